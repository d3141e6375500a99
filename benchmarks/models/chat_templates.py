"""Chats in the formats that the models were trained with: pictures first, then the text.

They spell out their loops over a message's content, since vLLM looks for those to tell that a
template takes lists of parts.
"""

_CONTENT = """
{%- if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for part in message['content'] if part['type'] == 'image' %}{{ image }}{% endfor -%}
{%- for part in message['content'] if part['type'] == 'video' %}{{ video }}{% endfor -%}
{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor -%}
{%- endif -%}
"""

_VICUNA = r"""
{%- set image, video = '<image>\n', '' -%}
{%- for message in messages -%}
{%- if message['role'] != 'system' %}{{ message['role'] | upper + ': ' }}{% endif -%}
CONTENT
{{- '</s>' if message['role'] == 'assistant' else ' ' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif -%}
"""

_MISTRAL = r"""
{%- set image, video = '<image>\n', '' -%}
{%- set start = {'user': '[INST] ', 'assistant': ' ', 'system': '<<SYS>>\n'} -%}
{%- set end = {'user': ' [/INST]', 'assistant': '</s>', 'system': '\n<</SYS>>\n\n'} -%}
{%- for message in messages -%}
{{- start[message['role']] }}
CONTENT
{{- end[message['role']] }}
{%- endfor -%}
"""

_QWEN = r"""
{%- set image = '<|vision_start|><|image_pad|><|vision_end|>' -%}
{%- set video = '<|vision_start|><|video_pad|><|vision_end|>' -%}
{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' }}
CONTENT
{{- '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""

VICUNA, MISTRAL, QWEN = (t.replace("CONTENT", _CONTENT) for t in (_VICUNA, _MISTRAL, _QWEN))
