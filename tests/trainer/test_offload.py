"""Memory that goes away while completions are generated, and what comes back."""

from dataclasses import replace

import pytest
import torch

from nemo_apo.config import ParallelConfig, RolloutConfig
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.trainer.offload import on_host, optimizer_tensors
from nemo_apo.trainer.rollouts import Completions
from nemo_apo.trainer.sampling import complete
from tests.parallel.ranks import run_ranks

from .tiny_runs import TINY_MODEL, Training, begin, bits_equal, tiny_config


def test_memory_comes_back_under_every_view() -> None:
    base = torch.arange(12, dtype=torch.float32)
    row, strided = base[3:6], base[::2]
    other = torch.tensor([torch.nan, -0.0], dtype=torch.bfloat16)
    wanted = [base.clone(), row.clone(), strided.clone()]
    kept = torch.ones(4)
    with on_host([row, base, other, kept[1:]], keep=[kept]):
        assert base.untyped_storage().nbytes() == 0
        assert other.untyped_storage().nbytes() == 0
        assert kept.tolist() == [1.0] * 4
    assert bits_equal([base, row, strided], wanted)
    assert (
        other.view(torch.int16).tolist()
        == torch.tensor([torch.nan, -0.0], dtype=torch.bfloat16).view(torch.int16).tolist()
    )
    base[3] = 40.0
    assert row[0] == 40.0, "a view looks into other memory than before"


def test_memory_comes_back_after_an_error() -> None:
    values = torch.arange(3.0)
    with pytest.raises(KeyboardInterrupt), on_host([values], keep=[]):
        raise KeyboardInterrupt
    assert values.tolist() == [0.0, 1.0, 2.0]


class Spy:
    """The static engine, asked what memory there is while it generates."""

    ranks_per_copy = 1

    def __init__(self, training: Training) -> None:
        self.inner = training.policy.engine
        self.training = training
        self.held: list[int] = []

    def wake(self) -> None:
        self.inner.wake()

    def refit(self) -> None:
        self.inner.refit()

    def generate(self, *args: object, **options: object) -> Completions:
        policy = self.training.policy
        weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        storages = [tensor.untyped_storage() for tensor in optimizer_tensors(policy.optimizer)]
        own = [one for one in storages if one.nbytes() and one.data_ptr() not in weights]
        gradients = [p.main_grad.untyped_storage().nbytes() for p in policy.parameters()]
        self.held.append(sum(one.nbytes() for one in own) + sum(gradients))
        return self.inner.generate(*args, **options)  # type: ignore[arg-type]

    def sleep(self) -> None:
        self.inner.sleep()


CASES = {
    "float32": (tiny_config(), 1),
    "bfloat16": (tiny_config(model=replace(TINY_MODEL, params_dtype="bfloat16")), 1),
    "sharded optimizer": (tiny_config(parallel=ParallelConfig(distributed_optimizer=True)), 2),
    "sharded optimizer, bfloat16": (
        tiny_config(
            model=replace(TINY_MODEL, params_dtype="bfloat16"),
            parallel=ParallelConfig(distributed_optimizer=True),
        ),
        2,
    ),
    "TP2": (tiny_config(parallel=ParallelConfig(2)), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_three_rl_steps_end_in_the_same_bits(case: str) -> None:
    config, ranks = CASES[case]

    def work() -> None:
        plain = begin(config)
        away = begin(replace(config, rollout=replace(config.rollout, offload=True)), plain.layout)
        spies = [Spy(training) for training in (plain, away)]
        for training, spy in zip((plain, away), spies, strict=True):
            training.policy.engine = spy
            training.run(3)
        assert spies[1].held == [0, 0, 0]
        assert spies[0].held[-1] > 0
        assert bits_equal(plain.policy.copy_weights(), away.policy.copy_weights())
        assert bits_equal(
            list(optimizer_tensors(plain.policy.optimizer)),
            list(optimizer_tensors(away.policy.optimizer)),
        )

    run_ranks(ranks, work)


def test_gradients_come_back_as_zeros() -> None:
    def work() -> None:
        training = begin(tiny_config(), parallel_layout.initialize(ParallelConfig(), 0))
        training.run(1)
        policy = training.policy
        assert any(bool(p.main_grad.any()) for p in policy.parameters())
        rollout = RolloutConfig(prompts=1, group_size=2, micro_batch_size=2, offload=True)
        complete(policy, training.config.task, rollout, training.config.task.test_prompts(2), None)
        assert not any(bool(p.main_grad.any()) for p in policy.parameters())

    run_ranks(1, work)
