"""Causal scores: how much less likely the true answer is when a KV head keeps its window only.

Not of the paper: it measures what pruning costs, the visual score measures where a head looks.
vLLM is imported in functions: it takes seconds, and reads an environment that is set before.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsemm_vllm.data.pictures import Sample
from sparsemm_vllm.names import KNOCKOUT
from sparsemm_vllm.profiler.attention import Request, Scores, first_line, model_shape
from sparsemm_vllm.profiler.errors import ProfilerError
from sparsemm_vllm.profiler.modes import Mode, messages
from sparsemm_vllm.profiler.words import token_spans


class CausalScorer:
    """Scores samples in an engine that can knock heads out; see `open_engine`.

    Each sample is one prompt for each KV head and one with all of them, its true answer behind it.

    Args:
        llm: a `vllm.LLM`.
        mode: way in which samples become requests.
    """

    method = (
        "For every KV head, the rise of the true answer's negative log-likelihood a token when the "
        "answer's queries see, in that head, only the window of the prompt and what follows; the "
        "score is the mean over samples, not below 0, shared evenly by the head's query heads."
    )

    def __init__(self, llm: Any, mode: Mode) -> None:
        from vllm.v1.kv_cache_interface import is_quantized_kv_cache

        from sparsemm_vllm.engine.config import pruned_layers

        if is_quantized_kv_cache(llm.llm_engine.vllm_config.cache_config.cache_dtype):
            raise ProfilerError(
                "causal scores need a KV cache that is not quantised; leave out --kv-cache-dtype"
            )
        self._llm = llm
        self._mode = mode
        self._tokenizer = llm.get_tokenizer()
        self._layers = pruned_layers(llm.llm_engine.model_config)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`L`, `Hq` and `Hkv` of the model."""
        return model_shape(self._llm)

    def request(self, sample: Sample) -> Request:
        """What the engine will be asked; nothing of it is recorded."""
        return Request(sample, 0, 1)

    def score(self, requests: Sequence[Request]) -> Scores:
        """Ask all at once.

        Raises:
            ProfilerError: if a prompt is too long.
        """
        L, Hq, Hkv = self.shape
        samples = [request.sample for request in requests]
        whole = self._ask(samples, [None] * len(samples))
        starts = [self._answer_start(o, s) for o, s in zip(whole, samples, strict=True)]
        heads = [(layer, head) for layer in range(len(self._layers)) for head in range(Hkv)]
        asked = [i for i in range(len(samples)) if starts[i] < len(whole[i].prompt_token_ids)]
        outputs = self._ask(
            [samples[i] for i in asked for _ in heads],
            [[*head, starts[i]] for i in asked for head in heads],
        )
        rises = np.zeros((len(samples), L, Hkv))
        for row, output in enumerate(outputs):
            i, (layer, head) = asked[row // len(heads)], heads[row % len(heads)]
            dense = answer_loss(whole[i], starts[i])
            rises[i, self._layers[layer], head] = answer_loss(output, starts[i]) - dense
        tokens = [len(o.prompt_token_ids) - s for o, s in zip(whole, starts, strict=True)]
        hits = np.repeat(rises, Hq // Hkv, axis=2) / (Hq // Hkv)
        return Scores(hits.astype(np.float32), np.array(tokens))

    def _ask(self, samples: list[Sample], knockouts: Sequence[list[int] | None]) -> list[Any]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0,
                max_tokens=1,
                prompt_logprobs=0,
                extra_args={KNOCKOUT: knockout} if knockout else None,
            )
            for knockout in knockouts
        ]
        try:
            return self._llm.chat(
                [messages(sample, self._mode) for sample in samples],
                params,
                use_tqdm=False,
                add_generation_prompt=False,
                continue_final_message=True,
            )
        except ValueError as error:  # vLLM's word for prompts that it does not take
            raise ProfilerError(f"vLLM refuses a sample: {first_line(error)}") from error

    def _answer_start(self, output: Any, sample: Sample) -> int:
        """Position of the answer's first token; that behind the prompt if it is not found."""
        ids = output.prompt_token_ids
        tail = len(self._tokenizer.encode(sample.answer, add_special_tokens=False)) + 8
        text, spans = token_spans(self._tokenizer, ids[-tail:])
        answer = sample.answer.rstrip()
        if not text.rstrip().endswith(answer):
            return len(ids)
        begin = len(text.rstrip()) - len(answer)
        first = next(i for i, (_, end) in enumerate(spans) if end > begin)
        return len(ids) - len(spans) + first


def answer_loss(output: Any, start: int) -> float:
    """Negative log-likelihood of a prompt's tokens from `start` on, in nats a token."""
    ids = output.prompt_token_ids
    logprobs = [output.prompt_logprobs[i][ids[i]].logprob for i in range(start, len(ids))]
    return -sum(logprobs) / len(logprobs)
