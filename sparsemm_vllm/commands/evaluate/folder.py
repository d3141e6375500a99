"""Where an evaluation keeps what is done: a second call goes on from there."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sparsemm_vllm.commands.evaluate.engine import Result
from sparsemm_vllm.commands.evaluate.errors import EvalError
from sparsemm_vllm.commands.evaluate.points import Point
from sparsemm_vllm.files import write_whole


class EvalFolder:
    """A folder for points of one configuration.

    ``configuration.json`` says which, ``points/`` holds a result a point, ``logs/`` vLLM's logs.

    Args:
        path: folder; it is made if it does not exist.
        configuration: values that all points have in common; JSON types only.

    Raises:
        EvalError: if the folder holds points of another configuration, or other things.
    """

    def __init__(self, path: Path, configuration: dict[str, Any]) -> None:
        self.path = path
        own = path / "configuration.json"
        if own.exists():
            _check_same(path, json.loads(own.read_bytes()), configuration)
        elif path.exists() and any(path.iterdir()):
            raise EvalError(f"{path} holds no evaluation, but other files; name another folder")
        path.mkdir(parents=True, exist_ok=True)
        write_whole(own, json.dumps(configuration, indent=1) + "\n")
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

        Raises:
            EvalError: if it cannot be read, or was measured with other settings.
        """
        path = self.point(point)
        if not path.exists():
            return None
        try:
            result = Result.model_validate_json(path.read_bytes())
        except ValidationError:
            raise EvalError(f"{path} is damaged; delete it to measure the point again") from None
        if result.settings != settings:
            raise EvalError(f"{path} was measured with other settings; name another folder")
        return result


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in wanted | found:
        if found.get(key) != wanted.get(key):
            raise EvalError(
                f"{path} holds an evaluation with another {key} ({found.get(key)!r}, not "
                f"{wanted.get(key)!r}); name another folder"
            )
