"""Files that survive a crash of the process or of the machine; no framework is involved.

A file is durable once it and the folder that names it are written out (``fsync``). Until then a
power cut may leave a new name with old content, or no name at all.
"""

import hashlib
import os
import secrets
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# Folders that are being written or removed; never taken for anything else.
PARTIAL, REMOVED = ".partial_", ".removed_"
_CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and the SHA-256 of its content, in hex."""

    size: int
    sha256: str


def settle_file(path: Path) -> FileRecord:
    """Write a file out to disk; its record is read back in the meantime."""
    with path.open("rb") as file, ThreadPoolExecutor(1) as pool:
        written_out = pool.submit(os.fsync, file.fileno())
        record = _record(file)
        written_out.result()
    return record


def read_record(path: Path) -> FileRecord:
    """The record of a file as it is now.

    Raises:
        OSError: if it cannot be read or is a symbolic link.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        return _record(file)


def _record(file: BinaryIO) -> FileRecord:
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Write the names in a folder out to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path) -> None:
    """Make a folder and those above it that are missing, and write their names out to disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Give a file a new content: after a crash it holds the old one or the new one, whole."""
    aside = path.with_name(f"{PARTIAL}{path.name}")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    sync_folder(path.parent)


def make_partial(root: Path, name: str) -> Path:
    """A fresh folder in which ``name`` is to be prepared.

    Its name is used once: a writer that outlives the job it belonged to cannot meet the next.
    """
    make_folders(root)
    partial = root / f"{PARTIAL}{name}.{secrets.token_hex(4)}"
    partial.mkdir()
    return partial


def publish(partial: Path, folder: Path) -> None:
    """Give a prepared folder its name, by one rename; every file in it has been settled."""
    sync_folder(partial)
    partial.rename(folder)
    sync_folder(folder.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder: after a crash it is there whole, or gone but for a hidden left-over."""
    hidden = folder.with_name(f"{REMOVED}{folder.name}.{secrets.token_hex(4)}")
    folder.rename(hidden)
    sync_folder(folder.parent)
    shutil.rmtree(hidden)


def remove_leftovers(root: Path) -> None:
    """Remove what interrupted writes and removals left in a folder."""
    for prefix in (PARTIAL, REMOVED):
        for path in root.glob(f"{prefix}*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
