"""Tasks from data sets: MATH, GSM8K, and any other with a column of prompts and one of answers."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from nemo_apo.tasks.answers import answer_after_hashes, boxed_answer
from nemo_apo.tasks.chat_task import ChatTask
from nemo_apo.tasks.curation import (
    OTHER_LEVEL,
    OTHER_SUBJECT,
    Dropped,
    Part,
    Problem,
    as_text,
    problem_of,
)
from nemo_apo.tasks.sources import DataError, Row, suggestion

LEVELS = range(1, 6)
_LEVEL = re.compile(r"(?:Level )?(\d)")

# How the right answer stands in its column.
ANSWER_FORMATS: dict[str, Callable[[str], str | None]] = {
    "plain": str.strip,
    "boxed": boxed_answer,
    "hashes": answer_after_hashes,
}


@dataclass(frozen=True)
class MathTask(ChatTask):
    """MATH: columns ``problem``, ``solution`` with a boxed answer, ``level``, ``type``/``subject``.

    Attributes:
        levels: of the training prompts, 1 to 5; none named takes all.
        subjects: of the training prompts, as the data set names them; none named takes all.
    """

    name: str = "math"
    path: str | None = "DigitalLearningGmbH/MATH-lighteval"
    levels: tuple[int, ...] = ()
    subjects: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "subjects", tuple(self.subjects))
        for level in self.levels:
            if level not in LEVELS:
                raise ValueError(f"task.levels={level}: must lie in 1..5")

    def columns(self) -> list[tuple[str, ...]]:
        needed: list[tuple[str, ...]] = [("problem",), ("solution",)]
        if self.levels:
            needed.append(("level",))
        if self.subjects:
            needed.append(("type", "subject"))
        return needed

    def read(self, row: Row, place: str) -> Problem | Dropped:
        solution = as_text(row["solution"])
        answer = None if solution is None else boxed_answer(solution)
        problem = problem_of(row["problem"], answer, place)
        if isinstance(problem, Dropped):
            return problem
        level = _LEVEL.fullmatch(as_text(row.get("level")) or "")
        subject = as_text(row.get("type", row.get("subject"))) or ""
        return replace(problem, level=int(level.group(1)) if level else None, subject=subject)

    def unwanted(self, problem: Problem) -> str | None:
        if self.levels and problem.level not in self.levels:
            return OTHER_LEVEL
        return OTHER_SUBJECT if self.subjects and problem.subject not in self.subjects else None

    def choose(self, training: Part) -> None:
        present = {problem.subject for problem in training.problems}
        for subject in self.subjects:
            if subject not in present:
                raise DataError(
                    f"task.subjects={subject}: no training prompt is of it, there are "
                    f"{', '.join(sorted(present))}{suggestion(subject, present)}"
                )
        super().choose(training)


@dataclass(frozen=True)
class Gsm8kTask(ChatTask):
    """GSM8K: columns ``question`` and ``answer``, the number after ``####``."""

    name: str = "gsm8k"
    path: str | None = "openai/gsm8k"
    subset: str | None = "main"

    default_grader: ClassVar[str] = "numeric"

    def columns(self) -> list[tuple[str, ...]]:
        return [("question",), ("answer",)]

    def read(self, row: Row, place: str) -> Problem | Dropped:
        solution = as_text(row["answer"])
        answer = None if solution is None else answer_after_hashes(solution)
        return problem_of(row["question"], answer, place)


@dataclass(frozen=True)
class DatasetTask(ChatTask):
    """Any data set with a column of prompts and one of answers.

    Attributes:
        prompt_column, answer_column: their names.
        id_column: of ids, all different; null numbers the rows.
        answer_format: "plain", "boxed" (the last \\boxed{} of the column) or "hashes" (what
            follows ####).
    """

    name: str = "dataset"
    test_split: str | None = None
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    id_column: str | None = None
    answer_format: str = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer_format not in ANSWER_FORMATS:
            rule = f"must be one of {', '.join(ANSWER_FORMATS)}"
            raise ValueError(f"task.answer_format={self.answer_format}: {rule}")

    def columns(self) -> list[tuple[str, ...]]:
        named = (self.prompt_column, self.answer_column, self.id_column)
        return [(column,) for column in named if column is not None]

    def read(self, row: Row, place: str) -> Problem | Dropped:
        written = as_text(row[self.answer_column])
        answer = None if written is None else ANSWER_FORMATS[self.answer_format](written)
        identity = place if self.id_column is None else str(row[self.id_column])
        return problem_of(row[self.prompt_column], answer, identity)
