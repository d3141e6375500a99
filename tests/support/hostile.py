"""Requests that nobody should send."""

import base64
import io
import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from support.tiny import picture

TEXT = "a prompt without a picture that is much longer than what is kept of it"
MAX_MODEL_LEN = 512
VOCABULARY = 128
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HUGE = 2**70


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        path: path of the URL.
        body: JSON value, or the bytes to send in its place.
        headers: headers beside the content's type.
    """

    path: str
    body: Any
    headers: dict[str, bytes] = field(default_factory=dict)

    def content(self) -> bytes:
        """The body's bytes; NaN, infinities and lone surrogates are sent as Python writes them."""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()

    def __repr__(self) -> str:
        text = self.content().decode(errors="replace")
        shown = text if len(text) < 600 else f"{text[:300]} ... {len(text)} characters"
        headers = {name: value[:60] for name, value in self.headers.items()}
        return f"{self.path} {headers or ''} {shown}"


# Values of any type

SCALARS = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, HUGE, -HUGE, 0.5, 1e308, 5e-324, 9.0,
    float("nan"), float("inf"), -float("inf"), "", "0", "many", "\0", "\ud800",
    "é\u202e\n", "x" * 9000,
]  # fmt: skip
scalars = st.sampled_from(SCALARS)
values = scalars | st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
OURS = (
    "sparsemm", "sparsemm_budget", "sparsemm_record", "sparsemm_knockout", "sparsemm_left_dense",
    "sparsemm_bugdet", "SPARSEMM", "Sparsemm_Budget", "sparsemm\0", "sparsemm\u202e\n",
    "sparsemm" * 9000,
)  # fmt: skip
asked = st.dictionaries(
    st.sampled_from(OURS) | st.text(max_size=8),
    values | st.sampled_from([9, 10, 40, 79, 80, 81, 8, [0, 1], [0, 0, 9], [[0, 1]]]),
    max_size=4,
)


# Pictures


def _png(width: int, height: int, bits: int = 8, kind: int = 0) -> bytes:
    """A black picture of a size that need not be in memory."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    row = b"\0" + bytes(-(-width * bits // 8))
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _url(content: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def picture_urls() -> dict[str, str]:
    """URLs of pictures that a server may or may not be able to read, by what they are."""
    good = _saved(picture(1), "PNG")
    frames = [picture(seed) for seed in range(3)]
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='9' height='9'/></svg>"
    return {
        "good": _url(good),
        "no bytes": _url(b""),
        "cut off": _url(good[: len(good) // 2]),
        "only a signature": _url(good[:8]),
        "one pixel": _url(_png(1, 1)),
        "a line": _url(_png(10_000, 1)),
        "a bomb": _url(_png(16_000, 16_000, bits=1)),
        "two bombs' warning": _url(_png(10_000, 10_000, bits=1)),
        "16 bits": _url(_png(56, 56, bits=16)),
        "one bit": _url(_png(56, 56, bits=1)),
        "wrong type": _url(good, "image/gif"),
        "no type": _url(good, ""),
        "text": _url(b"no picture at all", "text/plain"),
        "svg": _url(svg, "image/svg+xml"),
        "html": _url(b"<html>" * 100, "image/png"),
        "animated": _url(_saved(frames[0], "GIF", save_all=True, append_images=frames[1:])),
        "CMYK": _url(_saved(picture(1).convert("CMYK"), "JPEG"), "image/jpeg"),
        "palette": _url(_saved(picture(1).convert("P"), "PNG", transparency=0)),
        "not base64": "data:image/png;base64,@@@",
        "no data": "data:",
        "no URL": "nonsense",
        "nothing": "",
        "a file": "file:///etc/hostname",
        "another protocol": "gopher://127.0.0.1/x",
        "nobody listens": "http://127.0.0.1:9/x.png",
        "long": "data:image/png;base64," + "A" * 1_000_000,
    }


def chat(*urls: str, text: str = "what does it say?", **options: Any) -> dict[str, Any]:
    """A chat of one message with pictures."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": u}} for u in urls]
    parts.append({"type": "text", "text": text})
    message = {"role": "user", "content": parts}
    return {"model": "tiny", "messages": [message], "max_tokens": 4, "temperature": 0} | options


