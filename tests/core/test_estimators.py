"""pass@k against counting, the majority vote by hand, and standard errors against the textbook."""

import itertools
import math
from fractions import Fraction

import pytest

from nemo_apo.core.estimators import majority, pass_at_k, standard_error


def share_of_draws_with_a_right_one(samples: int, right: int, k: int) -> Fraction:
    """By drawing every set of k samples."""
    draws = list(itertools.combinations([True] * right + [False] * (samples - right), k))
    return Fraction(sum(any(draw) for draw in draws), len(draws))


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_draws(samples: int) -> None:
    for right in range(samples + 1):
        for k in range(1, samples + 1):
            wanted = share_of_draws_with_a_right_one(samples, right, k)
            assert pass_at_k(samples, right, k) == pytest.approx(float(wanted), rel=0, abs=2e-16)


def test_all_samples_or_one_are_exact() -> None:
    assert [pass_at_k(8, right, 8) for right in (0, 1, 8)] == [0.0, 1.0, 1.0]
    assert pass_at_k(4, 3, 1) == 0.75


def test_many_samples_lose_no_digit() -> None:
    samples, right, k = 4096, 3, 512
    missed = Fraction(1)
    for i in range(right):
        missed *= Fraction(samples - k - i, samples - i)
    assert pass_at_k(samples, right, k) == float(1 - missed)


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 2, 0), (4, 2, 5), (4, 5, 2), (4, -1, 2)])
def test_counts_that_cannot_be_are_refused(samples: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(samples, right, k)


@pytest.mark.parametrize(
    ("answers", "elected"),
    [
        (["a", "b", "b", "a", "b"], 1),
        (["a", "b", "b", "a"], 0),
        ([None, "c", "b", "b", "c"], 1),
        ([None, None, None, "c"], 3),
        ([None, None], None),
        ([], None),
    ],
)
def test_the_most_frequent_answer_wins_and_of_equals_the_first(
    answers: list[str | None], elected: int | None
) -> None:
    assert majority(answers) == elected


def test_standard_errors() -> None:
    # Mean 0.25; squares 3 (1/4)^2 + (3/4)^2 = 3/4; over 3 and 4.
    assert standard_error([0.0, 0.0, 1.0, 0.0]) == pytest.approx(math.sqrt(0.75 / 12), rel=1e-15)
    assert standard_error([2.5] * 7) == 0.0
    assert math.isnan(standard_error([1.0]))
    assert math.isnan(standard_error([]))
