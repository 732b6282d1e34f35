"""Where a completion ends by its text, found while it is generated token by token."""

from collections.abc import Callable, Sequence

# A token holds at least one byte, so a stop string's own tokens are at most as many as its bytes.
# Tokens that have no text of their own may stand between them; so many are looked past.
_TOKENS_WITHOUT_TEXT = 16


def stops(
    tokens: Sequence[int], stop_strings: Sequence[str], text: Callable[[list[int]], str]
) -> bool:
    """Whether the last token of a completion has brought a stop string into its text.

    Only the completion's tail is decoded, and the whole of it where the tail holds a stop string:
    a tail may begin within a character or a word.
    """
    for stop in stop_strings:
        tail = len(stop.encode()) + _TOKENS_WITHOUT_TEXT
        if stop in text(list(tokens[-tail:])) and stop in text(list(tokens)):
            return True
    return False
