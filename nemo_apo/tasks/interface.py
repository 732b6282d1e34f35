"""What the trainer asks of a task. Token ids are plain Python lists at this border."""

from dataclasses import dataclass
from random import Random
from typing import Protocol


@dataclass(frozen=True)
class Prompt:
    """A prompt: its text (what the grader compares with) and its token ids."""

    text: str
    tokens: tuple[int, ...]


class Task(Protocol):
    """Prompts, demonstrations and rewards. Implementations are frozen dataclasses.

    ``task_rng`` arguments are the only source of randomness, so that the data of a step is a
    function of the run's seed and the step.
    """

    @property
    def name(self) -> str: ...

    @property
    def reward(self) -> str:
        """Name of the reward in use."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def end_id(self) -> int: ...

    @property
    def max_prompt_length(self) -> int: ...

    @property
    def max_response_length(self) -> int:
        """Longest completion, its end token included, tokens."""
        ...

    def train_prompts(self, count: int, task_rng: Random) -> list[Prompt]: ...

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
