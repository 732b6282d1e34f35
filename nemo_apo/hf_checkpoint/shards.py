"""The safetensors files of a checkpoint: found, checked by their headers, read slice by slice.

A header states every tensor's name, shape and type, and a file that is not as long as its header
says is refused when it is opened, so all that can be wrong but the numbers themselves is known
before any number is read. Only safetensors are read, never pickles.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_apo.hf_checkpoint.decoder import Decoder, UnfitCheckpoint, read_json
from nemo_apo.hf_checkpoint.mapping import EMBEDDING, OUTPUT, shapes

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
WEIGHT_MAP = "weight_map"
# safetensors' names of the types that can be read.
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# How many names an error lists.
_SHOWN = 3


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class Shards:
    """The open files of a checked checkpoint.

    Attributes:
        has_spare_output: whether the embeddings are tied and their matrix is stored a second time
            as the output layer's, which some published checkpoints do.
    """

    def __init__(
        self, files: Mapping[str, Any], headers: Mapping[str, Header], has_spare_output: bool
    ) -> None:
        self._files = files
        self._headers = headers
        self.has_spare_output = has_spare_output

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        """A rectangle of a tensor, or rows of a vector, as stored; nothing else is read.

        Raises:
            UnfitCheckpoint: if the file cannot be read any more.
        """
        header = self._headers[name]
        place = (rows, columns) if len(header.shape) == 2 else (rows,)
        try:
            return self._files[header.file].get_slice(name)[place]
        except (OSError, SafetensorError) as error:
            raise UnfitCheckpoint(f"{header.file}: {name} cannot be read: {error}") from None


@contextlib.contextmanager
def open_shards(folder: Path, decoder: Decoder) -> Iterator[Shards]:
    """The files of a checkpoint, after a check that they hold just the decoder's tensors.

    Raises:
        UnfitCheckpoint: naming the file or the tensor, and the rule.
    """
    with contextlib.ExitStack() as stack:
        files, where = _found(folder)
        opened = {name: stack.enter_context(_open(folder, name)) for name in files}
        headers = _headers(opened, where)
        wanted = shapes(decoder)
        has_spare_output = decoder.tied_embeddings and OUTPUT in headers
        if has_spare_output:
            wanted[OUTPUT] = wanted[EMBEDDING]
        _check_tensors(headers, wanted)
        yield Shards(opened, headers, has_spare_output)


def _found(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The files, and the file of each tensor where an index says."""
    single, index = ((folder / name).exists() for name in (WEIGHTS_FILE, INDEX_FILE))
    if single and index:
        raise UnfitCheckpoint(f"holds both {WEIGHTS_FILE} and {INDEX_FILE}; which one is meant?")
    if single:
        return [WEIGHTS_FILE], None
    if not index:
        pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        hint = f"; {pickles[0]} is a pickle, which is never read" if pickles else ""
        raise UnfitCheckpoint(f"holds neither {WEIGHTS_FILE} nor {INDEX_FILE}{hint}")
    where = read_json(folder / INDEX_FILE).get(WEIGHT_MAP)
    if not isinstance(where, dict) or not where:
        raise UnfitCheckpoint(f"{INDEX_FILE} has no {WEIGHT_MAP}")
    names = sorted({str(name) for name in where.values()})
    for name in names:
        if not name.endswith(".safetensors") or set(name) & set("/\\\0"):
            raise UnfitCheckpoint(f"{INDEX_FILE} names {name!r}, which is no file of the folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UnfitCheckpoint(f"{_listed(missing)}: missing, although {INDEX_FILE} names it")
    return names, {str(tensor): str(name) for tensor, name in where.items()}


def _open(folder: Path, name: str) -> Any:
    try:
        return safe_open(str(folder / name), framework="pt")
    except (OSError, SafetensorError) as error:
        raise UnfitCheckpoint(
            f"{name} is damaged or truncated, or no safetensors file: {error}"
        ) from None


def _headers(opened: Mapping[str, Any], where: Mapping[str, str] | None) -> dict[str, Header]:
    """The header of every tensor; the index, where there is one, must tell the same."""
    headers: dict[str, Header] = {}
    for file, content in opened.items():
        for tensor in content.keys():  # noqa: SIM118 (no mapping)
            if where is not None and where.get(tensor) != file:
                raise UnfitCheckpoint(f"{file} holds {tensor}, which {INDEX_FILE} does not say")
            one = content.get_slice(tensor)
            headers[tensor] = Header(file, tuple(one.get_shape()), str(one.get_dtype()))
    for tensor, file in (where or {}).items():
        if tensor not in headers:
            raise UnfitCheckpoint(f"{file} lacks {tensor}, which {INDEX_FILE} says it holds")
    return headers


def _check_tensors(headers: Mapping[str, Header], wanted: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in wanted if name not in headers]
    if missing:
        raise UnfitCheckpoint(f"tensors missing that config.json asks for: {_listed(missing)}")
    unexpected = [name for name in headers if name not in wanted]
    if unexpected:
        raise UnfitCheckpoint(f"tensors that such a model does not have: {_listed(unexpected)}")
    for name, header in headers.items():
        if header.shape != wanted[name]:
            raise UnfitCheckpoint(
                f"{header.file}: {name} has shape {list(header.shape)}, config.json asks for "
                f"{list(wanted[name])}"
            )
        if header.dtype not in _DTYPES:
            raise UnfitCheckpoint(
                f"{header.file}: {name} has type {header.dtype}, must be one of "
                f"{', '.join(_DTYPES)}"
            )


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