def completion(prompt: Any = TEXT, **options: Any) -> dict[str, Any]:
    """A plain prompt."""
    return {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0} | options


# Bodies: a good one with some fields changed

tokens = [5 + i % 90 for i in range(MAX_MODEL_LEN)]
# Each of them would end the engine, in a worker.
TOO_LONG: dict[str, Any] = {"allowed_token_ids": [5] * 1025, "bad_words": ["x" * 5000]}
COMMON: dict[str, list[Any]] = {
    "model": ["", "other", "x" * 10_000],
    "max_tokens": [0, 1, MAX_MODEL_LEN, MAX_MODEL_LEN + 1, 2**31, HUGE, -1, 1.5, "4"],
    "min_tokens": [4, 10**9, -1],
    "n": [0, 8, -1, 2**31, HUGE],
    "temperature": [-1, 1e-9, 1e308, float("nan"), float("inf")],
    "top_p": [0, 1e-9, -1, 2, float("nan")],
    "top_k": [-1, 0, 1, 10**9, -5, HUGE],
    "min_p": [0, 1, -1, 2],
    "seed": [2**63 - 1, 2**63, 2**64, -(2**63), -1, HUGE],
    "stop": ["", [""], ["x"] * 4, [f"stop {i}" for i in range(3000)], [1], "x" * 100_000],
    "stop_token_ids": [[2**40], [-1], [VOCABULARY], ["a"], list(range(VOCABULARY))],
    "logit_bias": [{"5": 100}, {"5": 1e9}, {"999999": 1}, {"-1": 1}, {"x": 1}, {"5": "a"}],
    "presence_penalty": [2, 3, -1e9, float("nan")],
    "frequency_penalty": [-2, 3, float("inf")],
    "repetition_penalty": [0, -1, 1e-9, 1e9, float("inf")],
    "allowed_token_ids": [[], [5], [VOCABULARY], [-1], [HUGE], TOO_LONG["allowed_token_ids"]],
    "bad_words": [[""], ["x" * 500], ["a"] * 100, "a", TOO_LONG["bad_words"]],
    "ignore_eos": [True, "x"],
    "priority": [1, -1, 2**31, HUGE, -HUGE, "x"],
    "cache_salt": ["", "salt", "x" * 100_000, 5],
    "request_id": ["", "twice", "a/b/../../c", "x" * 10_000, "\0\n", 5],
    "structured_outputs": [
        {"regex": "("}, {"regex": "a{1000000}"}, {"grammar": "((("}, {"json": "nope"}, {},
        {"json": {"type": 5}}, {"choice": []}, {"choice": ["a", "b"]}, {"choice": [""]},
        {"structural_tag": "x"}, {"regex": ""}, {"json": {"$ref": "#"}},
        {"regex": "[0-9]", "grammar": "x"},
    ],
    "response_format": [
        {"type": "json_object"}, {"type": "json_schema"}, {"type": "nothing"}, {},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}},
    ],
    "stream": [True, "x"],
    "stream_options": [{"include_usage": True}, {"x": 1}],
    "truncate_prompt_tokens": [1, 0, -1, -5, 10**9],
    "kv_transfer_params": [{"do_remote_prefill": True}, {"a": HUGE}, []],
    "return_token_ids": [True],
    "prompt_logprobs": [1, 0, -1, 10**6],
    "repetition_detection": [{}, {"max_pattern_size": -1}],
    "data_parallel_rank": [0, 7, -1],
    "lora_request": [{"a": 1}],
}  # fmt: skip
OF_COMPLETIONS: dict[str, list[Any]] = {
    "prompt": [
        "", [], [[]], ["", ""], "a", [5], [[5], [6, 7]], ["a", TEXT, "b"], [0], [VOCABULARY - 1],
        [VOCABULARY], [-1], [2**31], [HUGE], [1.5], [None], {"a": 1}, "\0", "\ud800", "é" * 300,
        tokens, tokens[1:], [*tokens, 5], "x" * 100_000, [5, "a"], [True, False], [[[5]]],
    ],
    "logprobs": [0, 5, 21, -1, 10**6, True],
    "echo": [True, "x"],
    "suffix": ["x"],
    "best_of": [2, 0],
    "prompt_embeds": ["AAAA", [], "x" * 1000],
}  # fmt: skip
OF_CHATS: dict[str, list[Any]] = {
    "messages": [
        [], [{}], "hello", [{"role": "user"}], [{"role": "nobody", "content": "x"}], [None],
        [{"role": "user", "content": None}], [{"role": "user", "content": ""}],
        [{"role": "user", "content": []}], [{"role": "user", "content": [{}]}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": [{"type": "nothing", "nothing": 1}]}],
        [{"role": "user", "content": "<image>"}], [{"role": "user", "content": "<image>" * 9}],
        [{"role": "user", "content": "x"}] * 500, [{"role": "user", "content": "x" * 600}],
        [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:,"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
    ],
    "logprobs": [True, "x", 5],
    "top_logprobs": [0, 20, 21, -1],
    "max_completion_tokens": [0, 1, -1, HUGE],
    "tools": [
        [], [{}], [{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}],
    ],
    "tool_choice": ["required", "auto", {"type": "function", "function": {"name": "f"}}],
    "chat_template": ["{{ 1/0 }}", "{% for %}", "{{ messages }}"],
    "chat_template_kwargs": [{"a": HUGE}, {"messages": []}, []],
    "mm_processor_kwargs": [{"size": 5}, {"x": 1}, []],
    "continue_final_message": [True],
    "add_generation_prompt": [True, "x"],
    "documents": [[{"a": "b"}], 5],
    "reasoning_effort": ["low", "x"],
    "thinking_token_budget": [0, -1, HUGE],
}  # fmt: skip


@st.composite
def bodies(draw: st.DrawFn, fields: dict[str, list[Any]], good: dict[str, Any]) -> dict[str, Any]:
    """A good body with one to three fields changed; half of the time one of them is ours."""
    body = dict(good)
    for name in draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3)):
        body[name] = draw(st.sampled_from(fields[name]) | values)
    if draw(st.booleans()):
        body["vllm_xargs"] = draw(asked | values)
    return body


