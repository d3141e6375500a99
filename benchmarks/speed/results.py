"""Where results go: ``benchmarks/results/<device>/<date>/<benchmark>.json``, resumable."""

import re
import time
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Self

from common import RESULTS, machine

from sparsemm_vllm.store import OtherSettingsError, json_store


def results_folder(device: str, day: date | None = None, root: Path = RESULTS) -> Path:
    """A day's folder of a device.

    Args:
        device: name of the device, as its driver says it.
        day: day of the measurements; today if not given.
        root: folder of all results.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return root / slug / (day or datetime.now(UTC).date()).isoformat()


class Results:
    """Cells of one benchmark in a JSON file that is written after each of them.

    A cell that is there is not measured again, so a run of several pieces adds up. Cells of other
    settings are never mixed with these: the file says what was asked.

    Args:
        file: file that is continued or made.
        asked: values that all cells have in common, by name; JSON types only.
        cpu: whether there is no GPU.

    Attributes:
        cells: figures by the cell's name.
        skipped: reasons why variants are left out, by their names.

    Raises:
        SystemExit: if the file holds something else.
    """

    def __init__(self, file: Path, asked: dict[str, Any], cpu: bool) -> None:
        self.file = file
        self._store = json_store(file, {"asked": asked})
        try:
            found = self._store.load() or {}
        except OtherSettingsError:
            raise SystemExit(f"{file} holds other measurements; give another --out") from None
        self.cells: dict[str, Any] = found.get("cells", {})
        self.skipped: dict[str, str] = found.get("skipped", {})
        self.data = {"asked": asked, "machine": machine(cpu)}
        self.data |= {"skipped": self.skipped, "cells": self.cells}

    @classmethod
    def of(cls, benchmark: str, asked: dict[str, Any], cpu: bool, file: Path | None) -> Self:
        """Results in the file given, or in today's folder of this device."""
        if file is None:
            file = results_folder(machine(cpu)["device"]) / f"{benchmark}.json"
        return cls(file, asked, cpu)

    def save(self, name: str, cell: dict[str, Any]) -> None:
        """Write a cell and the commit it was measured at, at once or not at all."""
        self.cells[name] = cell | {"commit": self.data["machine"]["commit"]}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._store.save(self.data)


class Deadline:
    """A moment.

    Args:
        seconds: time until then.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until then; negative when it is over."""
        return self._end - time.monotonic()
