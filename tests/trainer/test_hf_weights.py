"""Hugging Face checkpoints in megatron's modules, in every layout, against transformers."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_apo.compose.hf_model import decoder_of, with_checkpoint_shapes
from nemo_apo.config import Config, ConfigError, ModelConfig, ParallelConfig
from nemo_apo.config_rules import validate
from nemo_apo.hf_checkpoint.shards import Shards
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.parallel.step import read_micro_batches
from nemo_apo.trainer.hf_weights import tensors_of
from nemo_apo.trainer.loop import build_policy
from nemo_apo.trainer.micro_batch import MicroBatch
from nemo_apo.trainer.policy import Policy
from tests.hf_checkpoint.tiny_checkpoints import (
    KINDS,
    VOCABULARY,
    logits_of,
    tensors_in,
    write,
)
from tests.parallel.ranks import run_ranks

from .tiny_runs import begin, largest_gap, tiny_config

LAYOUTS = {
    "single": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "cp2": {"context_parallel_size": 2},
    "pp2_vpp2": {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
    },
}
ROWS, WIDTH = 3, 12


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every kind, in several shards where it is one of Qwen3."""
    root = tmp_path_factory.mktemp("checkpoints")
    for kind in KINDS:
        options = {"max_shard_size": "30KB"} if kind == "qwen3" else {}
        write(root / kind, kind, **options)
    return {kind: root / kind for kind in KINDS}


def configured(folder: Path, layout: str = "single", **model: Any) -> Config:
    """A tiny configuration whose model is a checkpoint."""
    values = {"make_vocab_size_divisible_by": 8, "path": str(folder), "num_layers": None, **model}
    shapes = with_checkpoint_shapes(values)
    parallel = ParallelConfig(backend="gloo", **LAYOUTS[layout])
    return tiny_config(model=ModelConfig(**shapes), parallel=parallel)


def ranks_of(config: Config) -> int:
    """Ranks of one replica of the model."""
    sizes = config.parallel
    return (
        sizes.tensor_model_parallel_size
        * sizes.pipeline_model_parallel_size
        * sizes.context_parallel_size
    )


def tokens() -> Tensor:
    """Rows of random tokens, [N, T]."""
    return torch.randint(VOCABULARY, (ROWS, WIDTH), generator=torch.Generator().manual_seed(1))


def batch_of(tokens_NT: Tensor) -> MicroBatch:
    """The rows with every token but the first to be predicted."""
    return MicroBatch.of(tokens_NT, torch.ones(ROWS, WIDTH - 1, dtype=torch.bool))


def started(config: Config) -> Policy:
    """The policy on this rank."""
    return build_policy(config, parallel_layout.initialize(config.parallel, config.run.seed))


def own_logits(policy: Policy, tokens_NT: Tensor) -> Tensor | None:
    """Logits of this rank's rows of the vocabulary, [N, T, v]; None before the last stage."""

    def read(hidden_BTH: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        return {"logits": hidden_BTH @ policy.chunks[-1].module.output_weight.t()}

    kept = read_micro_batches(policy.chunks, [batch_of(tokens_NT)], read)
    return kept[0]["logits"] if kept else None


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2", "tp2_pp2"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(
    kind: str, layout: str, checkpoints: dict[str, Path]
) -> None:
    config, tokens_NT = configured(checkpoints[kind], layout), tokens()
    validate(config, ranks_of(config))
    parts = run_ranks(ranks_of(config), lambda: own_logits(started(config), tokens_NT))
    logits_NTV = torch.cat([part for part in parts if part is not None], dim=-1)
    expected_NTV = logits_of(checkpoints[kind], tokens_NT)[:, : logits_NTV.shape[1]]
    assert float(expected_NTV.std()) > 0.5
    assert logits_NTV.shape[-1] == 64
    torch.testing.assert_close(logits_NTV[..., :VOCABULARY], expected_NTV, rtol=1e-5, atol=1e-5)
    assert not logits_NTV[..., VOCABULARY:].any()


@pytest.mark.parametrize("layout", ["tp2_sp", "cp2", "pp2_vpp2"])
@pytest.mark.parametrize("kind", ["qwen3_tied", "qwen2"])
def test_log_probs_are_those_of_transformers(
    kind: str, layout: str, checkpoints: dict[str, Path]
) -> None:
    config, tokens_NT = configured(checkpoints[kind], layout), tokens()
    validate(config, ranks_of(config))

    def read() -> tuple[Tensor, Tensor]:
        return started(config).read_logprobs(batch_of(tokens_NT), micro_batch_size=1)

    log_p_NTV = logits_of(checkpoints[kind], tokens_NT).double().log_softmax(dim=-1)[:, :-1]
    expected_NT = log_p_NTV.gather(2, tokens_NT[:, 1:, None]).squeeze(2)
    entropy_NT = -(log_p_NTV.exp() * log_p_NTV).sum(dim=-1)
    for logprobs_NT, own_entropy_NT in run_ranks(ranks_of(config), read):
        torch.testing.assert_close(logprobs_NT.double(), expected_NT, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own_entropy_NT.double(), entropy_NT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [(kind, layout) for kind in KINDS for layout in ("single", "tp2_pp2")]
    + [("qwen3_tied", layout) for layout in LAYOUTS if layout not in ("single", "tp2_pp2")],
)
def test_the_sampling_replica_holds_every_tensor_bit_for_bit(
    kind: str, layout: str, checkpoints: dict[str, Path]
) -> None:
    config = configured(checkpoints[kind], layout)

    def read() -> dict[str, Tensor]:
        policy = started(config)
        decoder = decoder_of(config.model, policy.vocab_size)
        return {name: value.clone() for name, value in tensors_of(policy.refit_sampler(), decoder)}

    expected = tensors_in(checkpoints[kind])
    for found in run_ranks(ranks_of(config), read):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("layout", ["single", "tp2_sp", "tp2_pp2"])
