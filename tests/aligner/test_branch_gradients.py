"""APO, ADPO and GRPO steps through the real GRPO actor and trainer, in every layout.

The reference is autograd through the whole coupled loss, on one rank and in one piece
(``whole_group_loss``).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_apo import record
from tests.aligner import grpo_session, shards
from tests.aligner import whole_group_loss as oracle
from tests.aligner.grpo_session import Case
from tests.aligner.host_ranks import run_ranks

pytestmark = [pytest.mark.pinned, pytest.mark.branch]

TAU, BETA_R = 0.24, 0.3
# Two optimizer steps of two whole groups each; the second needs refreshed coefficients.
BASE = Case(batch_size=8, prompts=4, group_size=4)
LAYOUTS = {
    "tp1": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
}
OBJECTIVES = (
    "apo",
    "adpo_softmax",
    "adpo_plackett_luce",
    "adpo_pairwise",
    "grpo",
)


def relative_gap(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest difference of any entry over the largest entry of the whole gradient."""
    assert found.keys() == wanted.keys()
    largest = max(float(value.abs().max()) for value in wanted.values())
    gaps = (float((found[name] - wanted[name]).abs().max()) for name in wanted)
    return max(gaps) / largest


def run_case(rank: int, case: Case, full: dict[str, Tensor] | None) -> dict[str, Any]:
    """One RL step on the made rollout; this rank's gradients, and where it stands."""
    from megatron.core import parallel_state

    session = grpo_session.open_session(case, full)
    weights = shards.full_weights(session.actor) if full is None else None
    rollout = grpo_session.read_rollout(session, grpo_session.made_rollout(case), case)
    gradients = grpo_session.train_on(session, rollout, case)
    return {
        "gradients": gradients,
        "weights": weights,
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "pp_rank": parallel_state.get_pipeline_model_parallel_rank(),
        "metrics": session.trainer._settled.metrics,
    }


