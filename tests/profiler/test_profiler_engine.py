"""Attention recorded in vLLM's engine equals transformers', and so do the profiles made of it."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from sparsemm_vllm.budget.config_hash import config_hash
from sparsemm_vllm.budget.profile import HeadProfile
from sparsemm_vllm.data import SampleSet, load_samples
from sparsemm_vllm.data.pictures import Sample
from sparsemm_vllm.geometry import image_tokens
from sparsemm_vllm.names import RECORD
from sparsemm_vllm.profiler import run
from sparsemm_vllm.profiler.engine import check_model, open_engine
from sparsemm_vllm.profiler.partial import Partial, Run
from sparsemm_vllm.profiler.reliability import spearman
from sparsemm_vllm.profiler.worker import gather_attention
from sparsemm_vllm.reader import reader_folder
from support.tiny import make_llava, make_llava_next, make_qwen2_vl

pytestmark = pytest.mark.engine

SMALL = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8, "max_model_len": 1024}
_alive: list[Any] = []  # all share one process group, which the first to be deleted would close


def start(model: Path | str, rows: int, **options: Any) -> Any:
    """An engine in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    config = check_model(str(model), {})
    _alive.append(open_engine(str(model), config, rows, SMALL | options))
    return _alive[-1]


class Eager:
    """The same model in transformers, which returns its attention weights."""

    def __init__(self, model: Path | str) -> None:
        self.processor = AutoProcessor.from_pretrained(model)
        self.model = AutoModelForImageTextToText.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def inputs(self, sample: Sample) -> Any:
        content = [{"type": "image"}, {"type": "text", "text": sample.question}]
        chat = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        return self.processor(
            text=text, images=sample.image, return_tensors="pt", add_special_tokens=False
        )

    @torch.no_grad()
    def attention(self, sample: Sample, answer: list[int]) -> torch.Tensor:
        """Weights of the chat with these tokens behind it, ``[L, Hq, n, n]``."""
        inputs = self.inputs(sample)
        more = torch.tensor([answer], dtype=torch.int64)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            zeros = torch.zeros_like(more)
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], zeros], 1)
        output = self.model(**inputs, output_attentions=True)
        return torch.stack(output.attentions)[:, 0]


@pytest.mark.parametrize("make", [make_llava, make_llava_next, make_qwen2_vl])
def test_recorded_keys_are_those_of_eager_attention(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    """All positions of two prompts, in chunks side by side, and of generated tokens."""
    from vllm import SamplingParams

    model = make(tmp_path)
    eager = Eager(model)
    samples = load_samples("ocr", 2, 0).samples
    samples[1] = replace(samples[1], image=samples[1].image.resize((150, 100)))
    lengths = [eager.inputs(sample)["input_ids"].shape[1] for sample in samples]
    generated = 5
    starts = [0, lengths[0] + generated - 1]
    rows = sum(lengths) + 2 * (generated - 1)

    llm = start(model, rows, max_num_batched_tokens=48)
    chats = [
        [{"role": "user", "content": [{"type": "image_pil", "image_pil": sample.image},
                                      {"type": "text", "text": sample.question}]}]
        for sample in samples
    ]  # fmt: skip
    params = [
        SamplingParams(
            temperature=0, max_tokens=generated, ignore_eos=True, extra_args={RECORD: [first, n]}
        )
        for first, n in zip(starts, lengths, strict=True)
    ]
    outputs = llm.chat(chats, params, use_tqdm=False)
    keys = torch.from_numpy(gather_attention(llm, rows, 4, 8))
    assert (keys >= 0).all()
    assert config_hash(llm.llm_engine.model_config.hf_config) == config_hash(
        AutoConfig.from_pretrained(model)
    )
    for sample, first, output in zip(samples, starts, outputs, strict=True):
        prompt = output.prompt_token_ids
        assert prompt == eager.inputs(sample)["input_ids"][0].tolist()
        answer = list(output.outputs[0].token_ids)[:-1]
        weights = eager.attention(sample, answer)
        mine = keys[:, first : first + len(prompt) + len(answer)].transpose(1, 2).long()
        largest = weights.max(-1).values
        tied = largest - weights.gather(-1, mine[..., None])[..., 0] <= 1e-6 * largest
        assert mine[..., -1].unique().numel() > 4, "heads look at different keys"
        assert tied.float().mean() >= 0.995


READER = str(reader_folder())
RUN = Run("sparsemm-reader", "", "forced", "ocr", "", samples=0, seed=0)


@pytest.fixture(scope="module")
def reader() -> Any:
    return start(READER, run.ROWS)


@pytest.fixture(scope="module")
def samples() -> SampleSet:
    return load_samples("ocr", 12, 0)


def measure(llm: Any, samples: SampleSet, mode: str = "forced", *rest: Any) -> HeadProfile:
    described = replace(RUN, mode=mode, samples=len(samples.samples))
    return run.profile_engine(llm, samples, described, *rest)


@pytest.fixture(scope="module")
def forced(reader: Any, samples: SampleSet) -> HeadProfile:
    return measure(reader, samples)


def test_forced_scores_are_those_of_eager_attention(
    forced: HeadProfile, samples: SampleSet
) -> None:
    """Computed again from the definition, of characters that are a token each."""
    eager = Eager(READER)
    config, tokenizer = eager.model.config, eager.processor.tokenizer
    expected = torch.zeros(6, 8, dtype=torch.float64)
    for sample in samples.samples:
        ids = tokenizer.encode(sample.answer, add_special_tokens=False)
        prompt = eager.inputs(sample)["input_ids"][0]
        first = int((prompt == config.image_token_id).nonzero()[0])
        geometry = image_tokens(config, eager.processor, sample.image.size)
        top = eager.attention(sample, ids).argmax(-1) - first
        for word, (begin, end) in zip(sample.answer_words, sample.answer_spans, strict=True):
            inside = torch.from_numpy(geometry.covered(sample.words[word].box))
            rows = torch.arange(begin, end) + len(prompt) - 1
            expected += torch.isin(top[:, :, rows], inside).sum(-1) / len(inside)
    found = forced.tensor() * len(samples.samples)
    assert found.max() > 10
    # A near-tie may fall to the other side: at most one hit of a head, of hundreds.
    assert (found - expected).abs().max() <= 0.5
    assert ((found - expected).abs() > 1e-4).sum() <= 2


def test_an_interrupted_run_is_continued(
    reader: Any, samples: SampleSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "BATCH", 4)
    few = replace(samples, samples=samples.samples[:6])
    whole = measure(reader, few)
    partial = Partial(tmp_path / "partial", replace(RUN, samples=6))

    def interrupt(done: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(reader, few, "forced", partial, None, interrupt)
    done = partial.load()
    assert done is not None
    assert len(done.tokens) == 4
    again = measure(reader, few, "forced", partial, done)
    assert again.scores == whole.scores
    assert again.split_half == whole.split_half


def test_the_model_answers_by_itself(reader: Any, samples: SampleSet, forced: HeadProfile) -> None:
    """It reads well: nearly the same tokens count, and nearly the same heads score."""
    few = replace(samples, samples=samples.samples[:6])
    free = measure(reader, few, "free")
    true = sum(end - begin for sample in few.samples for begin, end in sample.answer_spans)
    assert 0.8 * true <= free.provenance["tokens"] <= true
    correlation = spearman(np.array(free.scores), np.array(forced.scores))
    assert correlation is not None
    assert correlation > 0.9
