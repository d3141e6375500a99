"""Answers one question from a pruned cache and records where visual heads looked.

vLLM is imported in functions, and with it our engine: it takes seconds, and reads an environment
that is set before.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparsemm_vllm.budget.plan import count_blocks
from sparsemm_vllm.budget.profile import HeadProfile
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.commands.kept_map import KeptPicture
from sparsemm_vllm.commands.look.sight import SaidWord, Sight
from sparsemm_vllm.commands.show import heads_in
from sparsemm_vllm.data.pictures import Sample
from sparsemm_vllm.names import RECORD
from sparsemm_vllm.profiler.attention import picture_tokens
from sparsemm_vllm.profiler.engine import check_model, open_engine, prepare_process
from sparsemm_vllm.profiler.errors import ProfilerError
from sparsemm_vllm.profiler.modes import MODES, messages
from sparsemm_vllm.profiler.words import token_spans
from sparsemm_vllm.profiler.worker import gather_attention
from sparsemm_vllm.reader import READER, reader_folder

VISUAL = 0.05  # share of the query heads that are called visual


def look(
    model: str,
    image: Image.Image,
    question: str,
    settings: Settings,
    max_tokens: int = 128,
    **engine_options: Any,
) -> Sight:
    """Let a model answer from a pruned cache, then see where it looked.

    The answer is the pruned cache's. Where the heads looked is recorded in a second request, whose
    prompt ends with that answer: attention to the whole prompt, as heads are profiled.

    Args:
        model: name or folder of the model, or the name of the bundled one.
        image: picture to ask about.
        question: text beside the picture.
        settings: settings of SPARSEMM.
        max_tokens: most tokens of the answer.
        engine_options: options of `vllm.LLM`.

    Raises:
        ProfilerError: if the model cannot be asked, has no head profile, or says nothing.
        RuntimeError: without a GPU, if vllm was imported before `sparsemm_vllm.use_cpu()`.
    """
    prepare_process()
    folder = str(reader_folder()) if model == READER else model
    config = check_model(folder, engine_options)
    sample = Sample(image, (), question, "", ())
    with tempfile.TemporaryDirectory(prefix="sparsemm-look-") as kept_folder:
        recording = settings.model_copy(update={"record_kept": kept_folder})
        rows = 2 * max_tokens + 64  # an answer may be cut into other tokens when it is read again
        llm = open_engine(folder, config, rows, engine_options, recording.as_values())
        return _see(llm, sample, max_tokens, rows, Path(kept_folder))


def _see(llm: Any, sample: Sample, max_tokens: int, rows: int, kept_folder: Path) -> Sight:
    from sparsemm_vllm.engine.config import Serving
    from sparsemm_vllm.engine.worker.probes.kept import load_kept

    vllm_config = llm.llm_engine.vllm_config
    serving = Serving.of(vllm_config)
    layout, profile = serving.layout, serving.settings.profile
    if not isinstance(profile, HeadProfile):
        raise ProfilerError("there is no head profile for this model: no visual heads are known")
    said = _ask(llm, sample, max_tokens)
    answer = said.outputs[0].text.strip()
    if not answer:
        raise ProfilerError("the model answers nothing: ask another question")
    queries = min(len(said.outputs[0].token_ids) + max_tokens // 2, rows)
    geometry, tokens, words = _look_again(llm, sample, answer, queries, profile)

    n = len(said.prompt_token_ids)
    by_head = load_kept(kept_folder, said.request_id) if layout.is_pruned(n) else {}
    positions = np.flatnonzero(tokens >= 0)
    return Sight(
        kept=KeptPicture(sample.image, geometry, positions, n, layout.window, by_head),
        question=sample.question,
        answer=answer,
        words=words,
        heads=visual_heads(profile),
        group=profile.num_query_heads // profile.num_kv_heads,
        blocks=count_blocks(layout, n, n, vllm_config.cache_config.block_size),
    )


def _ask(llm: Any, sample: Sample, max_tokens: int) -> Any:
    """The output of vLLM for the question, answered from the pruned cache."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return llm.chat(messages(sample, MODES["free"]), params, use_tqdm=False)[0]


def _look_again(
    llm: Any, sample: Sample, answer: str, queries: int, profile: HeadProfile
) -> tuple[Any, np.ndarray, list[SaidWord]]:
    """Let the model read its answer, and record where the visual heads look.

    Args:
        llm: engine that records attention.
        sample: picture and question.
        answer: answer that the model has given.
        queries: number of tokens at the end of the prompt whose attention is recorded.
        profile: head profile of the model.

    Returns:
        The `Geometry` of the picture, the index of the image token at each position of the prompt
        or -1, int ``[n]``, and the words of the answer.
    """
    from vllm import SamplingParams
    from vllm.transformers_utils.processor import cached_processor_from_config

    answered = Sample(sample.image, (), sample.question, answer, ())
    params = SamplingParams(temperature=0, max_tokens=1, extra_args={RECORD: [0, queries]})
    again = llm.chat(
        messages(answered, MODES["forced"]),
        params,
        use_tqdm=False,
        add_generation_prompt=False,
        continue_final_message=True,
    )[0]
    prompt = again.prompt_token_ids
    keys = gather_attention(llm, queries, profile.num_layers, profile.num_query_heads)
    model_config = llm.llm_engine.model_config
    processor = cached_processor_from_config(model_config)
    geometry, tokens = picture_tokens(model_config, processor, sample.image.size, prompt)
    text, spans = token_spans(llm.get_tokenizer(), prompt[1 - queries :])
    words = said_words(text, spans, answer, keys, visual_heads(profile), tokens)
    return geometry, tokens, words


def visual_heads(profile: HeadProfile) -> list[tuple[int, int]]:
    """The 5 % of query heads with the highest scores, (layer, head), best first."""
    scores = np.array(profile.scores)
    best = np.argsort(-scores, axis=None, kind="stable")[: heads_in(VISUAL, scores.size)]
    return [(int(head) // scores.shape[1], int(head) % scores.shape[1]) for head in best]


def said_words(
    text: str,
    spans: Sequence[tuple[int, int]],
    answer: str,
    keys: np.ndarray,
    heads: Sequence[tuple[int, int]],
    tokens: np.ndarray,
) -> list[SaidWord]:
    """The answer's words, and where heads looked while their tokens were predicted.

    Args:
        text: end of a prompt; `answer` is the end of it.
        spans: first character of each token of the text, and the one after its last.
        answer: answer of the model.
        keys: position that the query that predicts each token looked at most, int
            ``[L, >= tokens, Hq]``.
        heads: visual heads to watch, (layer, query head).
        tokens: index of the image token at each position of the prompt, or -1; int ``[n]``.

    Raises:
        ProfilerError: if the chat template changed the answer.
    """
    start = text.rstrip().rfind(answer)
    if start < 0:
        raise ProfilerError(
            "the model's chat template changes answers: where the heads looked cannot be told"
        )
    words = []
    for word in answer.split():
        start = text.index(word, start)
        end = start + len(word)
        own = [i for i, (first, last) in enumerate(spans) if first < end and start < last]
        seen = np.concatenate([keys[layer, own, head] for layer, head in heads])
        image = tokens[seen[seen >= 0]]
        looks = np.bincount(image[image >= 0], minlength=int(tokens.max()) + 1)
        words.append(SaidWord(word, looks, elsewhere=int((image < 0).sum())))
        start = end
    return words
