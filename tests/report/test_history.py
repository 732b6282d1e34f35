"""Reading run folders. All numbers are synthetic (see conftest)."""

import json
from pathlib import Path

import pytest

from nemo_apo.record import (
    ALPHA,
    CONFIG_FILE,
    EVAL_ACCURACY,
    FINDINGS,
    GRAD_NORM,
    METRICS_FILE,
    REWARD_MEAN,
    STEP,
    SUMMARY_FILE,
)
from nemo_apo.report.history import RunFolderError, read_run, read_runs


def append(folder: Path, text: str) -> None:
    with (folder / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(text)


def test_finished_run(tmp_path, write_run):
    run = read_run(write_run(tmp_path / "run", name="apo", steps=20))
    assert run.label == "apo"
    assert run.steps == 20
    assert len(run.records) == 21
    assert run.summary is not None
    assert run.summary.accuracy_start == run.first(EVAL_ACCURACY)
    assert run.summary.accuracy_final == run.last(EVAL_ACCURACY)
    assert run.series(EVAL_ACCURACY)[0] == [0, 10, 20]
    assert run.config["objective"]["name"] == "apo"
    assert run.truncated_lines == 0


def test_unfinished_run_is_named_after_its_folder(tmp_path, write_run):
    run = read_run(write_run(tmp_path / "killed", finished=False))
    assert run.summary is None
    assert run.label == "killed"


def test_truncated_last_line_is_skipped_and_counted(tmp_path, write_run):
    folder = write_run(tmp_path / "run", steps=5)
    append(folder, f'{{"{STEP}": 6, "{REWARD_MEAN}": 0.')
    run = read_run(folder)
    assert (run.steps, run.truncated_lines) == (5, 1)


def test_last_line_cut_within_a_letter(tmp_path, write_run):
    folder = write_run(tmp_path / "run", steps=5)
    with (folder / METRICS_FILE).open("ab") as file:
        file.write('{"é'.encode()[:-1])
    assert read_run(folder).truncated_lines == 1


def test_complete_last_line_needs_no_newline(tmp_path, write_run):
    folder = write_run(tmp_path / "run", steps=5)
    append(folder, json.dumps({STEP: 6, REWARD_MEAN: 0.5}))
    run = read_run(folder)
    assert (run.steps, run.truncated_lines) == (6, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 3, "rew', "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('{"x": 1}', '"step" must be a whole number'),
        ('{"step": true}', '"step" must be a whole number'),
        ('{"step": -1}', '"step" must be a whole number'),
        ('{"step": 3, "x": "high"}', '"x" must be a number or null'),
        ('{"step": 3, "x": NaN}', "NaN is not JSON"),
        ('{"step": 3, "findings": [{"name": "a"}]}', "a finding needs the texts"),
        ('{"step": 3, "findings": null}', '"findings" must be a list'),
    ],
)
def test_malformed_line_is_named(tmp_path, write_run, line, message):
    folder = write_run(tmp_path / "run", steps=2)
    append(folder, line + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_run(folder)
    assert METRICS_FILE in str(caught.value)
    assert "line 4" in str(caught.value)


def test_null_is_a_gap(tmp_path, write_run):
    def change(lines):
        lines[3][GRAD_NORM] = None

    run = read_run(write_run(tmp_path / "run", steps=5, change=change))
    steps, values = run.series(GRAD_NORM)
    assert steps == [1, 2, 3, 4, 5]
    assert values[2] is None
    assert len(run.finite(GRAD_NORM)) == 4


def test_resumed_run_replaces_the_steps_it_repeats(tmp_path, write_run):
    folder = write_run(tmp_path / "run", steps=12)
    append(folder, json.dumps({STEP: 10, REWARD_MEAN: 7.0}) + "\n")
    append(folder, json.dumps({STEP: 11, REWARD_MEAN: 8.0}) + "\n")
    run = read_run(folder)
    assert [record.step for record in run.records] == list(range(12))
    assert run.series(REWARD_MEAN)[1][-2:] == [7.0, 8.0]
    assert run.series(EVAL_ACCURACY)[0] == [0, 10]


def test_findings_become_spans(tmp_path, write_run):
    run = read_run(write_run(tmp_path / "run", steps=20))
    (span,) = run.finding_spans()
    assert span.name == "no signal"
    assert span.steps == (11, 12, 13, 14)
    assert "resample" in span.advice


def test_two_findings_of_one_name_at_one_step_count_once(tmp_path, write_run):
    def change(lines):
        lines[12][FINDINGS] *= 2

    run = read_run(write_run(tmp_path / "run", steps=20, change=change))
    assert run.finding_spans()[0].steps == (11, 12, 13, 14)


def test_missing_folder_and_files(tmp_path, write_run):
    with pytest.raises(RunFolderError, match="no run folder"):
        read_run(tmp_path / "absent")
    folder = write_run(tmp_path / "run")
    (folder / METRICS_FILE).unlink()
    with pytest.raises(RunFolderError, match=METRICS_FILE):
        read_run(folder)
    folder = write_run(tmp_path / "other")
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(RunFolderError, match=CONFIG_FILE):
        read_run(folder)


def test_malformed_summary(tmp_path, write_run):
    folder = write_run(tmp_path / "run")
    path = folder / SUMMARY_FILE
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "extra": 1}))
    with pytest.raises(RunFolderError, match=r"unknown fields \['extra'\]"):
        read_run(folder)
    path.write_text(json.dumps({**summary, "steps": "many"}))
    with pytest.raises(RunFolderError, match='"steps" has the wrong type'):
        read_run(folder)
    path.write_text('{\n"name": }')
    with pytest.raises(RunFolderError, match=f"{SUMMARY_FILE}, line 2"):
        read_run(folder)


def test_malformed_config(tmp_path, write_run):
    folder = write_run(tmp_path / "run", config="a: 1\nb: [1\nc: 2\n")
    with pytest.raises(RunFolderError, match=rf"{CONFIG_FILE}, line \d"):
        read_run(folder)
    folder = write_run(tmp_path / "other", config="- 1\n")
    with pytest.raises(RunFolderError, match="expected a mapping"):
        read_run(folder)


def test_labels_are_distinct(tmp_path, write_run):
    folders = [write_run(tmp_path / f"seed{i}", name="apo", steps=2) for i in range(2)]
    assert [run.label for run in read_runs(folders)] == ["apo (seed0)", "apo (seed1)"]
    assert len({run.label for run in read_runs([folders[0], folders[0]])}) == 2


def test_label_has_no_control_characters(tmp_path, write_run):
    run = read_run(write_run(tmp_path / "run", name="a\x1b[31m\nb", steps=2))
    assert run.label.isprintable()


def test_no_run_is_refused():
    with pytest.raises(RunFolderError, match="at least one"):
        read_runs([])


def test_run_without_metrics(tmp_path, write_run):
    run = read_run(write_run(tmp_path / "run", change=lambda lines: lines.clear()))
    assert (run.steps, run.records, run.last(ALPHA)) == (0, (), None)
