"""A run resumed at any of its steps ends as the run that was never stopped, bit for bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_apo import record
from nemo_apo.config import AnchorConfig, Config, OptimizerConfig, ParallelConfig
from nemo_apo.core.alpha_schedule import EssSchedule, GuardedSchedule
from nemo_apo.core.temperature import AdaptiveTemperature
from tests.trainer.resumed_runs import checkpoint_at_the_end, metrics, prepared, train
from tests.trainer.tiny_runs import bits_equal, parallel, tiny_config

from .effort import IS_LONG, report, tries

STEPS = tries(4, 8)
CLOCKS = ("wall_s", "warm_start_s")
LIVELY = GuardedSchedule(confidence="token", rho=0.5, rho_r=0.5)
WARMING_UP = OptimizerConfig(lr=1e-3, lr_warmup_steps=9, weight_decay=0.1)
SHORT = {
    "adaptive tau, ess alpha, moving average": (
        tiny_config(
            tau=AdaptiveTemperature(),
            schedule=EssSchedule(),
            anchor=AnchorConfig(name="ema", decay=0.6),
            optimizer=WARMING_UP,
        ),
        1,
    ),
}
LONG = {
    "guarded alpha, lagged anchor": (
        tiny_config(schedule=LIVELY, anchor=AnchorConfig(name="lagged", refresh_every=3)),
        1,
    ),
    "reference as anchor": (tiny_config(anchor=AnchorConfig(name="reference")), 1),
    "TP2 x PP2": (tiny_config(schedule=LIVELY, parallel=parallel(2, 2)), 1),
    "DP2, sharded optimizer": (
        tiny_config(schedule=LIVELY, parallel=ParallelConfig(distributed_optimizer=True)),
        2,
    ),
}
VARIANTS = {**SHORT, **(LONG if IS_LONG else {})}


def run_config(config: Config, root: Path, name: str, **changes: Any) -> Config:
    return prepared(config, root, name, steps=STEPS, save_every=1, **changes)


@pytest.mark.slow(reason="a run resumed at every step")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_resumed_at_any_step_is_the_uninterrupted_run(variant: str, tmp_path: Path) -> None:
    config, data = VARIANTS[variant]
    whole = run_config(config, tmp_path, "whole")
    train(whole, data)
    wanted = checkpoint_at_the_end(whole, data)
    for step in range(1, STEPS):
        name = f"from {step}"
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(tmp_path / name / record.CHECKPOINT_DIR / f"step_{later:06d}")
        resumed = run_config(config, tmp_path, name, if_exists="resume")
        train(resumed, data)
        assert metrics(tmp_path, name) == metrics(tmp_path, "whole"), step
        ends = checkpoint_at_the_end(resumed, data)
        for (tensors, state), (wanted_tensors, wanted_state) in zip(ends, wanted, strict=True):
            assert bits_equal(tensors, wanted_tensors), step
            for clock in CLOCKS:
                state.pop(clock)
            assert state == {k: v for k, v in wanted_state.items() if k not in CLOCKS}
    assert len({line[record.GRAD_NORM] for line in metrics(tmp_path, "whole")[1:]}) == STEPS
    report(f"resume at every step, {variant}", STEPS - 1)
