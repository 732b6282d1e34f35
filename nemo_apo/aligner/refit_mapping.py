"""Weights that the host's table for its sampler lacks.

Before each rollout the host walks its Megatron weights and translates each by a table of recipes
into the weights that the sampler knows:

    {"tp": dim, "hf": name}                    one weight, gathered over tensor ranks along dim
    {"tp": dim, "hf_func": f(weight, cfg)}     several, by name; without "tp" it is replicated

A name may hold ``{l}``, the number of the layer on its pipeline stage (Megatron's names), or
``{gl}``, its number in the whole model (the sampler's names). A weight without a recipe is skipped
with a printed line, and the sampler keeps whatever it holds there, never the policy's. So missing
recipes are added here, and what is still left without one can be found before a run starts.
"""

import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

Recipe = Mapping[str, Any]

_ATTENTION = "model.decoder.layers.{l}.self_attention."
_HF_ATTENTION = "model.layers.{gl}.self_attn."
_LAYER_NUMBER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
# What Transformer Engine saves beside weights ends so.
_NOT_WEIGHTS = ("_extra_state",)


def split_qkv_bias(bias: Tensor, cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """The biases of query, key and value, from Megatron's one.

    Megatron lays it out group by group: the query heads that share a key-value head, then that key
    head, then that value head.

    Args:
        bias: gathered over tensor ranks, [(heads + 2 groups) * head size].
        cfg: the model's configuration (``num_attention_heads``, and where they differ from the
            usual ``num_query_groups``).
    """
    heads = cfg["num_attention_heads"]
    groups = cfg.get("num_query_groups") or heads
    per_group = bias.reshape(groups, heads // groups + 2, -1)
    return {
        _HF_ATTENTION + "q_proj.bias": per_group[:, :-2].reshape(-1),
        _HF_ATTENTION + "k_proj.bias": per_group[:, -2].reshape(-1),
        _HF_ATTENTION + "v_proj.bias": per_group[:, -1].reshape(-1),
    }


# The norms act on single heads, so every tensor rank holds the same.
ENTRIES: dict[str, Recipe] = {
    _ATTENTION + "linear_qkv.bias": {"tp": 0, "hf_func": split_qkv_bias},
    _ATTENTION + "q_layernorm.weight": {"hf": _HF_ATTENTION + "q_norm.weight"},
    _ATTENTION + "k_layernorm.weight": {"hf": _HF_ATTENTION + "k_norm.weight"},
}


def missing_entries(
    existing: Mapping[str, Recipe], wanted: Mapping[str, Recipe] = ENTRIES
) -> dict[str, Recipe]:
    """The wanted recipes that a table does not hold.

    Raises:
        ValueError: if it holds a different recipe for one of these weights.
    """
    for name in wanted.keys() & existing.keys():
        if existing[name] != wanted[name]:
            raise ValueError(
                f"the host already sends {name} to the sampler in another way "
                f"({existing[name]}, ours is {wanted[name]}); leave one of them out"
            )
    return {name: recipe for name, recipe in wanted.items() if name not in existing}


def extend_mapping(mapping: MutableMapping[str, Recipe]) -> None:
    """Add to the host's table what it lacks; a second call changes nothing.

    Raises:
        ValueError: as ``missing_entries``; the table is then as before.
    """
    mapping.update(missing_entries(mapping))


def unmapped_weights(state_dict_keys: Iterable[str], mapping: Mapping[str, Recipe]) -> list[str]:
    """The weights of a policy that would not reach the sampler, in the order given.

    Adapter weights are among them: the host has no recipe for any.
    """
    known = _matcher(mapping)
    weights = (key for key in state_dict_keys if not key.endswith(_NOT_WEIGHTS))
    return [key for key in weights if not known(key)]


def unmapped_rule(names: Iterable[str]) -> str:
    """What is wrong with weights that have no recipe; the same weight of all layers, once."""
    kinds = sorted({_LAYER_NUMBER.sub("{l}", name) for name in names})
    return (
        "the host has no recipe to send these weights of the model to the sampler, which would "
        f"keep its own: {', '.join(kinds)}"
    )


def _matcher(mapping: Mapping[str, Recipe]) -> Callable[[str], object]:
    """Whether a name is one of the table, any layer number standing for ``{l}``."""
    patterns = (re.escape(name).replace(re.escape("{l}"), r"\d+") for name in mapping)
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns)).fullmatch
