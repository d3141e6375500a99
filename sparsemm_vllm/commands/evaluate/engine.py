"""One engine configuration answers all questions, in a process of its own.

    python -P -m sparsemm_vllm.commands.evaluate.engine JOB.json

An engine cannot change its budgets, and a process that has closed one cannot be trusted to open
another. Counts of answered questions go to the standard output, vLLM's log to the standard error.
vLLM is imported in functions: it takes seconds, and reads an environment that is set before.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sparsemm_vllm.commands.evaluate.questions import Choice, Question, load_questions
from sparsemm_vllm.environment import has_gpu
from sparsemm_vllm.names import KEY
from sparsemm_vllm.profiler.engine import parse_engine_options
from sparsemm_vllm.store import Settings, Store

CPU_OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 512 << 20,
    "max_num_seqs": 64,
}
OWN_OPTIONS = ("attention_backend", "additional_config", "enable_prefix_caching", "seed")
CHECKED_TOKENS = 8  # of the answer to the question that is asked alone


class Job(BaseModel):
    """What a process is to do.

    Attributes:
        model: name or folder of the model.
        engine_arguments: options of `vllm serve`.
        settings: settings of SPARSEMM, as they are given to vLLM.
        choice: questions to ask.
        max_tokens: most tokens of an answer.
        result: file to write a `Result` to.
    """

    model: str
    engine_arguments: list[str]
    settings: dict[str, Any]
    choice: Choice
    max_tokens: int
    result: Path


class TaskResult(BaseModel):
    """What was found of the questions of a task, one number or text a question, in order.

    Attributes:
        answers: answers of the model.
        prompt_tokens: tokens of each prompt, those of the picture among them.
        answer_tokens: tokens of each answer.
        held_bytes: size of the KV blocks that each prompt holds after it was pruned, in bytes over
            all layers and ranks.
        kept_tokens: prompt tokens that a KV head keeps on average, the window included.
    """

    answers: list[str] = []
    prompt_tokens: list[int] = []
    answer_tokens: list[int] = []
    held_bytes: list[int] = []
    kept_tokens: list[float] = []


class Result(BaseModel):
    """What a process found.

    Attributes:
        settings: settings of SPARSEMM, as they were given to vLLM.
        tasks: results by name of the task.
        block_size: tokens in a KV block.
        block_bytes: size of a KV block over all layers and ranks, in bytes.
        pool_blocks: blocks that the block pool had given out while the first question was answered
            alone; as many as the layout says.
        seconds: time from the start of the process to the end, in seconds.
    """

    settings: dict[str, Any]
    tasks: dict[str, TaskResult]
    block_size: int
    block_bytes: int
    pool_blocks: int
    seconds: float


def result_store(path: Path, settings: dict[str, Any]) -> Store[Result]:
    """The file of a result.

    Args:
        path: file of a point.
        settings: settings of SPARSEMM that the point is measured with.
    """

    def read(data: bytes) -> tuple[Settings, Result]:
        result = Result.model_validate_json(data)
        return {"settings": result.settings}, result

    def write(settings: Settings, result: Result) -> str:
        return result.model_dump_json(indent=1) + "\n"

    return Store(path, {"settings": settings}, read, write)


class HeldBytesError(RuntimeError):
    """The block pool does not hold what the layout says: held bytes would be wrong."""


@contextmanager
def watched_steps(llm: Any, watch: Callable[[list[Any]], None]) -> Iterator[None]:
    """Call `watch` with the outputs of every step of the engine."""
    engine = llm.llm_engine
    step = engine.step

    def watched() -> list[Any]:
        outputs = step()
        watch(outputs)
        return outputs

    engine.step = watched
    try:
        yield
    finally:
        engine.step = step


class Evaluated:
    """A running engine, and what its requests hold."""

    def __init__(self, job: Job) -> None:
        from vllm import LLM

        options = parse_engine_options(job.engine_arguments)
        self._chat_template = options.pop("chat_template", None)
        defaults: dict[str, Any] = {"limit_mm_per_prompt": {"image": 1}}
        if not has_gpu():
            defaults |= CPU_OPTIONS
        own = {
            "attention_backend": "SPARSEMM",
            "additional_config": {KEY: job.settings},
            "enable_prefix_caching": False,
            "seed": 0,
        }
        self.llm = LLM(model=job.model, **(defaults | options | own))
        # In this process: VLLM_ENABLE_V1_MULTIPROCESSING is off.
        scheduler: Any = self.llm.llm_engine.engine_core.engine_core.scheduler
        self._pool = scheduler.kv_cache_manager.block_pool
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        if len(managers) > 1:
            raise NotImplementedError("models with several kinds of KV cache are not evaluated")
        spec = managers[0].kv_cache_spec
        self.layout = managers[0].layout
        self.block_size: int = spec.block_size
        ranks = self.layout.tensor_parallel
        self.block_bytes: int = spec.page_size_bytes * len(self.layout.capacities) * ranks

    def check_pool(self, question: Question) -> int:
        """Ask one question alone and compare the block pool with the layout.

        Returns:
            Blocks held before the last token.

        Raises:
            HeldBytesError: if the layout says something else.
        """
        from vllm import SamplingParams

        used: list[int] = []
        free = self._pool.get_num_free_blocks()
        params = SamplingParams(temperature=0, max_tokens=CHECKED_TOKENS, ignore_eos=True)
        with watched_steps(
            self.llm, lambda _: used.append(free - self._pool.get_num_free_blocks())
        ):
            (output,) = self._chat([question], params)
        held = used[-2]  # after the last step all is free
        n = len(output.prompt_token_ids)
        # Steps may be scheduled before the one before is processed.
        possible = {
            self.layout.held_blocks(n, n + tokens, self.block_size)
            for tokens in range(CHECKED_TOKENS + 2)
        }
        if held not in possible:
            raise HeldBytesError(
                f"a prompt of {n} tokens holds {held} blocks in the block pool, the layout says "
                f"{' or '.join(map(str, sorted(possible)))}"
            )
        return held

    def answer(self, questions: list[Question], max_tokens: int, on_answer: Any) -> TaskResult:
        """Answer all questions at once, greedily; `on_answer` is called with numbers of them."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        with watched_steps(self.llm, lambda outputs: on_answer(sum(o.finished for o in outputs))):
            outputs = self._chat(questions, params)
        result = TaskResult()
        for output in outputs:
            n = len(output.prompt_token_ids)
            result.answers.append(output.outputs[0].text)
            result.prompt_tokens.append(n)
            result.answer_tokens.append(len(output.outputs[0].token_ids))
            blocks = self.layout.held_blocks(n, n, self.block_size)
            result.held_bytes.append(blocks * self.block_bytes)
            result.kept_tokens.append(self.layout.mean_kept(n))
        return result

    def _chat(self, questions: list[Question], params: Any) -> list[Any]:
        conversations = [question.conversation() for question in questions]
        template = self._chat_template
        return self.llm.chat(conversations, params, use_tqdm=False, chat_template=template)


def run(job: Job, on_answer: Callable[[int], None]) -> Result:
    """Do the job."""
    start = time.monotonic()
    questions = load_questions(job.choice)
    engine = Evaluated(job)
    pool_blocks = engine.check_pool(questions[job.choice.tasks[0]][0])
    tasks = {
        task: engine.answer(asked, job.max_tokens, on_answer) for task, asked in questions.items()
    }
    return Result(
        settings=job.settings,
        tasks=tasks,
        block_size=engine.block_size,
        block_bytes=engine.block_bytes,
        pool_blocks=pool_blocks,
        seconds=round(time.monotonic() - start, 1),
    )


def main() -> None:
    """Entry point of the process."""
    job = Job.model_validate_json(Path(sys.argv[1]).read_bytes())
    progress = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else writes to the standard output
    answered = 0

    def on_answer(count: int) -> None:
        nonlocal answered
        answered += count
        if count:
            print(answered, file=progress)

    result = run(job, on_answer)
    result_store(job.result, job.settings).save(result)


if __name__ == "__main__":
    main()
