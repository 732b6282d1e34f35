"""The mapping's arithmetic by hand; whether it is the right one is for transformers to say."""

import pytest

from nemo_apo.hf_checkpoint.decoder import Decoder
from nemo_apo.hf_checkpoint.mapping import LAYOUTS, MAPPING, SIZES, Piece, Share, pieces, targets

ALL = slice(None)
# Two query groups of three queries each, heads of 4 numbers, 10 tokens.
DECODER = Decoder(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=16,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=4,
    qk_layernorm=True,
    add_qkv_bias=False,
    rotary_base=10000,
    layernorm_epsilon=1e-6,
    tied_embeddings=False,
    vocab_size=10,
)


def rows_of(name: str, rank: int, size: int, vocabulary: int = 0) -> list[Piece]:
    """The pieces of a tensor of layer 0 on a rank."""
    target = MAPPING[f"model.layers.{{layer}}.{name}" if name not in MAPPING else name]
    return pieces(DECODER, target, Share(rank, size, vocabulary))


@pytest.mark.parametrize(
    ("name", "rank", "size", "expected"),
    [
        # A group is 3 queries, 1 key, 1 value: 20 rows; the second group starts at 20.
        ("self_attn.q_proj.weight", 0, 1, [(0, 12, 0, 12), (12, 24, 20, 32)]),
        ("self_attn.k_proj.weight", 0, 1, [(0, 4, 12, 16), (4, 8, 32, 36)]),
        ("self_attn.v_proj.weight", 0, 1, [(0, 4, 16, 20), (4, 8, 36, 40)]),
        ("self_attn.q_proj.weight", 1, 2, [(12, 24, 0, 12)]),
        ("self_attn.k_proj.weight", 1, 2, [(4, 8, 12, 16)]),
        ("self_attn.v_proj.bias", 1, 2, [(4, 8, 16, 20)]),
        ("mlp.gate_proj.weight", 1, 4, [(4, 8, 0, 4)]),
        ("mlp.up_proj.weight", 1, 4, [(4, 8, 4, 8)]),
    ],
)
def test_rows(name: str, rank: int, size: int, expected: list[tuple[int, ...]]) -> None:
    assert rows_of(name, rank, size) == [
        Piece(slice(first, last), ALL, slice(start, end)) for first, last, start, end in expected
    ]


def test_columns_are_divided_where_inputs_are() -> None:
    assert rows_of("self_attn.o_proj.weight", 1, 2) == [Piece(ALL, slice(12, 24), ALL)]
    assert rows_of("mlp.down_proj.weight", 0, 2) == [Piece(ALL, slice(0, 8), ALL)]


def test_a_vocabulary_ends_within_a_rank_or_before_it() -> None:
    # 10 tokens padded to 16, 4 on each rank: 4, 4, 2 and none.
    counts = [rows_of("lm_head.weight", rank, 4, vocabulary=4) for rank in range(4)]
    assert counts[1] == [Piece(slice(4, 8), ALL, slice(0, 4))]
    assert counts[2] == [Piece(slice(8, 10), ALL, slice(0, 2))]
    assert counts[3] == []


def test_every_layout_and_size_exists_and_is_used() -> None:
    assert {target.layout for target in MAPPING.values()} == LAYOUTS.keys()
    assert {size for target in MAPPING.values() for size in target.shape} == SIZES.keys()


def test_tensors_come_layer_by_layer() -> None:
    names = list(targets(DECODER))
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    assert (names[0], names[-1]) == ("model.embed_tokens.weight", "lm_head.weight")
