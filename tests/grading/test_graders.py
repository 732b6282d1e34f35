"""Graders by name: worked examples."""

import math

import pytest

from nemo_apo.grading import Grading, GradingSettings
from nemo_apo.grading.answers import answer_or_all, marked_answer
from nemo_apo.grading.graders import exact_match, number, numeric
from nemo_apo.tasks import SortTask
from nemo_apo.trainer.sampling import sample_of

from .workers import text


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{1} or \boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("<answer>7</answer>", "7"),
        ("<answer>1</answer><answer> 2 </answer>", "2"),
        (r"<answer>1</answer> \boxed{2}", "2"),
        (r"\boxed{2} <answer>1</answer>", "1"),
        (r"\boxed{never closed", None),
        (r"\boxed{4} and \boxed{never closed", None),
        ("<answer>never closed", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_the_last_mark_is_the_answer(completion: str, answer: str | None) -> None:
    assert marked_answer(completion) == answer


def test_a_million_braces_take_no_time_to_speak_of() -> None:
    assert marked_answer("\\boxed" + "{" * 10**6) is None
    assert marked_answer("\\boxed{" * 10**5) is None
    assert marked_answer("\\boxed{" + "{" * 10**5 + "}" * 10**5 + "}") is not None


def test_without_a_mark_the_whole_completion_is_the_answer() -> None:
    assert answer_or_all(" 133446\n") == "133446"


def test_exact_match() -> None:
    assert exact_match("", "1 2", "1 2 ") == 1.0
    assert exact_match("", r"it is \boxed{x}", "x") == 1.0
    assert exact_match("", "1  2", "1 2") == 0.0
    assert exact_match("", "", "") == 1.0


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("5", 5.0),
        ("-1,234.5", -1234.5),
        (" 2e-3 ", 0.002),
        ("3/4", 0.75),
        ("-3 / 4", -0.75),
        ("12%", 0.12),
        (r"12\%", 0.12),
        ("$5", 5.0),
        (r"\$1,000", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("\u22125", -5.0),
    ],
)
def test_numbers(written: str, value: float) -> None:
    assert number(written) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    "written",
    [
        "",
        "-",
        ".",
        "e5",
        "nan",
        "inf",
        "1e999",
        "1,23",
        "1 2",
        "1/0",
        "1/2/3",
        "0x10",
        "1_000",
        "2**9",
        "9^9",
        "__import__('os')",
        "\u0664",
        "1" * 301,
        "five",
    ],
)
def test_what_is_no_number(written: str) -> None:
    assert number(written) is None


@pytest.mark.parametrize(
    ("answer", "reference", "near"),
    [
        ("0.75", "3/4", 1.0),
        ("1000.9", "1000", 1.0),
        ("1001.1", "1000", 0.0),
        ("0.0009", "0", 1.0),
        ("0.0011", "0", 0.0),
        ("-1000.9", "-1000", 1.0),
        ("no number", "1", 0.0),
    ],
)
def test_numeric(answer: str, reference: str, near: float) -> None:
    assert numeric(1e-3)("", answer, reference) == near


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("1,005", 1.0),
        (r"1{,}005", 1.0),
        (r"1,\!005", 1.0),
        ("$1,005$", 1.0),
        (r"\$1005", 1.0),
        ("$1005", 1.0),
        ("x = 1005", 1.0),
        ("1005 apples", 1.0),
        ("1005 square feet.", 1.0),
        (r"1005\text{ cm}", 1.0),
        (r"1005 \mathrm{ km}", 1.0),
        (r"1\,005\,\mathrm{km}", 1.0),
        ("The answer is 1005.", 1.0),
        ("1 005", 1.0),
        ("1005 or 1006", 0.0),
        ("1006 apples", 0.0),
        ("1005x", 0.0),
        ("apples 1005", 0.0),
        ("1.005", 0.0),
        ("x = y = 1005", 0.0),
        ("1005 " * 100, 0.0),
    ],
)
def test_a_number_among_name_and_unit(answer: str, right: float) -> None:
    assert numeric(1e-6)("", f"<answer>{answer}</answer>", "1,005") == right


def test_a_reference_that_is_no_number_is_a_failed_grade() -> None:
    grading = Grading(GradingSettings(grader="numeric"), SortTask())
    (grade,) = grading.grade([text("1", "one")])
    assert grade.reason == "raised"


@pytest.mark.parametrize("workers", [0, 1])
def test_the_tolerance_of_the_settings_is_used(workers: int) -> None:
    loose = GradingSettings(grader="numeric", tolerance=0.5, workers=workers)
    grading = Grading(loose, SortTask())
    assert [grade.value for grade in grading.grade([text("1.4", "1"), text("1.6", "1")])] == [1, 0]
    grading.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_tasks_own_grader_is_the_same_in_workers(workers: int) -> None:
    task = SortTask(reward="graded", length=4)
    prompt = task.test_prompts(1)[0]
    samples = []
    wanted = []
    for answer in ("1", "9999", task.reference(prompt)):
        completion = [*task.encode(answer), task.end_id]
        samples.append(sample_of(task, prompt, completion))
        wanted.append(task.grade(prompt, completion))
    grading = Grading(GradingSettings(workers=workers), task)
    assert [grade.value for grade in grading.grade(samples)] == wanted
    assert math.isclose(wanted[-1], 1.0)
    grading.close()


@pytest.mark.parametrize("reward", ["exact", "two_modes"])
def test_exact_match_agrees_with_the_exact_reward_of_sorting(reward: str) -> None:
    task = SortTask(reward=reward)
    prompt = task.test_prompts(1)[0]
    grading = Grading(GradingSettings(grader="exact_match"), task)
    right = [*task.encode("".join(sorted(prompt.text))), task.end_id]
    for completion in (right, right[1:], [2, *right[1:]], [task.end_id], []):
        (grade,) = grading.grade([sample_of(task, prompt, completion)])
        assert grade.value == float(task.solved(prompt, completion))
