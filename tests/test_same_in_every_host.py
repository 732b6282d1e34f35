"""The same rollouts give the same alpha and coefficients in all three hosts, to the last bit.

Our trainer samples, reads and trains with a real model; its rollouts are then told to the NeMo-RL
policy and to the NeMo-Aligner trainer's own steps, each in its host's words.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_apo.aligner import rollout as aligner_rollout
from nemo_apo.aligner.columns import GROUP_ID
from nemo_apo.aligner.settings import BLOCK as ALIGNER_BLOCK
from nemo_apo.config import AnchorConfig, OptimizerConfig, UpdateConfig
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.objectives import Weighing
from nemo_apo.core.settling import RolloutLimits
from nemo_apo.nemo_rl.baselines import HISTOGRAM, ApoLogger, Baselines
from nemo_apo.nemo_rl.loss import ApoLoss
from nemo_apo.nemo_rl.policy import ApoRun, RunSizes, policy_factory
from nemo_apo.nemo_rl.settings import BLOCK
from nemo_apo.plugin import columns
from nemo_apo.plugin.settled import settle_rollout_steps
from nemo_apo.tasks import Prompt, SortTask
from nemo_apo.trainer.pending import PendingRollout
from nemo_apo.trainer.rollouts import Rollouts
from tests.nemo_rl.small_host import Batch, Recorder
from tests.parallel.ranks import run_ranks
from tests.trainer.tiny_runs import WatchedStep, begin, parallel, tiny_config

RL_STEPS, GROUP = 4, 4
SCHEDULES: dict[str, dict[str, Any]] = {
    "fixed": {"name": "fixed", "alpha": 0.4},
    "linear": {"name": "linear", "alpha_end": 0.2},
    "ess": {"name": "ess"},
    "guarded": {"name": "guarded", "confidence": "token", "improvement_scale": 0.01},
}
OBJECTIVES = ("apo", "adpo_softmax", "adpo_plackett_luce", "gspo", "grpo")


@dataclass(frozen=True)
class EighthsTask(SortTask):
    """Rewards that float32 holds exactly, and so do their means over groups of four."""

    length: int = 4

    def grade(self, prompt: Prompt, completion: list[int]) -> float:
        return sum(completion) % 8 / 8.0


@dataclass
class Seen:
    """An RL step: alpha, and the columns of its one optimizer step in the rollout's order."""

    alpha: float
    columns: dict[str, Tensor]


