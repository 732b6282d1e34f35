"""The mixin on the real PPO and Reinforce actors of the released NeMo-Aligner 0.7.0.

Their trainers are not ours: the columns are made here, as a caller of the mixin would.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.aligner import grpo_session, shards, tiny_actor
from tests.aligner import whole_group_loss as oracle
from tests.aligner.host_ranks import run_ranks

pytestmark = [pytest.mark.pinned, pytest.mark.released]

KINDS = ("ppo", "reinforce")
COUNT, GROUP, START, WIDTH = 8, 4, 4, 14
TAU, BETA_R, ALPHA = 0.24, 0.3, 0.6


@dataclass(frozen=True)
class Released:
    """One actor, layout and cut."""

    kind: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    micro_batch_size: int = 2

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


def build(case: Released, full: dict[str, Tensor] | None) -> Any:
    """The APO actor of a case, with the given weights."""
    from megatron.core import parallel_state

    from nemo_apo.aligner import released

    classes = {"ppo": released.ApoPPOActor, "reinforce": released.ApoReinforceActor}
    config = tiny_actor.tiny_config(
        case.kind,
        case.tp,
        case.pp,
        case.micro_batch_size,
        COUNT,  # type: ignore[arg-type]
    )
    config.apo = grpo_session.apo_section({"schedule.name": "fixed", "schedule.alpha": ALPHA})
    built = tiny_actor.build(case.kind, config, case.world_size, classes[case.kind])  # type: ignore
    if full is not None:
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        shards.load_shard(built.actor, full, tp_rank, case.tp, pp_rank, case.pp)
    return built.actor


def made_batch() -> dict[str, Tensor]:
    """Two groups of four answers of unequal length, the second group standing in between."""
    draw = torch.Generator().manual_seed(2)
    mask = torch.zeros(COUNT, WIDTH - 1)
    for row in range(COUNT):
        mask[row, START : START + 2 + row] = 1.0
    return {
        "response_tokens": torch.randint(1, 250, (COUNT, WIDTH), generator=draw),
        "mask": mask,
        "rewards": torch.rand(COUNT, generator=draw),
        "groups": torch.tensor([0, 1] * GROUP),
        "drift": 0.1 * torch.randn(COUNT, WIDTH - 1, generator=draw),
    }


def take_step(rank: int, case: Released, full: dict[str, Tensor] | None) -> dict[str, Any]:
    """Forward and backward of one optimizer step through the real actor."""
    from megatron.core import parallel_state

    from nemo_apo.aligner import columns
    from nemo_apo.core.advantages import group_advantages
    from nemo_apo.core.groups import Groups
    from nemo_apo.core.objectives import GroupBatch
    from nemo_apo.parallel.gather import all_gather_rows
    from nemo_apo.plugin.columns import attach

    actor, made = build(case, full), made_batch()
    weights = shards.full_weights(actor) if full is None else None
    share = COUNT // case.dp
    first = parallel_state.get_data_parallel_rank() * share
    local = {name: value[first : first + share] for name, value in made.items()}
    logprobs = actor.get_inference_log_probs(local["response_tokens"])
    entropy = actor.apo_reading.entropy_bT
    sums = all_gather_rows(
        torch.stack(
            [
                (logprobs.double() * local["mask"]).sum(dim=1),
                ((logprobs.double() + local["drift"]) * local["mask"]).sum(dim=1),
            ],
            dim=1,
        ),
        parallel_state.get_data_parallel_group(),
    )
    groups = Groups.from_ids(made["groups"])
    weighing = actor.apo.objective.weigh(
        GroupBatch(
            groups=groups,
            advantages_N=group_advantages(made["rewards"].double(), groups, "zscore"),
            lengths_N=made["mask"].double().sum(dim=1),
            logprob_sums_N=sums[:, 0],
            old_logprob_sums_N=sums[:, 1],
            anchor_logprob_sums_N=sums[:, 1],
            tau_N=torch.full((COUNT,), TAU, dtype=torch.float64),
            max_response_length=WIDTH,
        ),
        ALPHA,
    )
    batch = {name: local[name] for name in ("response_tokens", "mask")}
    batch[columns.OLD_LOGPROBS] = logprobs + local["drift"]
    mine = torch.arange(first, first + share)
    attach(batch, weighing.columns.select(mine), torch.device("cpu"))
    actor.prepare_for_training()
    actor.zero_grad()
    actor.prepare_for_training_step()
    _, metrics = actor.get_loss_and_metrics(batch, forward_only=False)
    actor.finish_training_step()
    return {
        "gradients": shards.gradients(actor),
        "metrics": metrics,
        "weights": weights,
        "entropy": entropy,
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "pp_rank": parallel_state.get_pipeline_model_parallel_rank(),
    }


def whole_gradient(rank: int, kind: str, full: dict[str, Tensor]) -> dict[str, Any]:
    """The same by autograd through the coupled loss, in one piece; and the entropies."""
    actor, made = build(Released(kind), full), made_batch()
    tokens, mask = made["response_tokens"], made["mask"].double()
    logprobs = oracle.token_logprobs(actor, tokens, actor.tokenizer.vocab_size).double()
    gap = ((logprobs - (logprobs.detach() + made["drift"])) * mask).sum(dim=1)
    order = torch.argsort(made["groups"], stable=True)
    u = gap[order].view(-1, GROUP) / TAU
    advantages = oracle.zscore(made["rewards"].double()[order].view(-1, GROUP))
    oracle.alpha_loss(u, advantages, ALPHA, BETA_R).backward()
    attention_mask, _, positions = actor.get_ltor_masks_and_position_ids(tokens)
    with torch.no_grad():
        logits = actor.model(tokens, positions, attention_mask, labels=None)
    p = torch.softmax(logits[:, :-1, : actor.tokenizer.vocab_size].double(), dim=-1)
    return {"gradients": shards.gradients(actor), "entropy": -(p * p.log()).sum(dim=-1)}


def relative_gap(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    largest = max(float(value.abs().max()) for value in wanted.values())
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted) / largest


@pytest.fixture(scope="module", params=KINDS)
def reference(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Weights of one rank, and what autograd computes with them."""
    kind = request.param
    single = run_ranks(1, take_step, Released(kind), None)[0]
    whole = run_ranks(1, whole_gradient, kind, single["weights"])[0]
    return {"kind": kind, "single": single, **whole}


LAYOUTS = [{}, {"micro_batch_size": 1}, {"micro_batch_size": 4}, {"tp": 2}, {"pp": 2}, {"dp": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_equal_autograd_through_the_whole_group(
    layout: dict[str, int], reference: dict[str, Any]
) -> None:
    case = replace(Released(reference["kind"]), **layout)
    for rank in run_ranks(case.world_size, take_step, case, reference["single"]["weights"]):
        mine = shards.shard_of(
            reference["gradients"], rank["tp_rank"], case.tp, rank["pp_rank"], case.pp, 2
        )
        assert relative_gap(rank["gradients"], mine) < 1e-5


def test_the_hosts_metrics_keep_their_names(reference: dict[str, Any]) -> None:
    names = {
        "ppo": {"loss", "ppo_ratio", "ppo_ratio_clamped", "scaled_entropy"},
        "reinforce": {"loss"},
    }
    assert set(reference["single"]["metrics"]) == names[reference["kind"]]


def test_token_entropy_is_that_of_the_unpadded_vocabulary(reference: dict[str, Any]) -> None:
    gap = reference["single"]["entropy"].double() - reference["entropy"]
    assert float(gap.abs().max()) < 1e-5
