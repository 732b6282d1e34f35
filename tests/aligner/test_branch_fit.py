"""Whole runs of the real ``GRPOTrainer.fit`` with the real rollout generator and actor."""

import tempfile
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from nemo_apo import record
from tests.aligner import grpo_session, letter_task
from tests.aligner.grpo_session import Case
from tests.aligner.host_ranks import run_ranks

pytestmark = [pytest.mark.pinned, pytest.mark.branch]

CASE = Case(
    batch_size=16,
    prompts=8,
    group_size=4,
    micro_batch_size=16,
    model={"grpo.forward_micro_batch_size": 16, "dist_ckpt_format": "zarr"},
    save_interval=2,
)
# One that learns within a few RL steps. NeMo cannot save this optimizer's state.
LEARNING = replace(CASE, lr=2e-2, model={**CASE.model, "optim.name": "adamw"}, save_interval=0)
ROLLOUTS, OPTIM = "train_rollouts/", "train_optim/"
# What the host keeps in a checkpoint's file name.
COUNTERS = ("step", "consumed_samples", "grpo_optimization_step", "epoch")
STEPS, NEVER = 8, 10**6


@dataclass
class StopAfter:
    """The host's run timer: time is up after some RL steps."""

    steps: int
    asked: int = 0

    def start_time(self) -> None:
        pass

    def is_finished(self) -> bool:
        self.asked += 1
        return self.asked >= self.steps


def fit(
    rank: int,
    case: Case,
    steps: int,
    folder: str,
    stop_after: int = NEVER,
    resume: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Run ``fit``; what it logged, the final state and weights, and what it saved in ``folder``."""
    saved: list[dict[str, int]] = []

    def save(counters: dict[str, Any]) -> None:
        # Lightning takes the suffix off again: a distributed checkpoint is a folder.
        saved.append({name: int(counters[name]) for name in COUNTERS})
        session.built.trainer.save_checkpoint(f"{folder}/step{saved[-1]['step']}.ckpt")

    session = grpo_session.open_session(
        case,
        actor_class=letter_task.sampling_actor_class(),
        generator=letter_task.rollout_generator,
        dataset=letter_task.dataset(),
        folder=folder,
        saver=grpo_session.Saver(save),
        max_steps=steps,
        gradient_clip_val=1.0,
        save_interval=case.save_interval,
        generation_rollout_mbs=case.prompts * case.group_size,
        prompt_micro_batch_size=case.prompts,
        val_prompt_micro_batch_size=case.prompts,
    )
    trainer, actor = session.trainer, session.actor
    trainer.run_timer = StopAfter(stop_after)
    if resume is not None:
        _restore(session, f"{folder}/step{resume['step']}")
        trainer.load_state_dict(resume)
    _seed_sampling_by_step(trainer, actor)
    trainer.fit()
    return {
        "rollouts": [line for line in session.log.lines if line[0] == ROLLOUTS],
        "optim": [line for line in session.log.lines if line[0] == OPTIM],
        "state": actor.apo_state.state_dict(actor.apo),
        "weights": {name: w.detach().clone() for name, w in actor.model.named_parameters()},
        "saved": saved,
        "counters": trainer.state_dict(),
    }


def _restore(session: Any, path: str) -> None:
    """What the host's launch script does with a checkpoint to resume from."""
    connector = session.built.trainer._checkpoint_connector
    connector._restore_modules_and_callbacks(path)
    connector.restore_training_state()
    connector.resume_end()


def _seed_sampling_by_step(trainer: Any, actor: Any) -> None:
    generate = trainer.generate_rollouts

    def seeded() -> Any:
        actor.rl_step, actor.calls = trainer.step, 0
        return generate()

    trainer.generate_rollouts = seeded


def column(result: dict[str, Any], part: str, name: str) -> list[float]:
    return [line[2][name] for line in result[part] if name in line[2]]


OVERRIDES: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "schedule.alpha_min=0.6": {"schedule.alpha_min": 0.6},
    "schedule.name=linear": {"schedule.name": "linear"},
    "schedule.name=fixed schedule.alpha=0.4": {"schedule.name": "fixed", "schedule.alpha": 0.4},
}


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[str, Any]]:
    """One run of eight RL steps per override."""
    results = {}
    for name, apo in OVERRIDES.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = run_ranks(1, fit, replace(LEARNING, apo=apo), STEPS, folder)[0]
    return results


