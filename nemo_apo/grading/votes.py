"""The answer for which a completion votes, compared as text.

Two answers are one if they are the same text after a few habits of writing are taken out. This is
no mathematics: 1/2, 0.5 and \\frac{1}{2} are three answers.
"""

import re

from nemo_apo.grading.answers import answer_or_all, marked_answer
from nemo_apo.grading.settings import TASK_GRADER

# Graders that read the whole completion where nothing is marked.
_READ_ALL = frozenset({TASK_GRADER, "exact_match", "numeric"})
_FRACTION = re.compile(r"\\[dt]frac(?![A-Za-z])")
# With the point of an invisible delimiter.
_SIZE = re.compile(r"\\(?:left|right)(?![A-Za-z])\s*\.?")
# A backslash that follows another one ends a row of a matrix.
_LATEX_SPACE = re.compile(r"(?<!\\)\\[,;:! ]|~")


def vote(completion: str, finished: bool, grader: str) -> str | None:
    """The normalised answer of a completion; None if it gives none.

    Args:
        completion: its text.
        finished: whether it came to its end; one that was cut off gives a marked answer or none.
        grader: ``grading.grader``: some take a completion without a mark for the answer.
    """
    reads_all = finished and grader in _READ_ALL
    answer = answer_or_all(completion) if reads_all else marked_answer(completion)
    return normalised(answer or "") or None


def normalised(answer: str) -> str:
    """The answer without spaces, dollar signs, sizes of delimiters and fractions, a final point."""
    text = _FRACTION.sub(r"\\frac", answer)
    text = _SIZE.sub("", text)
    text = _LATEX_SPACE.sub("", text)
    text = text.replace("\\$", "").replace("$", "")
    return "".join(text.split()).removesuffix(".")
