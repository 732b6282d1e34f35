"""Which tensor of a Hugging Face checkpoint is which part of which megatron parameter.

``MAPPING`` is the whole of it; ``pieces`` says what the layouts mean for a tensor-parallel rank.
Every piece is a rectangle of the Hugging Face tensor that is copied as it is, so that reading and
writing are the same list of pieces, walked in opposite directions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from nemo_apo.hf_checkpoint.decoder import Decoder

_HF, _MEGATRON = "model.layers.{layer}.", "decoder.layers.{layer}."
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# The one layout that may leave rows of the parameter unset: those of padding.
VOCABULARY = "vocabulary"


@dataclass(frozen=True)
class Target:
    """Where a tensor belongs.

    Attributes:
        megatron: the parameter's name, with the layer counted over the whole model.
        layout: a key of ``LAYOUTS``.
        shape: of the Hugging Face tensor, in keys of ``SIZES``.
    """

    megatron: str
    layout: str
    shape: tuple[str, ...]


MAPPING: dict[str, Target] = {
    EMBEDDING: Target("embedding.word_embeddings.weight", VOCABULARY, ("vocabulary", "hidden")),
    f"{_HF}input_layernorm.weight": Target(
        f"{_MEGATRON}input_layernorm.weight", "replicated", ("hidden",)
    ),
    f"{_HF}self_attn.q_proj.weight": Target(
        f"{_MEGATRON}self_attention.linear_qkv.weight", "query", ("queries", "hidden")
    ),
    f"{_HF}self_attn.q_proj.bias": Target(
        f"{_MEGATRON}self_attention.linear_qkv.bias", "query", ("queries",)
    ),
    f"{_HF}self_attn.k_proj.weight": Target(
        f"{_MEGATRON}self_attention.linear_qkv.weight", "key", ("keys", "hidden")
    ),
    f"{_HF}self_attn.k_proj.bias": Target(
        f"{_MEGATRON}self_attention.linear_qkv.bias", "key", ("keys",)
    ),
    f"{_HF}self_attn.v_proj.weight": Target(
        f"{_MEGATRON}self_attention.linear_qkv.weight", "value", ("keys", "hidden")
    ),
    f"{_HF}self_attn.v_proj.bias": Target(
        f"{_MEGATRON}self_attention.linear_qkv.bias", "value", ("keys",)
    ),
    f"{_HF}self_attn.q_norm.weight": Target(
        f"{_MEGATRON}self_attention.q_layernorm.weight", "replicated", ("head",)
    ),
    f"{_HF}self_attn.k_norm.weight": Target(
        f"{_MEGATRON}self_attention.k_layernorm.weight", "replicated", ("head",)
    ),
    f"{_HF}self_attn.o_proj.weight": Target(
        f"{_MEGATRON}self_attention.linear_proj.weight", "columns", ("hidden", "queries")
    ),
    f"{_HF}post_attention_layernorm.weight": Target(
        f"{_MEGATRON}pre_mlp_layernorm.weight", "replicated", ("hidden",)
    ),
    f"{_HF}mlp.gate_proj.weight": Target(
        f"{_MEGATRON}mlp.linear_fc1.weight", "gate", ("feed_forward", "hidden")
    ),
    f"{_HF}mlp.up_proj.weight": Target(
        f"{_MEGATRON}mlp.linear_fc1.weight", "up", ("feed_forward", "hidden")
    ),
    f"{_HF}mlp.down_proj.weight": Target(
        f"{_MEGATRON}mlp.linear_fc2.weight", "columns", ("hidden", "feed_forward")
    ),
    "model.norm.weight": Target("decoder.final_layernorm.weight", "replicated", ("hidden",)),
    OUTPUT: Target("output_layer.weight", VOCABULARY, ("vocabulary", "hidden")),
}

# Sizes that shapes are written in.
SIZES: dict[str, Callable[[Decoder], int]] = {
    "vocabulary": lambda decoder: decoder.vocab_size,
    "hidden": lambda decoder: decoder.hidden_size,
    "head": lambda decoder: decoder.kv_channels,
    "queries": lambda decoder: decoder.num_attention_heads * decoder.kv_channels,
    "keys": lambda decoder: decoder.num_query_groups * decoder.kv_channels,
    "feed_forward": lambda decoder: decoder.ffn_hidden_size,
}


@dataclass(frozen=True)
class Piece:
    """A rectangle of a Hugging Face tensor and the rows of a rank's parameter that it is.

    Attributes:
        rows, columns: in the Hugging Face tensor; a vector has rows alone.
        target_rows: in the parameter, all its columns.
    """

    rows: slice
    columns: slice
    target_rows: slice


@dataclass(frozen=True)
class Share:
    """A tensor-parallel rank's part of the model.

    Attributes:
        rank, size: of the tensor-parallel group.
        vocabulary: rows of the padded vocabulary on every rank.
    """

    rank: int
    size: int
    vocabulary: int


_ALL = slice(None)


def _range(share: Share, total: int) -> slice:
    """This rank's part of a dimension that is divided equally."""
    each = total // share.size
    return slice(share.rank * each, (share.rank + 1) * each)


