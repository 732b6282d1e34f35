"""Kept completions in the report: the best and the worst, whatever stands in their texts."""

import json
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import pytest

from nemo_apo.record import SAMPLES_FILE, KeptCompletion, KeptGroup
from nemo_apo.report import write_report
from nemo_apo.report.formats import visible
from nemo_apo.report.history import RunFolderError, read_run
from nemo_apo.report.samples import read_samples, shown_groups

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> \x1b[31m\x00\u202eevil\ud800"


def said(text: str, reward: float | None, **values: Any) -> KeptCompletion:
    facts = {"length": 3, "truncated": False, "failed": "", **values}
    return KeptCompletion(text=text, reward=reward, **facts)


def group(step: int, *completions: KeptCompletion, prompt: str = "2 + 2?") -> KeptGroup:
    return KeptGroup(step, prompt, "4", completions)


def write_samples(folder: Path, *groups: KeptGroup) -> Path:
    path = folder / SAMPLES_FILE
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in groups))
    return path


def test_the_first_and_the_last_step_show_their_best_and_worst() -> None:
    failed = said("?", None, failed="timeout", length=9)
    groups = [
        group(1, said("5", 0.0), said("4", 1.0), said("3", 0.5)),
        group(10, said("middle", 0.0), said("x", 1.0)),
        group(20, said("4!", 0.25, truncated=True), failed, said("4", -2.0)),
        group(20, said("one", 0.5), said("two", 0.5)),
    ]
    first, last, same = shown_groups(groups)
    assert (first.step, last.step, same.step) == (1, 20, 20)
    assert [one.text for one in first.completions] == ["4", "5"]
    assert first.completions[0].caption == "best of 3: reward 1.000, 3 tokens"
    assert first.completions[1].caption == "worst of 3: reward 0, 3 tokens"
    assert last.completions[0].caption.endswith("reward 0.250, 3 tokens, cut at the length limit")
    assert last.completions[1].caption == "worst of 3: no grade (timeout), 9 tokens"
    assert [one.text for one in same.completions] == ["one"]
    assert same.completions[0].caption.startswith("first of 2 that are worth the same: reward 0.5")


def test_one_step_is_shown_once_and_none_is_no_error() -> None:
    assert len(shown_groups([group(1, said("4", 1.0))])) == 1
    assert shown_groups([]) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\tb", "a\n\tb"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\u202e", "\\u202e"),
        ("\ud800", "\\ud800"),
        ("\r", "\\r"),
        ("naïve ∑ 数", "naïve ∑ 数"),
        ("", ""),
    ],
)
def test_what_has_no_glyph_is_shown_as_an_escape(text: str, expected: str) -> None:
    assert visible(text) == expected


def test_hostile_texts_reach_the_page_as_text(tmp_path: Path, write_run) -> None:
    folder = write_run(tmp_path / "run")
    hostile = KeptGroup(
        1, HOSTILE, HOSTILE, (said(HOSTILE, 1.0), said("fine", None, failed="timeout"))
    )
    write_samples(folder, hostile)
    page_path, _ = write_report([folder], tmp_path / "out")
    page = page_path.read_text(encoding="utf-8")
    assert page.count(escape(visible(HOSTILE), quote=False)) == 3
    assert "<script>alert(1)" not in page
    assert "onerror=alert(2)>" not in page.replace("onerror=alert(2)&gt;", "")
    assert "\x1b" not in page
    assert "\x00" not in page
    assert "\u202eevil" not in page


def test_several_runs_say_whose_samples_they_are(tmp_path: Path, write_run) -> None:
    folders = [write_run(tmp_path / name, name=name) for name in ("one", "two")]
    write_samples(folders[1], group(1, said("4", 1.0), said("5", 0.0)))
    page_path, _ = write_report(folders, tmp_path / "out")
    section = page_path.read_text(encoding="utf-8").split("<h2>Samples</h2>")[1]
    heading = section.split("<h3>")[1].split("</h3>")[0]
    assert "two" in heading
    assert "step 1" in heading


def test_a_run_without_samples_has_a_report(tmp_path: Path, write_run) -> None:
    folder = write_run(tmp_path / "run")
    assert read_run(folder).samples == ()
    page_path, _ = write_report([folder], tmp_path / "out")
    assert "None was kept." in page_path.read_text(encoding="utf-8")


def test_a_half_written_last_line_is_skipped(tmp_path: Path) -> None:
    path = write_samples(tmp_path, group(1, said("4", 1.0)), group(2, said("5", 0.0)))
    whole = path.read_bytes()
    assert [one.step for one in read_samples(path)] == [1, 2]
    path.write_bytes(whole[:-20])
    assert [one.step for one in read_samples(path)] == [1]
    path.write_bytes(whole.rstrip(b"\n"))
    assert [one.step for one in read_samples(path)] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "1"}, "'step' has the wrong type: '1'"),
        ({"step": True}, "'step' has the wrong type: True"),
        ({"prompt": None}, "'prompt' has the wrong type"),
        ({"completions": []}, "expected a list of completions"),
        ({"completions": [{"text": "a"}]}, "expected an object of"),
        ({"completions": [{**asdict(said("a", 1.0)), "reward": "1"}]}, "'reward' has the wrong"),
        ({"extra": 1}, "expected an object of"),
    ],
)
def test_a_malformed_line_is_named(
    tmp_path: Path, write_run, change: dict[str, Any], message: str
) -> None:
    folder = write_run(tmp_path / "run")
    good = asdict(group(1, said("4", 1.0)))
    text = json.dumps(good) + "\n" + json.dumps({**good, **change}) + "\n" + json.dumps(good) + "\n"
    (folder / SAMPLES_FILE).write_text(text)
    with pytest.raises(RunFolderError, match=f"{SAMPLES_FILE}, line 2: ") as error:
        read_run(folder)
    assert message in str(error.value)


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / SAMPLES_FILE).write_text("{\n{}\n")
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        read_samples(tmp_path / SAMPLES_FILE)