class ToldStep(WatchedStep):
    """Our RL step; the entropies are those of the sampled tokens, as NeMo-RL has them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[Seen] = []

    def _read(self, rollouts: Rollouts) -> Rollouts:
        read = super()._read(rollouts)
        self.read[-1] = replace(read, entropy_NT=-read.old_logprobs_NT)
        return self.read[-1]

    def _weigh(self, rollout: PendingRollout, at_n: Tensor) -> Weighing:
        weighing = super()._weigh(rollout, at_n)
        back_n = torch.empty_like(at_n)
        back_n[at_n] = torch.arange(len(at_n))
        self.seen.append(Seen(rollout.alpha, vars(weighing.columns.select(back_n))))
        return weighing


class Listening:
    """A NeMo-RL policy that keeps what it is given to train on."""

    def __init__(self, config: dict[str, Any], tokenizer: Any) -> None:
        self.cfg = config
        self.given: list[Batch] = []

    def train(self, data: Batch, loss_fn: Any, **kwargs: Any) -> dict[str, Any]:
        self.given.append(data)
        return {"grad_norm": torch.ones(1), "all_mb_metrics": {"loss": [0.0]}}


def in_our_trainer(objective: str, schedule: str) -> tuple[list[Rollouts], list[Seen], int]:
    """Its rollouts, what it saw, and the size of its vocabulary."""
    settings = BLOCK.read({"objective": {"name": objective}, "schedule": SCHEDULES[schedule]})

    def work() -> tuple[list[Rollouts], list[Seen], int]:
        config = tiny_config(
            task=EighthsTask(),
            objective=settings.objective,
            schedule=settings.schedule,
            anchor=AnchorConfig(name="reference"),
            update=UpdateConfig(
                mini_batches=1, epochs=1, micro_batch_size=8, monitor_reference_kl=True
            ),
            optimizer=OptimizerConfig(lr=3e-3, adam_eps=1e-4),
            parallel=parallel(1, 1),
        )
        training = begin(config, step_class=ToldStep)
        training.run(RL_STEPS)
        worker = training.worker
        return worker.read, worker.seen, training.policy.vocab_size

    return run_ranks(1, work)[0]


def in_nemo_rl(
    objective: str, schedule: str, rollouts: list[Rollouts], limits: RolloutLimits
) -> list[Seen]:
    settings = BLOCK.read(
        {
            "objective": {"name": objective},
            "schedule": SCHEDULES[schedule],
            "anchor": {"name": "reference"},
        }
    )
    baselines = Baselines()
    sizes = RunSizes(GROUP, tiny_config().run.steps, limits.max_response_length)
    run = ApoRun(settings, sizes, baselines)
    count = rollouts[0].count
    policy = policy_factory(run, Listening)(
        config={"train_global_batch_size": count}, tokenizer=range(limits.vocab_size)
    )
    logger = ApoLogger(Recorder(), baselines)
    loss = ApoLoss(settings.objective, settings.regularizers)
    seen = []
    for drawn in rollouts:
        rewards = drawn.rewards_N.float()
        means = rewards.view(-1, GROUP).mean(dim=1).repeat_interleave(GROUP)
        logger.log_histogram(means.numpy(), 1, HISTOGRAM)
        mask_NS = _by_tokens(drawn.mask_NT.float())
        data = Batch(
            input_ids=drawn.tokens_NT,
            input_lengths=mask_NS.cumsum(dim=1).argmax(dim=1) + 1,
            token_mask=mask_NS,
            sample_mask=torch.ones(count),
            prev_logprobs=_by_tokens(drawn.old_logprobs_NT),
            generation_logprobs=_by_tokens(drawn.old_logprobs_NT),
            reference_policy_logprobs=_by_tokens(drawn.reference_logprobs_NT),
            advantages=(rewards - means)[:, None].expand_as(mask_NS),
        )
        result = policy.train(data, loss)
        given = policy.given[-1]
        found = {
            "coefficient_N": given[columns.COEFFICIENT],
            "advantage_N": given[columns.ADVANTAGE],
            "token_weight_N": given[columns.TOKEN_WEIGHT],
        }
        seen.append(Seen(result["all_mb_metrics"].get("apo/alpha", [float("nan")])[0], found))
    return seen


def in_nemo_aligner(
    objective: str, schedule: str, rollouts: list[Rollouts], limits: RolloutLimits
) -> list[Seen]:
    settings = ALIGNER_BLOCK.read(
        {
            "objective": {"name": objective},
            "schedule": SCHEDULES[schedule],
            "anchor": {"name": "reference"},
        }
    )
    state, seen = ScheduleState(), []
    for step, drawn in enumerate(rollouts):
        told = {
            GROUP_ID: drawn.group_ids_N,
            "logprobs": drawn.old_logprobs_NT,
            "init_logprobs": drawn.reference_logprobs_NT,
            "response_trt_lps": _by_tokens(drawn.old_logprobs_NT),
            "rewards": drawn.rewards_N.float(),
            "is_end": (~drawn.truncated_N).float(),
        }
        groups = aligner_rollout.settle_rollout(told, drawn.mask_NT, settings)
        entropy_N = torch.where(drawn.mask_NT, drawn.entropy_NT.double(), 0.0).sum(dim=1)
        figures = aligner_rollout.sequence_figures(
            told, drawn.mask_NT, entropy_N, groups.rewards_N, settings.anchor.name
        )
        settled = settle_rollout_steps(
            figures, groups, settings, limits, state, step, tiny_config().run.steps
        )
        part = settled.part(torch.arange(drawn.count))
        weighing = settings.objective.weigh(part, settled.alpha)
        seen.append(Seen(settled.alpha, vars(weighing.columns)))
        state = settled.schedule
    return seen


def _by_tokens(column_NT: Tensor | None) -> Tensor:
    """A column of ours, by targets, as NeMo-RL has it: one longer, by tokens."""
    assert column_NT is not None
    return torch.nn.functional.pad(column_NT, (1, 0))


CASES = [("apo", schedule) for schedule in SCHEDULES] + [
    (objective, "fixed") for objective in OBJECTIVES if objective != "apo"
]


@pytest.mark.parametrize(("objective", "schedule"), CASES)
def test_alpha_and_columns_are_the_same(objective: str, schedule: str) -> None:
    rollouts, ours, vocab_size = in_our_trainer(objective, schedule)
    limits = RolloutLimits(vocab_size, EighthsTask().max_response_length)
    assert len(ours) == len(rollouts) == RL_STEPS
    for host in (in_nemo_rl, in_nemo_aligner):
        theirs = host(objective, schedule, rollouts, limits)
        for own, other in zip(ours, theirs, strict=True):
            assert own.alpha == other.alpha or own.alpha != own.alpha
            for name, column in own.columns.items():
                assert torch.equal(column, other.columns[name]), (host.__name__, name)
    if objective == "apo":
        moves = len({seen.alpha for seen in ours}) > 1
        assert moves == (schedule != "fixed"), "the example must let alpha move"
        sizes = [float(seen.columns["coefficient_N"].abs().max()) for seen in ours]
        assert min(sizes) > 0.0
