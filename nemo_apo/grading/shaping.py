"""Terms that shape a reward beside correctness: functions of a completion's text and length.

    reward = grade + format x [tags in order] - repetition x [repeated share]
                   - overlong x [share of the cache that is used]

Each term lies in [0, 1]; a grade that failed stays failed.
"""

import math
from collections import Counter
from dataclasses import dataclass

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# The terms by name, and whether they add or take away.
TERMS: dict[str, float] = {"format": 1.0, "repetition": -1.0, "overlong": -1.0}


@dataclass(frozen=True)
class Shaping:
    """The ``shaping`` section: weights, 0 is off.

    Attributes:
        format: for <think>...</think><answer>...</answer>, each tag once and nothing around them.
        repetition: times the share of n-grams of words that stood in the completion before.
        repetition_ngram: words per n-gram.
        overlong: times the share of ``overlong_cache`` that a completion uses: 0 up to
            max_response_length - overlong_cache tokens, then linear to 1 at the limit (DAPO).
        overlong_cache: tokens.
    """

    format: float = 0.0
    repetition: float = 0.0
    repetition_ngram: int = 20
    overlong: float = 0.0
    overlong_cache: int = 512

    def __post_init__(self) -> None:
        for name in TERMS:
            weight = getattr(self, name)
            if not 0.0 <= weight < math.inf:
                raise ValueError(f"shaping.{name}={weight}: must be >= 0 and finite")
        for key, reader in (("repetition_ngram", "repetition"), ("overlong_cache", "overlong")):
            value = getattr(self, key)
            if value < 1:
                raise ValueError(f"shaping.{key}={value}: must be at least 1")
            if getattr(self, reader) == 0.0 and value != getattr(Shaping, key):
                raise ValueError(
                    f"shaping.{key}={value}: nothing would read it, shaping.{reader} must be > 0"
                )

    @property
    def weights(self) -> dict[str, float]:
        """Signed weights of the terms in use, by name."""
        named = {name: sign * getattr(self, name) for name, sign in TERMS.items()}
        return {name: weight for name, weight in named.items() if weight != 0.0}

    def terms(self, completion: str, length: int, limit: int) -> dict[str, float]:
        """The terms in use, by name, each in [0, 1].

        Args:
            completion: its text.
            length: its tokens.
            limit: most tokens that it could have had.
        """
        values = {
            "format": lambda: has_format(completion),
            "repetition": lambda: repeated_share(completion, self.repetition_ngram),
            "overlong": lambda: used_cache(length, limit, self.overlong_cache),
        }
        return {name: float(values[name]()) for name in self.weights}


def has_format(completion: str) -> bool:
    """Whether it is <think>...</think><answer>...</answer> with every tag once; spaces aside."""
    text = completion.strip()
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    opening, thought, answering, answer = (text.index(tag) for tag in _TAGS)
    between = text[thought + len("</think>") : answering] if thought < answering else "?"
    in_order = opening == 0 < thought < answering < answer
    return in_order and not between.strip() and text.endswith("</answer>")


def repeated_share(completion: str, n: int) -> float:
    """Share of the n-grams of words that stand earlier in the completion, too."""
    words = completion.split()
    grams = Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))
    total = grams.total()
    return 1.0 - len(grams) / total if total else 0.0


def used_cache(length: int, limit: int, cache: int) -> float:
    """Share of the last ``cache`` tokens below the limit that a completion uses."""
    return min(1.0, max(0.0, (length - (limit - cache)) / cache))
