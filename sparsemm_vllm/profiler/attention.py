"""Hits of attention on words: what a head's visual score is the mean of.

vLLM is imported in functions: it takes seconds, and reads an environment that is set before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsemm_vllm.data.pictures import Sample
from sparsemm_vllm.names import RECORD
from sparsemm_vllm.profiler.errors import ProfilerError
from sparsemm_vllm.profiler.modes import Mode, messages
from sparsemm_vllm.profiler.words import token_spans, words_of_tokens
from sparsemm_vllm.profiler.worker import gather_attention


@dataclass(frozen=True)
class Scores:
    """What was counted of some samples.

    Attributes:
        hits: sum of each sample's hits, float32 ``[samples, L, Hq]``.
        tokens: number of each sample's tokens that belong to a word, int64 ``[samples]``.
    """

    hits: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Request:
    """A sample as the engine is asked it.

    Attributes:
        sample: picture, question and true answer.
        queries: number of its prompt's queries that are recorded.
        max_tokens: number of tokens to generate.
    """

    sample: Sample
    queries: int
    max_tokens: int

    @property
    def rows(self) -> int:
        """Recorded queries, those of generated tokens included."""
        return self.queries + self.max_tokens - 1


class AttentionScorer:
    """Scores samples in an engine that records attention; see `open_engine`.

    Args:
        llm: a `vllm.LLM`.
        mode: way in which samples become requests.
    """

    method = (
        "For every token of an answer that belongs to a word of the picture, a query head whose "
        "largest attention weight, in the row that predicts the token, falls on an image token "
        "inside the word's box scores 1 / (image tokens in the box); the score is the mean over "
        "samples of the sum of hits."
    )

    def __init__(self, llm: Any, mode: Mode) -> None:
        from vllm.transformers_utils.processor import cached_processor_from_config

        self._llm = llm
        self._mode = mode
        self._model = llm.llm_engine.model_config
        self._tokenizer = llm.get_tokenizer()
        self._processor = cached_processor_from_config(self._model)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`L`, `Hq` and `Hkv` of the model."""
        return model_shape(self._llm)

    def request(self, sample: Sample) -> Request:
        """What the engine will be asked."""
        answer = len(self._tokenizer.encode(sample.answer, add_special_tokens=False))
        return Request(sample, self._mode.prompt_queries(answer), self._mode.max_tokens(answer))

    def score(self, requests: Sequence[Request]) -> Scores:
        """Ask all at once.

        Raises:
            ProfilerError: if a prompt is too long, or its image tokens are not where they should.
        """
        starts = np.cumsum([0, *(request.rows for request in requests)]).tolist()
        outputs = self._ask(requests, starts)
        L, Hq, _ = self.shape
        keys = gather_attention(self._llm, starts[-1], L, Hq)
        hits, tokens = [], []
        for request, start, output in zip(requests, starts, outputs, strict=False):
            ids = self._mode.scored(
                output.prompt_token_ids, output.outputs[0].token_ids, request.queries
            )
            text, spans = token_spans(self._tokenizer, ids)
            words = words_of_tokens(text, spans, self._mode.places(text, request.sample))
            patches, inside = self._picture(request.sample, output.prompt_token_ids)
            hits.append(word_hits(keys[:, start : start + len(ids)], words, patches, inside))
            tokens.append(sum(word is not None for word in words))
        return Scores(np.stack(hits).astype(np.float32), np.array(tokens))

    def _ask(self, requests: Sequence[Request], starts: Sequence[int]) -> list[Any]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0,
                max_tokens=request.max_tokens,
                extra_args={RECORD: [start, request.queries]},
            )
            for request, start in zip(requests, starts, strict=False)
        ]
        try:
            return self._llm.chat(
                [messages(request.sample, self._mode) for request in requests],
                params,
                use_tqdm=False,
                add_generation_prompt=not self._mode.continues_answer,
                continue_final_message=self._mode.continues_answer,
            )
        except ValueError as error:  # vLLM's word for prompts that it does not take
            raise ProfilerError(f"vLLM refuses a sample: {first_line(error)}") from error

    def _picture(
        self, sample: Sample, prompt: Sequence[int]
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Index of the image token at each position, and what part of them shows each word."""
        geometry, patches = picture_tokens(self._model, self._processor, sample.image.size, prompt)
        inside = {}
        for word in range(len(sample.words)):
            inside[word] = np.zeros(geometry.num_tokens, dtype=bool)
            inside[word][geometry.covered(sample.words[word].box)] = True
        return patches, inside


def picture_tokens(
    model_config: Any, processor: Any, size: tuple[int, int], prompt: Sequence[int]
) -> tuple[Any, np.ndarray]:
    """Where the tokens of a prompt's picture are, and what they show.

    Args:
        model_config: model configuration of vLLM.
        processor: the model's processor, from transformers.
        size: width and height of the picture in pixels.
        prompt: token ids of the prompt, those of the picture included, ``[n]``.

    Returns:
        The `Geometry`, and the index of the image token at each position or -1, int ``[n]``.

    Raises:
        ProfilerError: if the prompt has another number of image tokens than the geometry.
    """
    from sparsemm_vllm.geometry import image_tokens

    config = model_config.hf_config
    geometry = image_tokens(config, processor, size)
    is_image = np.array(prompt) == config.image_token_id
    if is_image.sum() != geometry.num_tokens:
        raise ProfilerError(
            f"a picture of {size} pixels has {geometry.num_tokens} image tokens by its processor's "
            f"settings, and {is_image.sum()} in vLLM's prompt; use another version of "
            "transformers, or other --mm-processor-kwargs"
        )
    return geometry, np.where(is_image, np.cumsum(is_image) - 1, -1)


def model_shape(llm: Any) -> tuple[int, int, int]:
    """`L`, `Hq` and `Hkv` of an engine's model."""
    model = llm.llm_engine.model_config
    heads = model.hf_text_config.num_attention_heads
    return model.get_total_num_hidden_layers(), heads, model.get_total_num_kv_heads()


def word_hits(
    keys: np.ndarray,
    words: Sequence[int | None],
    patches: np.ndarray,
    inside: dict[int, np.ndarray],
) -> np.ndarray:
    """Sum of a sample's hits: a head that looks into a token's word scores 1 / (its image tokens).

    Source: SparseMM (ICCV 2025), section 3.

    Args:
        keys: top-1 position of each scored token's query, int ``[L, tokens, Hq]``; -1 if unknown.
        words: the word of each token, if it has one.
        patches: index of the image token at each position of the prompt, or -1; int ``[n]``.
        inside: whether each image token shows a part of a word, bool ``[image tokens]``, by word.

    Returns:
        float64 ``[L, Hq]``.
    """
    hits = np.zeros((keys.shape[0], keys.shape[2]))
    for token, word in enumerate(words):
        if word is None or not inside[word].any():  # no word, or one that the model does not see
            continue
        top = keys[:, token]
        in_prompt = (top >= 0) & (top < len(patches))
        patch = np.where(in_prompt, patches[np.where(in_prompt, top, 0)], -1)
        hits += ((patch >= 0) & inside[word][patch]) / inside[word].sum()
    return hits


def first_line(error: Exception) -> str:
    """The first line of a message of several."""
    return str(error).strip().partition("\n")[0]
