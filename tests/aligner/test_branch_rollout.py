"""A rollout's way through the trainer: which log-probs, which rows, which metrics.

The policy stands away from the reference, groups are dropped, log-probs are stale: nothing here is
the same number under two names, as it is on the first step of a fresh run. Gradients are compared
with autograd through the whole coupled loss (``whole_group_loss``) in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_apo import record
from tests.aligner import grpo_session, letter_task, shards
from tests.aligner import whole_group_loss as oracle
from tests.aligner.grpo_session import Case, Session
from tests.aligner.host_ranks import run_ranks
from tests.aligner.test_branch_gradients import relative_gap

pytestmark = [pytest.mark.pinned, pytest.mark.branch]

TAU, BETA_R, ALPHA, KL_COEF = 0.24, 0.3, 0.6, 0.05
CLIP_LOW, CLIP_HIGH = 0.1, 0.3
LENGTH_LIMIT = 11
VOCABULARY = 259  # of the byte-level tokenizer
OPTIM = "train_optim/"
# Rounding of float64 log-probs, divided by tau.
TOLERANCE = 1e-9

BASE = Case(batch_size=8, prompts=4, group_size=4, micro_batch_size=2, double=True)
# Three groups in an optimizer step: with two ranks the second of them is cut.
THREES = replace(BASE, batch_size=12, prompts=6, micro_batch_size=3)
APO = {"objective.name": "apo", "schedule.name": "fixed", "schedule.alpha": ALPHA}


@dataclass
class Facts:
    """What the oracle knows of a rollout before its first update.

    Attributes:
        old, reference: token log-probs under the policy and under the reference, [N, T].
        entropy: of the policy's distribution at each token, [N, T].
        mask: 1 on completion tokens, [N, T].
        rewards: [N].
        rows: of each group that is trained on, [G, P].
        known: sequence log-probs as an update last saw them, [N].
    """

    old: Tensor
    reference: Tensor
    entropy: Tensor
    mask: Tensor
    rewards: Tensor
    rows: Tensor
    known: Tensor

    def sums(self, values: Tensor, rows: Tensor) -> Tensor:
        """Over the completion tokens of some rows, [G, P]."""
        return (values[rows] * self.mask[rows]).sum(dim=-1)


@dataclass(frozen=True)
class Step:
    """An optimizer step: its rows [G, P], what was known of them, and their log-probs then."""

    rows: Tensor
    known: Tensor
    logprobs: Tensor


Loss = Callable[[Facts, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Plan:
    """A rollout and what training on it should do.

    Attributes:
        case: layout and settings.
        loss: of the rows [G, P] with differentiable token log-probs [G, P, T].
        spoil: change the made rollout.
        dropped: ids of the groups that are then not trained on.
        passes: how often the rollout is trained on.
    """

    case: Case
    loss: Loss
    spoil: Callable[[dict[str, Tensor]], None] = lambda rollout: None
    dropped: tuple[int, ...] = ()
    passes: int = 1

    def on(self, ranks: int) -> "Plan":
        return replace(self, case=replace(self.case, dp=ranks))


@dataclass(frozen=True)
class Compared:
    """What one rank found.

    Attributes:
        gaps: relative difference of the gradients at every optimizer step.
        facts, steps: of the oracle.
        metrics: of the rollout.
        lines: logged of the optimizer steps, by name.
    """

    gaps: list[float]
    facts: Facts
    steps: list[Step]
    metrics: dict[str, float]
    lines: dict[str, list[float]]


def compare(rank: int, plan: Plan) -> Compared:
    """An RL step by the oracle, then by the trainer, from the same weights."""
    session = grpo_session.open_session(plan.case)
    rollout = grpo_session.made_rollout(plan.case)
    plan.spoil(rollout)
    facts = _facts(session.actor, rollout, plan)
    start = shards.full_weights(session.actor)
    wanted, steps = _oracle_steps(session.actor, plan, facts, rollout["response_tokens"])
    _put_back(session.actor, start)
    read = grpo_session.read_rollout(session, rollout, plan.case)
    data, metrics = session.trainer.create_grpo_training_data_from_inferences(read)
    batches = [b for _ in range(plan.passes) for b in grpo_session.batches_of(data, plan.case)]
    found = grpo_session.train_batches(session, batches)
    assert len(found) == len(wanted)
    gaps = [relative_gap(one, other) for one, other in zip(found, wanted, strict=True)]
    return Compared(gaps, facts, steps, metrics, _logged(session))


def _logged(session: Session) -> dict[str, list[float]]:
    names = {name for _, _, line in session.log.lines for name in line}
    return {name: session.log.column(OPTIM, name) for name in names}


def _put_back(actor: Any, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight in actor.model.named_parameters():
            weight.copy_(weights[name])
            weight.grad = None


def move_away(actor: Any) -> None:
    """Move the policy some way from the reference; the same on all ranks."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in actor.model.parameters():
            noise = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
            weight += 0.01 * noise.to(weight.dtype)


