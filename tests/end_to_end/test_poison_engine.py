"""Defects put into the real engine on purpose, and how `poison_freed` finds them."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.worker.gpu.block_table import BlockTables

from sparsemm_vllm.budget.layout import CacheLayout
from sparsemm_vllm.engine.cpu import attention as cpu_backend
from sparsemm_vllm.engine.scheduler.manager import SparseMMManager
from sparsemm_vllm.engine.worker.probes.poison import Poison
from sparsemm_vllm.engine.worker.probes.watched_cache import PoisonError
from sparsemm_vllm.triton_kernels import reference, torch_ops, triton_ops
from sparsemm_vllm.triton_kernels.batch import HeadPages
from support.engines import BLOCK, DIGITS, HELLO, Engine, ask, settings

pytestmark = pytest.mark.engine

BUDGET = 40  # of prompts of 98 and 178 tokens
PROMPTS = (ask(HELLO, 1), ask(DIGITS, 1, 2), ask("<s>short")) * 2


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    """With a pool in which freed blocks are soon another's."""
    return Engine(
        model,
        settings(BUDGET),
        limit_mm_per_prompt={"image": 2},
        num_gpu_blocks_override=34,
        max_model_len=320,
    )


@pytest.fixture(autouse=True)
def _idle(engine: Engine) -> Iterator[None]:
    """Every test leaves an engine that serves."""
    yield
    running = [request.request_id for request in engine.scheduler.requests.values()]
    engine.llm.llm_engine.abort_request(running, internal=True)
    engine.llm.llm_engine.step()
    engine.rest()
    state = engine.state
    state.poison = Poison(state.cache.tensor, state.layout.window, 1024)


def found(engine: Engine, *prompts: dict[str, Any], max_tokens: int = 40) -> str:
    """The error that ends the engine."""
    with pytest.raises(PoisonError) as error:
        engine.generate(*prompts or PROMPTS, max_tokens=max_tokens, patience=60)
    return str(error.value)


