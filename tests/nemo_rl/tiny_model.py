"""A model and a tokenizer of one character per token, small enough for every test."""

from pathlib import Path
from typing import Any

import torch

# Enough for sums of small numbers and for MATH's boxed answers.
CHARACTERS = "0123456789+-*/= ?.\\{}abcdefghijklmnopqrstuvwxyzWA:\n"
PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"
PAD_ID, END_ID = 0, 1
# More rows than the tokenizer has tokens, as real models have.
ROWS = 64


def make(folder: Path) -> str:
    """Write model and tokenizer into a folder, as Hugging Face's libraries save them; its name."""
    _tokenizer().save_pretrained(folder)
    _model().save_pretrained(folder)
    return str(folder)


def load(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model as Hugging Face's library loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: place for place, token in enumerate([PAD, END, UNKNOWN, *CHARACTERS])}
    assert (ids[PAD], ids[END]) == (PAD_ID, END_ID)
    assert len(ids) <= ROWS
    characters = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def _model() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
        # Larger than the usual initialization, so that answers differ in probability.
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.1)
    return model
