"""What a run finds: rows of the table, and the lines of JSON in which they reach the parent."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["ok", "differs", "failed", "not run"]


class Row(BaseModel):
    """One line of the table.

    Attributes:
        name: name of what was served.
        status: result in a word: `ok`; `differs` from the reference or the formula; `failed` or
            `not run` if there is nothing to compare.
        tokens: number of generated tokens that were compared; none if there is no answer.
        difference: largest difference of their log-probabilities.
        blocks: KV blocks that were held, one number after the other.
        finding: sentence on what was seen, or on what is wrong.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    status: Status
    tokens: int | None = None
    difference: float | None = None
    blocks: str = ""
    finding: str = ""


class Line(BaseModel):
    """One line of the results: one of these.

    Attributes:
        begins: name of the row that is worked on from now on.
        device: name of what the engine runs on.
        row: result of a row.
    """

    model_config = ConfigDict(extra="forbid")

    begins: str | None = None
    device: str | None = None
    row: Row | None = None


class Results:
    """The file of results, written line by line."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("a", buffering=1, encoding="utf-8")

    def write(self, **line: Any) -> None:
        """Write a line; see `Line`."""
        self._file.write(Line(**line).model_dump_json(exclude_defaults=True) + "\n")

    def run(self, name: str, work: Callable[[], Row]) -> bool:
        """Do the work of a row and write it; an exception becomes a row that failed.

        Returns:
            Whether there was no exception.
        """
        self.write(begins=name)
        try:
            row = work()
        except Exception as error:  # whatever a release of vLLM raises; the log has the traceback
            traceback.print_exc()
            place = traceback.extract_tb(error.__traceback__)[-1]
            first_line = str(error).strip().partition("\n")[0]
            where = f"{Path(place.filename).name}, line {place.lineno}"
            finding = f"{type(error).__name__}: {first_line} ({where})"
            self.write(row=Row(name=name, status="failed", finding=finding))
            return False
        self.write(row=row.model_copy(update={"name": name}))
        return True
