"""Parameter counts against a list of every tensor of the model."""

import math

import pytest

from nemo_apo.config import ModelConfig
from nemo_apo.planning.settings import model_named
from nemo_apo.planning.shapes import Shapes

VOCABULARY = 151936
PUBLISHED = {
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "qwen2.5_7b": 7_615_616_512,
}


def tensors(model: ModelConfig, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, as a checkpoint lists them."""
    hidden, head = model.hidden_size, model.kv_channels
    found: dict[str, tuple[int, ...]] = {"embed": (vocabulary, hidden), "norm": (hidden,)}
    if not model.tied_embeddings:
        found["lm_head"] = (vocabulary, hidden)
    for layer in range(model.num_layers):
        found |= {
            f"{layer}.q": (model.num_attention_heads * head, hidden),
            f"{layer}.k": (model.num_query_groups * head, hidden),
            f"{layer}.v": (model.num_query_groups * head, hidden),
            f"{layer}.o": (hidden, model.num_attention_heads * head),
            f"{layer}.gate": (model.ffn_hidden_size, hidden),
            f"{layer}.up": (model.ffn_hidden_size, hidden),
            f"{layer}.down": (hidden, model.ffn_hidden_size),
            f"{layer}.input_norm": (hidden,),
            f"{layer}.post_attention_norm": (hidden,),
        }
        if model.add_qkv_bias:
            found |= {
                f"{layer}.q_bias": (model.num_attention_heads * head,),
                f"{layer}.k_bias": (model.num_query_groups * head,),
                f"{layer}.v_bias": (model.num_query_groups * head,),
            }
        if model.qk_layernorm:
            found |= {f"{layer}.q_norm": (head,), f"{layer}.k_norm": (head,)}
    return found


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_the_published_totals(name: str, published: int) -> None:
    model = model_named(name)
    assert model.vocab_size is not None
    listed = sum(math.prod(shape) for shape in tensors(model, model.vocab_size).values())
    assert Shapes.of(model, model.vocab_size).parameters == listed == published


def test_a_vocabulary_is_padded_as_the_model_says() -> None:
    model = model_named("qwen3_8b")
    assert model.make_vocab_size_divisible_by == 128
    assert Shapes.of(model, VOCABULARY).vocabulary == VOCABULARY
    assert Shapes.of(model, VOCABULARY + 1).vocabulary == VOCABULARY + 128


def test_without_norms_of_queries_and_keys() -> None:
    model = ModelConfig(qk_layernorm=False)
    listed = sum(math.prod(shape) for shape in tensors(model, 16).values())
    assert Shapes.of(model, 16).parameters == listed
