"""Turns in a data set: each prompt once per epoch, wherever a run was stopped."""

import pytest

from nemo_apo.tasks import PromptTurn
from nemo_apo.tasks.turns import positions


def walk(size: int, count: int, steps: range, seed: int = 0) -> list[int]:
    return [at for step in steps for at in positions(count, size, PromptTurn(seed, step))]


@pytest.mark.parametrize(("size", "count"), [(12, 4), (10, 4), (7, 3), (5, 5), (3, 8), (1, 2)])
def test_each_prompt_has_its_turn_exactly_once_per_epoch(size: int, count: int) -> None:
    walked = walk(size, count, range(6 * size))
    epochs = [walked[start : start + size] for start in range(0, len(walked), size)]
    assert len(epochs) == 6 * count
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = walk(50, 10, range(5)), walk(50, 10, range(5, 10))
    assert first != second
    assert first != walk(50, 10, range(5), seed=1)
    assert first != list(range(50))


def test_a_resumed_run_goes_on_where_it_stopped() -> None:
    whole = walk(23, 4, range(20))
    for stop in range(20):
        assert walk(23, 4, range(stop)) + walk(23, 4, range(stop, 20)) == whole


def test_further_rounds_do_not_disturb_the_walk_and_repeat_no_prompt_early() -> None:
    again = positions(6, 10, PromptTurn(0, 3, 1))
    assert len(set(again)) == 6
    assert again == positions(6, 10, PromptTurn(0, 3, 1))
    others = [PromptTurn(0, 3, 2), PromptTurn(0, 4, 1), PromptTurn(1, 3, 1), PromptTurn(0, 3, 0)]
    assert all(positions(6, 10, turn) != again for turn in others)
    assert sorted(positions(20, 10, PromptTurn(0, 0, 1)))[::2] == list(range(10))
