"""GRPO through our path against the actor's own loss, where the latter is well defined.

The actor's own loss is a token mean per micro-batch: with everything in one micro-batch it is the
batch token mean, otherwise it depends on the cut. Ours is the batch token mean under every cut.
"""

import types
from typing import Any

import pytest
import torch

from tests.aligner import grpo_session, shards
from tests.aligner.grpo_session import Case
from tests.aligner.host_ranks import run_ranks

pytestmark = [pytest.mark.pinned, pytest.mark.branch]

CLIP, KL_COEF, COUNT = 0.2, 0.05, 16
CASE = Case(
    batch_size=COUNT,
    prompts=4,
    group_size=4,
    micro_batch_size=COUNT,
    lr=0.0,
    apo={
        "objective.name": "grpo",
        "objective.aggregation": "batch_token_mean",
        "regularizers.kl_coef": KL_COEF,
        # The host's log-probs count the padded rows of the vocabulary in; so do ours here.
        "vocab_size": 320,
    },
)


def both_losses(rank: int) -> dict[int, dict[str, Any]]:
    """By micro-batch size: loss and gradients of the host's path and of ours, on the same data."""
    session = grpo_session.open_session(CASE)
    rollout = grpo_session.read_rollout(session, grpo_session.made_rollout(CASE), CASE)
    data, _ = session.trainer.create_grpo_training_data_from_inferences(rollout)
    # Old and reference log-probs some way from the current ones, so that clip and KL have effect.
    draw = torch.Generator().manual_seed(5)
    for name, ours in (("logprobs", "old"), ("init_logprobs", "reference")):
        data[name] = data[name] + 0.3 * torch.randn(data[name].shape, generator=draw)
        data[f"apo_{ours}_logprobs"] = data[name]
    results = {}
    for size in (1, 2, 4, COUNT):
        session.actor.cfg.micro_batch_size = size
        results[size] = {"host": _host(session, data), "ours": _ours(session, data)}
    return results


def _host(session: Any, data: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    from nemo_apo.aligner.branch import MegatronGPTActorModel

    actor = session.actor
    actor.ratio_eps = CLIP
    actor.cfg.grpo.initial_policy_kl_penalty = KL_COEF
    actor.prepare_for_training()
    session.built.optimizer.zero_grad()
    own_step = MegatronGPTActorModel.get_actor_forward_output_and_loss_func
    actor.get_actor_forward_output_and_loss_func = types.MethodType(own_step, actor)
    try:
        actor.prepare_for_training_step()
        loss, _ = MegatronGPTActorModel.get_loss_and_metrics(actor, dict(data), False)
        actor.finish_training_step()
    finally:
        del actor.get_actor_forward_output_and_loss_func
    return loss, shards.gradients(actor)


def _ours(session: Any, data: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    seen: list[dict[str, torch.Tensor]] = []
    session.built.optimizer.step = lambda: seen.append(shards.gradients(session.actor))
    loss, _ = session.trainer.run_training([dict(data)])
    return loss, seen[0]


@pytest.fixture(scope="module")
def losses() -> dict[int, dict[str, Any]]:
    return run_ranks(1, both_losses)[0]


def _gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    largest = max(float(value.abs().max()) for value in other.values())
    return max(float((one[name] - other[name]).abs().max()) for name in other) / largest


def test_one_micro_batch_equals_the_hosts_own_loss(losses: dict[int, dict[str, Any]]) -> None:
    (host, host_gradients), (ours, our_gradients) = losses[COUNT]["host"], losses[COUNT]["ours"]
    assert host != 0.0
    assert ours == pytest.approx(host, rel=1e-5)
    assert _gap(our_gradients, host_gradients) < 1e-5


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ours_does_not_depend_on_the_micro_batch(
    size: int, losses: dict[int, dict[str, Any]]
) -> None:
    whole, whole_gradients = losses[COUNT]["ours"]
    loss, gradients = losses[size]["ours"]
    assert loss == pytest.approx(whole, rel=1e-5)
    assert _gap(gradients, whole_gradients) < 1e-6


def test_the_hosts_own_loss_does(losses: dict[int, dict[str, Any]]) -> None:
    """Why ours is not simply the host's: answers differ in length."""
    whole, _ = losses[COUNT]["host"]
    assert abs(losses[1]["host"][0] - whole) > 1e-3 * abs(whole)
