"""The table of answers through real workers: one pool, one batch."""

from pathlib import Path

import pytest

pytest.importorskip("math_verify", reason="the math extra comes with requirements/test.txt")

from nemo_apo.grading import Grade
from nemo_apo.grading.writing import alternatives, plain, same_words

from .answer_table import COMPLETIONS, ENDLESS, HOSTILE, KNOWN_DISAGREEMENTS, TABLE, Row
from .workers import LONG, pool, text

REFUSALS = {"refused", "timeout", "cpu", "memory"}


def boxed(answer: str) -> str:
    return rf"\boxed{{{answer}}}"


def told(row: Row, grade: Grade) -> str:
    return f"{row.name}: {row.answer} for {row.reference} is {grade.value} {grade.reason}"


@pytest.mark.slow(reason="compares 200 answers in workers, and some that are made to take for ever")
def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [*TABLE, *KNOWN_DISAGREEMENTS]
    samples = [text(boxed(row.answer), row.reference) for row in rows]
    samples += [text(completion, "5") for completion in COMPLETIONS]
    # An honest one behind each: its worker must be as good as new.
    hostile = [name for name in HOSTILE if LONG or name not in ENDLESS[2:]]
    for name in hostile:
        samples += [text(boxed(HOSTILE[name]), "5"), text(boxed("5"), "5")]
    with pool(grader="math_verify", workers=2, wall_s=3.0, cpu_s=2, memory_mib=1024) as workers:
        grades = iter(workers.grade(samples))
    wrong = [
        told(row, grade)
        for row, grade in zip(TABLE, grades, strict=False)
        if grade.value != row.same
    ]
    assert wrong == []
    mended = [
        told(row, g)
        for row, g in zip(KNOWN_DISAGREEMENTS, grades, strict=False)
        if g.value == row.same
    ]
    assert mended == [], "no disagreement any more: these belong in the table, and into the docs"
    marks = [
        said
        for said, grade in zip(COMPLETIONS, grades, strict=False)
        if grade.value != COMPLETIONS[said]
    ]
    assert marks == []
    for name in hostile:
        grade, after = next(grades), next(grades)
        assert grade.value == 0.0 or grade.reason in REFUSALS, f"{name}: {grade}"
        assert after.value == 1.0, f"after {name}: {after}"
    assert next(grades, None) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("5.", "5"),
        ("1, 2, ...", "1, 2, ..."),
        (r"\frac{1}{2}.", r"\frac{1}{2}"),
        ("The answer is 5.", "5"),
        ("So the final answer is: $5$", "$5$"),
        ("answers", "answers"),
        ("the value is $x+1$ here", "x+1"),
        ("$1$ and $2$ here", "$1$ and $2$ here"),
        (r"\$5 each", r"\$5 each"),
        ("1 234", "1234"),
        ("1 23", "1 23"),
        (r"1.2\overline{34}", r"\frac{1222}{990}"),
        ("√12x", r"\sqrt{12}x"),
        ("√{a}", r"\sqrt{a}"),
        ("½", r"\frac12"),
        (r"\approx 3", "3"),
        (r"\approxeq 3", r"\approxeq 3"),
    ],
)
def test_what_is_taken_out(written: str, read: str) -> None:
    assert plain(written).strip() == read


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("East", r"\text{east}", True),
        (r"\textbf{New York}", "new york", True),
        ("east", "west", False),
        ("A", "a", False),
        ("5", "5", False),
        (r"\sin", "sin", False),
    ],
)
def test_words(one: str, other: str, same: bool) -> None:
    assert same_words(one, other) == same


@pytest.mark.parametrize(
    ("reference", "answer", "pairs"),
    [
        ("25", "25", []),
        (r"25\%", r"25\%", []),
        (r"25\%", "25", [("25", "25"), (r"\frac{25}{100}", "25")]),
        ("0.25", "25%", [("0.25", "25"), ("0.25", r"\frac{25}{100}")]),
        ("(1,3]", r"1<x\le 3", [("(1,3]", "(1, 3]")]),
        (r"1\leq x \lt 3", "[1,3)", [("[1, 3)", "[1,3)")]),
        ("1<x<3", "2", []),
        ("1<2<3", "(1,3)", []),
        ("x<3", "(1,3)", []),
    ],
)
def test_alternatives(reference: str, answer: str, pairs: list[tuple[str, str]]) -> None:
    def without_spaces(found: list[tuple[str, str]]) -> list[tuple[str, ...]]:
        return [tuple("".join(text.split()) for text in pair) for pair in found]

    assert without_spaces(alternatives(reference, answer)) == without_spaces(pairs)
