"""From a Hugging Face checkpoint through the commands and back: read, train, export, generate."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nemo_apo
from nemo_apo import record
from tests.tasks.tiny_chat import math_rows, save_tokenizer, write_jsonl

transformers: Any = pytest.importorskip("transformers", reason="comes with requirements/test.txt")
for _package in ("datasets", "math_verify"):
    pytest.importorskip(_package, reason="the math extra comes with requirements/test.txt")

REPOSITORY = Path(nemo_apo.__file__).parent.parent
LONGEST = 12
# A tiny model is fastest on one.
torch.set_num_threads(1)
SYSTEM = "Box it."
pytestmark = pytest.mark.slow(reason="commands that start processes, two ranks among them")


def command(*arguments: str, cwd: Path, ranks: int = 1) -> str:
    """Run ``nemo-apo``; what it printed."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, "nemo_apo", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ranks > 1 or "Warning" not in done.stderr, done.stderr  # torchrun has some of its own
    return done.stdout


def save_checkpoint(folder: Path, tied: bool) -> None:
    """A Qwen3 with two query groups that answers in a box, right about every other time."""
    save_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(3)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.Qwen3ForCausalLM(config)
    _teach(model, tokenizer)
    model.save_pretrained(folder)


def _teach(model: Any, tokenizer: Any) -> None:
    """Imitate boxed answers, the right one and its neighbours."""
    chats = [
        chat(tokenizer, row["problem"]) + f"\\boxed{{{n + off}}}<|im_end|>"
        for n, row in enumerate(math_rows(8))
        for off in (1, 1, 2)
    ]
    given = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
    seen = given["attention_mask"].bool()
    labels = given["input_ids"].masked_fill(~seen, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        model(**given, labels=labels).loss.backward()
        optimizer.step()


def chat(tokenizer: Any, problem: str) -> str:
    """A problem through the chat template, with the task's system prompt."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": problem}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def settings(folder: Path) -> list[str]:
    """MATH from two small files, graded by math-verify."""
    train = write_jsonl(folder / "train.jsonl", [*math_rows(8), *math_rows(4, 20, level=5)])
    test = write_jsonl(folder / "test.jsonl", math_rows(4, start=50))
    return [
        "model=hf",
        f"model.path={folder / 'checkpoint'}",
        "model.params_dtype=float32",
        "task=math",
        f"task.tokenizer={folder / 'checkpoint'}",
        f"task.path={train}",
        f"task.test_path={test}",
        "task.levels=[3]",
        f"task.system_prompt='{SYSTEM}'",
        "task.max_prompt_length=160",
        f"task.max_response_length={LONGEST}",
        "grading.workers=1",
        "rollout.prompts=4",
        "rollout.group_size=4",
        "optimizer.lr=0.001",
        "warm_start.steps=0",
        "evaluation.prompts=4",
        "evaluation.pass_prompts=2",
        "evaluation.pass_k=2",
        "run.steps=2",
        "run.name=tiny",
        "run.tensorboard=false",
        "run.report=false",
    ]


def greedy_texts(folder: Path, prompts: list[str]) -> list[str]:
    """What transformers completes greedily with the model in a folder, end token included."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = []
    for prompt in prompts:
        text = chat(tokenizer, prompt)
        given = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        said = model.generate(**given, do_sample=False, max_new_tokens=LONGEST)
        texts.append(tokenizer.decode(said[0, given["input_ids"].shape[1] :]))
    return texts


@pytest.mark.parametrize(
    ("layout", "tied"), [("tp2", True), ("pp2", False)], ids=["TP2, tied", "PP2, untied"]
)
def test_a_checkpoint_is_trained_and_exported(layout: str, tied: bool, tmp_path: Path) -> None:
    origin = tmp_path / "checkpoint"
    save_checkpoint(origin, tied)
    told = command("train", *settings(tmp_path), f"parallel={layout}", cwd=tmp_path, ranks=2)
    assert "kept 8 of 12" in told, told
    run = tmp_path / "runs/tiny"
    rows = [json.loads(line) for line in (run / record.METRICS_FILE).read_text().splitlines()]
    assert [row[record.REWARD_FAILED] for row in rows[1:]] == [0.0, 0.0]
    assert all(0.0 < row[record.REWARD_MEAN] < 1.0 for row in rows[1:]), "nothing to learn from"
    assert all(row[record.GRAD_NORM] > 0.0 for row in rows[1:])
    assert all(row[record.SAMPLER_MISMATCH] < 1e-5 for row in rows[1:])

    target = tmp_path / "exported"
    command("export", "runs/tiny", str(target), cwd=tmp_path)
    before = transformers.AutoModelForCausalLM.from_pretrained(origin).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert before.keys() == after.keys()
    matrices = [name for name, weight in before.items() if weight.dim() == 2]
    assert all(not torch.equal(before[name], after[name]) for name in matrices), "untrained"

    samples = tmp_path / "samples.jsonl"
    command("eval", "runs/tiny", "--samples", str(samples), "parallel=single", cwd=tmp_path)
    said = [json.loads(line) for line in samples.read_text().splitlines()]
    greedy = [row for row in said if row["sample"] is None]
    assert len(greedy) == 4
    wanted = greedy_texts(target, [row["prompt"] for row in greedy])
    assert [row["completion"] for row in greedy] == [
        text.removesuffix("<|im_end|>") for text in wanted
    ]
    assert len(set(wanted)) > 1, "all prompts are answered alike, which shows nothing"
