"""n-gram speculation: the answers, and the pruned cache behind them, are those without drafts."""

from typing import Any

import numpy as np
import pytest

from support.engines import BLOCK, DIGITS, HELLO, WINDOW, Engine, ask, assert_same, settings
from support.tiny import make_llava

pytestmark = pytest.mark.engine

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}
TOKENS = 10  # few: Triton's interpreter takes its time to verify drafts


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    """Without drafts and with."""
    model = make_llava(tmp_path_factory.mktemp("llava"))
    options: dict[str, Any] = {"limit_mm_per_prompt": {"image": 2}}
    plain = Engine(model, settings(40), **options)
    return plain, Engine(model, settings(40), speculative_config=NGRAM, **options)


def test_same_answers(engines: tuple[Engine, Engine]) -> None:
    """In one batch with an unpruned prompt: in chunks, then cached."""
    plain, drafting = engines
    prompts = ask(HELLO, 1), ask(DIGITS, 1, 2), ask("<s>short")
    expected = plain.generate(*prompts, max_tokens=TOKENS)
    for hit in (False, True):
        answers = drafting.generate(*prompts, max_tokens=TOKENS, chunk=None if hit else 60)
        for answer, same in zip(answers, expected, strict=True):
            assert_same(answer, same)
        assert drafting.all_free()
    n = answers[1].prompt_tokens
    assert answers[1].cached_tokens == (n - WINDOW) // BLOCK * BLOCK


def test_accepted_drafts(engines: tuple[Engine, Engine]) -> None:
    """A grammar makes drafts right; the letters behind them are the model's, from the cache."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = SamplingParams(
        max_tokens=2 * TOKENS,
        temperature=0,
        logprobs=1,
        structured_outputs=StructuredOutputsParams(regex=f"9{{{TOKENS}}}[a-z]{{{TOKENS}}}"),
    )
    steps, texts, logprobs = [], [], []
    for engine in engines:
        engine.forget()
        core = engine.llm.llm_engine
        core.add_request(f"accepted-{len(steps)}", ask(DIGITS, 1, 2), params)
        steps.append(0)
        while core.has_unfinished_requests():
            outputs = core.step()
            steps[-1] += bool(outputs)  # at first the grammar is compiled
        (output,) = (completion for answer in outputs for completion in answer.outputs)
        assert output.text.startswith("9" * TOKENS)
        texts.append(output.text)
        pairs = zip(output.logprobs, output.token_ids, strict=True)
        logprobs.append([step[token].logprob for step, token in pairs])
        assert engine.all_free()
    assert steps[1] < 0.75 * steps[0], f"no drafts were accepted: {steps} steps"
    assert len(set(texts[0])) > 3, "the letters say nothing"
    assert texts[1] == texts[0]
    np.testing.assert_allclose(logprobs[1], logprobs[0], atol=1e-4)