def _facts(actor: Any, rollout: dict[str, Tensor], plan: Plan) -> Facts:
    """Reference and policy read in turn; the actor is moved between."""
    tokens, ids = rollout["response_tokens"], rollout["apo_group_id"]
    mask = torch.zeros(tokens.shape[0], tokens.shape[1] - 1, dtype=torch.float64)
    ends = zip(rollout["prompt_lengths"], rollout["response_lengths"], strict=True)
    for row, (start, end) in enumerate(ends):
        mask[row, start - 1 : end - 1] = 1.0
    with torch.no_grad():
        reference = oracle.token_logprobs(actor, tokens, VOCABULARY)
        move_away(actor)
        old = oracle.token_logprobs(actor, tokens, VOCABULARY)
        entropy = oracle.token_entropies(actor, tokens, VOCABULARY)
    kept = [group for group in ids.unique().tolist() if group not in plan.dropped]
    return Facts(
        old=old,
        reference=reference,
        entropy=entropy,
        mask=mask,
        rewards=rollout["rewards"].double(),
        rows=torch.stack([(ids == group).nonzero().squeeze(1) for group in kept]),
        known=(old * mask).sum(dim=1),
    )


def _oracle_steps(
    actor: Any, plan: Plan, facts: Facts, tokens: Tensor
) -> tuple[list[dict[str, Tensor]], list[Step]]:
    """Gradients of every optimizer step by autograd through the whole loss, with SGD between."""
    gradients, steps = [], []
    for rows in _rows_by_step(plan, facts) * plan.passes:
        actor.zero_grad()
        new = oracle.token_logprobs(actor, tokens[rows.flatten()], VOCABULARY)
        new = new.view(*rows.shape, -1)
        plan.loss(facts, rows, new).backward()
        gradients.append(shards.gradients(actor))
        steps.append(Step(rows, facts.known[rows].clone(), new.detach()))
        facts.known[rows] = (new.detach() * facts.mask[rows]).sum(dim=-1)
        with torch.no_grad():
            for weight in actor.model.parameters():
                weight -= plan.case.lr * weight.grad
    return gradients, steps


def _rows_by_step(plan: Plan, facts: Facts) -> list[Tensor]:
    """The kept groups of each optimizer step; groups are dealt out before any is dropped."""
    first, count = 100, plan.case.prompts
    kept = [group for group in range(first, first + count) if group not in plan.dropped]
    per_step = plan.case.batch_size // plan.case.group_size
    steps = []
    for start in range(first, first + count, per_step):
        here = [kept.index(g) for g in range(start, start + per_step) if g in kept]
        steps.append(facts.rows[here])
    return steps


def _change(facts: Facts, rows: Tensor, new: Tensor, anchor: Tensor) -> Tensor:
    return ((new - anchor[rows]) * facts.mask[rows]).sum(dim=-1)


