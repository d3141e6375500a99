"""What a run has scored so far, on the disk, so that it can be continued."""

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sparsemm_vllm.profiler.attention import Scores
from sparsemm_vllm.profiler.errors import ProfilerError
from sparsemm_vllm.store import DamagedError, OtherSettingsError, Settings, Store


@dataclass(frozen=True)
class Run:
    """What the scores depend on; a run is continued with equal ones only.

    Attributes:
        model_id: name of the model.
        config_hash: hash of its configuration.
        mode: name in `MODES`.
        data: name of the data set.
        data_hash: hash of its samples.
        samples: number of samples.
        seed: seed of their choice.
    """

    model_id: str
    config_hash: str
    mode: str
    data: str
    data_hash: str
    samples: int
    seed: int


class Partial:
    """A file beside the profile, replaced after each batch.

    Args:
        path: file of the scores so far.
        run: run that they belong to.
    """

    def __init__(self, path: Path, run: Run) -> None:
        self.path = path
        self._store = Store(path, asdict(run), _read, _write)

    def load(self) -> Scores | None:
        """What an interrupted run scored; none if there is no such file.

        Raises:
            ProfilerError: if it is of another run, or no such file at all.
        """
        try:
            return self._store.load()
        except DamagedError as error:
            raise ProfilerError(
                f"{self.path} cannot be read ({error}); delete it to start anew"
            ) from None
        except OtherSettingsError as error:
            raise ProfilerError(
                f"{self.path} is of another run: its {error.name} is {error.found!r}, this one's "
                f"{error.wanted!r}; repeat that run's options, or delete the file to start anew"
            ) from None

    def save(self, scores: Scores) -> None:
        """Keep what has been scored, whole."""
        self._store.save(scores)


def _read(data: bytes) -> tuple[Settings, Scores]:
    with np.load(io.BytesIO(data)) as arrays:
        return json.loads(str(arrays["run"])), Scores(arrays["hits"], arrays["tokens"])


def _write(run: Settings, scores: Scores) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, run=json.dumps(run), hits=scores.hits, tokens=scores.tokens)
    return buffer.getvalue()