def test_alpha_follows_the_overrides(runs: dict[str, dict[str, Any]]) -> None:
    alphas = {name: column(result, "rollouts", record.ALPHA) for name, result in runs.items()}
    for name in alphas:  # the table of docs/aligner.md
        print(f"| {name} | {' '.join(f'{alpha:.3f}' for alpha in alphas[name])} |")
    assert all(len(values) == STEPS for values in alphas.values())
    shipped, floored = alphas["as shipped"], alphas["schedule.alpha_min=0.6"]
    assert shipped[0] == floored[0] == 0.9
    assert shipped[-1] < floored[-1] < 0.9
    assert alphas["schedule.name=linear"] == pytest.approx(
        [0.9 + (0.35 - 0.9) * step / (STEPS - 1) for step in range(STEPS)]
    )
    assert alphas["schedule.name=fixed schedule.alpha=0.4"] == [0.4] * STEPS


def test_alpha_leaves_its_bound_with_both_gates_open(runs: dict[str, dict[str, Any]]) -> None:
    result = runs["as shipped"]
    gates = [column(result, "rollouts", key) for key in (record.CONFIDENCE, record.IMPROVEMENT)]
    assert max(min(pair) for pair in zip(*gates, strict=True)) > 0.1
    assert min(column(result, "rollouts", record.ALPHA)) < 0.89
    rewards = column(result, "rollouts", record.REWARD_MEAN)
    assert rewards[-1] > rewards[0] + 0.2


def test_our_metrics_stand_beside_the_hosts(runs: dict[str, dict[str, Any]]) -> None:
    rollout = runs["as shipped"]["rollouts"][-1][2]
    assert {"rewards", "init_policy_kl", "nonzero_advantages"} <= rollout.keys()
    assert {record.ALPHA, record.TOKEN_ENTROPY, record.NO_SIGNAL_SHARE} <= rollout.keys()
    names = {name for _, _, line in runs["as shipped"]["optim"] for name in line}
    assert {"loss", "grpo_ratio", "grpo_ratio_clamped", "grad_norm", "lr", "optim_step"} <= names
    assert {record.ANCHOR_DRIFT, record.COEFFICIENT_TOP_SHARE, record.REFRESH_SECONDS} <= names


@pytest.mark.parametrize("layout", [{}, {"dp": 2}, {"tp": 2}], ids=["one", "dp2", "tp2"])
def test_a_resumed_run_goes_on_bit_for_bit(layout: dict[str, int]) -> None:
    """Two RL steps, a checkpoint, two more: as four without a break, schedule state included."""
    case = replace(CASE, lr=0.5, micro_batch_size=8, **layout)
    ranks = case.world_size
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as parts:
        unbroken = run_ranks(ranks, fit, case, 4, whole)
        first = run_ranks(ranks, fit, case, 4, parts, 2)
        second = run_ranks(ranks, fit, case, 4, parts, NEVER, first[0]["saved"][-1])
    for rank in range(ranks):
        assert first[rank]["state"]["rl_steps"] == 2
        assert second[rank]["state"] == unbroken[rank]["state"]
        for part in ("rollouts", "optim"):
            both = first[rank][part] + second[rank][part]
            assert _untimed(both) == _untimed(unbroken[rank][part])
        assert second[rank]["counters"] == unbroken[rank]["counters"]
        for name, weight in unbroken[rank]["weights"].items():
            assert torch.equal(second[rank]["weights"][name], weight), name


def _untimed(lines: list[Any]) -> list[Any]:
    """Logged lines without what a clock measured."""
    return [
        (prefix, step, {k: v for k, v in line.items() if not k.startswith("time/")})
        for prefix, step, line in lines
    ]
