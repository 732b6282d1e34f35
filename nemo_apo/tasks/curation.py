"""From the rows of a data set to problems that can be trained on; what is dropped is counted."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from nemo_apo.tasks.sources import DataError, Row

# Why a row is dropped.
NO_TEXT = "the prompt is no text"
EMPTY_PROMPT = "the prompt is empty"
NO_ANSWER = "no answer can be read"
OTHER_LEVEL = "of another level"
OTHER_SUBJECT = "of another subject"
DUPLICATE = "the prompt of an earlier row"
CONFLICT = "the prompt of an earlier row, with another answer"
IN_TEST_SET = "the prompt of a held-out row"
TOO_LONG = "the prompt is longer than max_prompt_length"
_HASH_BYTES = 8


@dataclass(frozen=True)
class Problem:
    """A problem of a data set.

    Attributes:
        text: what is asked.
        reference: the right answer.
        id: its name in the data set, or its place there.
        level, subject: where the data set tells.
    """

    text: str
    reference: str
    id: str
    level: int | None = None
    subject: str = ""


@dataclass(frozen=True)
class Dropped:
    """A row that is not used, and why."""

    reason: str


Reading = Callable[[Row, str], Problem | Dropped]


@dataclass
class Part:
    """The problems of one side of the split, and what became of the other rows.

    Attributes:
        name: "training" or "held-out".
        place: where the rows come from, for a person.
        rows: how many there were.
        problems: those that are left.
        dropped: number of rows by reason.
    """

    name: str
    place: str
    rows: int
    problems: list[Problem]
    dropped: Counter[str] = field(default_factory=Counter)

    def keep(self, reason: str, kept: Sequence[bool]) -> None:
        """Drop the problems that are not to be kept."""
        self.dropped[reason] += len(kept) - sum(kept)
        self.problems = [p for p, stays in zip(self.problems, kept, strict=True) if stays]

    def __str__(self) -> str:
        counts = {reason: count for reason, count in self.dropped.items() if count}
        line = f"{self.name} prompts: kept {len(self.problems)} of {self.rows} ({self.place})"
        why = ", ".join(f"{reason} ({count})" for reason, count in counts.items())
        return f"{line}; dropped: {why}" if counts else line


def read_part(name: str, place: str, rows: Sequence[Row], read: Reading) -> Part:
    """The problems of some rows, each prompt once; the first row with a prompt stays.

    Args:
        name, place: of the part, for a person.
        rows: of the data set.
        read: from a row, and an id for one that has none, to a problem.

    Raises:
        DataError: if two rows have the same id.
    """
    readings = [read(row, f"{name}/{number}") for number, row in enumerate(rows)]
    part = Part(name, place, len(rows), [r for r in readings if isinstance(r, Problem)])
    part.dropped.update(r.reason for r in readings if isinstance(r, Dropped))
    _refuse_duplicate_ids(part)
    _drop_duplicates(part)
    return part


def hold_out(part: Part, share: float) -> Part:
    """Take a share of the prompts out of a part, by the hash of their text; returns their part."""
    is_out = [_hash_of(problem) < share for problem in part.problems]
    chosen = [problem for problem, out in zip(part.problems, is_out, strict=True) if out]
    part.problems = [problem for problem, out in zip(part.problems, is_out, strict=True) if not out]
    part.rows -= len(chosen)
    return Part("held-out", f"a share of {share:g} of the same rows", len(chosen), chosen)


def problem_of(prompt: object, answer: str | None, id: str) -> Problem | Dropped:
    """The problem of a prompt and the answer that was read for it, None if none could be."""
    text = as_text(prompt)
    if text is None:
        return Dropped(NO_TEXT)
    if not text.strip():
        return Dropped(EMPTY_PROMPT)
    if answer is None or not answer.strip():
        return Dropped(NO_ANSWER)
    return Problem(text, answer.strip(), id)


def drop_contamination(training: Part, held_out: Part) -> None:
    """Drop training prompts that are held out, too."""
    tested = {normalized(problem.text) for problem in held_out.problems}
    kept = [normalized(problem.text) not in tested for problem in training.problems]
    training.keep(IN_TEST_SET, kept)


def normalized(text: str) -> str:
    """A prompt by which others are the same: composed characters, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def as_text(value: object) -> str | None:
    """A cell of a data set as text: numbers as they are written; None for what is no text."""
    if isinstance(value, bool) or value != value:  # NaN is how a table has an empty cell
        return None
    return str(value) if isinstance(value, str | int | float) else None


def digest(parts: Iterable[Sequence[object]]) -> str:
    """SHA-256, in hex, of texts and numbers in order."""
    sha = hashlib.sha256()
    for part in parts:
        for value in part:
            data = str(value).encode(errors="surrogatepass")
            # With its length, so that no two lists run together into the same bytes.
            sha.update(len(data).to_bytes(_HASH_BYTES, "little") + data)
    return sha.hexdigest()


def _hash_of(problem: Problem) -> float:
    """A number in [0, 1) that depends on the normalised prompt alone."""
    data = normalized(problem.text).encode(errors="surrogatepass")
    head = hashlib.sha256(data).digest()[:_HASH_BYTES]
    return int.from_bytes(head, "big") / 2.0 ** (8 * _HASH_BYTES)


def _refuse_duplicate_ids(part: Part) -> None:
    counts = Counter(problem.id for problem in part.problems)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise DataError(
            f"{part.place}: ids must differ, but {len(twice)} of them stand more than once, such "
            f"as {twice[0]!r}"
        )


def _drop_duplicates(part: Part) -> None:
    answers: dict[str, str] = {}
    kept = []
    for problem in part.problems:
        key = normalized(problem.text)
        if key in answers:
            part.dropped[DUPLICATE if answers[key] == problem.reference else CONFLICT] += 1
            continue
        answers[key] = problem.reference
        kept.append(problem)
    part.problems = kept
