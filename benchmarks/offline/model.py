"""A LLaVA whose prompts are computed once and then decoded with any KV heads pruned, in torch.

Nothing is evicted: a mask per layer, KV head and prompt token says what a pruned cache would hold.
Prompts are padded on the left, so a token's position is its column; rotary embeddings depend on
differences only.

Sizes: N prompts, n columns (the longest prompt), t new tokens a prompt; L, Hq, Hkv, D, W as ever.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_vlm.answers import Reader
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from sparsemm_vllm.data.pictures import Sample
from sparsemm_vllm.triton_kernels.reference import window_scores

ROWS = 25  # prompts computed at a time
TOGETHER = 100  # prompts decoded at a time
SPARE = 8  # tokens that an answer may be longer than the longest likely one


@dataclass
class Prompts:
    """What prompts leave behind: lists of `L` tensors, and what selection needs.

    Attributes:
        keys: keys of each layer, position-encoded, ``[N, Hkv, n, D]`` each; `values` alike.
        scores: scores of the tokens before the window, ``[N][L]`` of ``[Hkv, length - W]``.
        lengths: number of tokens of each prompt; its columns are the last of the `n`.
        logits: logits that predict the first token of the answer, ``[N, vocabulary]``.
        window: window in tokens, `W`.
    """

    keys: list[Tensor]
    values: list[Tensor]
    scores: list[list[Tensor]]
    lengths: list[int]
    logits: Tensor
    window: int

    @property
    def columns(self) -> int:
        return self.keys[0].shape[2]

    def everything(self) -> Tensor:
        """The mask of a dense cache, bool ``[L, N, Hkv, n]``."""
        N, Hkv, n, _ = self.keys[0].shape
        first = n - torch.tensor(self.lengths)
        shown = torch.arange(n) >= first[:, None]
        return shown[None, :, None].expand(len(self.keys), N, Hkv, n).clone()


class OfflineModel:
    """A checkpoint that answers from masked caches; greedy, float32.

    Args:
        folder: folder of the checkpoint, a LLaVA with a Llama inside.
        window: observation window in tokens, `W`.
    """

    def __init__(self, folder: Path, window: int) -> None:
        AttentionInterface.register("offline", self._attend)
        self.reader = Reader(
            folder, torch.float32, {"text_config": "offline", "vision_config": "sdpa"}
        )
        self.model = self.reader.model
        text = self.model.config.text_config
        self.L, self.Hq = text.num_hidden_layers, text.num_attention_heads
        self.Hkv, self.D = text.num_key_value_heads, text.head_dim
        self.window = window
        self.silenced = torch.zeros(self.L, self.Hq, dtype=torch.bool)
        self._prefill: _Prefill | None = None
        self._step: _Step | None = None

    @torch.no_grad()
    def prompts(self, samples: list[Sample], contexts: list[str] | None = None) -> Prompts:
        """Compute the samples' prompts; heads in `silenced` put out zeros."""
        inputs = self.reader.inputs(samples, contexts=contexts)
        self._prefill = _Prefill(self.window, [[] for _ in range(self.L)], [[] for _ in samples])
        logits = []
        for start in range(0, len(samples), ROWS):
            part = {name: tensor[start : start + ROWS] for name, tensor in inputs.items()}
            n = part["input_ids"].shape[1]
            self._prefill.lengths = part.pop("attention_mask").sum(1).tolist()
            self._prefill.first = start
            position_ids = torch.arange(n).expand(len(part["input_ids"]), -1)
            out = self.model(**part, position_ids=position_ids, use_cache=False, logits_to_keep=1)
            logits.append(out.logits[:, -1])
        done, self._prefill = self._prefill, None
        return Prompts(
            keys=[torch.cat([key for key, _ in layer]) for layer in done.cache],
            values=[torch.cat([value for _, value in layer]) for layer in done.cache],
            scores=done.scores,
            lengths=inputs["attention_mask"].sum(1).tolist(),
            logits=torch.cat(logits),
            window=self.window,
        )

    def answer(self, prompts: Prompts, shown: Tensor, likely: list[str]) -> list[str]:
        """Greedy answers while each head sees the prompt tokens ``shown [L, N, Hkv, n]``.

        Prompts whose ``likely`` answers have similar lengths are decoded together, and no answer
        gets more than `SPARE` tokens longer than the longest of them: it is faster.
        """
        order = sorted(range(len(likely)), key=lambda row: len(likely[row]))
        answers = [""] * len(order)
        for start in range(0, len(order), TOGETHER):
            rows = order[start : start + TOGETHER]
            most = len(likely[rows[-1]]) + SPARE  # one token a character
            for row, answer in zip(
                rows, self._answer(_Step(prompts, shown, rows), most), strict=True
            ):
                answers[row] = answer
        return answers

    def _answer(self, step: "_Step", most: int) -> list[str]:
        end = self.reader.processor.tokenizer.eos_token_id
        self._step = step
        tokens = [step.logits.argmax(-1)]
        unfinished = tokens[0] != end
        while unfinished.any() and len(tokens) < most:
            best = self._forward(tokens[-1][:, None])[:, -1].argmax(-1)
            tokens.append(torch.where(unfinished, best, end))
            unfinished &= best != end
        self._step = None
        return self.reader.processor.batch_decode(torch.stack(tokens, 1), skip_special_tokens=True)

    def answer_loss(self, prompts: Prompts, shown: Tensor, answers: list[str]) -> Tensor:
        """Mean negative log-likelihood of each true answer and its end, in nats a token, ``[N]``.

        The first token comes from the prompt itself and does not depend on the masks.
        """
        tokenizer = self.reader.processor.tokenizer
        batch = tokenizer(
            [f"{answer}</s>" for answer in answers],
            return_tensors="pt",
            padding=True,
            padding_side="right",
        )
        self._step = _Step(prompts, shown, list(range(len(answers))))
        later = self._forward(batch["input_ids"][:, :-1])
        self._step = None
        logits = torch.cat([prompts.logits[:, None], later], 1)
        each = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"], reduction="none")
        real = batch["attention_mask"]
        return (each * real).sum(1) / real.sum(1)

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> Tensor:
        assert self._step is not None
        start = self._step.start + self._step.new
        position_ids = torch.arange(start, start + ids.shape[1]).expand(len(ids), -1)
        out = self.model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
        self._step.new += ids.shape[1]
        return out

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        layer = module.layer_idx
        if self._prefill is not None:
            out = self._prefill.attend(layer, query, key, value, scaling)
        elif self._step is not None:
            out = self._step.attend(layer, query, key, value, scaling)
        else:
            raise ValueError("the model is called by prompts, answer and answer_loss only")
        out = out.masked_fill(self.silenced[layer][None, :, None, None], 0.0)
        return out.transpose(1, 2).contiguous(), None


