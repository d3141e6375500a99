"""Counting requests beside the scheduler."""

from sparsemm_vllm.engine.scheduler.stats import REMEMBERED, Outcome, RequestStats


def test_counts_are_those_since_the_last_time() -> None:
    stats = RequestStats()
    stats.complete("a", Outcome.PRUNED, 100, 20.5)
    stats.complete("b", Outcome.PRUNED, 200, 30.0)
    stats.complete("c", Outcome.TOO_SHORT, 7, 7.0)
    stats.free("a", 5, 2)
    drained = stats.drain(table_entries=30)
    assert drained["requests"] == {"pruned": 2, "too_short": 1}
    assert drained["prompt_tokens"] == {"pruned": 300, "too_short": 7}
    assert drained["kept_tokens"] == {"pruned": 50.5, "too_short": 7}
    assert (drained["held_blocks"], drained["dense_blocks"]) == (25, 28)
    assert [record["request_id"] for record in drained["recent"]["requests"]] == ["c", "b", "a"]
    again = stats.drain(table_entries=30)
    assert again["requests"] == again["prompt_tokens"] == again["kept_tokens"] == {}
    assert again["freed_blocks"] == 0
    assert (again["held_blocks"], again["dense_blocks"]) == (25, 28)
    assert "recent" not in again


def test_blocks_are_freed_once_and_again_after_a_preemption() -> None:
    stats = RequestStats()
    stats.complete("a", Outcome.PRUNED, 100, 20.0)
    for _ in range(3):
        stats.free("a", 5, 2)
    assert stats.drain(10)["freed_blocks"] == 5
    stats.release("a")  # preempted
    assert stats.drain(0)["held_blocks"] == 0
    assert stats.knows("a")
    stats.free("a", 5, 2)
    assert stats.drain(10)["freed_blocks"] == 5


def test_what_ended_is_forgotten_but_for_the_last() -> None:
    stats = RequestStats()
    for i in range(REMEMBERED + 5):
        stats.complete(f"r{i}", Outcome.TOO_SHORT, 9, 9.0)
    stats.end_others({"r36"})
    assert stats.knows("r36")
    assert not stats.knows("r35")
    recent = stats.drain(0)["recent"]["requests"]
    assert len(recent) == REMEMBERED
    assert recent[0]["request_id"] == "r36"
    assert recent[0]["finished"] is None
    assert all(record["finished"] >= record["completed"] for record in recent[1:])
    stats.end_others({"r36"})
    assert "recent" not in stats.drain(0)
