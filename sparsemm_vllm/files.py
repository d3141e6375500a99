"""Files that are never half written."""

import json
import os
import secrets
from pathlib import Path
from typing import Any


def write_whole(path: Path | str, content: str | bytes, durable: bool = True) -> None:
    """Write a file so that there is never half of one: an interrupted write changes nothing.

    The content goes to a temporary file in the same folder, to the disk, and only then in place of
    what was there. A symbolic link is followed.

    Args:
        path: file to write or replace.
        content: whole content; text is written as UTF-8.
        durable: whether to wait for the disk. Without it a machine that loses its power may lose
            the file. That is right for files that only running processes read.

    Raises:
        OSError: naming `path`, if its folder does not exist or cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        _replace(Path(path).resolve(), data, durable)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path | str, document: Any) -> None:
    """Write a JSON document whole, indented by one blank; see `write_whole`.

    Args:
        path: file to write or replace.
        document: content, of JSON types only.

    Raises:
        OSError: naming `path`, if its folder does not exist or cannot be written.
    """
    write_whole(path, json.dumps(document, indent=1) + "\n")


def _replace(target: Path, data: bytes, durable: bool) -> None:
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    # Not tempfile: its files are private to the user, others may be meant to read a profile.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
