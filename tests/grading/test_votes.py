"""What a completion votes for: its marked answer, as text."""

import pytest

from nemo_apo.grading.votes import normalised, vote


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\tfrac 1 2", r"\frac12"),
        (r"$x + 1$.", "x+1"),
        (r"\left( 1, 2 \right]", "(1,2]"),
        (r"\left. x \right|", "x|"),
        (r"10\,000", "10000"),
        (r"\$5", "5"),
        ("12. ", "12"),
        (" 3~cm", "3cm"),
    ],
)
def test_habits_of_writing_make_no_difference(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("0.5", r"\frac{1}{2}"),
        ("1/2", r"\frac{1}{2}"),
        ("12.5", "125"),
        (r"\leftarrow x", r"arrow x"),
        (r"1 \\ 2", "12"),
        ("-3", "3"),
    ],
)
def test_all_else_does(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


@pytest.mark.parametrize(
    ("completion", "finished", "grader", "wanted"),
    [
        (r"so \boxed{ 4 }.", True, "math_verify", "4"),
        (r"so \boxed{ 4 } or", False, "math_verify", "4"),
        ("so 4", True, "math_verify", None),
        ("so 4", True, "my.module:grade", None),
        ("so 4", True, "exact_match", "so4"),
        ("so 4", False, "exact_match", None),
        ("12.0", True, "numeric", "12.0"),
        ("133446", True, "task", "133446"),
        ("133446", False, "task", None),
        (r"<answer>a</answer> then \boxed{b}", True, "task", "b"),
        (r"\boxed{$ $}", True, "math_verify", None),
        ("", True, "task", None),
    ],
)
def test_a_completion_without_an_answer_does_not_vote(
    completion: str, finished: bool, grader: str, wanted: str | None
) -> None:
    assert vote(completion, finished, grader) == wanted
