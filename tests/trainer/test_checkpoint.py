"""What a checkpoint holds and whom it refuses; damage and crashes are in tests/abuse."""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_apo.config import Config, OptimizerConfig
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.diagnostics import DiagnosticsState
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.parallel.together import RankError, on_first, together
from nemo_apo.tasks import Prompt, PromptTurn
from nemo_apo.trainer import checkpoint
from nemo_apo.trainer.checkpoint import TrainerState
from nemo_apo.trainer.checkpoint_search import CheckpointError, newest_verified
from nemo_apo.trainer.fixed_config import changes, fixed_values
from nemo_apo.trainer.random_state import read_random_state
from tests.parallel.ranks import run_ranks

from .resumed_runs import moments
from .tiny_runs import TokenSumTask, Training, begin, bits_equal, parallel, tiny_config

STATE = TrainerState(step=1, schedule=ScheduleState(), diagnostics=DiagnosticsState())


def save(root: Path, training: Training, **metrics: float) -> Path:
    return checkpoint.save(
        root, training.policy, training.remembered, STATE, training.config, metrics
    )


def load(root: Path, training: Training, config: Config) -> TrainerState:
    found = newest_verified(root)
    assert found is not None
    state, _ = checkpoint.load(found.newest, training.policy, training.remembered, config)
    return state


def draws() -> list[float]:
    """A number of each generator."""
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_the_generators_go_on_where_they_were(tmp_path: Path) -> None:
    config = tiny_config(parallel=parallel(2, 1))

    def work() -> tuple[list[float], list[float], list[float]]:
        layout = parallel_layout.initialize(config.parallel, config.run.seed)
        training = begin(config, layout)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(layout.rank + 5)
        save(tmp_path, training)
        wanted, later = draws(), draws()
        load(tmp_path, training, config)
        return wanted, draws(), later

    outcomes = run_ranks(2, work)
    for wanted, got, later in outcomes:
        assert got == wanted
        assert later != wanted
    assert outcomes[0] != outcomes[1], "each rank has its own"


def test_training_draws_from_no_global_generator() -> None:
    """Why another layout may go on without the generators of the ranks that it lacks."""

    def work() -> bool:
        training = begin(tiny_config())
        before = read_random_state(training.layout.device)
        training.run(2)
        return read_random_state(training.layout.device) == before

    assert run_ranks(1, work) == [True]


def test_a_checkpoint_before_any_optimizer_step_can_be_resumed(tmp_path: Path) -> None:
    """As when every optimizer step so far was skipped."""

    def work() -> None:
        layout = parallel_layout.initialize(tiny_config().parallel, 0)
        one, other, whole = (begin(tiny_config(), layout) for _ in range(3))
        save(tmp_path, one)
        load(tmp_path, other, tiny_config())
        other.run(2)
        whole.run(2)
        assert bits_equal(moments(other.policy), moments(whole.policy))

    run_ranks(1, work)


def test_what_the_configuration_decides_is_not_taken_from_the_checkpoint(tmp_path: Path) -> None:
    changed = OptimizerConfig(lr=1e-3, adam_beta1=0.5, adam_eps=1e-3, weight_decay=0.3)
    config = tiny_config()
    allowed = replace(config, run=replace(config.run, allow_changed=["optimizer"]))

    def work() -> list[dict[str, Any]]:
        layout = parallel_layout.initialize(config.parallel, 0)
        save(tmp_path, begin(config, layout))
        training = begin(replace(allowed, optimizer=changed), layout)
        load(tmp_path, training, training.config)
        return [
            {name: group[name] for name in ("betas", "eps", "weight_decay", "wd_mult")}
            for group in training.policy.optimizer.param_groups
        ]

    for group in run_ranks(1, work)[0]:
        assert group["betas"] == (0.5, 0.95)
        assert group["eps"] == 1e-3
        assert group["weight_decay"] == 0.3 * group["wd_mult"]


