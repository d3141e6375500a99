"""Where results go: ``benchmarks/results/<device>/<date>/<benchmark>.json``, resumable."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from gpu_parts.records import ROOT, machine

RESULTS = ROOT / "benchmarks" / "results"


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
        file: that is continued or made.
        asked: what all cells have in common, as JSON can hold it.
        cpu: whether there is no GPU.

    Attributes:
        cells: by name.
        skipped: reasons why variants are left out, by their names.

    Raises:
        SystemExit: if the file holds something else.
    """

    def __init__(self, file: Path, asked: dict[str, Any], cpu: bool) -> None:
        self.file = file
        self.data: dict[str, Any] = {"asked": asked, "machine": machine(cpu)}
        self.data |= {"skipped": {}, "cells": {}}
        if file.exists():
            found = json.loads(file.read_text())
            if found["asked"] != json.loads(json.dumps(asked)):
                raise SystemExit(f"{file} holds other measurements; give another --out")
            self.data["cells"] = found["cells"]
            self.data["skipped"] = found.get("skipped", {})

    @classmethod
    def of(cls, benchmark: str, asked: dict[str, Any], cpu: bool, file: Path | None) -> Results:
        """In the file given, or in today's folder of this device."""
        if file is None:
            file = results_folder(machine(cpu)["device"]) / f"{benchmark}.json"
        return cls(file, asked, cpu)

    @property
    def cells(self) -> dict[str, Any]:
        return self.data["cells"]

    @property
    def skipped(self) -> dict[str, str]:
        return self.data["skipped"]

    def save(self, name: str, cell: dict[str, Any]) -> None:
        """Write a cell and the commit it was measured at, at once or not at all."""
        self.cells[name] = cell | {"commit": self.data["machine"]["commit"]}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".tmp")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        part.replace(self.file)


class Deadline:
    """So many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()
