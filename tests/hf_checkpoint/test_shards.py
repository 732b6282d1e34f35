"""The files of a checkpoint, whole and damaged in every way; safetensors writes them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_apo.hf_checkpoint.decoder import UnfitCheckpoint, read_decoder
from nemo_apo.hf_checkpoint.shards import open_shards

from .tiny_checkpoints import tensors_in, write

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in one file."""
    write(tmp_path / "one", "qwen3")
    return tmp_path / "one"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in several files with an index."""
    write(tmp_path / "many", "qwen3", max_shard_size="30KB")
    return tmp_path / "many"


def refusal(folder: Path) -> str:
    """The message with which a checkpoint is refused when it is opened."""
    with pytest.raises(UnfitCheckpoint) as error, open_shards(folder, read_decoder(folder)):
        pass
    return str(error.value)


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Write the tensors of the one file again, after a change."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def reindexed(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    """Write the index again, after a change of its map."""
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", ["1GB", "30KB"])
def test_rectangles_are_read_as_stored(dtype: torch.dtype, size: str, tmp_path: Path) -> None:
    write(tmp_path, "qwen3", dtype, max_shard_size=size)
    assert (tmp_path / INDEX).exists() == (size == "30KB")
    expected = tensors_in(tmp_path)
    name = "model.layers.3.mlp.down_proj.weight"
    with open_shards(tmp_path, read_decoder(tmp_path)) as shards:
        read = shards.read(name, slice(3, 9), slice(10, 20))
        assert read.dtype == dtype
        assert torch.equal(read, expected[name][3:9, 10:20])
        assert torch.equal(shards.read(NORM, slice(None), slice(None)), expected[NORM])


class TestOneFile:
    def test_no_file(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        message = refusal(folder)
        assert "holds neither model.safetensors nor model.safetensors.index.json" in message
        assert "pytorch_model.bin is a pickle, which is never read" in message

    @pytest.mark.parametrize("kept", [0, 4, 1000, -1])
    def test_truncated(self, kept: int, folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        assert "model.safetensors is damaged or truncated" in refusal(folder)

    def test_a_tensor_is_missing(self, folder: Path) -> None:
        changed(folder, lambda tensors: tensors.pop(NORM))  # type: ignore[arg-type, return-value]
        assert f"tensors missing that config.json asks for: {NORM}" in refusal(folder)

    def test_many_tensors_are_missing(self, folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content["num_hidden_layers"] = 5
        (folder / "config.json").write_text(json.dumps(content))
        message = refusal(folder)
        assert "model.layers.4.input_layernorm.weight" in message
        assert message.endswith("and 8 more")

    def test_a_tensor_too_many(self, folder: Path) -> None:
        name = "model.layers.0.self_attn.q_proj.bias"
        changed(folder, lambda tensors: tensors.update({name: torch.zeros(64)}))
        assert f"tensors that such a model does not have: {name}" in refusal(folder)

    def test_a_wrong_shape(self, folder: Path) -> None:
        changed(folder, lambda tensors: tensors.update({NORM: torch.zeros(31)}))
        message = refusal(folder)
        assert f"model.safetensors: {NORM} has shape [31], config.json asks for [32]" in message

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
    def test_a_wrong_type(self, dtype: torch.dtype, folder: Path) -> None:
        changed(folder, lambda tensors: tensors.update({NORM: torch.zeros(32).to(dtype)}))
        message = refusal(folder)
        assert f"{NORM} has type " in message
        assert "must be one of F32, BF16, F16" in message

    def test_beside_an_index(self, folder: Path, sharded: Path) -> None:
        (folder / INDEX).write_bytes((sharded / INDEX).read_bytes())
        assert "holds both" in refusal(folder)


class TestIndexed:
    def test_a_file_is_missing(self, sharded: Path) -> None:
        gone = sorted(sharded.glob("*.safetensors"))[1]
        gone.unlink()
        assert f"{gone.name}: missing, although {INDEX} names it" in refusal(sharded)

    def test_a_file_is_truncated(self, sharded: Path) -> None:
        short = sorted(sharded.glob("*.safetensors"))[1]
        short.write_bytes(short.read_bytes()[:-1])
        assert f"{short.name} is damaged or truncated" in refusal(sharded)

    def test_a_tensor_is_in_another_file(self, sharded: Path) -> None:
        first, second = (path.name for path in sorted(sharded.glob("*.safetensors"))[:2])

        def swap(where: dict[str, str]) -> None:
            name = next(name for name, file in where.items() if file == first)
            where[name] = second

        reindexed(sharded, swap)
        message = refusal(sharded)
        assert message.startswith(f"{first} holds ")
        assert message.endswith("does not say")

    def test_a_tensor_is_in_no_file(self, sharded: Path) -> None:
        file = sorted(sharded.glob("*.safetensors"))[0].name
        reindexed(sharded, lambda where: where.update({"model.extra": file}))
        assert refusal(sharded) == f"{file} lacks model.extra, which {INDEX} says it holds"

    def test_a_file_lies_elsewhere(self, sharded: Path) -> None:
        reindexed(sharded, lambda where: where.update({NORM: "../one/model.safetensors"}))
        assert "'../one/model.safetensors', which is no file of the folder" in refusal(sharded)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
    def test_no_index(self, text: str, sharded: Path) -> None:
        (sharded / INDEX).write_text(text)
        assert refusal(sharded).startswith(INDEX)
