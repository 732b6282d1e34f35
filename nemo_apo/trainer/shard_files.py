"""megatron's sharded files in a folder, written and read so that no rank is left waiting.

megatron's own save writes in child processes and lets a rank that cannot write raise alone, while
the others wait for it until their timeout. Here megatron plans what each rank writes; every rank
then writes it itself, and all learn whether all could. What is read back was pickled by megatron
and torch: only the classes of a checkpoint's description and plain tensors are let through.
"""

import contextlib
import functools
import itertools
import os
import pickle
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import (
    COMMON_STATE_FNAME,
    TorchCommonSaveStrategy,
)
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from nemo_apo.parallel.together import on_first, together

DESCRIPTION_FILE = ".metadata"
# Makes torch.load refuse all but tensors and plain values, whatever its caller asks for.
_TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_DESCRIPTION_CLASSES = {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.planner", "SavePlan"),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    ("torch.distributed.checkpoint.planner", "WriteItem"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch.serialization", "_get_layout"),
}


class UnsafeFile(ValueError):
    """A file that would run code when it is read."""


@dataclass(frozen=True)
class _Planned:
    """What this rank has to write; ``description`` is None except on rank 0."""

    writer: FileSystemWriterAsync
    description: Any


class _PlanOnly(TorchDistSaveShardedStrategy):
    """megatron's strategy, stopped after the plan."""

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        return _Planned(writer, save_state_dict_ret[1])


def write_shards(folder: Path, content: dict[str, Any]) -> list[str]:
    """Write megatron's entries into an empty folder; collective. Returns this rank's files.

    Raises:
        RankError: on every rank, if one could not write.
    """
    strategy = _PlanOnly("torch_dist", 1, thread_count=1)
    sharded, common = save_preprocess(content)
    planned: _Planned = strategy.async_save(sharded, str(folder))  # type: ignore[assignment]
    is_first = dist.get_rank() == 0

    def write() -> list[Any]:
        if is_first:
            TorchCommonSaveStrategy("torch", 1).save_common(common, str(folder))
            config = CheckpointingConfig(strategy.backend, strategy.version)
            save_config(config, str(folder))
        return _write_buckets(planned.writer)

    written = together(write)
    on_first(lambda: planned.writer.finish(planned.description, written))
    own = [name for _, name, _ in planned.writer.write_buckets or []]
    return [*own, COMMON_STATE_FNAME, CONFIG_FNAME, DESCRIPTION_FILE] if is_first else own


def _write_buckets(writer: FileSystemWriterAsync) -> list[Any]:
    """Write this rank's tensors; where in its files each of them is."""
    if not writer.write_buckets:
        return []
    write, _, _ = writer.get_save_function_and_args()
    assert isinstance(write, functools.partial)
    transforms = write.args[0]
    results: queue.Queue[Any] = queue.Queue()
    pending: queue.Queue[int] = queue.Queue()
    for number, bucket in enumerate(writer.preload_tensors(writer.write_buckets)):
        pending.put(number)
        # Written out to disk later, together with its digest.
        writer.write_preloaded_data(transforms, number, bucket, results, pending, use_fsync=False)
    outcomes = [results.get_nowait()[1] for _ in writer.write_buckets]
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return list(itertools.chain.from_iterable(outcomes))


def read_shards(folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
    """Read megatron's entries from a folder whose seal has been verified; collective.

    Raises:
        RankError: if the description of the shards holds anything but a description.
    """
    together(lambda: _check_description(folder / DESCRIPTION_FILE))
    with _tensors_only():
        return dist_checkpointing.load(entries, str(folder))


class _DescriptionReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _DESCRIPTION_CLASSES:
            raise UnsafeFile(f"{DESCRIPTION_FILE} would import {module}.{name}")
        return super().find_class(module, name)


def _check_description(path: Path) -> None:
    """Raise unless reading the file, as torch does without a check, makes known classes only."""
    with path.open("rb") as file:
        _DescriptionReader(file).load()


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    before = os.environ.get(_TENSORS_ONLY)
    os.environ[_TENSORS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TENSORS_ONLY]
        else:
            os.environ[_TENSORS_ONLY] = before
