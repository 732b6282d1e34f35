"""A study repeats no finished run, and takes none for another."""

import json
from pathlib import Path

import pytest

from nemo_apo import record
from nemo_apo.compose import to_yaml
from nemo_apo.config import Config
from nemo_apo.trainer import study
from nemo_apo.trainer.study import Study, results

STUDY = Study("exact", {"apo": ("objective=apo",), "grpo": ("objective=grpo",)}, seeds=2)


def finish(root: Path, label: str, seed: int, accuracy: float, *overrides: str) -> Config:
    """Leave the files of a finished run; its figures are made up."""
    config = study._config(STUDY, label, seed, root, overrides)
    folder = root / config.run.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / record.CONFIG_FILE).write_text(to_yaml(config))
    figures = dict.fromkeys(("accuracy_start", "reward_final", "pass_at_k"), 0.5)
    figures |= {"accuracy_final": accuracy, "alpha_last": 0.6 if label == "apo" else None}
    (folder / record.SUMMARY_FILE).write_text(json.dumps(figures))
    return config


def test_rows_are_means_and_deviations_over_the_finished_seeds(tmp_path: Path) -> None:
    finish(tmp_path, "apo", 0, 0.9)
    finish(tmp_path, "apo", 1, 0.8)
    (row,) = results(STUDY, tmp_path, [])
    assert (row.label, row.runs) == ("apo", 2)
    assert row.accuracy == (pytest.approx(0.85), pytest.approx(0.05))
    assert row.alpha_last == pytest.approx(0.6)


def test_a_run_with_other_settings_is_not_taken_for_finished(tmp_path: Path) -> None:
    finish(tmp_path, "grpo", 0, 0.9)
    assert [row.label for row in results(STUDY, tmp_path, [])] == ["grpo"]
    assert results(STUDY, tmp_path, ["optimizer.lr=1e-3"]) == []
    assert results(STUDY, tmp_path, ["run.steps=5"]) == []


def test_a_run_whose_graders_had_other_limits_is_finished(tmp_path: Path) -> None:
    finish(tmp_path, "grpo", 0, 0.9)
    limits = ["grading.workers=2", "grading.wall_s=5"]
    assert [row.label for row in results(STUDY, tmp_path, limits)] == ["grpo"]
    assert results(STUDY, tmp_path, ["grading.grader=exact_match"]) == []


def test_only_what_is_missing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(tmp_path, "apo", 0, 0.9)
    ran: list[str] = []
    monkeypatch.setattr(
        study, "_in_processes", lambda work, configs, jobs: ran.extend(c.run.name for c in configs)
    )
    study.run_study(STUDY, tmp_path, [], jobs=1)
    # A warm start for each seed that has a run left, then the runs themselves.
    assert ran[2:] == ["exact_grpo_seed0", "exact_apo_seed1", "exact_grpo_seed1"]


def test_warm_starts_are_shared_by_rewards_with_the_same_teacher_only(tmp_path: Path) -> None:
    def folder(*overrides: str) -> Path:
        return study._warm_folder(study._config(STUDY, "apo", 0, tmp_path, overrides))

    assert folder() == folder("task.reward=graded")
    assert folder() != folder("task.reward=two_modes")
    assert folder() != folder("warm_start.steps=5")
    assert folder() != folder("model.hidden_size=32")
