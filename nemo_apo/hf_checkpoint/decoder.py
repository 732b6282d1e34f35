"""The decoder that a ``config.json`` describes, or why it is not one that can be trained here.

Nothing is assumed of a key that is missing or a feature that is not known: the file decides every
shape, and what the trainer's model would compute otherwise is refused.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
# Names of the data types that weights may have, as config.json writes them.
DTYPES = ("float32", "bfloat16", "float16")


class UnfitCheckpoint(ValueError):
    """A checkpoint that cannot be read, or not by this trainer; the message names file and rule."""


@dataclass(frozen=True)
class Decoder:
    """Shapes of a dense decoder; the names are those of ``nemo_apo.config.ModelConfig``.

    Attributes:
        num_layers, hidden_size, ffn_hidden_size: sizes.
        num_attention_heads, num_query_groups: query heads and key/value heads.
        kv_channels: size of one head.
        qk_layernorm: RMSNorm on queries and keys.
        add_qkv_bias: queries, keys and values have a bias.
        rotary_base: base of RoPE.
        layernorm_epsilon: of RMSNorm.
        tied_embeddings: one matrix for input embedding and output projection.
        vocab_size: rows of the embedding, without padding.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    qk_layernorm: bool
    add_qkv_bias: bool
    rotary_base: int
    layernorm_epsilon: float
    tied_embeddings: bool
    vocab_size: int


@dataclass(frozen=True)
class Architecture:
    """What an architecture of transformers fixes beside ``config.json``.

    Attributes:
        model_type: its key of that name.
        qk_layernorm, add_qkv_bias: see ``Decoder``.
        head_dim_required: whether the size of a head must be written; else it may also follow
            from hidden size and heads, as transformers has it.
    """

    model_type: str
    qk_layernorm: bool
    add_qkv_bias: bool
    head_dim_required: bool


ARCHITECTURES: dict[str, Architecture] = {
    "Qwen3ForCausalLM": Architecture("qwen3", True, False, head_dim_required=True),
    "Qwen2ForCausalLM": Architecture("qwen2", False, True, head_dim_required=False),
}

# A key of config.json, whether its value (None where it is missing) will do, and why not if not.
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("quantization_config", lambda v: v is None, "quantized weights cannot be trained"),
    ("num_experts", lambda v: not v, "mixtures of experts are not supported"),
    ("hidden_act", lambda v: v == "silu", "the feed-forward layer must be SwiGLU (silu)"),
    ("attention_bias", lambda v: not v, "a bias in the attention's output is not supported"),
    ("attention_dropout", lambda v: not v, "dropout is not supported, must be 0"),
    ("use_sliding_window", lambda v: not v, "sliding windows are not supported"),
    (
        "layer_types",
        lambda v: v is None or all(kind == "full_attention" for kind in v),
        "only full_attention is supported",
    ),
    ("rope_scaling", lambda v: v is None, "scaled rotary embeddings are not supported"),
    ("partial_rotary_factor", lambda v: v in (None, 1), "must be 1"),
    ("dtype", lambda v: v in (None, *DTYPES), f"must be one of {', '.join(DTYPES)}"),
    ("torch_dtype", lambda v: v in (None, *DTYPES), f"must be one of {', '.join(DTYPES)}"),
)
# Keys of rope_parameters that change nothing.
_PLAIN_ROPE = {"rope_type": ("default", None), "type": ("default", None)}
_PLAIN_ROPE["partial_rotary_factor"] = (1, None)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UnfitCheckpoint: if it is missing, unreadable, or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnfitCheckpoint(f"{path.name} is missing") from None
    except OSError as error:
        raise UnfitCheckpoint(f"{path.name} cannot be read: {error}") from None
    except (ValueError, RecursionError):
        raise UnfitCheckpoint(f"{path.name} is not JSON") from None
    if not isinstance(content, dict):
        raise UnfitCheckpoint(f"{path.name} holds no JSON object")
    return content


def read_decoder(folder: Path) -> Decoder:
    """The decoder that a folder's ``config.json`` describes.

    Raises:
        UnfitCheckpoint: naming the key, its value and the rule.
    """
    if not folder.is_dir():
        raise UnfitCheckpoint("there is no such folder (a checkpoint must lie on this machine)")
    return decoder_of(read_json(folder / CONFIG_FILE))


