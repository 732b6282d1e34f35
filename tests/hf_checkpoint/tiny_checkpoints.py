"""Tiny random checkpoints, written by transformers, and its own answers about them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers: Any = pytest.importorskip("transformers", reason="comes with requirements/test.txt")

# No multiple of anything, so that rows of padding are there.
VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 500_000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    # Wide enough that every part of the network matters to the logits.
    "initializer_range": 0.2,
}
# A head whose size is not hidden size over heads, as in Qwen3.
QWEN3 = {**SIZES, "head_dim": 16}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {**QWEN3, "tie_word_embeddings": False},
    "qwen3_tied": {**QWEN3, "tie_word_embeddings": True},
    "qwen2": {**SIZES, "tie_word_embeddings": False},
}


def make_model(kind: str, **changes: Any) -> Any:
    """A model of transformers in float32 with random weights, norms and biases among them."""
    values = {**KINDS[kind], **changes}
    torch.manual_seed(len(kind))
    if kind.startswith("qwen3"):
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**values))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**values))
    # transformers starts norms at one and biases at zero, which would hide a mistake.
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.8, std=0.3)
    return model.eval()


def write(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Write a checkpoint and return the model; options are those of ``save_pretrained``."""
    model = make_model(kind).to(dtype)
    model.save_pretrained(folder, **options)
    return model


def logits_of(folder: Path, tokens_NT: Tensor) -> Tensor:
    """Logits [N, T, V] in float32 of the checkpoint in a folder, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens_NT).logits


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files in a folder."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