def _apo(u: Tensor, rewards: Tensor) -> Tensor:
    return oracle.alpha_loss(u, oracle.zscore(rewards), ALPHA, BETA_R)


def apo(facts: Facts, rows: Tensor, new: Tensor) -> Tensor:
    return _apo(_change(facts, rows, new, facts.old) / TAU, facts.rewards[rows])


def apo_to_reference(facts: Facts, rows: Tensor, new: Tensor) -> Tensor:
    return _apo(_change(facts, rows, new, facts.reference) / TAU, facts.rewards[rows])


def stale_apo(facts: Facts, rows: Tensor, new: Tensor) -> Tensor:
    """The derivative of the loss is taken where the log-probs were last known."""
    moving = (new * facts.mask[rows]).sum(dim=-1)
    drift = facts.known[rows] - facts.sums(facts.old, rows)
    return _apo((drift + moving - moving.detach()) / TAU, facts.rewards[rows])


def adaptive_apo(facts: Facts, rows: Tensor, new: Tensor) -> Tensor:
    entropy = facts.sums(facts.entropy, facts.rows).sum(dim=1) / facts.mask[facts.rows].sum((1, 2))
    tau = oracle.adaptive_tau(entropy, facts.rewards[facts.rows].mean(dim=1), TAU, VOCABULARY)
    tau_of_row = torch.zeros_like(facts.rewards)
    tau_of_row[facts.rows] = tau.unsqueeze(1).expand(facts.rows.shape)
    return _apo(_change(facts, rows, new, facts.old) / tau_of_row[rows], facts.rewards[rows])


def _clipped(
    facts: Facts, rows: Tensor, new: Tensor, advantages: Tensor, weights: Tensor
) -> Tensor:
    flat = rows.flatten()
    return oracle.clipped_ratio_loss(
        new.flatten(0, 1),
        facts.old[flat],
        facts.mask[flat],
        advantages.flatten(),
        weights,
        CLIP_LOW,
        CLIP_HIGH,
    )


def _sequence_mean(facts: Facts, rows: Tensor) -> Tensor:
    return 1.0 / (rows.numel() * facts.mask[rows.flatten()].sum(dim=1, keepdim=True))


def grpo_with_k3(facts: Facts, rows: Tensor, new: Tensor) -> Tensor:
    flat, weights = rows.flatten(), _sequence_mean(facts, rows)
    penalty = oracle.k3_penalty(new.flatten(0, 1), facts.reference[flat], facts.mask[flat], weights)
    advantages = oracle.zscore(facts.rewards[rows])
    return _clipped(facts, rows, new, advantages, weights) + KL_COEF * penalty


def grpo_with_k1(facts: Facts, rows: Tensor, new: Tensor) -> Tensor:
    kl = facts.sums(facts.old - facts.reference, rows)
    advantages = oracle.zscore(facts.rewards[rows] - KL_COEF * kl)
    return _clipped(facts, rows, new, advantages, _sequence_mean(facts, rows))


def dr_grpo(facts: Facts, rows: Tensor, new: Tensor) -> Tensor:
    rewards = facts.rewards[rows]
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    weights = rewards.new_full((rows.numel(), 1), 1.0 / (rows.numel() * LENGTH_LIMIT))
    return _clipped(facts, rows, new, advantages, weights)


def gspo(facts: Facts, rows: Tensor, new: Tensor) -> Tensor:
    change, lengths = _change(facts, rows, new, facts.old), facts.mask[rows].sum(dim=-1)
    advantages = oracle.zscore(facts.rewards[rows])
    return oracle.sequence_ratio_loss(change, lengths, advantages, CLIP_LOW, CLIP_HIGH)


def fail_grades(rollout: dict[str, Tensor]) -> None:
    """One answer of a group in the first optimizer step, and of one in the second."""
    for group in (100, 104):
        rollout["rewards"][_rows(rollout, group)[1]] = float("nan")


