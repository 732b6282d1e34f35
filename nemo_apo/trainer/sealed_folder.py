"""A folder sealed by a manifest: what was written is what is read, or the folder is refused.

``manifest.json`` holds the size and SHA-256 of every file, what the owner says about the whole,
and the SHA-256 of all that, so that a damaged manifest is known as well. The folder is flat: a
name with a separator, a link or a file that the manifest does not name makes it unfit, so that
nothing outside the folder is ever read. A seal tells damage, not forgery: who can write the
folder can seal it anew. No framework is involved.
"""

import dataclasses
import hashlib
import json
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_apo.trainer.durable_files import FileRecord, read_record, settle_file

MANIFEST_FILE = "manifest.json"
FORMAT = 1


class DamagedFolder(ValueError):
    """A folder that is not what its manifest says; the message says what is wrong."""


@dataclass(frozen=True)
class Manifest:
    """What a sealed folder holds.

    Attributes:
        files: record of each file by name, the manifest itself left out.
        about: what the owner says about the folder; plain JSON.
        sha256: digest of both; two folders with the same digest hold the same bytes.
    """

    files: Mapping[str, FileRecord]
    about: Mapping[str, Any]
    sha256: str


def seal(folder: Path, files: Mapping[str, FileRecord], about: Mapping[str, Any]) -> None:
    """Write the manifest of settled files and settle it.

    Raises:
        DamagedFolder: if the folder does not hold just these files.
    """
    _check_names(files)
    content = {
        "format": FORMAT,
        "files": {name: dataclasses.asdict(record) for name, record in sorted(files.items())},
        "about": about,
    }
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n")
    settle_file(path)
    wrong = shape_faults(folder, files)
    if wrong:
        raise DamagedFolder("; ".join(wrong))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; no other file is looked at.

    Raises:
        DamagedFolder: if it is missing, damaged, or names what lies outside the folder.
    """
    content = _parsed(folder / MANIFEST_FILE)
    if not isinstance(content, dict) or content.pop("sha256", None) != _digest(content):
        raise DamagedFolder(f"{MANIFEST_FILE} does not match its own digest")
    if content.get("format") != FORMAT:
        raise DamagedFolder(
            f"{MANIFEST_FILE} has format {content.get('format')}, expected {FORMAT}"
        )
    try:
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        about = dict(content["about"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DamagedFolder(f"{MANIFEST_FILE} lacks the records of its files") from None
    _check_names(files)
    return Manifest(files, about, _digest(content))


def shape_faults(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """What is wrong with the names, kinds and sizes of a folder's files; reads no content."""
    try:
        found = {path.name: path.lstat() for path in folder.iterdir()}
    except OSError as error:
        return [f"the folder cannot be read: {error}"]
    found.pop(MANIFEST_FILE, None)
    faults = [f"{name} is not in the manifest" for name in sorted(found.keys() - files.keys())]
    for name, record in files.items():
        if name not in found:
            faults.append(f"{name} is missing")
        elif not stat.S_ISREG(found[name].st_mode):
            faults.append(f"{name} is no regular file")
        elif found[name].st_size != record.size:
            faults.append(f"{name} has {found[name].st_size} bytes, not {record.size}")
    return faults


def content_faults(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """What is wrong with the content of some of a folder's files."""
    faults = []
    for name in names:
        try:
            same = read_record(folder / name) == manifest.files[name]
        except OSError as error:
            faults.append(f"{name} cannot be read: {error}")
            continue
        if not same:
            faults.append(f"the content of {name} has changed")
    return faults


def _parsed(path: Path) -> Any:
    try:
        is_file = stat.S_ISREG(path.lstat().st_mode)
        text = path.read_bytes() if is_file else b""
    except OSError as error:
        known = {FileNotFoundError: "is missing", NotADirectoryError: "is missing"}
        raise DamagedFolder(f"{path.name} {known.get(type(error), error)}") from None
    if not is_file:
        raise DamagedFolder(f"{path.name} is no regular file")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedFolder(f"{path.name} is no JSON") from None


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_names(files: Mapping[str, FileRecord]) -> None:
    outside = [name for name in files if not _is_inside(name)]
    if outside:
        raise DamagedFolder(f"{MANIFEST_FILE} names {outside[0]!r}, which is no file of the folder")


def _is_inside(name: str) -> bool:
    forbidden: Collection[str] = ("", ".", "..", MANIFEST_FILE)
    return name not in forbidden and not set(name) & set("/\\\0")
