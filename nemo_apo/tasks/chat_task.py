"""What the tasks of text have in common: a chat tokenizer, and problems from a data set.

A task holds settings only. Tokenizer and data set are loaded at first use, once per task and
process; a grading worker, which makes its own task, never uses either for a grader of text.
"""

import abc
import functools
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import ClassVar

from nemo_apo.tasks import curation
from nemo_apo.tasks.answers import marked_answer
from nemo_apo.tasks.curation import Dropped, Part, Problem
from nemo_apo.tasks.interface import Prompt, PromptTurn
from nemo_apo.tasks.sources import DataError, Row, Source, load_rows, state_of, suggestion
from nemo_apo.tasks.tokenizer import ChatSettings, ChatTokenizer
from nemo_apo.tasks.turns import positions

# In the words of the APO paper's set-up: reason inside the first tags, answer inside the second.
SYSTEM_PROMPT = (
    "Reason step by step inside <think></think>, then give the final answer inside "
    "<answer></answer>."
)
LONG_PROMPT_RULES = ("drop", "error")
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Curated:
    """A loaded data set: both parts, and their prompts."""

    training: Part
    held_out: Part
    train_prompts: tuple[Prompt, ...]
    test_prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class ChatTask(abc.ABC):
    """Problems of a data set, asked through a chat template. Abstract.

    Attributes:
        tokenizer: folder of a checkpoint with its tokenizer; null only where none is needed.
        chat_template: a Jinja file in place of the checkpoint's template; null takes that.
        enable_thinking: handed to the template; null leaves it out.
        end_token: text of the token that ends a completion; null is the tokenizer's.
        stop_strings: texts that end a completion besides.
        system_prompt: the first message; null is none.
        path: a JSONL or Parquet file, a folder, or a name on the hub.
        subset: configuration of a data set that has several; null is its only one.
        split: of the training prompts; a single file is one split whatever the name.
        test_path: place of the held-out prompts; null is ``path``.
        test_split: their split; null, without a ``test_path``, holds out a share of ``split``.
        held_out_share: that share, by hash of the prompt.
        max_prompt_length: longest prompt, the template's tokens included.
        max_response_length: longest completion, its end token included, tokens.
        long_prompts: "drop" counts and drops longer prompts, "error" refuses the data set.
    """

    name: str = ""
    tokenizer: str | None = None
    chat_template: str | None = None
    enable_thinking: bool | None = None
    end_token: str | None = None
    stop_strings: tuple[str, ...] = ()
    system_prompt: str | None = SYSTEM_PROMPT
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    test_path: str | None = None
    test_split: str | None = "test"
    held_out_share: float = HELD_OUT_SHARE
    max_prompt_length: int = 1024
    max_response_length: int = 2048
    long_prompts: str = "drop"

    # The grader of text that grading.grader=task stands for.
    default_grader: ClassVar[str] = "math_verify"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        for key in ("max_prompt_length", "max_response_length"):
            if getattr(self, key) < 1:
                raise ValueError(f"task.{key}={getattr(self, key)}: must be at least 1")
        if self.long_prompts not in LONG_PROMPT_RULES:
            rule = f"must be one of {', '.join(LONG_PROMPT_RULES)}"
            raise ValueError(f"task.long_prompts={self.long_prompts}: {rule}")
        if not 0.0 < self.held_out_share < 1.0:
            raise ValueError(f"task.held_out_share={self.held_out_share}: must lie in (0, 1)")
        given = self.test_path is not None or self.test_split is not None
        if given and self.held_out_share != HELD_OUT_SHARE:
            raise ValueError(
                f"task.held_out_share={self.held_out_share}: nothing would read it beside a test "
                "set; task.test_path and task.test_split must be null"
            )
        if "" in self.stop_strings:
            raise ValueError("task.stop_strings: must not hold an empty text, which ends them all")

    @abc.abstractmethod
    def columns(self) -> list[tuple[str, ...]]:
        """Columns that must be there, one of each tuple."""

    @abc.abstractmethod
    def read(self, row: Row, place: str) -> Problem | Dropped:
        """The problem of a row; ``place`` is its id where the data set has none."""

    def unwanted(self, problem: Problem) -> str | None:
        """Why a training problem is left out; None if it is wanted, as all are unless chosen."""
        return None

    @property
    def reward(self) -> str:
        return self.default_grader

    @property
    def text_grader(self) -> str:
        return self.default_grader

    @property
    def vocab_size(self) -> int:
        """Token ids of the tokenizer; a model's vocabulary may be larger."""
        return self._chat.vocab_size

    @property
    def pad_id(self) -> int:
        return self._chat.pad_id

    @property
    def end_id(self) -> int:
        return self._chat.end_id

    @property
    def test_size(self) -> int:
        return len(self._data.test_prompts)

    @property
    def has_demonstrations(self) -> bool:
        return False

    def check_files(self) -> list[str]:
        folder = Path(self.tokenizer or "")
        lines = [f"{self.tokenizer}: tokenizer, {_state(folder, self.tokenizer)}"]
        if self.chat_template is not None:
            state = _state(Path(self.chat_template), self.chat_template)
            lines.append(f"{self.chat_template}: chat template, {state}")
        training, held_out = self._sources()
        lines.append(f"{training}: training prompts, {state_of(training)}")
        if held_out is not None:
            lines.append(f"{held_out}: held-out prompts, {state_of(held_out)}")
        return lines

    def data_report(self) -> list[str]:
        return [str(self._data.training), str(self._data.held_out), *self._chat.notes()]

    def fingerprint(self) -> str:
        return self._digest

    def train_prompts(self, count: int, turn: PromptTurn) -> list[Prompt]:
        prompts = self._data.train_prompts
        return [prompts[at] for at in positions(count, len(prompts), turn)]

    def test_prompts(self, count: int) -> list[Prompt]:
        prompts = self._data.test_prompts
        if count > len(prompts):
            raise DataError(f"{count} held-out prompts are asked for, there are {len(prompts)}")
        return list(prompts[:count])

    def demonstrations(self, count: int, task_rng: Random) -> list[tuple[Prompt, list[int]]]:
        raise AssertionError("a data set of problems has no demonstrations")

    def grade(self, prompt: Prompt, completion: list[int]) -> float:
        """1 for the reference character by character; what trains is the grader of text."""
        return float(self.solved(prompt, completion))

    def text(self, completion: list[int]) -> str:
        return self._chat.decode(completion)

    def reference(self, prompt: Prompt) -> str:
        return prompt.reference

    def solved(self, prompt: Prompt, completion: list[int]) -> bool:
        return marked_answer(self.text(completion)) == prompt.reference

    @functools.cached_property
    def _chat(self) -> ChatTokenizer:
        return ChatTokenizer(
            ChatSettings(
                folder=self.tokenizer,
                chat_template=self.chat_template,
                end_token=self.end_token,
                system_prompt=self.system_prompt,
                enable_thinking=self.enable_thinking,
            )
        )

    @functools.cached_property
    def _data(self) -> Curated:
        training, held_out = self._parts()
        self.choose(training)
        curation.drop_contamination(training, held_out)
        return Curated(training, held_out, self._prompts(training), self._prompts(held_out))

    def choose(self, training: Part) -> None:
        """Drop the training problems that are left out."""
        reasons = [self.unwanted(problem) for problem in training.problems]
        training.dropped.update(filter(None, reasons))
        kept = zip(training.problems, reasons, strict=True)
        training.problems = [problem for problem, reason in kept if reason is None]

    # Every checkpoint asks for it.
    @functools.cached_property
    def _digest(self) -> str:
        prompts = (*self._data.train_prompts, None, *self._data.test_prompts)
        return curation.digest(
            ("held out",) if prompt is None else (prompt.text, prompt.reference, prompt.tokens)
            for prompt in prompts
        )

    def _parts(self) -> tuple[Part, Part]:
        train_source, test_source = self._sources()
        training = self._read("training", train_source)
        if test_source is None:
            return training, curation.hold_out(training, self.held_out_share)
        return training, self._read("held-out", test_source)

    def _read(self, name: str, source: Source) -> Part:
        rows = load_rows(source)
        if rows:
            self._check_columns(source, list(rows[0]))
        return curation.read_part(name, str(source), rows, self.read)

    def _check_columns(self, source: Source, present: list[str]) -> None:
        for choices in self.columns():
            if not set(choices) & set(present):
                raise DataError(
                    f"{source.key}={source.path}: has no column {' or '.join(choices)}, its "
                    f"columns are {', '.join(present)}{suggestion(choices[0], present)}"
                )

    def _sources(self) -> tuple[Source, Source | None]:
        """Where the training and the held-out prompts are; None holds out a share."""
        if self.path is None:
            rule = "must be a JSONL or Parquet file, a folder, or a name on the hub"
            raise DataError(f"task.path=null: {rule}")
        training = Source("task.path", self.path, self.subset, "task.split", self.split)
        if self.test_path is None and self.test_split is None:
            return training, None
        if self.test_path is None:
            if training.is_one_split:
                raise DataError(
                    f"task.test_split={self.test_split}: {self.path} is one set without splits; "
                    "set task.test_path, or task.test_split=null to hold out a share of it"
                )
            return training, Source(
                "task.path", self.path, self.subset, "task.test_split", self.test_split or ""
            )
        split = self.test_split or ""
        held_out = Source("task.test_path", self.test_path, self.subset, "task.test_split", split)
        if self.test_split is None and not held_out.is_one_split:
            raise DataError(
                f"task.test_split=null: must name a split of task.test_path={self.test_path}"
            )
        return training, held_out

    def _prompts(self, part: Part) -> tuple[Prompt, ...]:
        """The prompts of a part; those that are too long leave it."""
        encoded = self._chat.encode([problem.text for problem in part.problems])
        fits = [len(tokens) <= self.max_prompt_length for tokens in encoded]
        if self.long_prompts == "error" and not all(fits):
            raise DataError(
                f"task.max_prompt_length={self.max_prompt_length}: {fits.count(False)} {part.name} "
                f"prompts are longer, the longest has {max(map(len, encoded))} tokens "
                "(task.long_prompts=error)"
            )
        part.keep(curation.TOO_LONG, fits)
        if not part.problems:
            raise DataError(f"task.path={self.path}: nothing is left: {part}")
        tokens_of = [tokens for tokens, fit in zip(encoded, fits, strict=True) if fit]
        return tuple(
            Prompt(problem.text, tuple(tokens), problem.reference, problem.id)
            for problem, tokens in zip(part.problems, tokens_of, strict=True)
        )


def _state(path: Path, value: str | None) -> str:
    if value is None:
        return "missing (set the key)"
    return "found" if path.exists() else "missing (copy it there)"
