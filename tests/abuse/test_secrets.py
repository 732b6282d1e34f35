"""Secrets of the environment stay there: canaries, looked for in all that a run leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

from tests.abuse.effort import report

CANARIES = {
    "HF_TOKEN": "canary-hf-0c1d2e3f",
    "HUGGING_FACE_HUB_TOKEN": "canary-hub-4a5b6c7d",
    "WANDB_API_KEY": "canary-wandb-8e9f0a1b",
    "AWS_SECRET_ACCESS_KEY": "canary-aws-2c3d4e5f",
}
OVERRIDES = [
    "run.steps=2",
    "run.save_every=1",
    "run.console=plain",
    "warm_start.steps=1",
    "rollout.prompts=4",
    "evaluation.every=1",
    "evaluation.prompts=4",
    "evaluation.pass_prompts=2",
    "grading.workers=1",
]


def nemo_apo(*arguments: str) -> str:
    """All that the command prints, environment as above; its argument list is asked for too."""
    done = subprocess.run(
        [sys.executable, "-m", "nemo_apo", *arguments],
        env={**os.environ, **CANARIES},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout + done.stderr


def leaks(content: bytes) -> list[str]:
    return [name for name, canary in CANARIES.items() if canary.encode() in content]


def test_secrets_reach_neither_output_nor_files(tmp_path: Path) -> None:
    told = nemo_apo("train", f"run.root={tmp_path}", "run.name=run", *OVERRIDES)
    assert "finished" in told
    told += nemo_apo("train", f"run.root={tmp_path}", "run.name=run", "run.nam=x")
    told += nemo_apo("train", f"run.root={tmp_path}", "run.name=run", "run.dry_run=true")
    assert leaks(told.encode()) == []
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = {path.name for path in files}
    assert {"config.yaml", "metrics.jsonl", "report.html", "trainer_state.json"} <= kinds
    assert {path.name: leaks(path.read_bytes()) for path in files if leaks(path.read_bytes())} == {}
    report("secrets in files and output", len(files) + 3)


def test_the_search_would_find_them() -> None:
    assert leaks(b"token=canary-hf-0c1d2e3f") == ["HF_TOKEN"]
