"""SparseMM in transformers: dense prefill, then a mask per head while decoding.

Shares the scoring twin with the plugin, and nothing else: no blocks, no pages, no scheduler.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AttentionInterface, LlavaForConditionalGeneration, LlavaProcessor

from sparsemm_vllm.layout import CacheLayout
from sparsemm_vllm.triton_kernels.reference import kept_tokens, window_scores


class Oracle:
    """Greedy decoding of a LLaVA with a KV cache pruned by `layout`."""

    def __init__(self, model: Path, layout: CacheLayout) -> None:
        self.layout = layout
        self.seed = 0
        self.kept: dict[tuple[int, int], torch.Tensor] = {}
        self._visible: dict[int, torch.Tensor] = {}
        self._prompt_tokens = 0
        AttentionInterface.register("sparsemm_oracle", self._attend)
        self.model = LlavaForConditionalGeneration.from_pretrained(
            model,
            dtype=torch.float32,
            attn_implementation={"text_config": "sparsemm_oracle", "vision_config": "eager"},
        )
        self.processor = LlavaProcessor.from_pretrained(model)

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        layer, n = module.layer_idx, self._prompt_tokens
        Q, T = query.shape[2], key.shape[2]
        Hkv, G = key.shape[1], query.shape[1] // key.shape[1]
        causal = torch.ones(Q, T, dtype=torch.bool).tril(T - Q)
        visible = causal.expand(Hkv, -1, -1).clone()
        if n == T == Q and self.layout.is_pruned(n):
            self._prune(layer, query[0], key[0])
        elif layer in self._visible:
            visible[:, :, :n] &= self._visible[layer][:, None]
        logits = query[0].unflatten(0, (Hkv, G)) @ key[0][:, None].transpose(-1, -2) * scaling
        weights = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        out = (weights @ value[0][:, None]).flatten(0, 1)
        return out.transpose(0, 1)[None], None

    def _prune(self, layer: int, query: torch.Tensor, key: torch.Tensor) -> None:
        (Hkv, n, _), W, rules = key.shape, self.layout.window, self.layout.rules
        scores = window_scores(query[:, n - W :], key, self.layout.pool_kernel)
        if rules.token_scores is not None:
            scores = rules.token_scores(self.seed, layer, range(Hkv), n - W)
        visible = torch.zeros(Hkv, n, dtype=torch.bool)
        visible[:, n - W :] = True
        capacities = torch.from_numpy(self.layout.kept_tokens(n)[layer])
        if rules.split is not None:
            capacities = rules.split(scores, self.layout.base)
        for head, positions in enumerate(kept_tokens(scores, capacities)):
            visible[head, positions] = True
            self.kept[layer, head] = positions
        self._visible[layer] = visible

    @torch.no_grad()
    def generate(
        self, text: str, images: list[Image.Image], max_tokens: int
    ) -> tuple[list[int], list[float]]:
        """Tokens and their log-probabilities."""
        # The tokenizer adds no special tokens and the prompt brings its own <s>.
        inputs = self.processor(text=text, images=images or None, return_tensors="pt")
        self._prompt_tokens = inputs["input_ids"].shape[1]
        self._visible.clear()
        self.kept.clear()
        tokens, logprobs, cache = [], [], None
        for _ in range(max_tokens):
            output = self.model(**inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            best = output.logits[0, -1].log_softmax(-1).max(-1)
            tokens.append(int(best.indices))
            logprobs.append(float(best.values))
            inputs = {"input_ids": best.indices[None, None]}
        return tokens, logprobs