REQUEST_IDS = st.sampled_from(
    [
        b"x" * 300,
        b"x" * 10_000,
        b"../../a/b",
        b"twice",
        "é".encode(),
        b"\xff\xfe",
        b" ",
        b"%0d%0a",
        b"a b\tc",
    ]
)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """One hostile request."""
    headers = {"x-request-id": draw(REQUEST_IDS)} if draw(st.integers(0, 4)) == 0 else {}
    kind = draw(st.integers(0, 9))
    if kind < 4:
        body = draw(bodies(COMMON | OF_COMPLETIONS, completion()))
        return Call(COMPLETIONS, body, headers)
    if kind < 7:
        urls = draw(st.lists(st.sampled_from(sorted(URLS)), max_size=5))
        body = draw(bodies(COMMON | OF_CHATS, chat(*[URLS[name] for name in urls])))
        return Call(CHAT, body, headers)
    if kind < 9:
        path, good = draw(st.sampled_from(OTHERS))
        return Call(
            path, good | draw(st.dictionaries(st.sampled_from(sorted(good)), values)), headers
        )
    return Call(
        draw(st.sampled_from([COMPLETIONS, CHAT])), draw(st.sampled_from(NOT_JSON)), headers
    )


URLS = {name: url for name, url in picture_urls().items() if len(url) < 100_000}
USER = {"role": "user", "content": "x"}
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("/tokenize", {"model": "tiny", "prompt": TEXT, "return_token_strs": True}),
    ("/tokenize", {"model": "tiny", "messages": [USER]}),
    ("/detokenize", {"model": "tiny", "tokens": [5, 6, 7]}),
    (
        "/v1/responses",
        {"model": "tiny", "input": "hello", "max_output_tokens": 4, "vllm_xargs": {}},
    ),
    (
        "/v1/messages",
        {"model": "tiny", "max_tokens": 4, "messages": [USER], "stop_sequences": []},
    ),
    ("/v1/embeddings", {"model": "tiny", "input": "x"}),
    ("/inference/v1/generate", {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 4}}),
]  # fmt: skip
NOT_JSON = [
    b"", b"{", b"null", b"[]", b"5", b'"x"', b"\xff\xfe\x00", b"{" * 5000, b'{"model": "tiny"',
    b'{"a":1,"a":2}', b"[" * 100_000, b'{"model":"tiny","prompt":' + b"9" * 5000 + b"}",
]  # fmt: skip
