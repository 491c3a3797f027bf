"""One process at a time in a run folder: a lock file that names process and host.

A lock whose process is gone is taken over. Whether a process on another machine lives cannot be seen from here, so
there the age of the file counts, which a training refreshes as it goes.
"""

import contextlib
import json
import os
import secrets
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from lora_nb.errors import CheckpointError

FILE = ".lock"
SILENT = 300.0  # seconds after which a lock of another machine counts as left behind
REFRESHED = 30.0  # seconds between signs of life


class Lock:
    """The claim of one training on its folder; within a process the newest training has it."""

    def __init__(self, folder: Path):
        """Claim the folder and make it if need be; raises CheckpointError if another process has it."""
        self.file, self.token = folder / FILE, secrets.token_hex(8)
        self._new, self._pid, self._refreshed = not folder.exists(), os.getpid(), time.monotonic()
        started = psutil.Process().create_time()
        owner = {"pid": self._pid, "host": socket.gethostname(), "started": started}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _make_way(self.file)
            with open(self.file, "x", encoding="utf-8") as file:
                file.write(json.dumps(owner | {"token": self.token}))
        except OSError as error:
            raise CheckpointError(
                f"The run folder {folder} cannot be written to ({error.strerror}): choose another output_dir, or free "
                "it for this user."
            ) from error

    def held(self) -> bool:
        """Whether the claim still stands; a newer training of this process, or a person, may have ended it."""
        try:
            return _read(self.file).get("token") == self.token
        except OSError:  # a failing disk takes no claim away; the next save says what is wrong
            return True

    def refresh(self) -> None:
        """A sign of life for other machines, now and then."""
        if time.monotonic() - self._refreshed > REFRESHED:
            self._refreshed = time.monotonic()
            with contextlib.suppress(OSError):  # a deleted folder shows at the next save
                os.utime(self.file)

    def release(self) -> None:
        """Give the folder back; an empty one that was made for this claim goes too."""
        if os.getpid() != self._pid or not self.held():  # a forked child does not own it
            return
        with contextlib.suppress(OSError):
            self.file.unlink()
            if self._new:
                self.file.parent.rmdir()  # refuses unless empty


class Claim:
    """The lock of a training: taken while it is made, given back when its loop ends, taken again by the next loop.

    Only the main process of a training claims the folder; for the others there is nothing to do.
    """

    def __init__(self, folder: Path, main: bool):
        self.folder, self.main = folder, main

    def take(self) -> None:
        """Claim the folder, until `release` or the end of the training's life; raises as Lock does."""
        if self.main:
            self._lock = Lock(self.folder)
            weakref.finalize(self, self._lock.release)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Claim the folder, and give it back at once if what is done inside fails."""
        self.take()
        try:
            yield
        except BaseException:
            self.release()
            raise

    def held(self) -> bool:
        """Whether the claim still stands; see Lock."""
        return not self.main or self._lock.held()

    def refresh(self) -> None:
        """A sign of life, now and then."""
        if self.main:
            self._lock.refresh()

    def release(self) -> None:
        """Give the folder back."""
        if self.main:
            self._lock.release()


def _make_way(file: Path) -> None:
    """Remove a lock that is left behind or this process's own; raises CheckpointError for a living owner."""
    owner = _read(file)
    if not file.exists():
        return
    if _left_behind(file, owner):
        file.unlink(missing_ok=True)
        return
    raise CheckpointError(
        f"Process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown machine')} is training in "
        f"{file.parent}: stop it or choose another output_dir; if it is gone for sure, delete {file}."
    )


def _left_behind(file: Path, owner: dict[str, Any]) -> bool:
    if owner.get("host") != socket.gethostname():
        return time.time() - file.stat().st_mtime > SILENT
    if owner["pid"] == os.getpid():
        return True
    try:
        # The number may have gone to another process since; starts seconds apart are two processes.
        return abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) > 5
    except psutil.NoSuchProcess:
        return True


def _read(file: Path) -> dict[str, Any]:
    """What the lock says; empty if it is not there or was cut off."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
