"""What SPARSEMM cannot serve is refused when the configuration is built, with one clear reason."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BartConfig,
    DeepseekV2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)

from sparsemm_vllm.budget.methods import METHODS
from support.configs import SIZES, build, save
from support.tiny import skewed_profile, text_config


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), text_config(), "LlamaForCausalLM")


@pytest.mark.parametrize("config", [{"sparsemm": {"budget": 64}}, {"another": 1}])
def test_settings_without_the_backend_are_not_silent(
    llama: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    lines: list[str] = []
    monkeypatch.setattr(logging.getLogger("vllm"), "warning", lambda line, *_: lines.append(line))
    EngineArgs(model=str(llama), dtype="float32", additional_config=config).create_engine_config()
    said = any("add --attention-backend SPARSEMM" in line for line in lines)
    assert said == ("sparsemm" in config)


def test_a_plain_configuration_is_accepted(llama: Path) -> None:
    profile = skewed_profile()
    config = build(llama, {"profile": profile.model_dump(mode="json"), "budget": 100})
    assert config.additional_config["sparsemm"]["profile"]["model_id"] == "tiny"


CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
BOTH = {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}
ENCODER_CACHE = {
    "encoder_cache_manager_cls": "vllm.v1.core.encoder_cache_manager.EncoderCacheManager"
}
MP = {"distributed_executor_backend": "mp"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kv_transfer_config": CONNECTOR}, "KV connectors"),
        ({"kv_offloading_size": 1.0}, "KV connectors and offloading"),
        ({"long_prefill_token_threshold": 20}, "--long-prefill-token-threshold 20"),
        ({"max_num_batched_tokens": 39, "max_num_seqs": 8}, "give at least 40"),
        ({"max_num_scheduled_tokens": 20}, "--max-num-scheduled-tokens 20"),
        ({"max_num_scheduled_tokens": 39, "max_num_seqs": 8}, "give at least 40, or none"),
        (
            {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["sliding_window", "1"]},
            "--kv-cache-dtype-skip-layers names single layers",
        ),
        ({"disable_chunked_mm_input": True}, "drop --disable-chunked-mm-input"),
        ({"runner": "pooling"}, "only generation"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "drop --scheduler-cls"),
        ({"ec_manager_config": ENCODER_CACHE}, "drop encoder_cache_manager_cls"),
        ({"tensor_parallel_size": 8} | MP, "4 KV heads cannot be divided among 8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options(llama: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        build(llama, **options)
    assert "SPARSEMM" in str(refusal.value)


def test_a_window_of_one_token_needs_chunks_of_two(llama: Path) -> None:
    """vLLM runs a chunk of one token as a decode, in which nothing is pruned."""
    with pytest.raises(ValueError, match="a window of 1 tokens needs a chunk of at least 2"):
        build(llama, {"window": 1}, long_prefill_token_threshold=1)
    build(llama, {"window": 1}, long_prefill_token_threshold=2)
    with pytest.raises(ValueError, match=r"--max-num-batched-tokens 9 .* give at least 10"):
        build(llama, {"window": 1}, max_num_batched_tokens=9, max_num_seqs=8)


@pytest.mark.parametrize(
    "option",
    [
        {"mm_encoder_only": True},
        {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_producer"}},
    ],
    ids=lambda option: next(iter(option)),
)
def test_instances_that_only_encode(model: Path, option: dict[str, Any]) -> None:
    build(model, ec_transfer_config=BOTH)
    with pytest.raises(ValueError, match=r"SPARSEMM cannot .*: an instance that only encodes"):
        build(model, **option)


def test_v1_model_runner(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The variable itself is read once, and an engine in this process may have read it.
    monkeypatch.setattr("vllm.envs.VLLM_USE_V2_MODEL_RUNNER", False, raising=False)
    with pytest.raises(ValueError, match="V2 model runner"):
        build(llama)


def test_draft_model(llama: Path) -> None:
    draft = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match="draft models keep a KV cache of their own"):
        build(llama, speculative_config=draft)


def test_ngram_speculation_is_accepted(llama: Path) -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    build(llama, speculative_config=ngram)


@pytest.mark.parametrize("sizes", [{"decode_context_parallel_size": 2}])
def test_context_parallelism(llama: Path, sizes: dict[str, int]) -> None:
    from vllm.config import ParallelConfig

    from sparsemm_vllm.budget.settings import Settings
    from sparsemm_vllm.engine.frontend.startup import unsupported

    config = build(llama)
    config.parallel_config = ParallelConfig(tensor_parallel_size=2, **sizes)
    (reason,) = unsupported(config, Settings())
    assert "context parallelism" in reason


def test_a_profile_of_another_configuration(llama: Path) -> None:
    """Both hashes are named; a profile that does not know its model's goes with any."""
    from transformers import AutoConfig

    from sparsemm_vllm.budget.config_hash import config_hash

    mine = config_hash(AutoConfig.from_pretrained(llama))
    profile = skewed_profile().model_dump(mode="json")
    build(llama, {"profile": profile})
    build(llama, {"profile": profile | {"config_hash": mine}})
    with pytest.raises(ValueError, match=f"hash abc; this model's is {mine}"):
        build(llama, {"profile": profile | {"config_hash": "abc"}})


