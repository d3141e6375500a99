"""Files that are never half written."""

import os
import secrets
from pathlib import Path


def write_whole(path: Path | str, content: str | bytes) -> None:
    """Write a file so that there is never half of one: an interrupted write changes nothing.

    The content goes to a temporary file in the same folder, to the disk, and only then in place of
    what was there. A symbolic link is followed.

    Args:
        path: file to write or replace.
        content: whole content of the file; text is written as UTF-8.

    Raises:
        OSError: naming `path`, if its folder does not exist or cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        _replace(Path(path).resolve(), data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _replace(target: Path, data: bytes) -> None:
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    # Not tempfile: its files are private to the user, others may be meant to read a profile.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is on the disk too
    finally:
        os.close(folder)