def cut_short(rollout: dict[str, Tensor]) -> None:
    rollout["is_end"][_rows(rollout, 101)[2]] = False


def _rows(rollout: dict[str, Tensor], group: int) -> Tensor:
    return (rollout["apo_group_id"] == group).nonzero().squeeze(1)


def _with(case: Case, apo_changes: dict[str, Any], **changes: Any) -> Case:
    return replace(case, apo=apo_changes, **changes)


CLIPPED = {"objective.clip_low": CLIP_LOW, "objective.clip_high": CLIP_HIGH}
KL = {"regularizers.kl_coef": KL_COEF}
GRPO = {"objective.name": "grpo", **CLIPPED, **KL}
PLANS = {
    "apo, anchor reference": Plan(
        _with(BASE, {**APO, "anchor.name": "reference"}), apo_to_reference
    ),
    "apo, adaptive tau": Plan(_with(BASE, {**APO, "tau.name": "adaptive"}), adaptive_apo),
    "apo, stale": Plan(_with(BASE, {**APO, "objective.refresh": "stale"}), stale_apo, passes=2),
    "apo, failed grades": Plan(
        _with(THREES, {**APO, "groups.failed_grade": "drop"}),
        apo,
        fail_grades,
        dropped=(100, 104),
    ),
    "apo, stale, failed grades": Plan(
        _with(THREES, {**APO, "objective.refresh": "stale", "groups.failed_grade": "drop"}),
        stale_apo,
        fail_grades,
        dropped=(100, 104),
        passes=2,
    ),
    "apo, an answer cut short": Plan(
        _with(BASE, {**APO, "groups.truncated": "drop"}), apo, cut_short, dropped=(101,)
    ),
    "grpo, k3": Plan(_with(BASE, GRPO, lr=0.3), grpo_with_k3),
    "grpo, k1": Plan(_with(BASE, {**GRPO, "regularizers.kl_estimator": "k1"}), grpo_with_k1),
    "dr_grpo": Plan(
        _with(
            BASE,
            {"objective.name": "dr_grpo", **CLIPPED},
            model={"grpo.length_params.max_length": LENGTH_LIMIT},
        ),
        dr_grpo,
    ),
    "gspo": Plan(_with(BASE, {"objective.name": "gspo", **CLIPPED}, lr=0.3), gspo),
}


@pytest.fixture(scope="module")
def compared() -> Callable[[str, int], list[Compared]]:
    """What the ranks found under a plan; computed once."""
    seen: dict[tuple[str, int], list[Compared]] = {}

    def look_up(name: str, ranks: int) -> list[Compared]:
        if (name, ranks) not in seen:
            seen[name, ranks] = run_ranks(ranks, compare, PLANS[name].on(ranks))
        return seen[name, ranks]

    return look_up


Results = Callable[[str, int], list[Compared]]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", PLANS)
def test_every_optimizer_step_equals_autograd(name: str, ranks: int, compared: Results) -> None:
    plan = PLANS[name]
    steps = plan.passes * plan.case.prompts * plan.case.group_size // plan.case.batch_size
    for result in compared(name, ranks):
        assert len(result.gaps) == steps
        assert max(result.gaps) < TOLERANCE, result.gaps


@pytest.mark.parametrize("ranks", [1, 2])
def test_drift_is_measured_from_the_anchor(ranks: int, compared: Results) -> None:
    for result in compared("apo, anchor reference", ranks):
        anchor = result.facts.reference
        drifts = [_change(result.facts, s.rows, s.logprobs, anchor) / TAU for s in result.steps]
        (logged,) = result.lines[record.ANCHOR_DRIFT]
        assert logged == pytest.approx(float(torch.cat(drifts).std(correction=0)), rel=1e-9)