def oracle_gradients(rank: int, case: Case, full: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Gradients of both optimizer steps by autograd through the whole loss, with SGD between."""
    session = grpo_session.open_session(case, full)
    actor = session.actor
    rollout = grpo_session.made_rollout(case)
    vocabulary = actor.tokenizer.vocab_size
    mask = torch.zeros(rollout["response_tokens"].shape[0], rollout["response_tokens"].shape[1] - 1)
    for row, (start, end) in enumerate(
        zip(rollout["prompt_lengths"], rollout["response_lengths"], strict=True)
    ):
        mask[row, start - 1 : end - 1] = 1.0
    loss_of = LOSSES[case.apo["objective.name"]]
    with torch.no_grad():
        old = oracle.token_logprobs(actor, rollout["response_tokens"], vocabulary)
    seen = []
    groups = rollout["apo_group_id"].unique()
    per_step = case.batch_size // case.group_size
    for start in range(0, len(groups), per_step):
        rows = torch.cat(
            [
                (rollout["apo_group_id"] == group).nonzero().squeeze(1)
                for group in groups[start : start + per_step]
            ]
        )
        actor.zero_grad()
        logprobs = oracle.token_logprobs(actor, rollout["response_tokens"][rows], vocabulary)
        advantages = oracle.zscore(rollout["rewards"][rows].double().view(per_step, -1))
        loss_of(logprobs.double(), old[rows].double(), mask[rows].double(), advantages).backward()
        seen.append(shards.gradients(actor))
        with torch.no_grad():
            for parameter in actor.model.parameters():
                parameter -= case.lr * parameter.grad
    return seen


def _u(logprobs: Tensor, old: Tensor, mask: Tensor, shape: torch.Size) -> Tensor:
    return ((logprobs - old) * mask).sum(dim=1).view(shape) / TAU


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "apo": lambda new, old, mask, a: oracle.alpha_loss(_u(new, old, mask, a.shape), a, 0.6, BETA_R),
    "adpo_softmax": lambda new, old, mask, a: oracle.softmax_loss(
        _u(new, old, mask, a.shape), a, BETA_R
    ),
    "adpo_plackett_luce": lambda new, old, mask, a: oracle.plackett_luce_loss(
        _u(new, old, mask, a.shape), a
    ),
    "adpo_pairwise": lambda new, old, mask, a: oracle.pairwise_loss(_u(new, old, mask, a.shape), a),
    "grpo": lambda new, old, mask, a: oracle.clipped_ratio_loss(
        new,
        old,
        mask,
        a.reshape(-1),
        1.0 / (mask.sum(dim=1, keepdim=True) * a.numel()),
        clip=0.2,
    ),
}


def with_objective(case: Case, name: str, **changes: Any) -> Case:
    apo = {"objective.name": name, "schedule.name": "fixed", "schedule.alpha": 0.6}
    return replace(case, apo={**apo, **changes})


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """Weights of the model in one piece, and what one rank computes with them."""
    return run_ranks(1, run_case, with_objective(BASE, "apo"), None)[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_rank_equals_autograd_through_the_whole_group(
    objective: str, single: dict[str, Any]
) -> None:
    case = with_objective(BASE, objective)
    found = run_ranks(1, run_case, case, single["weights"])[0]["gradients"]
    wanted = run_ranks(1, oracle_gradients, case, single["weights"])[0]
    assert len(found) == len(wanted) == 2
    for one, other in zip(found, wanted, strict=True):
        assert relative_gap(one, other) < 1e-5


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1"])
@pytest.mark.parametrize("objective", ["apo", "adpo_plackett_luce", "grpo"])
def test_layouts_equal_autograd_on_one_rank(
    layout: str, objective: str, single: dict[str, Any]
) -> None:
    case = with_objective(BASE, objective)
    wanted = run_ranks(1, oracle_gradients, case, single["weights"])[0]
    split = replace(case, **LAYOUTS[layout])
    for rank in run_ranks(split.world_size, run_case, split, single["weights"]):
        assert len(rank["gradients"]) == len(wanted) == 2
        for found, whole in zip(rank["gradients"], wanted, strict=True):
            mine = shards.shard_of(
                whole, rank["tp_rank"], split.tp, rank["pp_rank"], split.pp, num_layers=2
            )
            assert relative_gap(found, mine) < 1e-5
        entropy = single["metrics"][record.TOKEN_ENTROPY]
        assert rank["metrics"][record.TOKEN_ENTROPY] == pytest.approx(entropy, rel=1e-6)


CUTS = [(dp, size) for dp in (1, 2) for size in (1, 2, 4)]


@pytest.fixture(scope="module")
def uncut(single: dict[str, Any]) -> dict[bool, list[dict[str, Tensor]]]:
    """Gradients of a rank whose micro-batch holds a whole optimizer step, in either precision."""
    return {
        double: run_ranks(1, run_case, _cut_case(1, 8, double), single["weights"])[0]["gradients"]
        for double in (False, True)
    }


def _cut_case(dp: int, micro_batch_size: int, double: bool) -> Case:
    case = replace(BASE, dp=dp, micro_batch_size=micro_batch_size, double=double)
    return with_objective(case, "apo")


@pytest.mark.parametrize(("dp", "micro_batch_size"), CUTS)
def test_gradients_do_not_depend_on_the_cut(
    dp: int, micro_batch_size: int, single: dict[str, Any], uncut: dict[bool, Any]
) -> None:
    """Both optimizer steps in float64, where nothing but the cut could make a difference."""
    case = _cut_case(dp, micro_batch_size, double=True)
    for rank in run_ranks(dp, run_case, case, single["weights"]):
        assert len(rank["gradients"]) == len(uncut[True]) == 2
        for found, wanted in zip(rank["gradients"], uncut[True], strict=True):
            assert relative_gap(found, wanted) < 1e-10


@pytest.mark.parametrize(("dp", "micro_batch_size"), CUTS)
def test_float32_gradients_do_not_depend_on_the_cut(
    dp: int, micro_batch_size: int, single: dict[str, Any], uncut: dict[bool, Any]
) -> None:
    """The second step's coefficients divide the rounding of float32 log-probs by tau."""
    case = _cut_case(dp, micro_batch_size, double=False)
    for rank in run_ranks(dp, run_case, case, single["weights"]):
        first, second = rank["gradients"]
        assert relative_gap(first, uncut[False][0]) < 1e-6
        assert relative_gap(second, uncut[False][1]) < 5e-6