@dataclass
class _Prefill:
    """Dense causal attention that keeps keys, values and scores."""

    window: int
    cache: list[list[tuple[Tensor, Tensor]]]
    scores: list[list[Tensor]]
    lengths: list[int] | None = None
    first: int = 0

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        assert self.lengths is not None
        n, W = key.shape[2], self.window
        self.cache[layer].append((key, value))
        for row, length in enumerate(self.lengths):
            scores = window_scores(query[row, :, n - W :], key[row, :, n - length :], scale=scaling)
            self.scores[self.first + row].append(scores)
        column = torch.arange(n)
        real = column >= n - torch.tensor(self.lengths)[:, None]
        seen = (column[:, None] >= column) & real[:, None]
        seen |= torch.eye(n, dtype=torch.bool)  # padding sees itself: an empty row is NaN
        groups = query.shape[1] // key.shape[1]
        return F.scaled_dot_product_attention(
            query,
            key.repeat_interleave(groups, 1),
            value.repeat_interleave(groups, 1),
            attn_mask=seen[:, None],
            scale=scaling,
        )


class _Step:
    """Attention of new tokens: the shown part of the prompt, and the new tokens so far.

    Args:
        prompts: computed prompts.
        shown: mask of what each head sees of all of them, ``[L, N, Hkv, n]``.
        rows: indices of the prompts that are decoded, B of the N.
    """

    def __init__(self, prompts: Prompts, shown: Tensor, rows: list[int]) -> None:
        self.logits = prompts.logits[rows]
        self.start = prompts.columns
        self.new = 0
        L = len(prompts.keys)
        self.prompt = [
            _shown_part(prompts.keys[layer][rows], prompts.values[layer][rows], shown[layer, rows])
            for layer in range(L)
        ]
        self.keys: list[Tensor | None] = [None] * L
        self.values: list[Tensor | None] = [None] * L

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        B, Hq, t, D = query.shape
        Hkv = key.shape[1]
        key, value = self._append(layer, key, value)
        # The rows of a KV head: its group's query heads, t tokens each.
        stacked = (query * scaling).reshape(B, Hkv, -1, D)
        prompt_keys, prompt_values, hidden = self.prompt[layer]
        old = stacked @ prompt_keys + hidden
        new = stacked @ key.transpose(2, 3)
        ahead = torch.ones(t, key.shape[2], dtype=torch.bool).triu(key.shape[2] - t + 1)
        new.masked_fill_(ahead.repeat(Hq // Hkv, 1), -torch.inf)
        weights = torch.cat([old, new], -1).softmax(-1)
        m = old.shape[-1]
        out = weights[..., :m] @ prompt_values + weights[..., m:] @ value
        return out.reshape(B, Hq, t, D)

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer], self.values[layer]
        if keys is not None and values is not None:
            key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        self.keys[layer], self.values[layer] = key, value
        return key, value


def _shown_part(key: Tensor, value: Tensor, shown: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What heads see of a layer, moved together to the m columns that the fullest head needs.

    Keys ``[B, Hkv, D, m]``, values ``[B, Hkv, m, D]``, and what to add to the logits,
    ``[B, Hkv, 1, m]``: minus infinity where a head has fewer tokens.
    """
    counts = shown.sum(-1, keepdim=True)
    m = int(counts.max())
    columns = shown.byte().argsort(dim=-1, descending=True, stable=True)[..., :m, None]
    columns = columns.expand(-1, -1, -1, key.shape[-1])
    unused = torch.arange(m) >= counts
    hidden = torch.zeros(unused.shape).masked_fill_(unused, -torch.inf)[:, :, None]
    keys = key.gather(2, columns).transpose(2, 3).contiguous()
    return keys, value.gather(2, columns), hidden
