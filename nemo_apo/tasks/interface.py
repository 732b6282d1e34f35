"""What the trainer asks of a task. Token ids are plain Python lists at this border."""

from dataclasses import dataclass
from random import Random
from typing import Protocol


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        text: what is asked, as graders are given it.
        tokens: token ids, those of a chat template included.
        reference: the right answer, where the data set has one.
        id: its name in the data set; "" where there is none.
    """

    text: str
    tokens: tuple[int, ...]
    reference: str = ""
    id: str = ""


@dataclass(frozen=True)
class PromptTurn:
    """Whose turn it is: prompts are a function of this alone.

    Attributes:
        seed: of the run.
        step: RL step, from 0.
        again: round of the step; 0 draws the rollout, later ones replace groups without signal.
    """

    seed: int
    step: int
    again: int = 0


class Task(Protocol):
    """Prompts, demonstrations and rewards.

    Implementations are frozen dataclasses whose fields JSON can hold: a grading worker makes its
    own from them. What a task needs beyond its fields (a tokenizer, a data set) is loaded at first
    use, and a ``ValueError`` then says what is missing. Turns and ``task_rng`` arguments are the
    only sources of randomness, so that the data of a step is a function of the seed and the step.
    """

    @property
    def name(self) -> str: ...

    @property
    def reward(self) -> str:
        """Name of the reward in use."""
        ...

    @property
    def text_grader(self) -> str | None:
        """The grader of text that ``grading.grader=task`` stands for; None grades by ``grade``."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def end_id(self) -> int: ...

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end a completion besides the end token."""
        ...

    @property
    def max_prompt_length(self) -> int: ...

    @property
    def max_response_length(self) -> int:
        """Longest completion, its end token included, tokens."""
        ...

    @property
    def test_size(self) -> int | None:
        """Number of held-out prompts; None if there is no end of them."""
        ...

    @property
    def has_demonstrations(self) -> bool:
        """Whether there is something to imitate before RL."""
        ...

    def check_files(self) -> list[str]:
        """A line for each file or data set needed: "path: what it is, found" or "missing (...)"."""
        ...

    def data_report(self) -> list[str]:
        """What was kept and dropped of the data, by reason, in lines; none without a data set."""
        ...

    def fingerprint(self) -> str:
        """SHA-256, in hex, of the prompts and answers: what a checkpoint is tied to."""
        ...

    def train_prompts(self, count: int, turn: PromptTurn) -> list[Prompt]:
        """Prompts to train on; every round 0 of a run must ask for the same ``count``."""
        ...

    def test_prompts(self, count: int) -> list[Prompt]:
        """The first ``count`` held-out prompts, always the same."""
        ...

    def demonstrations(self, count: int, task_rng: Random) -> list[tuple[Prompt, list[int]]]:
        """Prompts with the completions that a warm start imitates, end token included."""
        ...

    def grade(self, prompt: Prompt, completion: list[int]) -> float:
        """Reward of a completion (token ids, end token included if it was reached)."""
        ...

    def text(self, completion: list[int]) -> str:
        """A completion as text, for graders that read text; without its end token."""
        ...

    def reference(self, prompt: Prompt) -> str:
        """The right answer, as such a grader is given it."""
        ...

    def solved(self, prompt: Prompt, completion: list[int]) -> bool:
        """Whether the completion is the best answer: what accuracy and pass@k count."""
        ...