def changed(
    function: Callable[..., Any], **changes: Callable[[dict[str, Any]], Any]
) -> Callable[..., Any]:
    """A function that is called with other arguments, by their names."""
    signature = inspect.signature(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, change in changes.items():
            bound.arguments[name] = change(bound.arguments)
        return function(*bound.args, **bound.kwargs)

    return call


def test_nothing_is_found_without_a_defect(engine: Engine) -> None:
    """And the blocks were really poisoned, given more than once and shared."""
    preempted: set[str] = set()

    def watch() -> None:
        preempted.update(
            r.request_id for r in engine.scheduler.requests.values() if r.num_preemptions
        )

    answers = engine.generate(*PROMPTS, max_tokens=60, watch=watch)
    assert preempted
    assert any(answer.cached_tokens for answer in answers)
    poison = engine.state.poison
    assert poison is not None
    assert (poison._generation > 2).any()
    assert engine.state.cache.tensor[:, 0].isnan().all()


def test_a_block_too_many_is_freed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    freed = CacheLayout.freed_blocks
    monkeypatch.setattr(
        CacheLayout, "freed_blocks", lambda *args: freed(*args) and freed(*args) + 1
    )
    text = found(engine)
    assert "was given to it while" in text or " of its row" in text


def test_generated_tokens_are_written_where_vllm_says(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off by the compact blocks."""
    monkeypatch.setattr(torch_ops, "correct_slots", lambda *args: None)
    text = found(engine, PROMPTS[0])
    assert "writes position 112, slot 0: block " in text
    assert "is a compact block" in text


def test_the_scheduler_gives_a_compact_block_too_few(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    register = SparseMMManager.register_prompt

    def register_less(self: SparseMMManager, *args: Any) -> Any:
        prompt = register(self, *args)
        prompt.compact_blocks -= prompt.compact_blocks > 1
        return prompt

    monkeypatch.setattr(SparseMMManager, "register_prompt", register_less)
    assert "blocks in the step that prunes its" in found(engine, PROMPTS[1])


def test_compact_blocks_are_counted_too_few(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By scheduler and worker alike: head pages lie behind them."""
    count = CacheLayout.compact_blocks
    monkeypatch.setattr(CacheLayout, "compact_blocks", lambda *args: count(*args) - 1)
    assert "is not one of its compact blocks" in found(engine, PROMPTS[1])


def test_head_pages_overlap(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    enter = changed(HeadPages.enter, first_pages=lambda a: (a["first_pages"] - 1).clamp(min=0))
    monkeypatch.setattr(HeadPages, "enter", enter)
    assert "holds a kept token there already" in found(engine, PROMPTS[0])


def test_an_index_keeps_what_another_request_had(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.generate(ask(DIGITS, 1, 2), max_tokens=2)
    monkeypatch.setattr(HeadPages, "enter", lambda *args: None)
    assert "is not one of its blocks" in found(engine, PROMPTS[0])


def test_a_row_keeps_another_requests_blocks(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = BlockTables.append_block_ids

    def append_only(
        self: BlockTables, index: int, blocks: tuple[list[int], ...], overwrite: bool
    ) -> None:
        if overwrite:
            self.num_blocks.np[0, index] = len(blocks[0])
        else:
            append(self, index, blocks, overwrite)

    engine.generate(*PROMPTS[:3], max_tokens=2)
    monkeypatch.setattr(BlockTables, "append_block_ids", append_only)
    text = found(engine)
    assert "writes position 0, slot 0" in text
    assert "is not one of its blocks" in text


def test_a_layer_is_not_compacted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    compact = torch_ops.compact_kv
    monkeypatch.setattr(
        torch_ops,
        "compact_kv",
        lambda cache, layer, *args: None if layer == 2 else compact(cache, layer, *args),
    )
    text = found(engine, PROMPTS[0])
    assert " in layer 2: block " in text
    assert "holds NaN there" in text


def test_a_token_behind_the_kept_ones_is_read(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = changed(
        reference.sparse_decode,
        lengths=lambda a: a["lengths"] + 1,
        longest=lambda a: a["longest"] + 1,
    )
    monkeypatch.setattr(reference, "sparse_decode", decode)
    text = found(engine, PROMPTS[0])
    assert "reads entry 7 of its row" in text
    assert "holds NaN there" in text


def test_the_window_begins_too_early(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = changed(reference.sparse_decode, tail_start=lambda a: a["tail_start"] - 1)
    monkeypatch.setattr(reference, "sparse_decode", decode)
    text = found(engine, PROMPTS[0])
    assert "reads position 89, " in text
    assert "held a pruned token" in text


def test_a_pruned_prompt_is_read_as_a_whole(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_pruned = torch_ops._is_pruned
    schedule = torch_ops.schedule_decode

    def schedule_dense(*args: Any) -> None:
        torch_ops._is_pruned = lambda *a: is_pruned(*a) & False  # type: ignore[assignment]
        schedule(*args)
        torch_ops._is_pruned = is_pruned

    monkeypatch.setattr(torch_ops, "schedule_decode", schedule_dense)
    assert "held a pruned token" in found(engine, PROMPTS[0])


def test_a_token_too_many_is_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt that stays whole."""
    attend = changed(cpu_backend.dense_attention, seq_len=lambda a: a["seq_len"] + 1)
    monkeypatch.setattr(cpu_backend, "dense_attention", attend)
    assert "holds nothing there yet" in found(engine, ask(HELLO, 1))


def test_answers_to_pruned_prompts_are_shared(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a next turn would find in the prefix cache is no prompt's."""
    monkeypatch.setattr(SparseMMManager, "cache_blocks", FullAttentionManager.cache_blocks)
    prompt = [5 + i % 90 for i in range(6 * BLOCK)]
    asked = {"prompt_token_ids": prompt}
    (first,) = engine.generate(asked, max_tokens=3 * BLOCK + 1)
    text = found(engine, {"prompt_token_ids": [*prompt, *first.tokens, *range(7, 40)]})
    assert "is a prefix hit, and" in text


def test_a_prefix_was_never_computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = reversed(engine.pool.blocks)
    monkeypatch.setattr(BlockPool, "get_cached_block", lambda *args, **kwargs: [next(blocks)])
    assert "is a prefix hit, and was never computed" in found(engine, PROMPTS[0])


def test_a_prefix_is_of_another_picture(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kv_cache_utils, "generate_block_hash_extra_keys", lambda request, start, *args: (None, 0)
    )
    engine.generate(ask(HELLO, 1), max_tokens=1)
    assert "is a prefix hit, and holds other tokens" in found(engine, ask(HELLO, 2))


def test_kernels_read_unseen_but_not_for_long(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their attention is NaN: two tokens are read behind each head's kept ones."""

    def schedule_more(batch: Any, pages: HeadPages, *args: Any) -> None:
        pages = replace(pages, lengths=pages.lengths + 2)
        torch_ops.schedule_decode(batch, pages, *args)

    ops = {name: getattr(torch_ops, name) for name in torch_ops.__all__}
    ops |= {"schedule_decode": schedule_more, "sparse_decode": triton_ops.sparse_decode}
    monkeypatch.setattr(engine.state, "ops", SimpleNamespace(**ops))
    text = found(engine, PROMPTS[0], max_tokens=2)
    assert "attention of request request-" in text
    assert "position 98, is NaN in layer 0" in text


def test_the_error_names_whoever_it_is(engine: Engine) -> None:
    """A slot that another part of the engine fills with NaN."""

    def spoil() -> None:
        (request,) = engine.scheduler.running
        block = engine.manager.req_to_blocks[request.request_id][-1].block_id
        engine.state.cache.tensor[2, block, 1, 0] = torch.nan

    with pytest.raises(PoisonError) as error:
        engine.generate(ask(HELLO, 1), watch=spoil, patience=60)
    text = str(error.value)
    assert "request request-" in text
    assert "slot 0 in layer 2: block " in text
    assert ", generation " in text
