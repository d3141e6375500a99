"""The paragraph in the log, against counting by hand and the real engine."""

from types import SimpleNamespace
from typing import Any

import pytest

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.request import RequestLimits
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.engine.config import Serving
from sparsemm_vllm.engine.worker import model_state
from sparsemm_vllm.engine.worker.startup_log import describe_profile, describe_serving
from support.engines import HELLO, Engine, ask, settings
from support.tiny import make_llava, skewed_profile

# Two layers of two heads keep 100 + 4 + 0 + 12 tokens: 7 + 1 + 1 pages, 3 blocks of 4.
LAYOUT = CacheLayout(((100, 4), (0, 12)), window=8, base=29, tensor_parallel=2)


def config(longest: int, layers: int = 2, eager: bool = False, **values: Any) -> Any:
    return SimpleNamespace(
        additional_config={"sparsemm": {"profile": "none", "budget": 37, "window": 8} | values},
        cache_config=SimpleNamespace(enable_prefix_caching=False),
        model_config=SimpleNamespace(
            max_model_len=longest,
            enforce_eager=eager,
            get_total_num_hidden_layers=lambda: layers,
        ),
    )


def describe(config: Any, num_blocks: int) -> str:
    """The paragraph of a server with blocks of 16 tokens and 1,000 bytes."""
    settings = Settings.from_additional_config(config.additional_config)
    serving = Serving(settings, LAYOUT, RequestLimits.of(settings))
    return describe_serving(config, serving, num_blocks, block_size=16, layer_block_bytes=1000)


def test_bytes_and_requests() -> None:
    # Rank 0 of 2 has 7 + 0 pages in 2 layers: 4 blocks. 200 tokens fill 13 blocks, 12 are freed.
    text = describe(config(200), num_blocks=101)
    assert text == (
        "SPARSEMM: method sparsemm, no head profile (every head has the same budget), budget 37 "
        "tokens per KV head, window 8. A prompt of 200 tokens (max_model_len) holds 20 kB in 5 "
        "KV blocks after its prefill, dense 52 kB in 13; of 100 blocks, 17 such prompts fit at "
        "once, dense 7."
    )


def test_a_typical_prompt_and_the_longest() -> None:
    text = describe(config(8000), 1001)
    assert text.index("A prompt of 3,072 tokens holds") < text.index("8,000 tokens (max_model_len)")


def test_what_is_off_and_why() -> None:
    plain = describe(config(200), 101)
    off = {
        "min_prompt_tokens": 99,
        "mask_heads": [[0, 1]],
        "record_kept": "folder",
        "poison_freed": True,
    }
    made = config(200, 6, True, prune_when_free_below=0.25, **off)
    made.cache_config.enable_prefix_caching = True
    text = describe(made, 101)
    for note in (
        "4 of 6 layers stay dense: they see a window or a chunk.",
        "Prompts of less than 99 tokens stay dense: min_prompt_tokens.",
        "stay dense: prune_when_free_below 0.25.",
        "Prefix caching is off for answers to pruned prompts",
        "CUDA graphs are off: --enforce-eager.",
        "1 query heads are off: mask_heads.",
        "Every step waits for the device: record_kept.",
        "Every step is checked, and is slow: poison_freed.",
    ):
        assert note in text
        assert note not in plain


def test_what_the_rust_front_end_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, told in (("1", True), ("0", False)):
        monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", value)
        text = describe(config(200), 101)
        assert ("answers HTTP 400. /metrics has no sparsemm: metrics" in text) == told


def test_a_profile_is_told_from_another() -> None:
    profile = skewed_profile()
    texts = [
        describe_profile(Settings(profile=p))
        for p in (
            profile,
            profile.model_copy(update={"samples": 1400}),
            profile.model_copy(update={"scores": profile.scores[::-1]}),
        )
    ]
    assert texts[0].startswith("head profile of tiny (sha256 ")
    assert texts[0].endswith(", samples unknown)")
    assert texts[1].endswith(", 1,400 samples)")
    assert len({text.partition("sha256 ")[2][:12] for text in texts}) == 3


@pytest.mark.engine
def test_the_engine_says_it_once_and_means_it(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_llava(tmp_path_factory.mktemp("model"))
    said: list[str] = []
    monkeypatch.setattr(model_state.logger, "info", said.append)
    engine = Engine(model, settings(40))
    (text,) = said
    held = []

    def watch() -> None:
        held.append(sum(map(engine.held, engine.manager.req_to_blocks)))

    (answer,) = engine.generate(ask(HELLO, 1), max_tokens=3, watch=watch)
    n = answer.prompt_tokens
    vllm_config = engine.llm.llm_engine.vllm_config
    paragraph = describe_serving(
        vllm_config, Serving.of(vllm_config), engine.pool.num_gpu_blocks,
        engine.manager.block_size, engine.manager.kv_cache_spec.page_size_bytes,
    )  # fmt: skip
    assert text == paragraph
    assert f"of {engine.pool.num_gpu_blocks - 1:,} blocks" in text
    assert held[-2] == engine.layout.held_blocks(n, n + 2, 16)
