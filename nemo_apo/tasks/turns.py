"""Whose turn it is in a data set: from a turn to positions, without any state.

Round 0 of the steps of a run walks through one random order of the data set per epoch, so each
prompt has its turn exactly once per epoch, wherever a run was stopped and resumed. Later rounds of
a step draw from a stream of their own and do not disturb the walk.
"""

import functools
import itertools
from collections.abc import Iterator
from random import Random

from nemo_apo.tasks.interface import PromptTurn


def positions(count: int, size: int, turn: PromptTurn) -> list[int]:
    """Positions in a data set of ``size`` prompts for the ``count`` prompts of a turn.

    Args:
        count: of the turn; the walk of round 0 takes it to be the same at every step.
        size: of the data set, at least 1. A turn with more prompts than that has some twice.
        turn: seed, step and round.
    """
    if turn.again > 0:
        stream = _rounds(size, Random(f"{turn.seed}/again/{turn.step}/{turn.again}"))
        return list(itertools.islice(stream, count))
    walked = range(turn.step * count, (turn.step + 1) * count)
    return [order_of_epoch(size, turn.seed, at // size)[at % size] for at in walked]


# A turn lies in one epoch or across two, and a permutation of a large data set takes a while.
@functools.lru_cache(maxsize=4)
def order_of_epoch(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of an epoch, a permutation of ``range(size)``."""
    return tuple(_shuffled(size, Random(f"{seed}/epoch/{epoch}")))


def _rounds(size: int, stream: Random) -> Iterator[int]:
    """Positions without end, none twice before all were there."""
    while True:
        yield from _shuffled(size, stream)


def _shuffled(size: int, stream: Random) -> list[int]:
    order = list(range(size))
    stream.shuffle(order)
    return order
