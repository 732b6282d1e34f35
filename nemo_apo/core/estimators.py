"""What a few sampled answers tell: pass@k, the majority vote, and standard errors."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a right one.

        1 - C(samples - right, k) / C(samples, k)

    The unbiased estimate of Chen et al., 2021 (arXiv 2107.03374); for k = samples, whether any is
    right.

    Raises:
        ValueError: unless 1 <= k <= samples and 0 <= right <= samples.
    """
    if not (1 <= k <= samples and 0 <= right <= samples):
        raise ValueError(
            f"pass@k needs 1 <= k <= samples and 0 <= right <= samples, got {k=}, {samples=}, "
            f"{right=}"
        )
    # Whole numbers of any size, divided once.
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(answers: Sequence[Hashable | None]) -> int | None:
    """Where the most frequent answer first stands; None if nobody votes.

    Args:
        answers: one per sample; None does not vote. Of equally frequent ones the first wins.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return None
    # A counter keeps the order in which its keys came, and max() the first of equals.
    return answers.index(max(votes, key=votes.__getitem__))


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; NaN for fewer than two.

    For values that are 0 or 1 with mean p this is sqrt(p (1 - p) / (n - 1)).
    """
    count = len(values)
    if count < 2:
        return math.nan
    mean = math.fsum(values) / count
    squares = math.fsum((value - mean) ** 2 for value in values)
    return math.sqrt(squares / (count - 1) / count)
