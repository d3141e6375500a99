"""What the tests of broken workers add to vLLM's worker class (`worker_extension_cls`)."""

import time
from typing import Any


class SlowWorker:
    """Lets a test make one rank slow."""

    rank: int
    execute_model: Any

    def take(self, seconds: float, rank: int) -> None:
        """From now on a step of that rank takes so much longer."""
        if self.rank == rank:
            self.execute_model = _slowly(type(self).execute_model.__get__(self), seconds)


def _slowly(execute_model: Any, seconds: float) -> Any:
    def slow_execute_model(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return execute_model(*args, **kwargs)

    return slow_execute_model
