"""Chats in the formats that the models were trained with: pictures first, then the text."""

# A message's pictures, or its text, whether its content is a list of parts or plain text.
_PARTS = """
{%- macro media(content, kind, token) -%}
{%- if content is not string -%}
{%- for part in content if part['type'] == kind %}{{ token }}{% endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro text(content) -%}
{%- if content is string %}{{ content }}{% else -%}
{%- for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

VICUNA = (
    _PARTS
    + """
{%- for message in messages -%}
{%- set images = media(message['content'], 'image', '<image>\n') -%}
{%- if message['role'] == 'user' -%}
{{ 'USER: ' + images + text(message['content']) + ' ' }}
{%- elif message['role'] == 'assistant' -%}
{{ 'ASSISTANT: ' + text(message['content']) + '</s>' }}
{%- else -%}
{{ text(message['content']) + ' ' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif -%}
"""
)

MISTRAL = (
    _PARTS
    + """
{%- for message in messages -%}
{%- set images = media(message['content'], 'image', '<image>\n') -%}
{%- if message['role'] == 'user' -%}
{{ '[INST] ' + images + text(message['content']) + ' [/INST]' }}
{%- elif message['role'] == 'assistant' -%}
{{ ' ' + text(message['content']) + '</s>' }}
{%- else -%}
{{ '<<SYS>>\n' + text(message['content']) + '\n<</SYS>>\n\n' }}
{%- endif -%}
{%- endfor -%}
"""
)

QWEN = (
    _PARTS
    + """
{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{{- media(content, 'image', '<|vision_start|><|image_pad|><|vision_end|>') }}
{{- media(content, 'video', '<|vision_start|><|video_pad|><|vision_end|>') }}
{{- text(content) + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""
)
