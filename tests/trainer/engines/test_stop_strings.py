"""A completion ends with the token that brings a stop string into its text."""

import pytest

from nemo_apo.trainer.engines.stop_strings import stops

WORDS = {0: "", 1: "a", 2: "b", 3: " end", 4: "<", 5: "/x", 6: ">", 7: "€"}


def text(tokens: list[int]) -> str:
    """Words side by side; the first loses its leading space, as some tokenizers decode."""
    return "".join(WORDS[token] for token in tokens).removeprefix(" ")


@pytest.mark.parametrize(
    ("tokens", "stop_strings", "expected"),
    [
        ([1, 2], ("ab",), True),
        ([1, 2], ("ba",), False),
        ([2, 1], ("ab", "ba"), True),
        ([4, 5, 6], ("</x>",), True),
        ([4, 5], ("</x>",), False),
        # Tokens without text between its parts.
        ([4, *([0] * 12), 5, 6], ("</x>",), True),
        # In the middle of the last token, and one character of three bytes.
        ([1, 3], ("en",), True),
        ([1, 7], ("€",), True),
        ([1, 2], (), False),
        # The tail's first word loses its space, the whole completion's does not.
        ([1] * 60 + [3], ("a end",), True),
        ([3], (" end",), False),
        ([], ("a",), False),
    ],
)
def test_where_a_completion_stops(
    tokens: list[int], stop_strings: tuple[str, ...], expected: bool
) -> None:
    assert stops(tokens, stop_strings, text) is expected


def test_a_tail_that_reads_otherwise_than_the_whole_is_not_believed() -> None:
    """A word that begins within the tail only."""

    def odd(tokens: list[int]) -> str:
        return "stop" if len(tokens) < 30 else "go on"

    assert stops([1] * 29, ("stop",), odd)
    assert not stops([1] * 30, ("stop",), odd)


def test_only_the_tail_is_decoded_again_and_again() -> None:
    decoded = []

    def counted(tokens: list[int]) -> str:
        decoded.append(len(tokens))
        return text(tokens)

    assert not stops([1] * 5000, ("ab",), counted)
    assert max(decoded) < 40
