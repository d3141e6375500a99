"""SparseMM in transformers: dense prefill, then a mask per head while decoding.

Shares the scoring twin with the plugin, and nothing else: no blocks, no pages, no scheduler.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.triton_kernels.reference import kept_tokens, window_scores

NAME = "sparsemm_oracle"


class Oracle:
    """Greedy decoding with a KV cache pruned by `layout`, of a model with or without pictures.

    Layers that see a window or a chunk are not pruned; the layout has the others, in their order.

    Args:
        model: folder of the model; it is computed in float32.
        layout: budgets of its heads.

    Attributes:
        layout: budgets of its heads; may be replaced between two answers.
        seed: seed of `random` methods.
        kept: positions that (pruned layer, KV head) kept of the last prompt, without the window.
        regrets: log-probability that each token of the last answer has less than the best one.
    """

    def __init__(self, model: Path, layout: CacheLayout) -> None:
        self.layout = layout
        self.seed = 0
        self.kept: dict[tuple[int, int], torch.Tensor] = {}
        self.regrets: list[float] = []
        self._visible: dict[int, torch.Tensor] = {}
        self._prompt_tokens = self._tokens = 0
        AttentionInterface.register(NAME, self._attend)
        config = AutoConfig.from_pretrained(model)
        types = getattr(config.get_text_config(), "layer_types", None)
        self._pruned = [i for i, kind in enumerate(types or []) if kind == "full_attention"]
        if hasattr(config, "vision_config"):
            attention: Any = {"text_config": NAME, "vision_config": "eager"}
            self.processor = AutoProcessor.from_pretrained(model)
            auto: Any = AutoModelForImageTextToText
        else:
            attention, auto = NAME, AutoModelForCausalLM
            self.processor = AutoTokenizer.from_pretrained(model)
        self.model = auto.from_pretrained(model, dtype=torch.float32, attn_implementation=attention)

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        layer, n = module.layer_idx, self._prompt_tokens
        Q, T = query.shape[2], key.shape[2]
        Hkv, G = key.shape[1], query.shape[1] // key.shape[1]
        causal = torch.ones(Q, T, dtype=torch.bool).tril(T - Q)
        visible = causal.expand(Hkv, -1, -1).clone()
        if sliding_window is not None:
            visible &= causal.triu(T - Q - sliding_window + 1)
        elif self._pruned and layer not in self._pruned:
            chunk = (
                torch.arange(self._tokens - T, self._tokens) // module.config.attention_chunk_size
            )
            visible &= chunk[T - Q :, None] == chunk
        elif n == T == Q and self.layout.is_pruned(n):
            # The twin scales by 1 / sqrt(D), not every model does.
            self._prune(layer, query[0] * scaling * query.shape[3] ** 0.5, key[0])
        elif layer in self._visible:
            visible[:, :, :n] &= self._visible[layer][:, None]
        logits = query[0].unflatten(0, (Hkv, G)) @ key[0][:, None].transpose(-1, -2) * scaling
        weights = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        out = (weights @ value[0][:, None]).flatten(0, 1)
        return out.transpose(0, 1)[None], None

    def _prune(self, layer: int, query: torch.Tensor, key: torch.Tensor) -> None:
        (Hkv, n, _), W, rules = key.shape, self.layout.window, self.layout.rules
        index = self._pruned.index(layer) if self._pruned else layer
        scores = window_scores(query[:, n - W :], key, self.layout.pool_kernel)
        if rules.token_scores is not None:
            scores = rules.token_scores(self.seed, index, range(Hkv), n - W)
        visible = torch.zeros(Hkv, n, dtype=torch.bool)
        visible[:, n - W :] = True
        capacities = torch.from_numpy(self.layout.kept_tokens(n)[index])
        if rules.split is not None:
            capacities = rules.split(scores, self.layout.base)
        for head, positions in enumerate(kept_tokens(scores, capacities)):
            visible[head, positions] = True
            self.kept[index, head] = positions
        self._visible[layer] = visible

    @torch.no_grad()
    def generate(
        self,
        text: str,
        images: list[Any],
        max_tokens: int,
        forced: Sequence[int] | None = None,
        **options: Any,
    ) -> tuple[list[int], list[float]]:
        """Answer a prompt.

        Args:
            text: prompt, with its ``<image>`` or the like.
            images: pictures of the prompt.
            max_tokens: number of tokens to generate.
            forced: tokens to take in place of the best ones.
            options: options of the processor.

        Returns:
            The tokens and their log-probabilities.
        """
        # The tokenizer adds no special tokens and the prompt brings its own <s>.
        pictures = {"images": images} if images else {}
        inputs = self.processor(text=text, **pictures, **options, return_tensors="pt")
        if not images and not options:
            inputs = {"input_ids": torch.as_tensor(inputs["input_ids"]).view(1, -1)}
        self._prompt_tokens = inputs["input_ids"].shape[1]
        self._visible.clear()
        self.kept.clear()
        self.regrets = []
        tokens, logprobs, cache = [], [], None
        for step in range(max_tokens):
            self._tokens = self._prompt_tokens + step
            output = self.model(**inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            scores = output.logits[0, -1].log_softmax(-1)
            token = int(scores.argmax()) if forced is None else forced[step]
            tokens.append(token)
            logprobs.append(float(scores[token]))
            self.regrets.append(float(scores.max() - scores[token]))
            inputs = {"input_ids": torch.tensor([[token]])}
        return tokens, logprobs
