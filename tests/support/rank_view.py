"""What the parallel tests add to vLLM's worker class (`worker_extension_cls`)."""

from typing import Any


class RankView:
    """Lets a test look at a rank's side of the pruned requests."""

    model_runner: Any

    def view(self) -> dict[str, Any]:
        """The rank's slice of the layout, and blocks by prompt length of what it has served."""
        state = self.model_runner.model_state._state
        served = [
            (int(n), int(compact), state.layout.freed_blocks(int(n), state.page_size))
            for n, compact in zip(state.prompt_tokens, state.compact_blocks, strict=True)
            if n
        ]
        return {
            "layout": repr(state.layout),
            "own": [[part.start, part.stop] for part in state.own],
            "served": sorted(served),
        }

    def shards_sampling(self) -> bool:
        """Whether the rank samples a part of the batch only."""
        return self.model_runner.batch_sharder is not None
