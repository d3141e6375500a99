"""What a request may ask for, with a pruned prompt, and what may happen to the engine meanwhile."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.commands.check.oracle import Oracle
from support.engines import BLOCK, DIGITS, HELLO, WINDOW, Engine, ask, assert_same, settings
from support.tiny import KV_HEADS, make_llava, picture, skewed_profile

pytestmark = pytest.mark.engine

BUDGET = 40  # of prompts of 98 and 178 tokens
TOKENS = 12


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine(model, settings(BUDGET), limit_mm_per_prompt={"image": 2}, max_logprobs=200)


@pytest.fixture(autouse=True)
def _idle(engine: Engine) -> Iterator[None]:
    yield
    engine.rest()


def generate(engine: Engine, prompts: Any, params: Any) -> list[Any]:
    """What `LLM.generate` gives; greedy unless the parameters say otherwise."""
    from vllm import SamplingParams

    defaults = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    every = [SamplingParams(**(defaults | values)) for values in params]
    return engine.llm.generate(prompts, every, use_tqdm=False)


def full(engine: Engine) -> CacheLayout:
    scores = skewed_profile().tensor()
    return CacheLayout.from_scores(scores, KV_HEADS, BUDGET, WINDOW, method="full")


def test_logprobs(engine: Engine) -> None:
    """The whole distribution of every step, and the same tokens beside others."""
    (output, _) = generate(engine, [ask(DIGITS, 1, 2), ask(HELLO, 1)], [{"logprobs": 128}, {}])
    (completion,) = output.outputs
    for step, token in zip(completion.logprobs, completion.token_ids, strict=True):
        assert step[token].rank == 1
        np.testing.assert_allclose(sum(np.exp(p.logprob) for p in step.values()), 1, atol=1e-4)
    (alone,) = engine.generate(ask(DIGITS, 1, 2), max_tokens=TOKENS)
    assert list(completion.token_ids) == alone.tokens


def test_prompt_logprobs(engine: Engine) -> None:
    """The prompt is computed densely, all of it although it is cached; the answer is not."""
    pruned = engine.layout
    rows, answers = [], []
    for layout, chunk in ((full(engine), None), (pruned, None), (pruned, 60)):
        engine.use(layout)
        generate(engine, ask(DIGITS, 1, 2), [{}])
        usual = engine.scheduler.max_num_scheduled_tokens
        engine.scheduler.max_num_scheduled_tokens = chunk or usual
        (output,) = generate(engine, ask(DIGITS, 1, 2), [{"prompt_logprobs": 2, "logprobs": 1}])
        engine.scheduler.max_num_scheduled_tokens = usual
        assert output.num_cached_tokens == 0
        tokens = output.prompt_token_ids
        assert len(output.prompt_logprobs) == len(tokens)
        pairs = zip(output.prompt_logprobs[1:], tokens[1:], strict=True)
        rows.append([step[token].logprob for step, token in pairs])
        steps = output.outputs[0].logprobs
        answers.append([max(p.logprob for p in step.values()) for step in steps])
    np.testing.assert_allclose(rows[1], rows[0], atol=1e-4)
    np.testing.assert_allclose(rows[2], rows[0], atol=1e-4)
    np.testing.assert_allclose(answers[2], answers[1], atol=1e-4)
    assert np.abs(np.subtract(answers[1], answers[0])).max() > 1e-2, "nothing was pruned"


def test_several_samples(engine: Engine) -> None:
    """n = 3 are three requests with one prompt each, and seeds that follow one another."""
    random = {"temperature": 1.0, "seed": 5}
    (together,) = generate(engine, ask(DIGITS, 1, 2), [random | {"n": 3}])
    samples = [list(completion.token_ids) for completion in together.outputs]
    assert len({tuple(tokens) for tokens in samples}) == 3
    engine.forget()
    params = [random | {"seed": 5 + i} for i in range(3)]
    alone = generate(engine, [ask(DIGITS, 1, 2)] * 3, params)
    assert samples == [list(output.outputs[0].token_ids) for output in alone]


def test_every_sampling_parameter(engine: Engine) -> None:
    """In one batch, each does what it says; a request beside them is answered as alone."""
    (alone,) = engine.generate(ask(DIGITS, 1, 2), max_tokens=TOKENS)
    tokenizer = engine.llm.get_tokenizer()
    first, second = alone.tokens[:2]
    random = {"temperature": 1.0, "seed": 3}
    params = {
        "plain": {},
        "top_k": random | {"top_k": 1},
        "top_p": random | {"top_p": 1e-6},
        "min_p": random | {"min_p": 1.0},
        "seed": random,
        "same seed": random,
        "other seed": random | {"seed": 4},
        "logit_bias": {"logit_bias": {9: 100.0}},
        "allowed_token_ids": {"allowed_token_ids": [7, 8]},
        "bad_words": {"bad_words": [tokenizer.decode([first])]},
        "stop": {"stop": [tokenizer.decode([second])]},
        "stop_token_ids": {"stop_token_ids": [second]},
        "min_tokens": {"stop_token_ids": [second], "min_tokens": 2},
        "repetition_penalty": {"repetition_penalty": 5.0},
        "presence_penalty": {"presence_penalty": 2.0, "frequency_penalty": 2.0},
    }
    outputs = generate(engine, [ask(DIGITS, 1, 2)] * len(params), params.values())
    tokens = {
        name: list(output.outputs[0].token_ids)
        for name, output in zip(params, outputs, strict=True)
    }
    for greedy in ("plain", "top_k", "top_p", "min_p"):
        assert tokens[greedy] == alone.tokens, greedy
    assert tokens["seed"] == tokens["same seed"]
    assert tokens["seed"] not in (tokens["other seed"], alone.tokens)
    assert tokens["logit_bias"] == [9] * TOKENS
    assert set(tokens["allowed_token_ids"]) <= {7, 8}
    assert first not in tokens["bad_words"]
    assert tokens["stop"] == tokens["stop_token_ids"] == [first, second]
    assert len(tokens["min_tokens"]) > 2
    for penalty in ("repetition_penalty", "presence_penalty"):
        assert len(set(tokens[penalty])) == TOKENS, f"{penalty}: {tokens[penalty]}"


def test_structured_outputs(engine: Engine) -> None:
    import json

    from vllm.sampling_params import StructuredOutputsParams

    (alone,) = engine.generate(ask(HELLO, 1), max_tokens=TOKENS)
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    wanted = [
        StructuredOutputsParams(regex="[0-9]{4}"),
        StructuredOutputsParams(choice=["cat", "dog"]),
        StructuredOutputsParams(json=schema, disable_any_whitespace=True),
    ]
    params: list[dict[str, Any]] = [
        {"structured_outputs": form, "max_tokens": 30, "ignore_eos": False} for form in wanted
    ]
    prompts = [ask(DIGITS, 1, 2), ask(HELLO, 1), ask(DIGITS, 2, 1), ask(HELLO, 1)]
    outputs = generate(engine, prompts, [*params, {}])
    digits, choice, written = (output.outputs[0].text for output in outputs[:3])
    assert len(digits) == 4
    assert digits.isdigit()
    assert choice in ("cat", "dog")
    assert isinstance(json.loads(written)["a"], bool)
    assert list(outputs[3].outputs[0].token_ids) == alone.tokens


def test_chat_of_several_turns_about_one_picture(engine: Engine) -> None:
    """Each turn hits what the last one cached, and is answered as without a cache."""
    from vllm import SamplingParams

    # Characters only, so that the next turn's prompt has the very tokens of the last answer.
    params = SamplingParams(
        max_tokens=24,
        temperature=0,
        logprobs=1,
        ignore_eos=True,
        allowed_token_ids=list(range(5, 101)),
    )
    url = {"type": "image_pil", "image_pil": picture(1)}
    chat: list[Any] = [
        {"role": "user", "content": [url, {"type": "text", "text": "what does it say?"}]}
    ]
    cached = []
    for question in ("and what is below it?", "is there anything else in it?", ""):
        (warm,) = engine.llm.chat(chat, params, use_tqdm=False)
        cached.append(warm.num_cached_tokens)
        chats = list(chat)
        answer = warm.outputs[0].text
        said = {"role": "assistant", "content": ">" + answer}  # the template ends prompts with ">"
        chat += [said, {"role": "user", "content": question}]
        expected = _cold(engine, chats, params)
        assert answer == expected.outputs[0].text
        np.testing.assert_allclose(chosen(warm), chosen(expected), atol=1e-4)
        assert expected.num_cached_tokens == 0
    assert cached[0] == 0
    assert 64 < cached[1] < cached[2], "each turn should hit the picture and the last question"


def chosen(output: Any) -> list[float]:
    """Log-probabilities of the answer's tokens, before the others were forbidden."""
    (completion,) = output.outputs
    pairs = zip(completion.logprobs, completion.token_ids, strict=True)
    return [step[token].logprob for step, token in pairs]


