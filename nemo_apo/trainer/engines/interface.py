"""What completes prompts with the policy's weights: one small interface, whatever is behind it.

Axes: N prompts of one call, R response tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nemo_apo.tasks import Prompt, Task
from nemo_apo.trainer.rollouts import Completions


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn and where they end.

    Attributes:
        vocab_size: the model's unpadded vocabulary; no other token is ever drawn.
        end_id, pad_id: token ids.
        max_response_length: R.
        temperature: divides the logits; greedy decoding ignores it.
        micro_batch_size: sequences generated at once, for an engine that has no queue of its own.
        stop_strings: texts that end a completion once they stand in it; their tokens belong to it.
        text: a completion's token ids as text, in which ``stop_strings`` are looked for.
    """

    vocab_size: int
    end_id: int
    pad_id: int
    max_response_length: int
    temperature: float
    micro_batch_size: int
    stop_strings: tuple[str, ...]
    text: Callable[[list[int]], str]

    @classmethod
    def of(
        cls, task: Task, vocab_size: int, temperature: float, micro_batch_size: int
    ) -> "Sampling":
        """That of a task, by a model of ``vocab_size`` tokens."""
        return cls(
            vocab_size=vocab_size,
            end_id=task.end_id,
            pad_id=task.pad_id,
            max_response_length=task.max_response_length,
            temperature=temperature,
            micro_batch_size=micro_batch_size,
            stop_strings=task.stop_strings,
            text=task.text,
        )


class RolloutEngine(Protocol):
    """Completes prompts with the current weights of the policy that it was made for.

    Every method is collective. One round is ``wake``, ``refit``, ``generate`` any number of times,
    ``sleep``; an engine is made asleep.

    Attributes:
        ranks_per_copy: how many ranks hold one copy of the model together; they stand next to one
            another and ask for the same completions.
    """

    ranks_per_copy: int

    def wake(self) -> None:
        """Take the memory that the weights need."""
        ...

    def refit(self) -> None:
        """Take over the policy's weights as they are now, and make ready to complete."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        uniforms_NR: Tensor | None,
        sampling: Sampling,
        between: Callable[[], None],
    ) -> Completions:
        """Complete this rank's prompts, as many on every rank.

        Args:
            prompts: one per completion wanted, of any lengths.
            uniforms_NR: uniform numbers in [0, 1) from which the draws come, so that samples are a
                function of them, float64; None decodes greedily.
            sampling: how.
            between: called on all ranks alike, at least once, where generation may be ended; what
                it raises ends it.
        """
        ...

    def sleep(self) -> None:
        """Give back what memory can be given back until the next round."""
        ...
