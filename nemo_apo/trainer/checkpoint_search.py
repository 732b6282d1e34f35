"""Which checkpoint to go on from: the newest whose seal holds, the same one on every rank."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from nemo_apo.config import ConfigError
from nemo_apo.parallel.together import RankError, Result, on_first, together
from nemo_apo.trainer.durable_files import sync_folder
from nemo_apo.trainer.sealed_folder import (
    DamagedFolder,
    Manifest,
    content_faults,
    read_manifest,
    shape_faults,
)

# A step that was saved again, after its first checkpoint turned out damaged or within the rollout
# that follows it, has a second number.
_NAME = re.compile(r"step_(\d{6,})(?:\.(\d+))?")
DAMAGED = "damaged_"


class CheckpointError(ConfigError):
    """A checkpoint that cannot be resumed from."""


@dataclass(frozen=True)
class Verified:
    """A folder whose seal every rank has found whole; made by ``verify`` alone."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class Found:
    """The checkpoint to resume from, and newer ones that are damaged, each with the reason."""

    newest: Verified
    damaged: tuple[tuple[Path, str], ...]


def order(folder: Path) -> tuple[int, int]:
    """Step and attempt that a checkpoint's name states."""
    match = _NAME.fullmatch(folder.name)
    assert match is not None, folder
    return int(match[1]), int(match[2] or 0)


def checkpoint_folders(root: Path) -> list[Path]:
    """What is named like a checkpoint, newest first; nothing is verified."""
    if not root.is_dir():
        return []
    named = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=order, reverse=True)


def free_name(root: Path, step: int) -> Path:
    """The folder of a step's next checkpoint; it replaces none that is there."""
    taken = [order(folder)[1] for folder in checkpoint_folders(root) if order(folder)[0] == step]
    attempt = f".{max(taken) + 1}" if taken else ""
    return root / f"step_{step:06d}{attempt}"


def newest_verified(root: Path) -> Found | None:
    """The newest checkpoint that is whole, or None where there is no checkpoint; collective.

    Raises:
        CheckpointError: if there are checkpoints and none is whole, or if ranks see different
            ones; on every rank.
    """
    damaged: list[tuple[Path, str]] = []
    for folder in _on_first(lambda: checkpoint_folders(root)):
        try:
            return Found(verify(folder), tuple(damaged))
        except DamagedFolder as fault:
            damaged.append((folder, str(fault)))
    if damaged:
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in damaged)
        raise CheckpointError(f"no checkpoint in {root} is whole ({reasons})")
    return None


def verify(folder: Path) -> Verified:
    """Check the seal of a folder; collective. The ranks share out the reading.

    Raises:
        DamagedFolder: on every rank, if the folder is not what its manifest says.
        CheckpointError: on every rank, if one sees another folder than the others.
    """
    looks = together(lambda: _look(folder))
    for rank, look in enumerate(looks):
        if look != looks[0]:
            raise CheckpointError(
                f"{folder}: rank {rank} sees another folder than rank 0 does ({_told(look)} "
                f"against {_told(looks[0])}); all ranks must read the same file system"
            )
    _, faults = looks[0]
    if not faults:
        manifest = read_manifest(folder)
        share = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
        found = together(lambda: content_faults(folder, manifest, share))
        faults = tuple(fault for of_rank in found for fault in of_rank)
    if faults:
        raise DamagedFolder("; ".join(faults))
    return Verified(folder, manifest)


def _look(folder: Path) -> tuple[str, tuple[str, ...]]:
    """What one rank sees without reading the content: the manifest's digest, and faults."""
    try:
        manifest = read_manifest(folder)
    except DamagedFolder as fault:
        return "", (str(fault),)
    return manifest.sha256, tuple(shape_faults(folder, manifest.files))


def _told(look: tuple[str, tuple[str, ...]]) -> str:
    digest, faults = look
    return "; ".join(faults) or f"manifest {digest[:12]}"


def set_aside(damaged: tuple[tuple[Path, str], ...]) -> list[str]:
    """Take damaged checkpoints out of the sequence by renaming them; collective.

    The run goes on from an earlier step; a newer checkpoint that only failed to be read this time
    must not be taken up again later, beside metrics of the run that went on without it. Returns
    one line for each, to be shown.

    Raises:
        CheckpointError: on every rank, if one cannot be renamed.
    """

    def rename() -> list[str]:
        lines = []
        for folder, reason in damaged:
            aside, number = folder.with_name(f"{DAMAGED}{folder.name}"), 1
            while aside.exists():
                number += 1
                aside = folder.with_name(f"{DAMAGED}{folder.name}_{number}")
            folder.rename(aside)
            sync_folder(folder.parent)
            lines.append(f"{folder.name} is damaged and was passed over: {reason}; now {aside}")
        return lines

    return _on_first(rename) if damaged else []


def _on_first(work: Callable[[], Result]) -> Result:
    try:
        return on_first(work)
    except RankError as error:
        raise CheckpointError(f"the folder of checkpoints cannot be used: {error}") from error
