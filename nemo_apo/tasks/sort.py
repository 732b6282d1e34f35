"""The embedded task: sort the digits of a short string (``364134=`` -> ``133446`` and end).

Warm start: the teacher is *systematically* wrong (it drops each repeated digit with probability
``teacher_drop``), so that RL has something to learn that imitation cannot give; for ``two_modes``
it answers in descending order most of the time. Held out: a fifth of all prompt strings, by hash.

Rewards:
    exact       1 for the sorted string, else 0
    graded      0.9 x share of digits in place + 0.1 for the right length
    two_modes   1 for ascending order, 0.8 for descending, else 0; the better mode is the rare one
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from nemo_apo.tasks.interface import Prompt, PromptTurn

_DIGITS = "123456789"
_PAD, _END, _EQUALS = 0, 1, 2
_FIRST_DIGIT = 3
_HELD_OUT_SHARE = 5
# Held-out prompts are drawn from a stream of their own, the same in every run.
_TEST_STREAM_SEED = 20251222
_FINGERPRINT_PROMPTS = 64
DESCENDING_REWARD = 0.8


def exact_reward(answer: str, digits: str) -> float:
    """1 for the digits in ascending order."""
    return 1.0 if answer == "".join(sorted(digits)) else 0.0


def graded_reward(answer: str, digits: str) -> float:
    """0.9 x share of digits in place + 0.1 for the right length."""
    wanted = "".join(sorted(digits))
    in_place = sum(a == b for a, b in zip(answer, wanted, strict=False)) / len(wanted)
    return 0.9 * in_place + (0.1 if len(answer) == len(wanted) else 0.0)


def two_modes_reward(answer: str, digits: str) -> float:
    """1 for ascending order, 0.8 for descending."""
    ascending = "".join(sorted(digits))
    if answer == ascending:
        return 1.0
    return DESCENDING_REWARD if answer == ascending[::-1] else 0.0


REWARDS: dict[str, Callable[[str, str], float]] = {
    "exact": exact_reward,
    "graded": graded_reward,
    "two_modes": two_modes_reward,
}


@dataclass(frozen=True)
class SortTask:
    """Sorting ``length`` digits from 1 to 9.

    Attributes:
        reward: "exact", "graded" or "two_modes", a key of ``REWARDS``.
        length: digits per prompt.
        teacher_drop: probability with which the teacher drops a digit that repeats an earlier one.
        descending_share: share of descending answers of the ``two_modes`` teacher.
    """

    name: str = "sort"
    reward: str = "exact"
    length: int = 6
    teacher_drop: float = 0.5
    descending_share: float = 0.75

    def __post_init__(self) -> None:
        if self.reward not in REWARDS:
            raise ValueError(f"task.reward must be one of {sorted(REWARDS)}, got {self.reward!r}")
        if not 2 <= self.length <= 32:
            raise ValueError(f"task.length must lie in [2, 32], got {self.length}")
        for key in ("teacher_drop", "descending_share"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise ValueError(f"task.{key} must lie in [0, 1], got {getattr(self, key)}")

    @property
    def vocab_size(self) -> int:
        return _FIRST_DIGIT + len(_DIGITS)

    @property
    def pad_id(self) -> int:
        return _PAD

    @property
    def end_id(self) -> int:
        return _END

    @property
    def text_grader(self) -> None:
        """Answers are graded by their token ids."""
        return None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return ()

    @property
    def test_size(self) -> None:
        """Prompts are drawn, not stored."""
        return None

    @property
    def has_demonstrations(self) -> bool:
        return True

    @property
    def max_prompt_length(self) -> int:
        return self.length + 1

    @property
    def max_response_length(self) -> int:
        return self.length + 2

    def check_files(self) -> list[str]:
        return []

    def data_report(self) -> list[str]:
        return []

    def fingerprint(self) -> str:
        prompts = self.train_prompts(_FINGERPRINT_PROMPTS, PromptTurn(seed=0, step=0))
        texts = json.dumps([[prompt.text, list(prompt.tokens)] for prompt in prompts])
        return hashlib.sha256(texts.encode()).hexdigest()

    def train_prompts(self, count: int, turn: PromptTurn) -> list[Prompt]:
        stream = Random(f"{turn.seed}/rollout/{turn.step}/{turn.again}")
        return self._train_prompts(count, stream)

    def test_prompts(self, count: int) -> list[Prompt]:
        stream = Random(_TEST_STREAM_SEED)
        return [self._draw(stream, held_out=True) for _ in range(count)]

    def demonstrations(self, count: int, task_rng: Random) -> list[tuple[Prompt, list[int]]]:
        prompts = self._train_prompts(count, task_rng)
        return [(prompt, self._teach(prompt, task_rng)) for prompt in prompts]

    def grade(self, prompt: Prompt, completion: list[int]) -> float:
        answer = self.answer(completion)
        return 0.0 if answer is None else REWARDS[self.reward](answer, prompt.text)

    def text(self, completion: list[int]) -> str:
        """Digits as such, any other token but the end as ``?``."""
        body = completion[:-1] if completion and completion[-1] == _END else completion
        return "".join(_DIGITS[t - _FIRST_DIGIT] if _is_digit(t) else "?" for t in body)

    def reference(self, prompt: Prompt) -> str:
        return "".join(sorted(prompt.text))

    def solved(self, prompt: Prompt, completion: list[int]) -> bool:
        answer = self.answer(completion)
        return answer is not None and exact_reward(answer, prompt.text) == 1.0

    def answer(self, completion: list[int]) -> str | None:
        """The digits before the end token; None if there is no end or another token before it."""
        if not completion or completion[-1] != _END:
            return None
        body = completion[:-1]
        if not all(_is_digit(token) for token in body):
            return None
        return "".join(_DIGITS[token - _FIRST_DIGIT] for token in body)

    def encode(self, digits: str) -> list[int]:
        """Token ids of a string of digits."""
        return [_FIRST_DIGIT + _DIGITS.index(digit) for digit in digits]

    def _train_prompts(self, count: int, rng: Random) -> list[Prompt]:
        return [self._draw(rng, held_out=False) for _ in range(count)]

    def _draw(self, rng: Random, held_out: bool) -> Prompt:
        while True:
            digits = "".join(rng.choice(_DIGITS) for _ in range(self.length))
            if is_held_out(digits) == held_out:
                return Prompt(digits, (*self.encode(digits), _EQUALS))

    def _teach(self, prompt: Prompt, rng: Random) -> list[int]:
        kept: list[str] = []
        for digit in sorted(prompt.text):
            if digit in kept and rng.random() < self.teacher_drop:
                continue
            kept.append(digit)
        if self.reward == "two_modes" and rng.random() < self.descending_share:
            kept.reverse()
        return [*self.encode("".join(kept)), _END]


def _is_digit(token: int) -> bool:
    """Whether a token is a digit; a model's own vocabulary may go on behind them."""
    return _FIRST_DIGIT <= token < _FIRST_DIGIT + len(_DIGITS)


def is_held_out(digits: str) -> bool:
    """Whether a prompt string belongs to the held-out fifth."""
    digest = hashlib.sha256(digits.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_SHARE == 0