def test_megatron_notes_the_same_about_every_weight_as_where_it_fills_them_in(
    layout: str, checkpoints: dict[str, Path]
) -> None:
    read = configured(checkpoints["qwen2"], layout)
    random = replace(read, model=replace(read.model, path=None))

    def notes(config: Config) -> dict[str, dict[str, Any]]:
        return {
            name: {key: value for key, value in vars(parameter).items() if key != "main_grad"}
            for name, parameter in started(config).stage.named_parameters()
        }

    for found, expected in zip(
        run_ranks(ranks_of(read), notes, read),
        run_ranks(ranks_of(read), notes, random),
        strict=True,
    ):
        assert found == expected
        assert any(entry.get("partition_stride") == 2 for entry in found.values())


@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2_sp"])
def test_an_rl_step_is_that_of_one_rank(layout: str, checkpoints: dict[str, Path]) -> None:
    def trained(config: Config) -> dict[str, Tensor]:
        training = begin(config)
        training.one()
        return training.weights()

    whole, split = (configured(checkpoints["qwen2"], name) for name in ("single", layout))
    start = run_ranks(1, lambda: begin(whole).weights())[0]
    expected = run_ranks(1, trained, whole)[0]
    bias = "decoder.layers.3.self_attention.linear_qkv.bias"
    assert float((expected[bias] - start[bias]).abs().max()) > 1e-4
    for found in run_ranks(ranks_of(split), trained, split):
        assert largest_gap(found, expected) < 2e-5


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("params_dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_another_type_is_converted(
    stored: torch.dtype, params_dtype: str, tmp_path: Path
) -> None:
    write(tmp_path, "qwen3_tied", stored)
    config = configured(tmp_path, "pp2", params_dtype=params_dtype)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[params_dtype]

    def read() -> dict[str, Tensor]:
        policy = started(config)
        decoder = decoder_of(config.model, policy.vocab_size)
        # The optimizer's own copy, from which every step brings the weights back.
        policy.optimizer.reload_model_params()
        return {name: value.clone() for name, value in tensors_of(policy.refit_sampler(), decoder)}

    expected = tensors_in(tmp_path)
    for found in run_ranks(2, read):
        for name, value in expected.items():
            assert value.dtype == stored
            assert found[name].dtype == dtype
            assert torch.equal(found[name], value.to(dtype)), name


def test_a_rank_reads_its_own_part_alone(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(checkpoints["qwen3"], "tp2_pp2")
    whole = sum(value.numel() for value in tensors_in(checkpoints["qwen3"]).values())
    read = Shards.read

    def counted() -> int:
        counts: list[int] = []

        def counting(shards: Shards, *where: Any) -> Tensor:
            found = read(shards, *where)
            counts.append(found.numel())
            return found

        monkeypatch.setattr(Shards, "read", counting)
        started(config)
        return sum(counts)

    counts = run_ranks(4, counted)
    # Norms are on both tensor ranks, every other number on one rank.
    norms = sum(v.numel() for v in tensors_in(checkpoints["qwen3"]).values() if v.dim() == 1)
    assert sum(counts) == whole + norms
    assert max(counts) < 0.3 * whole


class TestTiedEmbeddingsStoredTwice:
    @pytest.fixture
    def folder(self, checkpoints: dict[str, Path], tmp_path: Path) -> Path:
        tensors = tensors_in(checkpoints["qwen3_tied"])
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_bytes(
            (checkpoints["qwen3_tied"] / "config.json").read_bytes()
        )
        return tmp_path

    def test_the_same_matrix_is_read(self, folder: Path) -> None:
        config, tokens_NT = configured(folder), tokens()
        found = run_ranks(1, lambda: own_logits(started(config), tokens_NT))[0]
        expected_NTV = logits_of(folder, tokens_NT)[:, : WIDTH - 1]
        torch.testing.assert_close(found[..., :VOCABULARY], expected_NTV, rtol=1e-5, atol=1e-5)

    def test_another_matrix_is_refused_on_every_rank(self, folder: Path) -> None:
        tensors = tensors_in(folder)
        tensors["lm_head.weight"][VOCABULARY - 1, 0] += 1e-3
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

        def refused() -> str:
            with pytest.raises(ConfigError) as error:
                started(configured(folder, "tp2"))
            return str(error.value)

        # The row that differs lies on the second rank.
        for message in run_ranks(2, refused):
            assert "rank 1: UnfitCheckpoint: config.json ties the embeddings, but" in message


def test_a_file_that_went_after_the_check_ends_every_rank(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints["qwen3"], folder)
    config = configured(folder, "tp2")
    sorted(folder.glob("*.safetensors"))[-1].unlink()

    def refused() -> str:
        with pytest.raises(ConfigError) as error:
            started(config)
        return str(error.value)

    for message in run_ranks(2, refused):
        assert message.startswith(f"model.path={folder}: rank 0: UnfitCheckpoint: model-000")
        assert "missing, although" in message
