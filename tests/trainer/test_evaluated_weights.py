"""Which checkpoint is evaluated; the evaluation itself is in tests/test_cli_eval.py."""

from pathlib import Path

import pytest

from nemo_apo import record
from nemo_apo.config import ConfigError
from nemo_apo.trainer.evaluated_weights import chosen_checkpoint
from nemo_apo.trainer.retention import METRICS
from nemo_apo.trainer.sealed_folder import MANIFEST_FILE, seal

METRIC = record.EVAL_ACCURACY


def checkpoints(run: Path, accuracies: dict[str, float | None]) -> None:
    """Sealed folders without content, by name."""
    for name, accuracy in accuracies.items():
        folder = run / record.CHECKPOINT_DIR / name
        folder.mkdir(parents=True)
        seal(folder, {}, {METRICS: {} if accuracy is None else {METRIC: accuracy}})


def chosen(run: Path, which: str) -> str:
    return chosen_checkpoint(run, which, METRIC).name


def test_the_latest_the_best_and_a_step(tmp_path: Path) -> None:
    names = ("step_000010", "step_000020", "step_000020.1", "step_000030", "step_000100")
    checkpoints(tmp_path, dict(zip(names, (0.5, 0.7, 0.8, 0.8, None), strict=True)))
    assert chosen(tmp_path, "latest") == "step_000100"
    assert chosen(tmp_path, "best") == "step_000030", "the newer of two equal ones"
    assert chosen(tmp_path, "20") == "step_000020.1", "the later of two of a step"
    assert chosen(tmp_path, "0010") == "step_000010"
    for which in ("15", "last", "-10", "1.0"):
        with pytest.raises(ConfigError, match=f"--checkpoint {which}: .*are 10, 20, 30, 100"):
            chosen(tmp_path, which)


def test_a_damaged_manifest_leaves_open_which_is_best(tmp_path: Path) -> None:
    checkpoints(tmp_path, {"step_000010": 0.5, "step_000020": 0.4})
    (tmp_path / record.CHECKPOINT_DIR / "step_000020" / MANIFEST_FILE).write_text("{}")
    with pytest.raises(ConfigError, match=r"best: .*step_000020 is damaged"):
        chosen(tmp_path, "best")
    assert chosen(tmp_path, "10") == "step_000010"


def test_there_must_be_a_checkpoint_and_for_the_best_one_with_the_metric(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        chosen(tmp_path, "latest")
    checkpoints(tmp_path, {"step_000010": None})
    with pytest.raises(ConfigError, match=f"best: none of .* states {METRIC}"):
        chosen(tmp_path, "best")
