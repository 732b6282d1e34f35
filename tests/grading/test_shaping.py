"""The terms beside correctness, by hand."""

import pytest

from nemo_apo.grading.shaping import Shaping, has_format, repeated_share, used_cache


@pytest.mark.parametrize(
    "completion",
    [
        "<think>1+1</think><answer>2</answer>",
        " <think>a\nb</think>\n\n<answer>\n2</answer>\n",
        "<think></think><answer></answer>",
    ],
)
def test_the_format(completion: str) -> None:
    assert has_format(completion)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "2",
        "<answer>2</answer>",
        "<think>1</think>",
        "<answer>2</answer><think>1</think>",
        "</think><think><answer>2</answer>",
        "<think><answer>2</answer></think>",
        "<think><answer></think>2</answer>",
        "<think>1</think></answer>2<answer>",
        "<think>1</think>so <answer>2</answer>",
        "well <think>1</think><answer>2</answer>",
        "<think>1</think><answer>2</answer>.",
        "<think>1</think><answer>2</answer><answer>3</answer>",
        "<think>1<think>2</think><answer>2</answer>",
        "<think>1</think></think><answer>2</answer>",
        "<Think>1</Think><answer>2</answer>",
        "<think>1</think><answer>2",
    ],
)
def test_what_is_not_the_format(completion: str) -> None:
    assert not has_format(completion)


@pytest.mark.parametrize(
    ("completion", "n", "share"),
    [
        ("", 2, 0.0),
        ("a b", 3, 0.0),
        ("a b c d", 2, 0.0),
        ("a a a a", 1, 0.75),
        ("a b a b a", 2, 0.5),  # ab, ba, ab, ba
        ("a  b\na b", 2, 1 / 3),  # ab, ba, ab
        ("a b c a b c a b c", 3, 4 / 7),  # abc, bca, cab, then again, abc
    ],
)
def test_the_share_of_repeated_ngrams(completion: str, n: int, share: float) -> None:
    assert repeated_share(completion, n) == pytest.approx(share)


@pytest.mark.parametrize(
    ("length", "used"), [(1, 0.0), (60, 0.0), (61, 0.025), (80, 0.5), (99, 0.975), (100, 1.0)]
)
def test_the_soft_punishment_is_linear_up_to_the_limit(length: int, used: float) -> None:
    assert used_cache(length, limit=100, cache=40) == pytest.approx(used)


def test_only_the_terms_in_use_are_computed_and_they_have_signs() -> None:
    assert Shaping().weights == {}
    assert Shaping().terms("a a", 5, 5) == {}
    shaping = Shaping(format=0.25, repetition=0.5, repetition_ngram=1, overlong=2, overlong_cache=4)
    assert shaping.weights == {"format": 0.25, "repetition": -0.5, "overlong": -2.0}
    assert shaping.terms("a a", 4, 5) == {"format": 0.0, "repetition": 0.5, "overlong": 0.75}
    assert list(shaping.terms("", 0, 5)) == list(shaping.weights)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": -0.1}, r"shaping\.format=-0\.1: must be >= 0"),
        ({"overlong": float("inf")}, r"shaping\.overlong=inf: must be >= 0 and finite"),
        ({"repetition": 1.0, "repetition_ngram": 0}, "must be at least 1"),
        ({"overlong_cache": 8}, r"nothing would read it, shaping\.overlong must be > 0"),
    ],
)
def test_bad_values(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shaping(**values)
