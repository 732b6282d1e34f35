"""The answer that a text marks: its last ``\\boxed{}`` or ``<answer>``, or what follows ``####``.

All of it in linear time.
"""

import re

_OPEN, _CLOSE = "<answer>", "</answer>"
_HASHES = "####"
# \boxed{x}, \boxed {x}, \fbox{x}, and \boxed x without braces, which some solutions of MATH have.
_BOXED = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BARE = re.compile(r"[^\s{}$]+")


def marked_answer(text: str) -> str | None:
    """What stands in the last mark; None if there is none, or if that one is not closed."""
    boxed, tagged = _last_box(text), text.rfind(_OPEN)
    if boxed is None and tagged < 0:
        return None
    return (
        _in_tags(text, tagged) if boxed is None or tagged > boxed.start() else _in_box(text, boxed)
    )


def boxed_answer(text: str) -> str | None:
    """What stands in the last ``\\boxed{}``, as in a solution of MATH; None if there is none."""
    boxed = _last_box(text)
    return None if boxed is None else _in_box(text, boxed)


def answer_after_hashes(text: str) -> str | None:
    """What follows the last ``####``, as in a solution of GSM8K; None if nothing does."""
    _, hashes, answer = text.rpartition(_HASHES)
    return (answer.strip() or None) if hashes else None


def _last_box(text: str) -> re.Match[str] | None:
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    while start >= 0:
        if (found := _BOXED.match(text, start)) is not None:
            return found
        start = max(text.rfind("\\boxed", 0, start), text.rfind("\\fbox", 0, start))
    return None


def _in_box(text: str, boxed: re.Match[str]) -> str | None:
    begin = boxed.end()
    if not text.startswith("{", begin):
        bare = _BARE.match(text, begin)
        return bare.group() if bare else None
    begin += 1
    depth = 1
    for at in range(begin, len(text)):
        if text[at - 1] == "\\":
            continue
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin:at].strip()
    return None


def _in_tags(text: str, start: int) -> str | None:
    begin = start + len(_OPEN)
    end = text.find(_CLOSE, begin)
    return None if end < 0 else text[begin:end].strip()
