"""Writing a folder that transformers loads: weights, ``config.json``, and what is copied along.

Tensors are taken one at a time and written file by file, so that at no time more than one file's
tensors are held in the written type.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_apo.hf_checkpoint.decoder import (
    ARCHITECTURES,
    CONFIG_FILE,
    DTYPES,
    Decoder,
    UnfitCheckpoint,
    architecture_named_for,
    decoder_of,
    read_json,
)
from nemo_apo.hf_checkpoint.mapping import shapes
from nemo_apo.hf_checkpoint.shards import INDEX_FILE, WEIGHT_MAP, WEIGHTS_FILE

_TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}
MAX_SHARD_BYTES = 5_000_000_000
# Copied as they are, where the origin has them.
COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def write_weights(
    folder: Path,
    decoder: Decoder,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Write every tensor of a decoder, in several files with an index if one is not enough.

    Args:
        folder: an existing folder.
        decoder: says which tensors there are.
        tensors: each by name, in the order of ``mapping.shapes``.
        dtype: one of ``DTYPES``.
        max_shard_bytes: largest content of a file; a larger tensor has one to itself.

    Returns:
        The names of the files.

    Raises:
        UnfitCheckpoint: if a number is not finite in the type.
    """
    files = _files(decoder, _TORCH_DTYPES[dtype].itemsize, max_shard_bytes)
    source = iter(tensors)
    for file, names in files.items():
        held: dict[str, Tensor] = {}
        for expected in names:
            name, tensor = next(source)
            assert name == expected, (name, expected)
            held[name] = _converted(name, tensor, dtype)
        save_file(held, str(folder / file), metadata={"format": "pt"})
    assert next(source, None) is None
    if len(files) == 1:
        return list(files)
    index = {
        "metadata": {"total_size": _bytes(shapes(decoder).values(), _TORCH_DTYPES[dtype].itemsize)},
        WEIGHT_MAP: {name: file for file, names in files.items() for name in names},
    }
    _write_json(folder / INDEX_FILE, index)
    return [*files, INDEX_FILE]


def _files(decoder: Decoder, itemsize: int, max_shard_bytes: int) -> dict[str, list[str]]:
    """The tensors of each file, in order."""
    groups: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, shape in shapes(decoder).items():
        size = _bytes([shape], itemsize)
        if groups[-1] and size > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {WEIGHTS_FILE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": names
        for number, names in enumerate(groups, start=1)
    }


def _bytes(sizes: Iterable[tuple[int, ...]], itemsize: int) -> int:
    return sum(torch.Size(shape).numel() for shape in sizes) * itemsize


def _converted(name: str, tensor: Tensor, dtype: str) -> Tensor:
    converted = tensor.detach().to("cpu", _TORCH_DTYPES[dtype]).contiguous()
    if not bool(converted.isfinite().all()):
        raise UnfitCheckpoint(f"{name} holds numbers that are not finite in {dtype}")
    return converted


def config_content(decoder: Decoder, dtype: str, origin: Path | None) -> dict[str, Any]:
    """The ``config.json`` of an export: the origin's with the type replaced, or one of its own.

    Raises:
        UnfitCheckpoint: if the origin is another model, or no architecture computes the same.
    """
    if origin is None:
        return _own_config(decoder, dtype)
    content = read_json(origin / CONFIG_FILE)
    found = decoder_of(content)
    if found != decoder:
        pairs = [(key, value, vars(decoder)[key]) for key, value in vars(found).items()]
        told = ", ".join(f"{key}={was}, not {now}" for key, was, now in pairs if was != now)
        raise UnfitCheckpoint(f"{CONFIG_FILE} is of another model than was trained: {told}")
    key = "torch_dtype" if "torch_dtype" in content and "dtype" not in content else "dtype"
    return {**content, key: dtype}


def _own_config(decoder: Decoder, dtype: str) -> dict[str, Any]:
    name = architecture_named_for(decoder)
    content: dict[str, Any] = {
        "architectures": [name],
        "model_type": ARCHITECTURES[name].model_type,
        "attention_dropout": 0.0,
        "head_dim": decoder.kv_channels,
        "hidden_act": "silu",
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.ffn_hidden_size,
        "num_attention_heads": decoder.num_attention_heads,
        "num_hidden_layers": decoder.num_layers,
        "num_key_value_heads": decoder.num_query_groups,
        "rms_norm_eps": decoder.layernorm_epsilon,
        # Read by transformers 4 and 5 alike.
        "rope_theta": decoder.rotary_base,
        "tie_word_embeddings": decoder.tied_embeddings,
        "torch_dtype": dtype,
        "use_sliding_window": False,
        "vocab_size": decoder.vocab_size,
    }
    assert decoder_of(content) == decoder
    return content


def write_config(folder: Path, content: Mapping[str, Any]) -> list[str]:
    """Write ``config.json``; the names of the files written."""
    _write_json(folder / CONFIG_FILE, content)
    return [CONFIG_FILE]


def copy_along(folder: Path, origin: Path) -> list[str]:
    """Copy tokenizer and generation settings from the origin; the names of the files copied."""
    found = [name for name in COPIED_FILES if (origin / name).is_file()]
    for name in found:
        shutil.copyfile(origin / name, folder / name)
    return found


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
