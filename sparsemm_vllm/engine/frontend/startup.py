"""From a vLLM configuration to a cache layout, and what cannot be served, said at startup."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from sparsemm_vllm.budget.config_hash import config_hash
from sparsemm_vllm.budget.layout import smallest_last_chunk
from sparsemm_vllm.budget.profile import HeadProfile
from sparsemm_vllm.budget.settings import AUTO, NO_PROFILE, Settings
from sparsemm_vllm.engine.config import (
    UnsupportedError,
    build_layout,
    heads_per_kv_head,
    pruned_layers,
)
from sparsemm_vllm.engine.frontend.auto_profile import find_profile
from sparsemm_vllm.engine.worker.probes.masked_heads import check_masked_heads
from sparsemm_vllm.names import KEY
from sparsemm_vllm.triton_kernels.tile_sizes import decode_rows

logger = init_logger("vllm.sparsemm")  # vLLM configures its own loggers only

PLAIN_CACHES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
NGRAM_METHODS = ("ngram", "ngram_gpu")


def prepare_config(vllm_config: VllmConfig, engine_args: Any) -> None:
    """Check the configuration and put the profile's contents in place of its name.

    Every process then works with the same profile, wherever its file lies and whatever becomes of
    it.

    Args:
        vllm_config: configuration of the engine that will be built; changed in place.
        engine_args: arguments that the configuration was made from.

    Raises:
        SettingsError, ProfileError, UnsupportedError: with one line that says what to change.
    """
    settings = Settings.from_additional_config(vllm_config.additional_config)
    settings = settings.with_profile_loaded()
    if reasons := unsupported(vllm_config, settings):
        raise UnsupportedError("SPARSEMM cannot serve this configuration: " + "; ".join(reasons))
    if settings.profile == AUTO:
        # The other methods would not look at it.
        found = settings.method == "sparsemm" and find_profile(vllm_config, engine_args)
        settings = settings.model_copy(update={"profile": found or NO_PROFILE})
    layout = build_layout(vllm_config, settings)
    model = vllm_config.model_config
    check_masked_heads(
        settings,
        model.get_total_num_hidden_layers(),
        model.model_arch_config.total_num_attention_heads,
    )
    if isinstance(settings.profile, HeadProfile):
        settings.profile.check_config(config_hash(model.hf_config))
    if settings.record_attention:
        _check_recording(vllm_config)
    if not layout.rules.prunes:
        logger.warning("SPARSEMM: method %s: nothing is pruned", settings.method)
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        KEY: settings.model_dump(mode="json"),
    }


def _check_recording(vllm_config: VllmConfig) -> None:
    """Attention is recorded in steps that are planned one by one."""
    checks = [
        (not vllm_config.model_config.enforce_eager, "CUDA graphs replay steps; --enforce-eager"),
        (vllm_config.cache_config.enable_prefix_caching, "cached queries are not computed"),
        (vllm_config.speculative_config is not None, "drafts are no tokens of the answer"),
    ]
    if reasons := [reason for refused, reason in checks if refused]:
        raise UnsupportedError("SPARSEMM cannot record attention: " + "; ".join(reasons))


def unsupported(vllm_config: VllmConfig, settings: Settings) -> list[str]:
    """Why this configuration cannot be served; empty if it can."""
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    scheduler = vllm_config.scheduler_config
    cache = vllm_config.cache_config
    videos = model.multimodal_config
    speculative = vllm_config.speculative_config
    threshold = scheduler.long_prefill_token_threshold
    drafts = 0 if speculative is None else speculative.num_speculative_tokens or 0
    last_chunk = smallest_last_chunk(settings.window)
    step_tokens = last_chunk + scheduler.max_num_seqs * (1 + drafts)
    scheduled_tokens = scheduler.max_num_scheduled_tokens

    checks = [
        (
            not vllm_config.use_v2_model_runner,
            "it needs vLLM's V2 model runner, and this configuration selects V1 "
            "(VLLM_USE_V2_MODEL_RUNNER=0, or a feature that V2 lacks: vLLM's log names it)",
        ),
        (
            speculative is not None and speculative.method not in NGRAM_METHODS,
            "draft models keep a KV cache of their own, which is not pruned; use ngram "
            "speculation or none",
        ),
        (
            vllm_config.kv_transfer_config is not None or cache.kv_offloading_size is not None,
            "KV connectors and offloading move blocks by prompt position, pruned requests have "
            "none",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism spreads a head's tokens over ranks; use tensor or pipeline "
            "parallelism",
        ),
        (
            PLAIN_CACHES.get(cache.cache_dtype, model.dtype) != model.dtype,
            "a KV cache of 16 bits must have the type of the queries: leave it at auto",
        ),
        (
            is_quantized_kv_cache(cache.cache_dtype)
            and not {"sliding_window"}.issuperset(cache.kv_cache_dtype_skip_layers),
            "--kv-cache-dtype-skip-layers names single layers, and a head page lies in the cache "
            "of any layer that is pruned; give sliding_window or none",
        ),
        (parallel.use_ubatching, "dual-batch overlap builds attention metadata per microbatch"),
        (model.use_mla, "MLA keeps one latent vector for all heads, there is no head to prune"),
        (model.is_encoder_decoder, "encoder-decoder models have cross-attention caches"),
        (
            model.is_hybrid or model.is_attention_free,
            "models with state-space layers use another model state",
        ),
        (model.runner_type != "generate", "only generation decodes from a pruned cache"),
        (
            model.multimodal_config is not None and model.multimodal_config.mm_encoder_only,
            "an instance that only encodes pictures (EC role ec_producer, --mm-encoder-only) has "
            "no KV cache; start it without --attention-backend SPARSEMM",
        ),
        (model.rswa_window is not None, "reference sliding window attention frees its own blocks"),
        (
            not pruned_layers(model),
            "every layer has a sliding window, so no layer's cache grows with the prompt",
        ),
        (
            heads_per_kv_head(model) > (most := decode_rows(model.get_head_size(), model.dtype)),
            f"{heads_per_kv_head(model)} query heads share a KV head, the decode kernel packs at "
            f"most {most} of this size and type",
        ),
        (
            scheduler.disable_hybrid_kv_cache_manager
            and len(pruned_layers(model)) < model.get_total_num_hidden_layers(),
            "a model that mixes sliding-window and full attention needs the hybrid KV cache "
            "manager; drop --disable-hybrid-kv-cache-manager",
        ),
        (
            vllm_config.cache_config.prefix_cache_retention_interval != 0
            and len(pruned_layers(model)) < model.get_total_num_hidden_layers(),
            "--prefix-cache-retention-interval lets sliding-window layers cache what is generated "
            "after a pruned prompt, whose keys and values are not those of a prefill; leave it out",
        ),
        (
            scheduler.scheduler_cls is not None,
            "a scheduler of another class may end a prompt's chunks elsewhere than where the "
            "window begins; drop --scheduler-cls",
        ),
        (
            vllm_config.ec_manager_config.encoder_cache_manager_cls is not None,
            "an encoder cache of another class may have no room for all pictures in the window; "
            "drop encoder_cache_manager_cls from --ec-manager-config",
        ),
        (
            scheduler.disable_chunked_mm_input,
            "the chunk that ends a prompt holds its window, which may begin inside a picture; drop "
            "--disable-chunked-mm-input",
        ),
        (
            videos is not None and bool(videos.video_pruning_rate) and cache.enable_prefix_caching,
            "vLLM gives what follows a pruned video other positions if the video comes from the "
            "prefix cache: give --no-enable-prefix-caching with --video-pruning-rate",
        ),
        (
            0 < threshold < last_chunk,
            f"--long-prefill-token-threshold {threshold} is too small: a window of "
            f"{settings.window} tokens needs a chunk of at least {last_chunk}",
        ),
        (
            scheduler.max_num_batched_tokens < step_tokens,
            f"--max-num-batched-tokens {scheduler.max_num_batched_tokens} leaves no room for a "
            f"window of {settings.window} tokens beside {scheduler.max_num_seqs} decoding "
            f"requests; give at least {step_tokens}, or fewer --max-num-seqs",
        ),
        (
            scheduled_tokens is not None
            and scheduled_tokens < min(step_tokens, scheduler.max_num_batched_tokens),
            f"--max-num-scheduled-tokens {scheduled_tokens} leaves no room for a window of "
            f"{settings.window} tokens beside {scheduler.max_num_seqs} decoding requests; give at "
            f"least {step_tokens}, or none",
        ),
    ]
    return [reason for refused, reason in checks if refused]
