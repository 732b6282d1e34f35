"""Hugging Face checkpoints in megatron's modules, in every layout, against transformers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_apo.compose.hf_model import decoder_of, with_checkpoint_shapes
from nemo_apo.config import Config, ModelConfig, ParallelConfig, validate
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

from .tiny_runs import tiny_config

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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
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