def _replicated(decoder: Decoder, share: Share, shape: tuple[int, ...]) -> Iterator[Piece]:
    yield Piece(_ALL, _ALL, _ALL)


def _columns(decoder: Decoder, share: Share, shape: tuple[int, ...]) -> Iterator[Piece]:
    yield Piece(_ALL, _range(share, shape[1]), _ALL)


def _vocabulary(decoder: Decoder, share: Share, shape: tuple[int, ...]) -> Iterator[Piece]:
    first = share.rank * share.vocabulary
    count = min(max(decoder.vocab_size - first, 0), share.vocabulary)
    if count:
        yield Piece(slice(first, first + count), _ALL, slice(0, count))


def _gate(decoder: Decoder, share: Share, shape: tuple[int, ...]) -> Iterator[Piece]:
    rows = _range(share, decoder.ffn_hidden_size)
    yield Piece(rows, _ALL, slice(0, rows.stop - rows.start))


def _up(decoder: Decoder, share: Share, shape: tuple[int, ...]) -> Iterator[Piece]:
    rows = _range(share, decoder.ffn_hidden_size)
    each = rows.stop - rows.start
    yield Piece(rows, _ALL, slice(each, 2 * each))


def _heads(decoder: Decoder, share: Share, per_group: int, heads_before: int) -> Iterator[Piece]:
    """Heads of the query groups of a rank; megatron's rows go group by group.

    Args:
        decoder, share: whose.
        per_group: heads that the tensor has of each group.
        heads_before: heads of the other tensors before them in a group.
    """
    size = decoder.kv_channels
    group_heads = decoder.num_attention_heads // decoder.num_query_groups + 2
    groups = _range(share, decoder.num_query_groups)
    for place, group in enumerate(range(groups.start, groups.stop)):
        first = (place * group_heads + heads_before) * size
        yield Piece(
            slice(group * per_group * size, (group + 1) * per_group * size),
            _ALL,
            slice(first, first + per_group * size),
        )


def _query(decoder: Decoder, share: Share, shape: tuple[int, ...]) -> Iterator[Piece]:
    return _heads(decoder, share, decoder.num_attention_heads // decoder.num_query_groups, 0)


def _key(decoder: Decoder, share: Share, shape: tuple[int, ...]) -> Iterator[Piece]:
    return _heads(decoder, share, 1, decoder.num_attention_heads // decoder.num_query_groups)


def _value(decoder: Decoder, share: Share, shape: tuple[int, ...]) -> Iterator[Piece]:
    return _heads(decoder, share, 1, decoder.num_attention_heads // decoder.num_query_groups + 1)


LAYOUTS: dict[str, Callable[[Decoder, Share, tuple[int, ...]], Iterator[Piece]]] = {
    # Whole on every rank.
    "replicated": _replicated,
    # Rows of tokens, divided among the ranks; those of padding have no source.
    VOCABULARY: _vocabulary,
    # Columns divided (megatron's row-parallel layers, whose inputs are divided).
    "columns": _columns,
    # Each query group: its queries, then its key, then its value; whole groups on a rank.
    "query": _query,
    "key": _key,
    "value": _value,
    # A rank's rows of the gate, then its rows of the up projection.
    "gate": _gate,
    "up": _up,
}


def shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Every tensor of the decoder's checkpoint and its shape."""
    return {
        name: tuple(SIZES[size](decoder) for size in target.shape)
        for name, target in targets(decoder).items()
    }


def targets(decoder: Decoder) -> dict[str, Target]:
    """``MAPPING`` for every layer of a decoder in turn, without what it does not have."""
    own = [pattern for pattern in MAPPING if _has(decoder, pattern)]
    names = [(pattern, 0) for pattern in own if pattern == EMBEDDING]
    layered = [pattern for pattern in own if pattern.startswith(_HF)]
    names += [(pattern, layer) for layer in range(decoder.num_layers) for pattern in layered]
    names += [(pattern, 0) for pattern in own if pattern not in (EMBEDDING, *layered)]
    return {
        pattern.format(layer=layer): replace(
            MAPPING[pattern], megatron=MAPPING[pattern].megatron.format(layer=layer)
        )
        for pattern, layer in names
    }


def _has(decoder: Decoder, pattern: str) -> bool:
    if pattern == OUTPUT:
        return not decoder.tied_embeddings
    if pattern.endswith(".bias"):
        return decoder.add_qkv_bias
    return decoder.qk_layernorm or not pattern.endswith(("q_norm.weight", "k_norm.weight"))


def pieces(decoder: Decoder, target: Target, share: Share) -> list[Piece]:
    """The pieces of a tensor on a tensor-parallel rank."""
    shape = tuple(SIZES[size](decoder) for size in target.shape)
    return list(LAYOUTS[target.layout](decoder, share, shape))