def _cold(engine: Engine, chat: list[Any], params: Any) -> Any:
    engine.forget()
    (output,) = engine.llm.chat(chat, params, use_tqdm=False)
    return output


def test_a_long_prompt_without_pictures(model: Path, engine: Engine) -> None:
    text = "<s>" + "no picture at all, but many words. " * 4
    oracle = Oracle(model, engine.layout)
    (answer,) = engine.generate(ask(text), max_tokens=TOKENS)
    assert engine.layout.is_pruned(answer.prompt_tokens)
    tokens, logprobs = oracle.generate(text, [], TOKENS)
    assert answer.tokens == tokens
    np.testing.assert_allclose(answer.logprobs, logprobs, atol=1e-4)


def test_beam_search(engine: Engine) -> None:
    """To vLLM every step of a beam is a prompt of its own, which is pruned again."""
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True)
    (output,) = engine.llm.beam_search([ask(DIGITS, 1, 2)], params)
    best, second = (beam.tokens[-4:] for beam in output.sequences)
    assert best != second
    (greedy,) = engine.generate(ask(DIGITS, 1, 2), max_tokens=1)
    assert greedy.tokens[0] in (best[0], second[0])


def test_the_prefix_cache_is_reset_while_requests_run(engine: Engine) -> None:
    """As with dense attention: refused, or the requests start over and answer the same."""
    prompts = [ask(HELLO, 1), ask(DIGITS, 1, 2)]
    expected = engine.generate(*prompts, max_tokens=TOKENS)
    for running in (False, True):
        done: list[bool] = []
        preempted: set[str] = set()

        def reset(running: bool = running, done: Any = done, preempted: Any = preempted) -> None:
            requests = engine.scheduler.running
            if not done and requests and all(r.num_output_tokens > 2 for r in requests):
                done.append(engine.llm.reset_prefix_cache(reset_running_requests=running))
            preempted |= {r.request_id for r in requests if r.num_preemptions}

        engine.forget()
        answers = engine.generate(*prompts, max_tokens=TOKENS, watch=reset)
        assert done == [running]
        assert len(preempted) == (2 if running else 0)
        for answer, same in zip(answers, expected, strict=True):
            assert_same(answer, same)
        (after,) = engine.generate(prompts[1], max_tokens=1)
        assert after.cached_tokens == (after.prompt_tokens - WINDOW) // BLOCK * BLOCK


