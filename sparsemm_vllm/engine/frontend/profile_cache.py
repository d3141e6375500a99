"""Profiles that were made for this user's models, kept between runs."""

import hashlib
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from vllm.logger import init_logger

from sparsemm_vllm.budget.profile import HeadProfile, ProfileError, load_profile, save_profile
from sparsemm_vllm.environment import cache_folder
from sparsemm_vllm.files import write_whole

logger = init_logger("vllm.sparsemm.cache")

SAY_EVERY = 60.0  # seconds


class ProfileCache:
    """The profile of one model, in the user's cache, or in `/tmp` where that cannot be written.

    Args:
        model: name or path of the model.
        config_hash: hash of its configuration. The same name may stand for another model later.
    """

    def __init__(self, model: str, config_hash: str) -> None:
        readable = re.sub(r"[^\w.-]+", "-", Path(model).name)[:80]
        digest = hashlib.sha256(f"{model}\n{config_hash}".encode()).hexdigest()[:16]
        self._config_hash = config_hash
        self._files = [folder / f"{readable}-{digest}.json" for folder in _folders()]

    @property
    def file(self) -> Path:
        """Where the profile belongs."""
        return self._files[0]

    def load(self) -> tuple[HeadProfile, Path] | None:
        """The profile and its file, if there is one that can be used."""
        for file in self._files:
            if not file.is_file():
                continue
            try:
                profile = load_profile(str(file))
            except ProfileError as error:  # written by another release, or damaged: made again
                logger.warning("SPARSEMM: %s; it is not used", error)
                continue
            if profile.config_hash in (None, self._config_hash):
                return profile, file
        return None

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Only one process at a time makes the profile; the others wait here, and say so.

        Yields:
            Whether there is a lock: no folder may take one.
        """
        lock = self._open_lock()
        if lock is None:
            yield False
            return
        holder = Path(f"{lock.lock_file}.holder")
        with suppress(OSError):  # only what those who wait say depends on it
            said = f"process {os.getpid()} on {socket.gethostname()}"
            write_whole(holder, said, durable=False)
        try:
            yield True
        finally:
            with suppress(OSError):
                holder.unlink()
            lock.release()

    def _open_lock(self) -> FileLock | None:
        for file in self._files:
            try:
                file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                return _acquired(FileLock(f"{file}.lock"))
            except OSError as error:
                logger.warning("SPARSEMM: %s cannot be written: %s", file.parent, error.strerror)
        return None

    def save(self, profile: HeadProfile) -> Path | None:
        """Keep a profile, and say where; none if no folder takes it, which is not an error."""
        for file in self._files:
            try:
                file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                save_profile(profile, file)
            except OSError as error:
                logger.warning("SPARSEMM: the head profile was not kept in %s: %s",
                               file.parent, error.strerror)  # fmt: skip
            else:
                return file
        return None


def _acquired(lock: FileLock) -> FileLock:
    """Wait for a lock as long as another process holds it; a process that ends lets go of it."""
    since = time.monotonic()
    patience = 0.0
    while True:
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            logger.warning(
                "SPARSEMM: waiting for %s, which makes this model's head profile (%.0f s so far)",
                _holder(lock), time.monotonic() - since,
            )  # fmt: skip
            patience = SAY_EVERY
        else:
            return lock


def _holder(lock: FileLock) -> str:
    try:
        return Path(f"{lock.lock_file}.holder").read_text("utf-8")
    except (OSError, ValueError):
        return "another process"


def _folders() -> list[Path]:
    """The user's cache, and for want of it a folder in `/tmp`, unless somebody else made that."""
    spare = Path(tempfile.gettempdir()) / f"sparsemm-{os.getuid()}"
    if os.path.lexists(spare) and (spare.is_symlink() or spare.stat().st_uid != os.getuid()):
        return [cache_folder()]
    return [cache_folder(), spare]
