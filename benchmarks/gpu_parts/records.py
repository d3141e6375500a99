"""What a part has found out so far, on disk after every case."""

import re
from pathlib import Path
from typing import Any

from sparsemm_vllm.files import write_whole
from sparsemm_vllm.store import OtherSettingsError, json_store


class Record:
    """``<part>.partial.json`` while the part runs, ``<part>.json`` when every case has passed.

    Attributes:
        data: ``source``, a digest of the code, ``names`` of all cases, ``cases`` that passed, by
            name, those that ``failed`` in this call with their errors, those that failed
            ``earlier``, those that are ``running``, the machine, and the seconds of all calls.

    Raises:
        SystemExit: if there are files of the other kind of run, dry or not.
    """

    def __init__(self, folder: Path, part: str, dry: bool, code: str) -> None:
        self.part = part
        self.final = folder / f"{part}.json"
        self.partial = folder / f"{part}.partial.json"
        self.failures = folder / f"{part}.failed.txt"
        self.data: dict[str, Any] = {"part": part, "dry_run": dry, "source": code}
        self.data |= {"seconds": 0.0, "total": None, "names": [], "running": []}
        self.data |= {"cases": {}, "failed": {}, "earlier": []}
        self._store = json_store(self.partial, {"dry_run": dry})
        for store in (json_store(self.final, {"dry_run": dry}), self._store):
            try:
                found = store.load()
            except OtherSettingsError:
                raise SystemExit(
                    f"{store.path} is of another kind of run; give another --out"
                ) from None
            if found and (store.path == self.final or found["source"] == code):
                self.data = found  # half a part of other code counts for nothing
                break

    @property
    def complete(self) -> bool:
        """Whether every case has passed."""
        return self.data["total"] is not None and len(self.data["cases"]) == self.data["total"]

    def done(self, pattern: str) -> bool:
        """Whether every case has passed in whose name the regular expression finds something."""
        asked = [name for name in self.data["names"] if re.search(pattern, name)]
        return bool(asked) and all(name in self.data["cases"] for name in asked)

    def save(self) -> None:
        """Write what there is, at once or not at all."""
        self._store.save(self.data)

    def finish(self) -> None:
        """Write the failures, or the final file."""
        self.failures.unlink(missing_ok=True)
        self.save()
        if self.data["failed"]:
            errors = (f"== {name}\n{error}\n" for name, error in self.data["failed"].items())
            write_whole(self.failures, "\n".join(errors))
        elif self.complete:
            self.partial.replace(self.final)

    @property
    def status(self) -> str:
        """State in one word."""
        if self.data["failed"]:
            return "failed"
        if self.complete:
            return "done"
        return "unfinished" if self.partial.exists() else "not begun"
