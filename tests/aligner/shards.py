"""A model's tensors as one rank holds them, cut from those of the model on a single rank.

For weights and for gradients alike, so that a test can give every layout the same weights and
compare what each rank computes with the model in one piece. The rules are written down here by
name, apart from megatron-core's own, as a test's oracle must be.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

# The last two parts of a parameter's name decide how tensor parallelism cuts it. Rows of
# linear_qkv are ordered by query group, so equal pieces hold whole groups.
_BY_ROWS = {
    "word_embeddings.weight",
    "output_layer.weight",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_fc1.weight",
    "linear_fc1.bias",
}
_BY_COLUMNS = {"linear_proj.weight", "linear_fc2.weight"}

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_FIRST_STAGE = "embedding."
_LAST_STAGE = ("decoder.final_layernorm.", "output_layer.")


def full_weights(actor: Any) -> dict[str, torch.Tensor]:
    """A copy of all weights of an actor on one tensor- and pipeline-parallel rank."""
    assert actor.cfg.tensor_model_parallel_size == actor.cfg.pipeline_model_parallel_size == 1
    return {name: weight.detach().clone() for name, weight in actor.model.named_parameters()}


def gradients(actor: Any) -> dict[str, torch.Tensor]:
    """A copy of the gradients that this rank holds; zeros where there is none."""
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.detach().clone()
        for name, weight in actor.model.named_parameters()
    }


def load_shard(
    actor: Any, full: Mapping[str, torch.Tensor], tp_rank: int, tp: int, pp_rank: int, pp: int
) -> None:
    """Give the actor its part of the weights of ``full_weights``.

    The reference policy stays as ``build`` made it, until ``tiny_actor.refer_to_present_weights``.
    """
    mine = shard_of(
        full,
        tp_rank,
        tp,
        pp_rank,
        pp,
        actor.cfg.num_layers,
        gated=str(actor.cfg.activation).endswith("glu"),
    )
    weights = dict(actor.model.named_parameters())
    assert weights.keys() == mine.keys(), sorted(weights.keys() ^ mine.keys())
    with torch.no_grad():
        for name, weight in weights.items():
            assert weight.shape == mine[name].shape, (name, weight.shape, mine[name].shape)
            weight.copy_(mine[name])


def shard_of(
    full: Mapping[str, torch.Tensor],
    tp_rank: int,
    tp: int,
    pp_rank: int,
    pp: int,
    num_layers: int,
    *,
    gated: bool = True,
) -> dict[str, torch.Tensor]:
    """The part of a model's tensors that one rank holds, under the names it has there.

    Args:
        full: tensors by parameter name, of the model in one piece.
        tp_rank: tensor-parallel rank.
        tp: tensor-parallel size.
        pp_rank: pipeline stage.
        pp: number of stages, among which the layers are dealt evenly.
        num_layers: layers of the whole model.
        gated: whether linear_fc1 is a gate above an up projection, as with swiglu.
    """
    assert num_layers % pp == 0
    mine = {}
    for name, tensor in full.items():
        local_name = _name_on_stage(name, pp_rank, pp, num_layers // pp)
        if local_name is not None:
            mine[local_name] = _piece(name, tensor, tp_rank, tp, gated).clone()
    return mine


def _name_on_stage(name: str, pp_rank: int, pp: int, layers_per_stage: int) -> str | None:
    """The name that a tensor has on a stage, whose layers count from 0; None if it is not there."""
    layer = _LAYER.match(name)
    if layer is None:
        assert name.startswith((_FIRST_STAGE, *_LAST_STAGE)), f"on which stage is {name}?"
        stage = 0 if name.startswith(_FIRST_STAGE) else pp - 1
        return name if stage == pp_rank else None
    stage, number = divmod(int(layer[1]), layers_per_stage)
    return f"decoder.layers.{number}.{layer[2]}" if stage == pp_rank else None


def _piece(name: str, tensor: torch.Tensor, tp_rank: int, tp: int, gated: bool) -> torch.Tensor:
    last = ".".join(name.split(".")[-2:])
    if last in _BY_COLUMNS:
        return _cut(tensor, 1, tp_rank, tp)
    if last not in _BY_ROWS:
        return tensor
    if gated and last.startswith("linear_fc1."):
        gate, up = tensor.chunk(2, dim=0)
        return torch.cat([_cut(gate, 0, tp_rank, tp), _cut(up, 0, tp_rank, tp)])
    return _cut(tensor, 0, tp_rank, tp)


def _cut(tensor: torch.Tensor, dim: int, tp_rank: int, tp: int) -> torch.Tensor:
    size, rest = divmod(tensor.shape[dim], tp)
    assert rest == 0, (tuple(tensor.shape), dim, tp)
    return tensor.narrow(dim, tp_rank * size, size)