def decoder_of(content: Mapping[str, Any]) -> Decoder:
    """The decoder that the content of a ``config.json`` describes; raises as ``read_decoder``."""
    architecture = _architecture(content)
    for key, holds, rule in _RULES:
        _require(holds(content.get(key)), key, content.get(key), rule)
    heads, hidden = _size(content, "num_attention_heads"), _size(content, "hidden_size")
    return Decoder(
        num_layers=_size(content, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_size(content, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=_size(content, "num_key_value_heads"),
        kv_channels=_head_size(content, architecture, hidden, heads),
        qk_layernorm=architecture.qk_layernorm,
        add_qkv_bias=architecture.add_qkv_bias,
        rotary_base=_rotary_base(content),
        layernorm_epsilon=_epsilon(content),
        tied_embeddings=_tied(content),
        vocab_size=_size(content, "vocab_size"),
    )


def longest_sequence(folder: Path) -> int | None:
    """Tokens that the model was made for; None where ``config.json`` does not say."""
    content = read_json(folder / CONFIG_FILE)
    key = "max_position_embeddings"
    return None if content.get(key) is None else _size(content, key)


def architecture_named_for(decoder: Decoder) -> str:
    """The architecture of transformers that computes the same.

    Raises:
        UnfitCheckpoint: if there is none.
    """
    for name, architecture in ARCHITECTURES.items():
        own = (architecture.qk_layernorm, architecture.add_qkv_bias)
        if own == (decoder.qk_layernorm, decoder.add_qkv_bias):
            return name
    raise UnfitCheckpoint(
        "no architecture of transformers has "
        f"qk_layernorm={str(decoder.qk_layernorm).lower()} and "
        f"add_qkv_bias={str(decoder.add_qkv_bias).lower()}: Qwen3 has the first alone, Qwen2.5 "
        "the second"
    )


def _require(holds: bool, key: str, value: object, rule: str) -> None:
    if not holds:
        raise UnfitCheckpoint(f"{CONFIG_FILE} has {key}={json.dumps(value)}: {rule}")


def _architecture(content: Mapping[str, Any]) -> Architecture:
    names = content.get("architectures")
    known = isinstance(names, list) and len(names) == 1 and names[0] in ARCHITECTURES
    rule = f"must be one of {', '.join(ARCHITECTURES)}: dense decoders alone are supported"
    _require(known, "architectures", names, rule)
    assert isinstance(names, list)
    architecture = ARCHITECTURES[names[0]]
    kind = content.get("model_type")
    rule = f"must be {architecture.model_type} for {names[0]}"
    _require(kind == architecture.model_type, "model_type", kind, rule)
    return architecture


def _size(content: Mapping[str, Any], key: str) -> int:
    value = content.get(key)
    _require(type(value) is int and value > 0, key, value, "must be a whole number of at least 1")
    assert isinstance(value, int)
    return value


def _head_size(
    content: Mapping[str, Any], architecture: Architecture, hidden: int, heads: int
) -> int:
    if content.get("head_dim") is not None or architecture.head_dim_required:
        return _size(content, "head_dim")
    rule = f"must divide hidden_size={hidden}, as there is no head_dim"
    _require(hidden % heads == 0, "num_attention_heads", heads, rule)
    return hidden // heads


def _rotary_base(content: Mapping[str, Any]) -> int:
    """``rope_theta``, which transformers 5 keeps in ``rope_parameters``."""
    key, rope = "rope_parameters", content.get("rope_parameters")
    if rope is None:
        key, value = "rope_theta", content.get("rope_theta")
    else:
        _require(isinstance(rope, dict), key, rope, "must be an object")
        for name, plain in _PLAIN_ROPE.items():
            _require(rope.get(name) in plain, key, rope, "scaled rotary embeddings: not supported")
        unknown = sorted(rope.keys() - _PLAIN_ROPE.keys() - {"rope_theta"})
        _require(not unknown, key, rope, f"{', '.join(unknown)}: not supported")
        key, value = "rope_parameters.rope_theta", rope.get("rope_theta")
        outside = content.get("rope_theta", value)
        _require(outside == value, "rope_theta", outside, f"contradicts {key}={value}")
    is_whole = type(value) in (int, float) and value >= 1 and value == int(value)
    _require(is_whole, key, value, "must be a whole number of at least 1")
    return int(value)  # type: ignore[arg-type]


def _epsilon(content: Mapping[str, Any]) -> float:
    key = "rms_norm_eps"
    value = content.get(key)
    _require(type(value) in (int, float) and 0 < value < 1, key, value, "must lie in (0, 1)")
    return float(value)  # type: ignore[arg-type]


def _tied(content: Mapping[str, Any]) -> bool:
    key = "tie_word_embeddings"
    value = content.get(key)
    _require(type(value) is bool, key, value, "must be true or false")
    return bool(value)
