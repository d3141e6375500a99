"""From vLLM's configuration to our settings and cache layout, in any process."""

from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.budget.profile import HeadProfile
from sparsemm_vllm.budget.request import RequestLimits
from sparsemm_vllm.budget.settings import NO_PROFILE, Settings
from sparsemm_vllm.errors import UserError
from sparsemm_vllm.names import NAME

_MADE = "_sparsemm_serving"  # attribute of a `VllmConfig`: what it was made of, and `Serving`


class UnsupportedError(UserError):
    """A configuration that SPARSEMM cannot serve; the message says what and why."""


def uses_sparsemm(vllm_config: VllmConfig) -> bool:
    """Whether any layer's backend is SPARSEMM."""
    attention = vllm_config.attention_config
    backends = [attention.backend, *attention.backend_per_kind.values()]
    return any(backend is not None and backend.name == NAME for backend in backends)


@dataclass(frozen=True)
class Serving:
    """What a server does, the same in all of its processes.

    Attributes:
        settings: settings of the server, with the head profile's contents.
        layout: cache layout of the whole model.
        limits: limits of what requests may ask for.
    """

    settings: Settings
    layout: CacheLayout
    limits: RequestLimits

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> "Serving":
        """What a configuration says that `prepare_config` has checked. Made once of each.

        Raises:
            ProfileError: for a profile of another architecture.
            UnsupportedError: if the heads do not divide among the ranks.
        """
        additional_config = vllm_config.additional_config
        made_of, serving = getattr(vllm_config, _MADE, (None, None))
        if serving is None or made_of is not additional_config:
            settings = Settings.from_additional_config(additional_config)
            layout = build_layout(vllm_config, settings)
            serving = cls(settings, layout, RequestLimits.of(settings))
            serving.remember(vllm_config)
        return serving

    def remember(self, vllm_config: VllmConfig) -> None:
        """Let `of` find this, as long as the configuration keeps its settings."""
        setattr(vllm_config, _MADE, (vllm_config.additional_config, self))


def heads_per_kv_head(model_config: Any) -> int:
    """Query heads that share a KV head, `G`."""
    query_heads = model_config.model_arch_config.total_num_attention_heads
    return query_heads // max(1, model_config.get_total_num_kv_heads())


def pruned_layers(model_config: Any) -> list[int]:
    """Indices of the layers whose cache is pruned: those that attend to the whole prompt."""
    total = model_config.get_total_num_hidden_layers()
    types = getattr(model_config.hf_text_config, "layer_types", None)
    if types:
        return [layer for layer in range(total) if types[layer] == "full_attention"]
    return [] if model_config.get_sliding_window() is not None else list(range(total))


def build_layout(vllm_config: VllmConfig, settings: Settings) -> CacheLayout:
    """The layout of the whole model, equal on all ranks and in the scheduler.

    Raises:
        ProfileError: for a profile of another architecture.
        UnsupportedError: if the heads do not divide among the ranks.
    """
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    layers = model.get_total_num_hidden_layers()
    query_heads = model.hf_text_config.num_attention_heads
    kv_heads = model.get_total_num_kv_heads()

    profile = settings.with_profile_loaded().profile
    if profile == NO_PROFILE:
        profile = HeadProfile.uniform(model.model, layers, query_heads, kv_heads)
    assert isinstance(profile, HeadProfile), "prepare_config has not run"
    profile.check_model(layers, query_heads, kv_heads)

    pruned = pruned_layers(model)
    stages = []
    for stage in range(parallel.pipeline_parallel_size):
        first, end = get_pp_indices(layers, stage, parallel.pipeline_parallel_size)
        stages.append((sum(x < first for x in pruned), sum(x < end for x in pruned)))
    try:
        return CacheLayout.from_settings(
            settings,
            profile.tensor()[pruned],
            kv_heads,
            stages=tuple(stages),
            tensor_parallel=parallel.tensor_parallel_size,
        )
    except ValueError as error:
        raise UnsupportedError(f"SPARSEMM: {error}") from None