@pytest.mark.parametrize("name", ["apo, stale", "apo, stale, failed grades"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_bias_of_stale_coefficients_is_logged(name: str, ranks: int, compared: Results) -> None:
    for result in compared(name, ranks):
        facts, last = result.facts, result.steps[-1]
        current = (last.logprobs * facts.mask[last.rows]).sum(dim=-1)
        used, exact = (_coefficients(facts, last.rows, sums) for sums in (last.known, current))
        bias = float((used - exact).abs().sum() / exact.abs().sum())
        assert bias > 1e-3
        assert result.lines[record.REFRESH_BIAS] == [pytest.approx(bias, rel=1e-6)]


def _coefficients(facts: Facts, rows: Tensor, sums: Tensor) -> Tensor:
    """Derivative of the APO loss by the sequence log-probs [G, P], up to a common factor."""
    sums = sums.clone().requires_grad_()
    _apo((sums - facts.sums(facts.old, rows)) / TAU, facts.rewards[rows]).backward()
    assert sums.grad is not None
    return sums.grad


@pytest.mark.parametrize(
    ("name", "count"), [("apo, failed grades", 2), ("apo, an answer cut short", 1)]
)
def test_dropped_groups_are_counted(name: str, count: int, compared: Results) -> None:
    for result in compared(name, 2):
        assert result.metrics[record.DROPPED_GROUPS] == count


@pytest.mark.parametrize("ranks", [1, 2])
def test_ratios_are_means_over_the_completion_tokens(ranks: int, compared: Results) -> None:
    for result in compared("grpo, k3", ranks):
        facts = result.facts
        for index, step in enumerate(result.steps):
            mask = facts.mask[step.rows].bool()
            ratio = torch.exp(step.logprobs - facts.old[step.rows])[mask]
            clamped = ratio.clamp(1.0 - CLIP_LOW, 1.0 + CLIP_HIGH)
            assert index == 0 or abs(float(ratio.mean() - clamped.mean())) > 1e-3
            wanted = {"grpo_ratio": ratio, "grpo_ratio_clamped": clamped}
            for name, values in wanted.items():
                assert result.lines[name][index] == pytest.approx(float(values.mean()), rel=1e-9)


def test_a_clip_of_sequences_has_effect_here(compared: Results) -> None:
    """Or the comparison of GSPO with its oracle would say little."""
    for result in compared("gspo", 2):
        assert 0.0 < result.lines[record.CLIPPED_SHARE][0] < 1.0


@dataclass(frozen=True)
class Outcome:
    """What an RL step left on one rank.

    Attributes:
        steps: optimizer steps taken.
        changed: whether any weight changed.
        skipped: optimizer steps skipped, as logged.
        alpha: of the schedule's state.
    """

    steps: int
    changed: bool
    skipped: list[float]
    alpha: float | None


Prepare = Callable[[int, Session], None]
SMALL = Case(dp=2, batch_size=8, prompts=4, group_size=4, micro_batch_size=2)


def outcome(rank: int, case: Case, prepare: Prepare) -> Outcome:
    """An RL step after something was done to the session that has read the rollout."""
    session = grpo_session.open_session(case)
    rollout = grpo_session.read_rollout(session, grpo_session.made_rollout(case), case)
    prepare(rank, session)
    before = shards.full_weights(session.actor)
    gradients = grpo_session.train_on(session, rollout, case)
    after = shards.full_weights(session.actor)
    return Outcome(
        steps=len(gradients),
        changed=any(not torch.equal(before[name], after[name]) for name in before),
        skipped=session.log.column(OPTIM, record.SKIPPED_STEPS),
        alpha=session.actor.apo_state.schedule.alpha,
    )


def _lose_entropies(rank: int, session: Session) -> None:
    """On the first rank, which holds answers of every group."""
    if rank == 0:
        session.actor.apo_reading.entropy_bT.fill_(float("nan"))


@pytest.mark.parametrize("schedule", ["fixed", "guarded"])
def test_entropies_that_are_not_finite_skip_the_rollout(schedule: str) -> None:
    case = replace(SMALL, apo={"schedule.name": schedule})
    for result in run_ranks(2, outcome, case, _lose_entropies):
        assert (result.steps, result.changed, result.skipped) == (0, False, [2])
        assert result.alpha is None


def _infinite_loss(rank: int, session: Session) -> None:
    """On the second rank a loss that is infinite, with gradients that are not."""
    objective = type(session.actor.apo.objective)
    token_loss = objective.token_loss

    def endless(*args: Any) -> Tensor:
        return token_loss(*args) + float("inf")

    if rank == 1:
        objective.token_loss = endless


def test_an_infinite_loss_on_one_rank_is_skipped_by_all() -> None:
    for result in run_ranks(2, outcome, SMALL, _infinite_loss):
        assert (result.steps, result.changed, result.skipped) == (0, False, [2])


def test_without_a_fault_every_step_is_taken() -> None:
    for result in run_ranks(2, outcome, SMALL, lambda rank, session: None):
        assert (result.steps, result.changed, result.skipped) == (2, True, [0])


def sampler_gaps(rank: int) -> dict[str, float]:
    """The logged mismatch, by where the sampler's log-prob of a token stands."""
    session = grpo_session.open_session(SMALL)
    rollout = grpo_session.read_rollout(session, grpo_session.made_rollout(SMALL), SMALL)
    first = torch.zeros(rollout["logprobs"].shape[0], 1)
    by_token = torch.cat([first, rollout["logprobs"]], dim=1)
    columns = {
        "token": by_token,
        "token, not padded": by_token[:, : int(rollout["response_lengths"].max())],
        "target": by_token.roll(-1, dims=1),
        "next token": by_token.roll(1, dims=1),
    }
    gaps = {}
    for name, column in columns.items():
        rollout["response_trt_lps"] = column
        _, metrics = session.trainer.create_grpo_training_data_from_inferences(rollout)
        gaps[name] = metrics[record.SAMPLER_MISMATCH]
    return gaps


def test_the_samplers_log_probs_are_read_at_their_tokens() -> None:
    for gaps in run_ranks(2, sampler_gaps):
        assert gaps["token"] < 1e-6
        assert gaps["token, not padded"] < 1e-6
        assert min(gaps["target"], gaps["next token"]) > 0.01


@dataclass(frozen=True)
class Pass:
    """One forward pass of the model: its sequences, and how the model stood."""

    rows: int
    training: bool
    gradient: bool


# Three optimizer steps of 8; neither 8 nor the rollout's micro-batch of 12 divides the other.
FORWARD = Case(
    batch_size=8,
    prompts=6,
    group_size=4,
    micro_batch_size=2,
    model={"grpo.forward_micro_batch_size": 12},
)


def training_passes(rank: int) -> list[Pass]:
    """Every forward pass of the optimizer steps of a rollout."""
    session = grpo_session.open_session(FORWARD)
    rollout = grpo_session.read_rollout(session, grpo_session.made_rollout(FORWARD), FORWARD)
    passes: list[Pass] = []

    def note(model: Any, inputs: Any, logits: Tensor) -> None:
        passes.append(Pass(logits.shape[0], model.training, torch.is_grad_enabled()))

    session.actor.model.register_forward_hook(note)
    grpo_session.train_on(session, rollout, FORWARD)
    return passes


@pytest.fixture(scope="module")
def passes() -> list[Pass]:
    return run_ranks(1, training_passes)[0]


def test_coefficients_are_refreshed_without_dropout(passes: list[Pass]) -> None:
    assert {one.training for one in passes if not one.gradient} == {False}
    assert {one.training for one in passes if one.gradient} == {True}


def test_coefficients_are_refreshed_in_the_largest_micro_batches_that_fit(
    passes: list[Pass],
) -> None:
    assert [one.rows for one in passes if not one.gradient] == [4] * 4
    assert [one.rows for one in passes if one.gradient] == [2] * 12


def resumed(rank: int, state_step: int, counted_step: int) -> str:
    """The error of counters that are loaded beside the actor's state; empty if they fit."""
    session = grpo_session.open_session(replace(SMALL, dp=1))
    session.actor.apo_state = replace(session.actor.apo_state, rl_steps=state_step)
    counters = {"step": counted_step, "consumed_samples": 8, "grpo_optimization_step": 4}
    try:
        session.trainer.load_state_dict(counters)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_counters_of_another_rl_step_than_the_state_are_refused() -> None:
    (error,) = run_ranks(1, resumed, 3, 2)
    assert error.startswith("ConfigError: ")
    assert "RL step 3" in error
    assert "step 2" in error
    assert run_ranks(1, resumed, 2, 2) == [""]


def cut_otherwise(rank: int) -> str:
    """The error of a rollout whose optimizer steps exchange half of their sequences."""
    from nemo_apo.aligner.rollout import RolloutError

    session = grpo_session.open_session(SMALL)
    rollout = grpo_session.read_rollout(session, grpo_session.made_rollout(SMALL), SMALL)
    data, _ = session.trainer.create_grpo_training_data_from_inferences(rollout)
    order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
    mixed = {name: column[order] for name, column in data.items()}
    try:
        grpo_session.train_batches(session, grpo_session.batches_of(mixed, SMALL))
    except RolloutError as error:
        return str(error)
    return ""


def test_an_optimizer_step_with_part_of_a_group_is_refused_by_all() -> None:
    for error in run_ranks(2, cut_otherwise):
        assert error.startswith("an optimizer step holds part of a group")


def share_with_advantage(rank: int) -> float:
    """The logged share; one group has equal rewards, one is dropped."""
    case = replace(SMALL, apo={"groups.failed_grade": "drop"})
    session = grpo_session.open_session(case)
    rollout = grpo_session.made_rollout(case)
    rollout["rewards"][_rows(rollout, 101)] = 0.7
    rollout["rewards"][_rows(rollout, 102)[0]] = float("nan")
    read = grpo_session.read_rollout(session, rollout, case)
    _, metrics = session.trainer.create_grpo_training_data_from_inferences(read)
    return metrics["nonzero_advantages"]


def test_advantages_are_counted_without_equal_rewards_and_dropped_groups() -> None:
    assert run_ranks(2, share_with_advantage) == [8 / 16] * 2


# As many prompts as the letter task's sampler is asked for at once.
SAME_PROMPTS = Case(
    dp=2,
    batch_size=16,
    prompts=8,
    group_size=4,
    micro_batch_size=4,
    model={"grpo.forward_micro_batch_size": 16},
)


def sampled(rank: int, folder: str) -> tuple[Tensor, Tensor]:
    """Rewards and advantages of this rank's answers to prompts that all have the same tokens."""
    case = SAME_PROMPTS
    session = grpo_session.open_session(
        case,
        actor_class=letter_task.sampling_actor_class(),
        generator=letter_task.rollout_generator,
        dataset=[{"text": torch.tensor([5, 6, 7, 8, 9])} for _ in range(64)],
        folder=folder,
        generation_rollout_mbs=case.prompts * case.group_size,
        prompt_micro_batch_size=case.prompts,
        val_prompt_micro_batch_size=case.prompts,
    )
    data, _, _ = session.trainer.generate_rollouts()
    answers = data["response_tokens"][:, -letter_task.ANSWER :]
    rewards = (answers < letter_task.SMALL_IDS).double().mean(dim=1)
    return rewards, data["advantages"].squeeze(1).double()


def test_equal_prompts_of_a_rollout_are_groups_of_their_own(tmp_path: Path) -> None:
    for rewards, advantages in run_ranks(2, sampled, str(tmp_path)):
        wanted = oracle.zscore(rewards.view(-1, SAME_PROMPTS.group_size))
        assert len(wanted) == SAME_PROMPTS.prompts // 2
        assert advantages.tolist() == pytest.approx(wanted.flatten().tolist(), abs=1e-5)
