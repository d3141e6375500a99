"""From a model and samples to a head profile."""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sparsemm_vllm import __version__
from sparsemm_vllm.budget.config_hash import config_hash
from sparsemm_vllm.budget.profile import HeadProfile
from sparsemm_vllm.data import SampleSet
from sparsemm_vllm.profiler.attention import AttentionScorer, Request, Scores
from sparsemm_vllm.profiler.causal import CausalScorer
from sparsemm_vllm.profiler.engine import check_model, open_engine, prepare_process
from sparsemm_vllm.profiler.errors import ProfilerError
from sparsemm_vllm.profiler.modes import MODES
from sparsemm_vllm.profiler.partial import Partial, Run
from sparsemm_vllm.profiler.reliability import split_half
from sparsemm_vllm.reader import READER, reader_folder

BATCH = 16  # samples between two readings
ROWS = 8192  # queries of theirs that are recorded


def profile_model(
    model: str,
    samples: SampleSet,
    mode: str = "forced",
    *,
    seed: int = 0,
    model_id: str | None = None,
    partial: Path | None = None,
    resume: bool = False,
    on_progress: Callable[[int], None] = lambda done: None,
    **engine_options: Any,
) -> HeadProfile:
    """Measure a model's visual heads in vLLM; on the CPU where there is no GPU.

    Args:
        model: name of a model, also that of the bundled one, or its folder.
        samples: samples that the model is asked.
        mode: name in `MODES`.
        seed: seed that the samples were chosen with; only written down.
        model_id: name of the model in the profile; if not given, `model`, or the folder's name.
        partial: file that keeps what is done, if the run shall survive an interruption; to be
            deleted when the profile is safe.
        resume: whether to continue what `partial` keeps, if it exists.
        on_progress: function that is told the number of samples done, first and after each batch.
        engine_options: options of `vllm.LLM`.

    Raises:
        ProfilerError: if no profile can be made of them; one line that says why.
        RuntimeError: without a GPU, if vllm was imported before `sparsemm_vllm.use_cpu()`.
    """
    if mode not in MODES:
        raise ProfilerError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if not samples.samples:
        raise ProfilerError("there are no samples to measure with")
    prepare_process()
    folder = str(reader_folder()) if model == READER else model
    config = check_model(folder, engine_options)
    run = Run(
        model_id=model_id or (Path(model).resolve().name if Path(model).is_dir() else model),
        config_hash=config_hash(config),
        mode=mode,
        data=samples.name,
        data_hash=samples.hash,
        samples=len(samples.samples),
        seed=seed,
    )
    kept = None if partial is None else Partial(partial, run)
    done = kept.load() if kept is not None and resume else None
    llm = open_engine(folder, config, ROWS, engine_options)
    return profile_engine(llm, samples, run, kept, done, on_progress)


def profile_engine(
    llm: Any,
    samples: SampleSet,
    run: Run,
    partial: Partial | None = None,
    done: Scores | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> HeadProfile:
    """The same in an engine that runs already; see `open_engine`.

    Args:
        llm: a `vllm.LLM` that records `ROWS` queries.
        samples: samples that the model is asked.
        run: facts about the run that the profile keeps.
        partial: file that keeps what is done.
        done: scores of the samples that were done before.
        on_progress: function that is told the number of samples done.

    Raises:
        ProfilerError: if no head ever looked at a word, or a sample cannot be asked.
    """
    choose = CausalScorer if run.mode == "causal" else AttentionScorer
    scorer = choose(llm, MODES[run.mode])
    requests = [scorer.request(sample) for sample in samples.samples]
    parts = [] if done is None else [done]
    count = sum(len(part.tokens) for part in parts)
    for batch in _batches(requests):
        on_progress(count)
        if batch.start < count:  # batches do not depend on where a run was interrupted
            continue
        parts.append(scorer.score(requests[batch]))
        count = batch.stop
        if partial is not None:
            partial.save(_joined(parts))
    on_progress(count)
    return _profile(llm, scorer, samples, run, _joined(parts))


def _batches(requests: Sequence[Request]) -> Iterator[slice]:
    """Samples to ask at once: their recorded queries fit into the workers' buffer.

    Raises:
        ProfilerError: if those of one alone do not.
    """
    first, rows = 0, 0
    for i, request in enumerate(requests):
        if request.rows > ROWS:
            raise ProfilerError(
                f"sample {i + 1} records {request.rows} tokens of its answer, {ROWS} at most"
            )
        if i - first == BATCH or rows + request.rows > ROWS:
            yield slice(first, i)
            first, rows = i, 0
        rows += request.rows
    yield slice(first, len(requests))


def _joined(parts: Sequence[Scores]) -> Scores:
    return Scores(
        np.concatenate([part.hits for part in parts]),
        np.concatenate([part.tokens for part in parts]),
    )


def _profile(
    llm: Any, scorer: AttentionScorer | CausalScorer, samples: SampleSet, run: Run, scores: Scores
) -> HeadProfile:
    tokens = int(scores.tokens.sum())
    if not tokens:
        raise ProfilerError(
            f"in {run.samples} samples no token of an answer belongs to a word of its picture: "
            "all scores are zero, nothing is written; use data whose answers say the words"
            + ("" if run.mode == "forced" else ", or --mode forced")
        )
    if not scores.hits.any():
        raise ProfilerError(
            f"no head looked at the word that it was about to say, in {tokens} tokens: all scores "
            "are zero, nothing is written; can this model read?"
        )
    L, Hq, Hkv = scorer.shape
    means = scores.hits.mean(0, dtype=np.float64).round(6).clip(min=0)
    return HeadProfile(
        model_id=run.model_id,
        num_layers=L,
        num_query_heads=Hq,
        num_kv_heads=Hkv,
        config_hash=run.config_hash,
        mode=MODES[run.mode].name,
        data=run.data,
        data_hash=run.data_hash,
        samples=run.samples,
        seed=run.seed,
        split_half=split_half(scores.hits),
        tool_version=__version__,
        vllm_version=version("vllm"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        provenance={
            "method": scorer.method,
            "answers": MODES[run.mode].answers,
            "tokens": tokens,
            "samples_without_tokens": int((scores.tokens == 0).sum()),
            "dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
        },
        scores=tuple(map(tuple, means.tolist())),
    )
