"""Results that come piece by piece, in a file: a second call goes on from there.

A file says which settings its results were made with. Results of other settings are never mixed
with them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sparsemm_vllm.errors import UserError
from sparsemm_vllm.files import write_whole

Content = TypeVar("Content")
Settings = Mapping[str, Any]

# What readers of JSON, of pydantic's models and of numpy's files raise for damaged ones.
_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile)


class OtherSettingsError(UserError):
    """The file was made with other settings; it is left as it is.

    Attributes:
        name: name of the first setting that differs.
        found: its value in the file; None if it is not there.
        wanted: its value in this call.
    """

    def __init__(self, path: Path, name: str, found: Any, wanted: Any) -> None:
        super().__init__(f"{path} was made with another {name}: {found!r}, not {wanted!r}")
        self.name, self.found, self.wanted = name, found, wanted


class DamagedError(UserError):
    """The file cannot be read; the message says why, without the file's name."""


@dataclass(frozen=True)
class Store(Generic[Content]):
    """A file with results that are replaced as a whole when some are added.

    Attributes:
        path: file; its folder exists when it is saved.
        settings: values that the results depend on, by name; JSON types only.
        read: function from the file's bytes to its settings and its content.
        write: function from settings and content to the file's bytes, or to its text.
    """

    path: Path
    settings: Settings
    read: Callable[[bytes], tuple[Settings, Content]]
    write: Callable[[Settings, Content], bytes | str]

    def load(self) -> Content | None:
        """Content that an earlier call has saved; None if there is no file.

        Raises:
            OtherSettingsError: if it was made with other settings.
            DamagedError: if it cannot be read.
        """
        if not self.path.exists():
            return None
        try:
            found, content = self.read(self.path.read_bytes())
        except _DAMAGE as error:
            raise DamagedError(str(error)) from error
        wanted = json.loads(json.dumps(dict(self.settings)))  # a tuple is a list in a file
        for name in {**wanted, **found}:
            if found.get(name) != wanted.get(name):
                raise OtherSettingsError(self.path, name, found.get(name), wanted.get(name))
        return content

    def save(self, content: Content) -> None:
        """Replace the file, at once or not at all.

        Raises:
            OSError: naming the file, if it cannot be written.
        """
        write_whole(self.path, self.write(self.settings, content))


def json_store(path: Path, settings: Settings) -> Store[dict[str, Any]]:
    """A store of one JSON document; the settings stand in it under their names.

    Args:
        path: file of the document.
        settings: values that the document depends on, by name; JSON types only.
    """

    def read(data: bytes) -> tuple[Settings, dict[str, Any]]:
        document = json.loads(data)
        return {name: document[name] for name in settings}, document

    def write(settings: Settings, document: dict[str, Any]) -> str:
        return json.dumps({**settings, **document}, indent=1) + "\n"

    return Store(path, settings, read, write)
