"""What layers keep: by hand, and against what megatron-core's local layers save on a CPU."""

import dataclasses

import pytest
import torch

from nemo_apo.config import ModelConfig, ParallelConfig
from nemo_apo.planning.activations import layer_activations
from tests.parallel.ranks import run_ranks
from tests.planning.small import layout_of, question, shapes_of

TOKENS = 32
MODEL = ModelConfig(hidden_size=32, ffn_hidden_size=96, num_attention_heads=8, kv_channels=8)


def test_local_layers_by_hand() -> None:
    """The layout of ``test_memory``: 8 tokens, TP 2 and split norms, h 8, f 16, q 8, k 4, d 2."""
    asked = question(workload={"attention": "unfused"})
    norms = (6 * 2 * 8 + 8) * 8 // 2
    query_key_norms = (2 * (2 * 8 + 3 * 4) + 4 * 6) * 8 // 2  # one key/value head on a rank
    rotation = 4 * 2 * 8 * 2
    attention = 2 * 8 * (8 + 2 * 8) // 2 + 6 * 4 * 8 * 8 // 2
    output, swiglu = 2 * 8 * 8 // 2, 5 * 2 * 8 * 16 // 2
    layer = norms + query_key_norms + rotation + attention + output + swiglu
    layout = layout_of(asked, tensor=2, pipeline=2)
    assert layer_activations(asked, shapes_of(asked), layout) == layer


def test_gathered_keys_are_not_divided_by_context_parallelism() -> None:
    asked = question(workload={"attention": "gathered", "sequences": 8})
    one, two = (
        layer_activations(asked, shapes_of(asked), layout_of(asked, context=c)) for c in (1, 2)
    )
    # Everything is halved but the 2 x 8 x 8 numbers of repeated keys and values; a mask is new.
    assert 2 * (two - 2 * 2 * 8 * 8 - 4 * 8) == one - 2 * 2 * 8 * 8


def saved_by(layers: int, parallel: ParallelConfig) -> int:
    """Bytes of distinct memory, apart from parameters, that a rank saves for the backward pass."""
    from nemo_apo.parallel.layout import initialize
    from nemo_apo.trainer.model import build_training_model

    layout, tokens = initialize(parallel, 0), TOKENS // parallel.context_parallel_size
    (model,) = build_training_model(
        dataclasses.replace(MODEL, num_layers=layers), layout, parallel, 64, TOKENS
    )
    model.train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(
            input_ids=torch.zeros(1, tokens, dtype=torch.long),
            position_ids=torch.arange(tokens)[None],
            attention_mask=torch.ones(1, 1, tokens, tokens, dtype=torch.bool).triu(1),
        )
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (2, 1), (1, 2)])
def test_local_layers_against_megatron(tensor: int, context: int, recompute: str) -> None:
    pytest.importorskip("megatron.core", reason="the layers are megatron-core's")
    workload = {"sequence_length": TOKENS, "attention": "gathered", "sequences": 8}
    asked = question(MODEL, workload=workload, recompute=recompute)
    planned = layer_activations(asked, shapes_of(asked), layout_of(asked, tensor, 1, context))
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        context_parallel_size=context,
        sequence_parallel=tensor > 1,
        recompute=recompute,
    )
    two, four = (run_ranks(tensor * context, saved_by, n, parallel)[0] for n in (2, 4))
    # A few bytes a layer of attention's checkpoint come on top.
    assert planned == pytest.approx((four - two) / 2, abs=16)
