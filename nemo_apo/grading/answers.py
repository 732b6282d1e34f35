"""The answer that a grader of text looks at."""

from nemo_apo.tasks.answers import marked_answer

__all__ = ["answer_or_all", "marked_answer"]


def answer_or_all(completion: str) -> str:
    """The marked answer, or the whole completion where nothing is marked; without outer spaces."""
    answer = marked_answer(completion)
    return (completion if answer is None else answer).strip()
