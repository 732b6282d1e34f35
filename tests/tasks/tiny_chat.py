"""A tiny byte-level tokenizer with a chat template in Qwen3's style, and data sets beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TURN, TURN_END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)


def save_tokenizer(
    folder: Path,
    *,
    template: str | None = TEMPLATE,
    end: str | None = TURN_END,
    corpus: Sequence[str] = ("Reason step by step.",),
    merges: int = 0,
) -> Path:
    """A tokenizer of all bytes, some tags and ``merges`` more tokens, saved as a checkpoint's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(list(corpus), trainer)
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    made.add_tokens([AddedToken(tag, special=False) for tag in tags])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=end,
        pad_token=TEXT_END,
        extra_special_tokens=[TURN, TURN_END],
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a JSONL file; returns its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def math_rows(count: int, start: int = 0, level: int = 3) -> list[dict[str, Any]]:
    """Rows as MATH has them: 1+0, 1+1, ..."""
    return [
        {
            "problem": f"What is $1+{n}$?",
            "level": f"Level {level}",
            "type": "Algebra",
            "solution": f"We add: $1+{n}=\\boxed{{{n + 1}}}$.",
        }
        for n in range(start, start + count)
    ]


def gsm8k_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows as GSM8K has them."""
    return [
        {
            "question": f"Ann has {n} apples and buys 1000. How many has she?",
            "answer": f"{n}+1000=<<{n}+1000={n + 1000}>>{n + 1000}\n#### {n + 1000:,}",
        }
        for n in range(start, start + count)
    ]
