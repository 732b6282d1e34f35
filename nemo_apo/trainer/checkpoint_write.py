"""Writing a checkpoint's folder: prepared aside by all ranks, sealed, and named by one rename."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nemo_apo.parallel.together import RankError, on_first, together
from nemo_apo.trainer.durable_files import FileRecord, publish, settle_file
from nemo_apo.trainer.sealed_folder import seal
from nemo_apo.trainer.shard_files import write_shards


class SaveFailed(RuntimeError):
    """A checkpoint could not be written, or an old one not removed; the newest is whole."""


def write_sealed(
    prepare: Callable[[], Path],
    name: Callable[[], Path],
    entries: dict[str, Any],
    contents: Mapping[str, bytes],
    about: Mapping[str, Any],
) -> Path:
    """Write, settle and seal a folder, then give it its name; collective.

    Args:
        prepare: makes the hidden folder, on rank 0.
        name: gives the folder's name once it is complete, on rank 0.
        entries: megatron's entries.
        contents: this rank's other files.
        about: what the manifest says besides.

    Raises:
        SaveFailed: on every rank, if one could not write; nothing is left of the folder then.
    """
    partial = None
    try:
        partial = on_first(prepare)
        own = write_shards(partial, entries)
        records = together(lambda: _settle(partial, own, contents))
        files = {name: record for of_rank in records for name, record in of_rank.items()}

        def finish() -> Path:
            seal(partial, files, about)
            folder = name()
            publish(partial, folder)
            return folder

        return on_first(finish)
    except RankError as error:
        if partial is not None and dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise SaveFailed(
            f"no checkpoint could be written ({error}); earlier ones are untouched"
        ) from error


def _settle(folder: Path, own: list[str], contents: Mapping[str, bytes]) -> dict[str, FileRecord]:
    """Write this rank's other files, then see all that it wrote onto the disk."""
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: settle_file(folder / name) for name in [*own, *contents]}
