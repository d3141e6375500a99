"""Where an evaluation keeps what is done: a second call goes on from there."""

import json
from pathlib import Path
from typing import Any

from sparsemm_vllm.commands.evaluate.engine import Result, result_store
from sparsemm_vllm.commands.evaluate.errors import EvalError
from sparsemm_vllm.commands.evaluate.points import Point
from sparsemm_vllm.store import DamagedError, OtherSettingsError, Settings, Store


class EvalFolder:
    """A folder for points of one configuration.

    ``configuration.json`` says which, ``points/`` holds a result a point, ``logs/`` vLLM's logs.

    Args:
        path: folder; it is made if it does not exist.
        configuration: values that all points have in common, by name; JSON types only.

    Raises:
        EvalError: if the folder holds points of another configuration, or other things.
    """

    def __init__(self, path: Path, configuration: dict[str, Any]) -> None:
        self.path = path
        own = Store(path / "configuration.json", configuration, _read, _write)
        if not own.path.exists() and path.exists() and any(path.iterdir()):
            raise EvalError(f"{path} holds no evaluation, but other files; name another folder")
        try:
            own.load()
        except OtherSettingsError as other:
            raise EvalError(
                f"{path} holds an evaluation with another {other.name} ({other.found!r}, not "
                f"{other.wanted!r}); name another folder"
            ) from None
        except DamagedError:
            raise EvalError(f"{own.path} is damaged; name another folder") from None
        path.mkdir(parents=True, exist_ok=True)
        own.save(None)
        for folder in ("points", "logs"):
            (path / folder).mkdir(exist_ok=True)

    def point(self, point: Point) -> Path:
        """The file of a point's result."""
        return self.path / "points" / f"{point.name}.json"

    def log(self, point: Point) -> Path:
        """The log of its engine."""
        return self.path / "logs" / f"{point.name}.log"

    def load(self, point: Point, settings: dict[str, Any]) -> Result | None:
        """A point's result, if it is there.

        Args:
            point: point that was measured.
            settings: settings of SPARSEMM that it must have been measured with.

        Raises:
            EvalError: if it cannot be read, or was measured with other settings.
        """
        path = self.point(point)
        try:
            return result_store(path, settings).load()
        except DamagedError:
            raise EvalError(f"{path} is damaged; delete it to measure the point again") from None
        except OtherSettingsError:
            raise EvalError(
                f"{path} was measured with other settings; name another folder"
            ) from None


def _read(data: bytes) -> tuple[Settings, None]:
    """A configuration, which is all that its file holds."""
    return json.loads(data), None


def _write(configuration: Settings, nothing: None) -> str:
    return json.dumps(configuration, indent=1) + "\n"
