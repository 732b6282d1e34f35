"""The answer that a completion marks: its last ``\\boxed{}`` or ``<answer>``. Linear time."""

_OPEN, _CLOSE = "<answer>", "</answer>"
_BOXED = "\\boxed{"


def marked_answer(completion: str) -> str | None:
    """What stands in the last complete mark; None if there is none."""
    boxed, tagged = completion.rfind(_BOXED), completion.rfind(_OPEN)
    if boxed < 0 and tagged < 0:
        return None
    return _in_braces(completion, boxed) if boxed > tagged else _in_tags(completion, tagged)


def answer_or_all(completion: str) -> str:
    """The marked answer, or the whole completion where nothing is marked; without outer spaces."""
    answer = marked_answer(completion)
    return (completion if answer is None else answer).strip()


def _in_braces(text: str, start: int) -> str | None:
    begin = start + len(_BOXED)
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
