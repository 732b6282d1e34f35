"""Habits of writing an answer that math-verify does not read, taken out of answer and reference.

Each is a rewriting that does not change what the text says; what math-verify then compares is LaTeX
again. Answers are short (``math_answers.LONGEST_ANSWER``).
"""

import re
from collections.abc import Callable

_SAID = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final )?answer is:?(?=\s|\$|\\)", re.IGNORECASE
)
_INLINE = re.compile(r"(?<!\\)\$([^$]+)(?<!\\)\$")
_TWO_LETTERS = re.compile(r"[A-Za-z]{2}")
_APPROXIMATELY = re.compile(r"^\s*(?:\\approx(?![A-Za-z])|≈)")
_FINAL_POINT = re.compile(r"(?<=[^.\s])\.\s*$")
_SPACED_DIGITS = re.compile(r"-?\d{1,3}(?: \d{3})+", re.ASCII)
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{(\d+)\}", re.ASCII)
# More digits than a person writes would be a large number to compute.
_LONGEST_REPEATING = 100
_ROOT = re.compile(r"√\s*(\d+|\{)", re.ASCII)
_VULGAR = {"½": "12", "⅓": "13", "⅔": "23", "¼": "14", "¾": "34", "⅕": "15", "⅛": "18"}
_SYMBOLS = {
    "∞": r"\infty ",
    r"\varnothing": r"\emptyset",
    r"\langle": "(",
    r"\rangle": ")",
    **{sign: rf"\frac{digits}" for sign, digits in _VULGAR.items()},
}
_LESS = re.compile(r"(<=|<|≤|\\leq?(?![A-Za-z])|\\lt(?![A-Za-z]))")
_STRICT = ("<", r"\lt")
_VARIABLE = re.compile(r"\s*[A-Za-z]\s*")
_INTERVAL = re.compile(r"\s*(?:\\left\s*)?[(\[].*,.*[)\]]\s*", re.DOTALL)
_WORDS = re.compile(
    r"\s*(?:\\(?:text|textbf|textit|mathrm)\s*\{)?\s*([A-Za-z]{2,}(?: [A-Za-z]+)*)\s*\}?\s*"
)


def plain(text: str) -> str:
    """The text without habits of writing."""
    for rewrite in _REWRITES:
        text = rewrite(text)
    return text


def same_words(one: str, other: str) -> bool:
    """Whether both are words alone, and the same but for capitals."""
    words = [_WORDS.fullmatch(text) for text in (one, other)]
    return None not in words and len({found.group(1).casefold() for found in words if found}) == 1


def alternatives(reference: str, answer: str) -> list[tuple[str, str]]:
    """Other pairs to compare: the two mean the same if those of one of these pairs do.

    A percent sign on one side alone may be a unit (25% for 25) or a factor (25% for 0.25). A double
    inequality is an interval if it is compared with one.
    """
    pairs = []
    if _is_percent(reference) != _is_percent(answer):
        pairs.append((_without_percent(reference), _without_percent(answer)))
        pairs.append((_as_share(reference), _as_share(answer)))
    if (interval := _interval_of(reference)) is not None and _INTERVAL.fullmatch(answer):
        pairs.append((interval, answer))
    if (interval := _interval_of(answer)) is not None and _INTERVAL.fullmatch(reference):
        pairs.append((reference, interval))
    return pairs


def _is_percent(text: str) -> bool:
    return text.rstrip().endswith("%")


def _without_percent(text: str) -> str:
    return text.rstrip().removesuffix("%").removesuffix("\\").rstrip()


def _as_share(text: str) -> str:
    return rf"\frac{{{_without_percent(text)}}}{{100}}" if _is_percent(text) else text


def _interval_of(text: str) -> str | None:
    """``a < x \\le b`` as ``(a,b]``; None for anything else."""
    parts = _LESS.split(text)
    if len(parts) != 5 or not _VARIABLE.fullmatch(parts[2]):
        return None
    low, opens, _, closes, high = parts
    return f"{'(' if opens in _STRICT else '['}{low},{high}{')' if closes in _STRICT else ']'}"


def _without_announcement(text: str) -> str:
    return _SAID.sub("", text, count=1).strip() if _SAID.match(text) else text


def _without_final_point(text: str) -> str:
    return _FINAL_POINT.sub("", text)


def _inline_formula(text: str) -> str:
    """The formula of a sentence that has one, such as ``the value is $5$``."""
    found = _INLINE.findall(text)
    is_sentence = len(found) == 1 and _TWO_LETTERS.search(_INLINE.sub("", text))
    return found[0] if is_sentence else text


def _without_about(text: str) -> str:
    return _APPROXIMATELY.sub("", text)


def _joined_digits(text: str) -> str:
    return text.replace(" ", "") if _SPACED_DIGITS.fullmatch(text.strip()) else text


def _repeating_decimals(text: str) -> str:
    return _REPEATING.sub(_fraction, text) if len(text) <= _LONGEST_REPEATING else text


def _fraction(repeating: re.Match[str]) -> str:
    whole, fixed, repeated = repeating.groups()
    nines = 10 ** len(repeated) - 1
    numerator = int(f"{whole}{fixed}" or "0") * nines + int(repeated)
    return rf"\frac{{{numerator}}}{{{10 ** len(fixed) * nines}}}"


def _symbols(text: str) -> str:
    text = _ROOT.sub(lambda found: r"\sqrt" + _in_braces(found.group(1)), text)
    for symbol, latex in _SYMBOLS.items():
        text = text.replace(symbol, latex)
    return text


def _in_braces(radicand: str) -> str:
    """Digits in braces; an opening brace stays."""
    return radicand if radicand == "{" else f"{{{radicand}}}"


_REWRITES: tuple[Callable[[str], str], ...] = (
    _without_announcement,
    _without_final_point,
    _inline_formula,
    _without_about,
    _joined_digits,
    _repeating_decimals,
    _symbols,
)