WHOLE = {"record_attention": 64, "method": "full"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"enforce_eager": False}, "CUDA graphs replay steps"),
        ({"enable_prefix_caching": True}, "cached queries are not computed"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "drafts are no tokens of the answer",
        ),
    ],
)
def test_recording_attention(llama: Path, options: dict[str, Any], reason: str) -> None:
    plain = {"enforce_eager": True, "enable_prefix_caching": False}
    build(llama, WHOLE, **plain)
    with pytest.raises(ValueError, match=f"cannot record attention: {reason}"):
        build(llama, WHOLE, **plain | options)


MODELS = {
    "sliding window only": (
        MistralConfig(**SIZES, sliding_window=256),
        "MistralForCausalLM",
        "every layer has a sliding window",
    ),
    "many query heads on one KV head": (
        LlamaConfig(
            **SIZES | {"hidden_size": 288, "num_attention_heads": 72, "num_key_value_heads": 1}
        ),
        "LlamaForCausalLM",
        "72 query heads share a KV head, the decode kernel packs at most 32",
    ),
    "MLA": (
        DeepseekV2Config(
            **SIZES | {"head_dim": 16, "num_key_value_heads": 4},
            kv_lora_rank=32,
            q_lora_rank=None,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=16,
            n_routed_experts=4,
            first_k_dense_replace=4,
        ),
        "DeepseekV2ForCausalLM",
        "MLA",
    ),
    "state space": (
        MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2),
        "MambaForCausalLM",
        "state-space",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, tmp_path: Path) -> None:
    config, architecture, reason = MODELS[name]
    model = save(tmp_path, config, architecture)
    with pytest.raises(ValueError, match=reason):
        build(model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_16_bit_caches_of_another_type(llama: Path, dtype: str) -> None:
    """vLLM 0.33 refuses them before we could, 0.32 does not."""
    from sparsemm_vllm.budget.settings import Settings
    from sparsemm_vllm.engine.frontend.startup import unsupported

    config = build(llama, dtype=dtype)
    for cache in ("float16", "bfloat16"):
        config.cache_config.cache_dtype = cache
        reasons = unsupported(config, Settings())
        if cache == dtype:
            assert reasons == []
            build(llama, dtype=dtype, kv_cache_dtype=cache)
            continue
        (reason,) = reasons
        assert reason.startswith("a KV cache of 16 bits must have the type of the queries")
        with pytest.raises(ValueError, match=r"incompatible with dtype|must have the type"):
            build(llama, dtype=dtype, kv_cache_dtype=cache)


def test_mixed_sliding_window_prunes_the_full_layers(tmp_path: Path) -> None:
    from sparsemm_vllm.budget.settings import Settings
    from sparsemm_vllm.engine.config import build_layout, pruned_layers

    vllm_config = build(gemma(tmp_path, ["sliding_attention", "full_attention"] * 2))
    assert pruned_layers(vllm_config.model_config) == [1, 3]
    assert len(build_layout(vllm_config, Settings(profile="none")).capacities) == 2


def gemma(folder: Path, kinds: list[str]) -> Path:
    """A Gemma 3 with these kinds of layers."""
    config = Gemma3TextConfig(**SIZES, sliding_window=64, layer_types=kinds)
    return save(folder, config, "Gemma3ForCausalLM")


def test_mixed_attention_needs_a_group_for_each_kind(tmp_path: Path) -> None:
    model = gemma(tmp_path, ["sliding_attention", "full_attention"] * 2)
    with pytest.raises(ValueError, match="drop --disable-hybrid-kv-cache-manager"):
        build(model, disable_hybrid_kv_cache_manager=True)


@pytest.mark.parametrize("interval", [16, None])
def test_generated_tokens_stay_out_of_the_cache_of_sliding_layers(
    tmp_path: Path, interval: int | None
) -> None:
    model = gemma(tmp_path, ["sliding_attention", "full_attention"] * 2)
    with pytest.raises(ValueError, match="--prefix-cache-retention-interval lets sliding-window"):
        build(model, prefix_cache_retention_interval=interval)
    build(gemma(tmp_path, ["full_attention"] * 4), prefix_cache_retention_interval=None)


def test_a_pipeline_stage_without_layers_to_prune(tmp_path: Path) -> None:
    model = gemma(tmp_path, ["sliding_attention"] * 2 + ["full_attention"] * 2)
    with pytest.raises(ValueError, match="pipeline stage 0 has no layer that SPARSEMM can prune"):
        build(model, pipeline_parallel_size=2, **MP)


def test_what_takes_hardware_that_is_not_here(llama: Path) -> None:
    """vLLM refuses these on the CPU before we could."""
    from sparsemm_vllm.budget.settings import Settings
    from sparsemm_vllm.engine.frontend.startup import unsupported

    config = build(llama)
    config.parallel_config.enable_dbo = True
    assert any("dual-batch overlap" in reason for reason in unsupported(config, Settings()))
    config.parallel_config.enable_dbo = False
    config.model_config.model_arch_config.rswa_window = 64
    (reason,) = unsupported(config, Settings())
    assert "reference sliding window attention" in reason


def test_encoder_decoder(tmp_path: Path, llama: Path) -> None:
    """vLLM has no encoder-decoder text model any more; what it says of one is checked instead."""
    from sparsemm_vllm.budget.settings import Settings
    from sparsemm_vllm.engine.frontend.startup import unsupported

    config = build(llama)
    config.model_config.hf_config = BartConfig(is_encoder_decoder=True)
    config.model_config.__dict__.pop("is_encoder_decoder", None)
    assert any("encoder-decoder" in reason for reason in unsupported(config, Settings()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bugdet": 100}, "unknown sparsemm setting 'bugdet'; did you mean 'budget'?"),
        ({"method": "snapvk"}, "unknown method 'snapvk'; did you mean 'snapkv'?"),
        ({"budget": 32}, "must be larger than window"),
        ({"window": 0}, "window"),
        ({"profile": "no-such-profile"}, "neither a file nor a bundled profile"),
        ({"profile": skewed_profile(layers=3).model_dump(mode="json")}, "has 3 layers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings(llama: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(llama, settings)


def test_profile_is_read_once(llama: Path, tmp_path: Path) -> None:
    """Later changes of the file must not reach a running server's workers."""
    from sparsemm_vllm.budget.settings import Settings
    from sparsemm_vllm.engine.config import build_layout

    file = tmp_path / "profile.json"
    file.write_text(json.dumps(skewed_profile().model_dump(mode="json")))
    config = build(llama, {"profile": str(file)})
    before = build_layout(config, Settings.from_additional_config(config.additional_config))
    file.write_text("{")
    after = build_layout(config, Settings.from_additional_config(config.additional_config))
    assert before == after
    assert len({c for layer in after.capacities for c in layer}) > 4, "the profile was not used"


def test_adakv_with_tensor_parallelism(llama: Path) -> None:
    with pytest.raises(ValueError, match="SPARSEMM: method adakv compares the scores of all heads"):
        build(llama, {"method": "adakv"}, tensor_parallel_size=2, **MP)
    build(llama, {"method": "random"}, tensor_parallel_size=2, **MP)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_layout(llama: Path, method: str) -> None:
    from sparsemm_vllm.budget.layout import CacheLayout
    from sparsemm_vllm.engine.config import Serving

    profile = skewed_profile()
    settings = {"method": method, "redistribute": True, "budget": 100}
    config = build(llama, settings | {"profile": profile.model_dump(mode="json")})
    layout = Serving.of(config).layout
    assert layout == CacheLayout.from_scores(
        profile.tensor(),
        profile.num_kv_heads,
        100,
        method=method,
        redistribute=True,
        largest_budget=200,
    )


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"sparsemm"}))
def test_methods_that_know_no_heads_need_no_profile(
    llama: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsemm_vllm.engine.frontend import startup as support

    warnings: list[str] = []
    monkeypatch.setattr(support, "find_profile", lambda *_: pytest.fail("looks for a profile"))
    monkeypatch.setattr(support.logger, "warning", lambda text, *args: warnings.append(text % args))
    build(llama, {"method": method, "profile": "auto"})
    expected = ["SPARSEMM: method full: nothing is pruned"] if method == "full" else []
    assert warnings == expected
