"""Writing files so that a reader sees the old content or the new, never a half."""

import os
import re
import secrets
import shutil
from pathlib import Path

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def temporary_beside(path: Path) -> Path:
    """A hidden name beside `path` that nothing has and that TEMPORARY matches."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def free_megabytes(folder: Path) -> float:
    """Room on the disk of a folder, which need not exist yet, in MB."""
    there = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    return shutil.disk_usage(there).free / 1e6


def write_atomically(path: Path, content: bytes | str) -> Path:
    """Write to a temporary name beside `path`, flush to the disk, rename; the folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        write_through(temporary, content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return path


def write_through(path: Path, content: bytes) -> None:
    """Write and flush to the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk, where the system can (Windows cannot)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
