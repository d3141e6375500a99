"""What a run has scored so far, on the disk, so that it can be continued."""

import io
import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sparsemm_vllm.files import write_whole
from sparsemm_vllm.profiler.attention import Scores
from sparsemm_vllm.profiler.errors import ProfilerError


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
        seed: seed that they were chosen with.
    """

    model_id: str
    config_hash: str
    mode: str
    data: str
    data_hash: str
    samples: int
    seed: int


class Partial:
    """A file beside the profile, replaced after each batch."""

    def __init__(self, path: Path, run: Run) -> None:
        self.path = path
        self._run = run

    def load(self) -> Scores | None:
        """What an interrupted run scored; none if there is no such file.

        Raises:
            ProfilerError: if it is of another run, or no such file at all.
        """
        if not self.path.exists():
            return None
        try:
            with np.load(self.path) as data:
                run = json.loads(str(data["run"]))
                scores = Scores(data["hits"], data["tokens"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ProfilerError(
                f"{self.path} cannot be read ({error}); delete it to start anew"
            ) from None
        mine = asdict(self._run)
        differing = [name for name in mine if run.get(name) != mine[name]]
        if differing:
            name = differing[0]
            raise ProfilerError(
                f"{self.path} is of another run: its {name} is {run.get(name)!r}, this one's "
                f"{mine[name]!r}; repeat that run's options, or delete the file to start anew"
            )
        return scores

    def save(self, scores: Scores) -> None:
        """Keep what has been scored, whole."""
        run = json.dumps(asdict(self._run))
        buffer = io.BytesIO()
        np.savez(buffer, run=run, hits=scores.hits, tokens=scores.tokens)
        write_whole(self.path, buffer.getvalue())