def test_weights_are_reloaded(model: Path, engine: Engine, tmp_path: Path) -> None:
    """Those of another checkpoint, and back; then while a request runs."""
    core = engine.llm.llm_engine
    other = make_llava(tmp_path / "other", seed=1)
    (before,) = engine.generate(ask(DIGITS, 1, 2), max_tokens=TOKENS)

    def reload(path: Path) -> None:
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        core.reset_encoder_cache()

    reload(other)
    engine.forget()
    (answer,) = engine.generate(ask(DIGITS, 1, 2), max_tokens=TOKENS)
    tokens, logprobs = Oracle(other, engine.layout).generate(
        DIGITS, [picture(1), picture(2)], TOKENS
    )
    assert answer.tokens == tokens != before.tokens
    np.testing.assert_allclose(answer.logprobs, logprobs, atol=1e-4)
    reload(model)
    engine.forget()
    reloaded: list[int] = []

    def reload_once() -> None:
        (request,) = engine.scheduler.running or (None,)
        if not reloaded and request is not None and request.num_output_tokens == 3:
            reloaded.append(3)
            reload(model)

    (again,) = engine.generate(ask(DIGITS, 1, 2), max_tokens=TOKENS, watch=reload_once)
    assert reloaded
    assert_same(again, before)


def test_sleeping_is_not_for_the_cpu(model: Path) -> None:
    """vLLM refuses it there, with any attention."""
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        EngineArgs(
            model=str(model), attention_backend="SPARSEMM", enable_sleep_mode=True
        ).create_engine_config()


def test_answers_with_a_watermark(model: Path) -> None:
    """vLLM's detector finds it in the answer to a pruned prompt, with the server's key only."""
    from vllm.v1.watermarking import GumbelWatermarkDetector

    watermarked = Engine(model, settings(BUDGET), watermark_config={"key": 7})
    same = {"temperature": 1, "max_tokens": 60, "seed": 5}
    params = [same | {"watermarking": mark} for mark in (True, False)]
    marked, plain = generate(watermarked, [ask(HELLO, 1)] * 2, params)
    for output, key, found in ((marked, 7, True), (marked, 8, False), (plain, 7, False)):
        detected = GumbelWatermarkDetector(key, 4, p_value_threshold=1e-3).detect(
            list(output.outputs[0].token_ids)
        )
        assert detected.is_watermarked == found, detected
    assert watermarked.all_free()