def test_the_manifest_states_step_layout_and_finite_metrics(tmp_path: Path) -> None:
    def work() -> Path:
        return save(tmp_path, begin(tiny_config()), accuracy=0.5, lost=float("nan"))

    about = json.loads((run_ranks(1, work)[0] / "manifest.json").read_text())["about"]
    assert about["step"] == 1
    assert about["metrics"] == {"accuracy": 0.5}
    assert about["layout"]["tensor"] == about["layout"]["data"] == 1
    assert len(about["config_sha256"]) == len(about["prompts_sha256"]) == 64


def test_a_step_saved_again_replaces_the_first_once_it_is_complete(tmp_path: Path) -> None:
    def work() -> list[str]:
        training = begin(tiny_config())
        return [save(tmp_path, training).name for _ in range(2)]

    assert run_ranks(1, work) == [["step_000001", "step_000001.1"]]
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001.1"]


def test_a_checkpoint_of_another_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> str:
        training = begin(tiny_config())
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "_FORMAT", 99)
            save(tmp_path, training)
        with pytest.raises(CheckpointError) as info:
            load(tmp_path, training, tiny_config())
        return str(info.value)

    assert "has format 99, expected 5" in run_ranks(1, work)[0]


def test_weights_alone_cannot_be_resumed(tmp_path: Path) -> None:
    def work() -> str:
        training = begin(tiny_config())
        checkpoint.save_weights(tmp_path / "step_000001", training.policy)
        with pytest.raises(CheckpointError) as info:
            load(tmp_path, training, training.config)
        return str(info.value)

    assert "it holds weights alone" in run_ranks(1, work)[0]


@dataclass(frozen=True)
class OtherPrompts(TokenSumTask):
    """The settings of the tiny task, with other data behind them."""

    def train_prompts(self, count: int, turn: PromptTurn) -> list[Prompt]:
        prompts = super().train_prompts(count, turn)
        return [*prompts[:-1], prompts[0]]


@dataclass(frozen=True)
class MoreTokens(TokenSumTask):
    """The settings of the tiny task, with a token more in its vocabulary."""

    @property
    def vocab_size(self) -> int:
        return super().vocab_size + 1


def changed(before: Config, after: Config, *allowed: str) -> list[str]:
    return changes(fixed_values(before), fixed_values(after), allowed)


def test_a_change_is_named_with_its_values_unless_its_section_may_change() -> None:
    before = tiny_config()
    after = replace(before, optimizer=replace(before.optimizer, lr=0.5))
    assert changed(before, before) == []
    assert changed(before, after) == ["optimizer.lr was 0.001 and is now 0.5"]
    assert changed(before, after, "optimizer") == []
    assert changed(before, after, "task") == ["optimizer.lr was 0.001 and is now 0.5"]


def test_other_data_behind_the_same_settings_is_a_change_of_the_task() -> None:
    before = tiny_config()
    after = replace(before, task=OtherPrompts())
    (difference,) = changed(before, after)
    assert difference.startswith("task.prompts_sha256 was ")
    assert changed(before, after, "task") == []


def test_the_vocabulary_the_model_and_the_seed_may_never_change() -> None:
    before = tiny_config()
    more = replace(before, task=MoreTokens())
    size = before.task.vocab_size
    assert changed(before, more, "task") == [f"task.vocab_size was {size} and is now {size + 1}"]
    wider = replace(before, model=replace(before.model, hidden_size=64))
    assert changed(before, wider, "model") == ["model.hidden_size was 32 and is now 64"]
    seeded = replace(before, run=replace(before.run, seed=3))
    assert changed(before, seeded, "run") == ["run.seed was 0 and is now 3"]


def test_work_that_fails_on_one_rank_fails_on_all() -> None:
    def work() -> tuple[list[int], int, list[str]]:
        rank = torch.distributed.get_rank()
        told = []
        for attempt in (together, on_first):
            with pytest.raises(RankError) as info:
                attempt(lambda: 1 // rank)
            told.append(str(info.value))
        return together(lambda: 10 * rank), on_first(lambda: 7 + rank), told

    for ranks, first, told in run_ranks(2, work):
        assert (ranks, first) == ([0, 10], 7)
        assert told == ["rank 0: ZeroDivisionError: integer division or modulo by zero"] * 2
