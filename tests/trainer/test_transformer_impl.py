"""Transformer Engine's layers: the choice, the names, and the way through the trainer.

Transformer Engine itself needs a GPU and is not here. Its place is taken by megatron's own linear
layers with a norm inside, which have the same parameters under the same names; what they compute
is known, so a weight that went astray would show.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

from nemo_apo import record
from nemo_apo.compose import compose
from nemo_apo.config import TRANSFORMER_ENGINE, ConfigError, ModelConfig
from nemo_apo.config_rules import validate
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.parallel.layout import Layout
from nemo_apo.trainer import checkpoint, layer_specs, policy
from nemo_apo.trainer.checkpoint_search import CheckpointError, newest_verified
from nemo_apo.trainer.layer_specs import LOCAL_NAMES, local_name
from nemo_apo.trainer.transformer_impl import chosen_impl
from tests.parallel.ranks import run_ranks

from .test_checkpoint import STATE
from .tiny_runs import Training, begin, bits_equal, largest_gap, parallel, tiny_config

# What float32 sums in another order may change.
TOLERANCE = 2e-6


class NormThenLinear(ColumnParallelLinear):
    """What stands in for Transformer Engine's LayerNormLinear."""

    def __init__(self, input_size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(input_size, *args, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))

    def forward(self, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        weight = self.layer_norm_weight
        normed = F.rms_norm(values, weight.shape, weight, self.config.layernorm_epsilon)
        return super().forward(normed, *args, **kwargs)


def fused_layers(model: ModelConfig, config: Any) -> tuple[ModuleSpec, type]:
    """Layers with the structure of Transformer Engine's spec."""
    layer = get_gpt_layer_local_spec(qk_layernorm=model.qk_layernorm, normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
    parts.self_attention.submodules.linear_qkv = NormThenLinear
    parts.mlp.submodules.linear_fc1 = NormThenLinear
    parts.sharded_state_dict_keys_map = {}
    return layer, WrappedTorchNorm


def put_in_place() -> None:
    """Make the stand-in what ``transformer_engine`` means, in this (forked) process."""
    layer_specs._LAYERS[TRANSFORMER_ENGINE] = fused_layers
    policy.chosen_impl = lambda model, on_gpu: TRANSFORMER_ENGINE  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("wanted", "on_gpu", "installed", "dtype", "chosen"),
    [
        ("local", True, True, "bfloat16", "local"),
        ("auto", True, True, "bfloat16", "transformer_engine"),
        ("auto", True, True, "float32", "local"),
        ("auto", True, False, "bfloat16", "local"),
        ("auto", False, True, "bfloat16", "local"),
        ("transformer_engine", True, True, "bfloat16", "transformer_engine"),
    ],
)
def test_the_choice(
    wanted: str,
    on_gpu: bool,
    installed: bool,
    dtype: str,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    model = ModelConfig(transformer_impl=wanted, params_dtype=dtype)
    assert chosen_impl(model, on_gpu) == chosen


def test_what_cannot_run_is_refused_by_key() -> None:
    asked = ["model.transformer_impl=transformer_engine"]
    with pytest.raises(ConfigError, match=r"needs model\.params_dtype=bfloat16, not float32"):
        validate(compose(asked), 1)
    config = compose([*asked, "model.params_dtype=bfloat16"])
    validate(config, 1)
    for on_gpu, lacks in ((True, "an installed transformer_engine"), (False, "a CUDA device")):
        with pytest.raises(ConfigError, match=f"=transformer_engine: needs {lacks}"):
            chosen_impl(config.model, on_gpu)
    with pytest.raises(ConfigError, match="must be one of local, transformer_engine, auto"):
        validate(compose(["model.transformer_impl=apex"]), 1)


def test_the_names_are_those_by_which_megatron_saves_its_own_layers() -> None:
    """megatron saves the norms of both kinds of layers under Transformer Engine's names."""
    saved_as = get_gpt_layer_local_spec(qk_layernorm=True).submodules.sharded_state_dict_keys_map
    assert {f"{fused}weight": f"{local}weight" for local, fused in saved_as.items()} == LOCAL_NAMES
    for number in (0, 13):
        layer = f"decoder.layers.{number}."
        for fused, local in LOCAL_NAMES.items():
            assert local_name(f"{layer}{fused}") == f"{layer}{local}"
            assert local_name(f"{layer}{local}") == f"{layer}{local}"
    assert local_name("decoder.final_layernorm.weight") == "decoder.final_layernorm.weight"


def test_megatrons_spec_fuses_those_two_norms_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its classes need Transformer Engine, its description does not."""
    from megatron.core.extensions import transformer_engine_spec_provider as provider

    monkeypatch.setattr(provider, "is_te_min_version", lambda version: True)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, raising=False)
    layer, norm = layer_specs._transformer_engine(ModelConfig(), None)  # type: ignore[arg-type]
    parts = layer.submodules
    attention = parts.self_attention.submodules
    assert parts.input_layernorm is parts.pre_mlp_layernorm is IdentityOp
    assert attention.linear_qkv is TELayerNormColumnParallelLinear
    assert parts.mlp.submodules.linear_fc1 is TELayerNormColumnParallelLinear
    assert attention.q_layernorm is attention.k_layernorm is norm


def trained(config: Any, layout: Layout | None = None) -> tuple[Training, dict[str, Tensor]]:
    training = begin(config, layout)
    training.run(2)
    return training, training.weights()


@pytest.mark.parametrize(
    ("tensor", "pipeline", "ranks"),
    [(1, 1, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2)],
    ids=["one rank", "DP2", "TP2", "PP2"],
)
def test_fused_norms_train_and_sample_as_megatrons_own(
    tensor: int, pipeline: int, ranks: int
) -> None:
    """The same rollouts and weights: the sampler's layers have got every weight, norms included."""

    def own() -> tuple[list[Tensor], dict[str, Tensor]]:
        training, weights = trained(tiny_config())
        return [drawn.tokens_NT for drawn in training.worker.drawn], weights

    def fused() -> tuple[list[Tensor], dict[str, Tensor]]:
        put_in_place()
        config = tiny_config(parallel=parallel(tensor, pipeline))
        training, weights = trained(config)
        names = [name for name, _ in training.policy.stage.named_parameters()]
        assert any(name.endswith("linear_qkv.layer_norm_weight") for name in names)
        assert not any("input_layernorm" in name for name in names)
        outcome = training.run(1)[0]
        assert outcome.metrics[record.SAMPLER_MISMATCH] < 1e-5
        return [drawn.tokens_NT for drawn in training.worker.drawn[:2]], weights

    ((tokens, wanted),) = run_ranks(1, own)
    norms = {name: value for name, value in wanted.items() if "layernorm" in name}
    assert all(float((value - 1.0).abs().max()) > 1e-4 for value in norms.values()), "none moved"
    for got_tokens, got in run_ranks(ranks, fused):
        assert bits_equal(got_tokens, tokens)
        assert largest_gap(got, wanted) < TOLERANCE


def test_a_checkpoint_of_the_other_layers_is_refused_by_name(tmp_path: Path) -> None:
    config = tiny_config()

    def save(fused: bool) -> dict[str, Tensor]:
        if fused:
            put_in_place()
        training, weights = trained(config)
        root = tmp_path / str(fused)
        checkpoint.save(root, training.policy, training.remembered, STATE, config, {})
        checkpoint.save_weights(tmp_path / f"weights_{fused}", training.policy)
        return weights

    def load(fused: bool) -> tuple[dict[str, Tensor], list[str]]:
        if fused:
            put_in_place()
        layout = parallel_layout.initialize(config.parallel, config.run.seed)
        training, told = begin(config, layout), []
        found = newest_verified(tmp_path / str(not fused))
        assert found is not None
        ways = (
            lambda: checkpoint.load(found.newest, training.policy, training.remembered, config),
            lambda: checkpoint.load_for_evaluation(found.newest, training.policy, config),
            lambda: checkpoint.load_weights(tmp_path / f"weights_{not fused}", training.policy),
        )
        for way in ways:
            with pytest.raises(CheckpointError) as info:
                way()
            told.append(str(info.value))
        own = newest_verified(tmp_path / str(fused))
        assert own is not None
        checkpoint.load(own.newest, training.policy, training.remembered, config)
        return training.weights(), told

    saved = {fused: run_ranks(1, save, fused)[0] for fused in (False, True)}
    for fused, was, now in (
        (False, "transformer_engine", "local"),
        (True, "local", "transformer_engine"),
    ):
        weights, told = run_ranks(1, load, fused)[0]
        assert largest_gap(weights, saved[fused]) == 0.0
        for message in told:
            assert f"model.transformer_impl stood for {was} and now stands for {now}" in message
