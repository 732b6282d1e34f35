"""Weights on their way to the sampler: Megatron's layouts, and what would not arrive."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nemo_apo.aligner.refit_mapping import (
    ENTRIES,
    extend_mapping,
    missing_entries,
    split_qkv_bias,
    unmapped_weights,
)

# The names in the host's own table, with recipes that only have to be told apart.
HOST_NAMES = (
    "model.embedding.word_embeddings.weight",
    "model.decoder.final_layernorm.weight",
    "model.output_layer.weight",
    "model.decoder.layers.{l}.self_attention.linear_proj.weight",
    "model.decoder.layers.{l}.self_attention.linear_qkv.weight",
    "model.decoder.layers.{l}.self_attention.linear_qkv.layer_norm_weight",
    "model.decoder.layers.{l}.mlp.linear_fc1.weight",
    "model.decoder.layers.{l}.mlp.linear_fc1.layer_norm_weight",
    "model.decoder.layers.{l}.mlp.linear_fc2.weight",
)
QKV_BIAS = "self_attention.linear_qkv.bias"
NORMS = ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
# Per model: layers, tied embeddings, attention weights that the host's table lacks.
MODELS: dict[str, tuple[int, bool, list[str]]] = {
    "qwen3_1.7b": (28, True, NORMS),
    "qwen3_8b": (36, False, NORMS),
    "qwen2.5_7b": (28, False, [QKV_BIAS]),
    "llama3.1_8b": (32, False, []),
}


def host_table() -> dict[str, dict[str, object]]:
    return {name: {"hf": f"hf of {name}"} for name in HOST_NAMES}


def policy_keys(layers: int, tied: bool, extra: list[str]) -> list[str]:
    """Keys of a Transformer Engine policy on one pipeline stage."""
    keys = ["model.embedding.word_embeddings.weight"]
    for layer in range(layers):
        stem = f"model.decoder.layers.{layer}."
        keys += [
            stem + "self_attention.core_attention._extra_state",
            stem + "self_attention.linear_proj.weight",
            stem + "self_attention.linear_proj._extra_state",
            stem + "self_attention.linear_qkv.layer_norm_weight",
            stem + "self_attention.linear_qkv.weight",
            stem + "self_attention.linear_qkv._extra_state",
            stem + "mlp.linear_fc1.layer_norm_weight",
            stem + "mlp.linear_fc1.weight",
            stem + "mlp.linear_fc1._extra_state",
            stem + "mlp.linear_fc2.weight",
            stem + "mlp.linear_fc2._extra_state",
        ]
        keys += [stem + name for name in extra]
        keys += [stem + name.replace("weight", "_extra_state") for name in extra if "norm" in name]
    keys += ["model.decoder.final_layernorm.weight", "model.decoder.final_layernorm._extra_state"]
    keys += ["model.output_layer._extra_state"]
    return keys if tied else [*keys, "model.output_layer.weight"]


def head_value(kind: int, head: int, size: int) -> list[float]:
    """Values that name their kind (query, key, value), head and place."""
    return [kind * 10000.0 + head * 100.0 + place for place in range(size)]


@pytest.mark.parametrize(
    ("heads", "groups", "size"),
    [(28, 4, 128), (32, 8, 128), (16, 8, 128), (4, 4, 3), (6, 1, 2), (8, 2, 5)],
)
def test_the_split_of_the_bias_undoes_the_layout_of_grouped_heads(
    heads: int, groups: int, size: int
) -> None:
    shared = heads // groups
    packed: list[float] = []
    for group in range(groups):
        for head in range(group * shared, (group + 1) * shared):
            packed += head_value(1, head, size)
        packed += head_value(2, group, size)
        packed += head_value(3, group, size)
    # Beside the usual size of a head, so that the split cannot rely on it.
    cfg = {"num_attention_heads": heads, "num_query_groups": groups, "hidden_size": 7}
    split = split_qkv_bias(torch.tensor(packed), cfg)
    expected = {"q": (1, heads), "k": (2, groups), "v": (3, groups)}
    assert len(split) == 3
    for letter, (kind, count) in expected.items():
        values = [v for head in range(count) for v in head_value(kind, head, size)]
        got = split[f"model.layers.{{gl}}.self_attn.{letter}_proj.bias"]
        assert got.tolist() == values
        assert got.is_contiguous(), "it is broadcast as it is"


@pytest.mark.parametrize("groups", [None, "absent"])
def test_without_groups_every_head_is_its_own(groups: str | None) -> None:
    cfg: dict[str, int | None] = {"num_attention_heads": 2}
    if groups is None:
        cfg["num_query_groups"] = None
    split = split_qkv_bias(torch.arange(6.0), cfg)
    assert [part.tolist() for part in split.values()] == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_the_bias_is_cut_like_the_weight_that_it_belongs_to() -> None:
    """A linear layer of the parts gives the parts of the linear layer."""
    heads, groups, size, hidden = 4, 2, 3, 5
    generator = torch.Generator().manual_seed(0)
    rows = (heads + 2 * groups) * size
    weight = torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    bias = torch.randn(rows, generator=generator, dtype=torch.float64)
    x = torch.randn(hidden, generator=generator, dtype=torch.float64)
    # Megatron's own reading of the joint projection: a view by group, then a cut along it.
    joint = (weight @ x + bias).view(groups, -1)
    shared = heads // groups * size
    q, k, v = (part.reshape(-1) for part in joint.split([shared, size, size], dim=1))
    without = (weight @ x).view(groups, -1)
    q0, k0, v0 = (part.reshape(-1) for part in without.split([shared, size, size], dim=1))
    split = split_qkv_bias(bias, {"num_attention_heads": heads, "num_query_groups": groups})
    differences: list[tuple[Tensor, Tensor]] = [(q, q0), (k, k0), (v, v0)]
    for part, (whole, plain) in zip(split.values(), differences, strict=True):
        torch.testing.assert_close(plain + part, whole)


def test_shards_of_tensor_ranks_join_to_the_whole_bias() -> None:
    """Ranks hold whole groups, so joining their shards along axis 0 gives the layout again."""
    cfg = {"num_attention_heads": 8, "num_query_groups": 4}
    whole = split_qkv_bias(torch.arange(32.0), cfg)
    ranks = [
        split_qkv_bias(shard, {"num_attention_heads": 4, "num_query_groups": 2})
        for shard in torch.arange(32.0).chunk(2)
    ]
    assert ENTRIES["model.decoder.layers.{l}.self_attention.linear_qkv.bias"]["tp"] == 0
    for name, value in whole.items():
        assert torch.equal(value, torch.cat([rank[name] for rank in ranks]))


def test_norms_are_replicated_and_keep_their_value() -> None:
    for letter in "qk":
        recipe = ENTRIES[f"model.decoder.layers.{{l}}.self_attention.{letter}_layernorm.weight"]
        assert recipe == {"hf": f"model.layers.{{gl}}.self_attn.{letter}_norm.weight"}


def test_extending_adds_what_is_missing_and_nothing_a_second_time() -> None:
    table = host_table()
    assert missing_entries(table) == ENTRIES
    extend_mapping(table)
    assert {name: table[name] for name in HOST_NAMES} == host_table()
    assert {name: table[name] for name in ENTRIES} == ENTRIES
    assert missing_entries(table) == {}
    once = dict(table)
    extend_mapping(table)
    assert table == once


@pytest.mark.parametrize("name", ENTRIES)
def test_a_different_recipe_of_the_host_is_not_overwritten(name: str) -> None:
    table = {**host_table(), name: {"tp": 1, "hf": "another"}}
    before = dict(table)
    with pytest.raises(ValueError, match="in another way") as error:
        extend_mapping(table)
    assert name in str(error.value)
    assert table == before


@pytest.mark.parametrize("model", MODELS)
def test_what_the_host_alone_would_not_send(model: str) -> None:
    layers, tied, lacking = MODELS[model]
    keys = policy_keys(layers, tied, lacking)
    table = host_table()
    assert unmapped_weights(keys, table) == [
        f"model.decoder.layers.{layer}.{name}" for layer in range(layers) for name in lacking
    ]
    extend_mapping(table)
    assert unmapped_weights(keys, table) == []


def _adapter(key: str) -> str:
    return key.replace("linear_qkv.weight", "adapter_layer.lora_kqv_adapter.linear_in.weight")


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace("linear_proj.weight", "linear_proj.bias"),
        lambda key: key.replace("linear_qkv.layer_norm_weight", "linear_qkv.layer_norm_bias"),
        lambda key: key.replace("mlp.linear_fc1.weight", "mlp.router.weight"),
        lambda key: key.replace("layers.1.mlp", "layers.x.mlp"),
        lambda key: key.replace("model.decoder", "0.model.decoder"),
        lambda key: key + "_scale" if key.endswith("fc2.weight") else key,
        lambda key: key.replace(".weight", "xweight") if "final_layernorm" in key else key,
        _adapter,
    ],
)
def test_any_other_weight_is_found(change: Callable[[str], str]) -> None:
    table = host_table()
    extend_mapping(table)
    keys = policy_keys(12, False, [])
    changed = [change(key) for key in keys]
    weights = [key for key in changed if "_extra_state" not in key]
    expected = [key for key in weights if key not in keys]
    assert expected
    assert unmapped_weights(changed, table) == expected


def test_an_empty_table_maps_nothing() -> None:
    assert unmapped_weights(["a.weight", "a._extra_state"], {}) == ["a.weight"]
