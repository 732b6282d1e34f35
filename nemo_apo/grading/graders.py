"""Graders of text by name: called with prompt, completion and reference, they give 1 or 0."""

import math
import re
from collections.abc import Callable

from nemo_apo.grading.answers import answer_or_all
from nemo_apo.grading.math_answers import math_grader
from nemo_apo.grading.settings import GradingSettings
from nemo_apo.grading.writing import plain

TextGrader = Callable[[str, str, str], object]

# Digits with or without thousands separators, a fraction part, an exponent; nothing longer than a
# person would write.
_NUMBER = re.compile(
    r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d{1,100})?(?:\.\d{0,100})?(?:[eE][+-]?\d{1,3})?", re.ASCII
)
_LONGEST_NUMBER = 300
# What stands around a number in an answer: a name, thousands in LaTeX, a unit.
_NAME = re.compile(r"[A-Za-z]\s*=\s*")
_THIN_SPACE = re.compile(r"\\[,!;: ]")
_UNIT = re.compile(r"(?:\s*\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\s+[A-Za-z][A-Za-z ]*)$")


def exact_match(prompt: str, completion: str, reference: str) -> float:
    """1 if the marked answer (or the whole completion) is the reference, outer spaces aside."""
    return float(answer_or_all(completion) == reference.strip())


def number(text: str) -> float | None:
    """The number that a text is: ``-1,234.5``, ``2e-3``, ``3/4``, ``12%``, ``$5``; None if none."""
    text = text.strip().replace("\\%", "%").replace("\\$", "$").replace("\u2212", "-")
    if len(text) > _LONGEST_NUMBER:
        return None
    scale = 0.01 if text.endswith("%") else 1.0
    above, slash, below = text.removesuffix("%").removeprefix("$").partition("/")
    top = _decimal(above.strip())
    bottom = _decimal(below.strip()) if slash else 1.0
    if top is None or not bottom:
        return None
    value = scale * top / bottom
    return value if math.isfinite(value) else None


def without_surroundings(answer: str) -> str:
    """An answer without the name before a number and the unit after it: ``x = 5 cm`` is ``5``."""
    text = plain(answer[:_LONGEST_NUMBER]).strip()
    if text.startswith("$") and text.endswith("$"):
        text = text.strip("$").strip()
    text = _THIN_SPACE.sub("", text.replace("{,}", ","))
    return _UNIT.sub("", _NAME.sub("", text, count=1) if _NAME.match(text) else text)


def _decimal(text: str) -> float | None:
    if not _NUMBER.fullmatch(text) or not any(character.isdigit() for character in text):
        return None
    try:
        return float(text.replace(",", ""))
    except ValueError:  # an exponent alone
        return None


def numeric(tolerance: float) -> TextGrader:
    """A grader that gives 1 for a number that is near enough to the reference.

    Args:
        tolerance: relative to a reference above 1 in absolute value, absolute below.
    """

    def grade(prompt: str, completion: str, reference: str) -> float:
        wanted = number(reference)
        if wanted is None:
            raise ValueError("the reference is no number")
        said = answer_or_all(completion)
        answer = number(said)
        if answer is None:
            answer = number(without_surroundings(said))
        near = tolerance * max(1.0, abs(wanted))
        return float(answer is not None and abs(answer - wanted) <= near)

    return grade


# A grader by name, made from the run's settings.
GRADERS: dict[str, Callable[[GradingSettings], TextGrader]] = {
    "exact_match": lambda settings: exact_match,
    "numeric": lambda settings: numeric(settings.tolerance),
    "math_verify": lambda settings: math_grader(),
}
# Those that need a worker: they take long, or evaluate what a model wrote.
NEEDS_WORKER = frozenset({"math_verify"})
