"""Drawing the rollout of an RL step: prompts, completions, rewards, and which groups are kept.

Prompts and samples are a function of the run's seed, the step and the round, so they need no
state in a checkpoint. Axes: N sequences, G groups.
"""

import time
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_apo import record
from nemo_apo.config import Config
from nemo_apo.core.filtering import SettledGroups, settle_groups
from nemo_apo.core.groups import Groups
from nemo_apo.grading import Grading
from nemo_apo.record import KeptGroup
from nemo_apo.tasks import PromptTurn, Task
from nemo_apo.trainer.interruption import StopCheck
from nemo_apo.trainer.kept_samples import keeps_samples, kept_groups
from nemo_apo.trainer.policy import Policy
from nemo_apo.trainer.rollouts import Rollouts, assemble, check_tokens, concatenate
from nemo_apo.trainer.sampler import uniforms
from nemo_apo.trainer.sampling import complete, grade


@dataclass(frozen=True)
class Drawn:
    """A rollout ready to be weighed.

    Attributes:
        rollouts: the kept groups, failed grades settled; may be empty.
        samples: completions drawn, those thrown away included.
        metrics: by the names of ``nemo_apo.record``.
        kept: groups of the first round for ``samples.jsonl``.
    """

    rollouts: Rollouts
    samples: int
    metrics: dict[str, float]
    kept: tuple[KeptGroup, ...] = ()


class RolloutSource:
    """Draws rollouts from a policy; every rank gets the same ones."""

    def __init__(self, policy: Policy, config: Config, task: Task, stop: StopCheck) -> None:
        self.policy = policy
        self.stop = stop
        self.config = config
        self.task = task
        self.grading = Grading(config.grading, task)
        self._failures: Counter[str] = Counter()
        self._kept: tuple[KeptGroup, ...] = ()
        self._grade_means: dict[str, float] = {}

    def draw(self, step: int) -> Drawn:
        """The rollout of RL step ``step``; with ``rollout.resample``, groups without signal are
        replaced by further ones as long as rounds are left.

        Raises:
            StoppedEarly: on all ranks, if it was asked for meanwhile.
        """
        began = time.perf_counter()
        self._failures.clear()
        self._kept = ()
        wanted = self.config.rollout.prompts
        first = rollouts = self._sample(step, 0, wanted)
        for again in range(1, self.config.rollout.resample + 1):
            missing = wanted - int(self._with_signal(rollouts).sum())
            if missing <= 0:
                break
            rollouts = concatenate([rollouts, self._sample(step, again, missing)])
        seconds = time.perf_counter() - began
        samples = rollouts.count
        if samples > first.count:
            rollouts = self._prefer_signal(rollouts, wanted)
        settled = self._settle(rollouts)
        rewards_N = self._unselected_rewards(first)
        metrics = {
            record.REWARD_MEAN: float(rewards_N.mean()),
            record.REWARD_STD: float(rewards_N.std(correction=0)),
            record.REWARD_FAILED: settled.failed_grades,
            record.RESPONSE_LENGTH: float(first.lengths_N.mean()),
            record.TRUNCATED_SHARE: float(first.truncated_N.double().mean()),
            record.TOKENS_PER_SECOND: float(first.lengths_N.mean()) * samples / seconds,
            record.DROPPED_GROUPS: sum(settled.dropped.values()),
            record.RESAMPLED_GROUPS: (samples - first.count) // self.config.rollout.group_size,
            record.ROLLOUT_SECONDS: seconds,
        }
        metrics |= self._grade_means
        for reason, count in self._failures.items():
            metrics[record.FAILED_GRADES_BY_REASON[reason]] = count
        rollouts = replace(rollouts, rewards_N=settled.rewards_N)
        return Drawn(rollouts.select(settled.keep_N), samples, metrics, self._kept)

    def _sample(self, step: int, again: int, count: int) -> Rollouts:
        """``count`` groups of round ``again``."""
        config, task = self.config, self.task
        size = config.rollout.group_size
        stream = f"rollout/{step}/{again}"
        distinct = task.train_prompts(count, PromptTurn(config.run.seed, step, again))
        prompts = [prompt for prompt in distinct for _ in range(size)]
        for prompt in distinct:
            check_tokens(torch.tensor(prompt.tokens), self.policy.vocab_size)
        draws = uniforms(config.run.seed, stream, len(prompts), task.max_response_length)
        completions = complete(self.policy, task, config.rollout, prompts, draws, self.stop)
        graded = grade(self.policy.layout, self.grading, task, prompts, completions, config.shaping)
        self._failures.update(graded.failures)
        if again == 0 and keeps_samples(config.run, step + 1):
            groups = config.run.samples_groups
            self._kept = kept_groups(step + 1, task, prompts, completions, graded, size, groups)
        if again == 0:
            self._grade_means = graded.means()
        group_ids_N = torch.arange(count).repeat_interleave(size)
        rollouts = assemble(
            prompts,
            completions,
            group_ids_N + again * config.rollout.prompts,
            graded.rewards_N,
            task.max_prompt_length + task.max_response_length,
            task.pad_id,
            keeps_token_logprobs=config.rollout.importance_cap is not None,
        )
        check_tokens(rollouts.tokens_NT, self.policy.vocab_size)
        return rollouts

    def _unselected_rewards(self, first: Rollouts) -> Tensor:
        """Rewards of the first round's usable groups: those of prompts as they come.

        Groups chosen for their signal have middling rewards whatever the policy has learnt, and
        would hide its improvement from the schedule. If no group is usable, all rewards.
        """
        settled = self._settle(first)
        return settled.rewards_N[settled.keep_N] if settled.keep_N.any() else settled.rewards_N

    def _settle(self, rollouts: Rollouts) -> SettledGroups:
        return settle_groups(
            rollouts.rewards_N,
            rollouts.mask_NT.sum(dim=1),
            rollouts.truncated_N,
            Groups.from_ids(rollouts.group_ids_N),
            self.config.groups,
        )

    def _with_signal(self, rollouts: Rollouts) -> Tensor:
        """Groups that would be kept and whose rewards differ, bool [G]."""
        groups = Groups.from_ids(rollouts.group_ids_N)
        settled = self._settle(rollouts)
        kept_G = groups.min(settled.keep_N.to(torch.int64)) > 0
        return kept_G & ~groups.all_equal(settled.rewards_N)

    def _prefer_signal(self, rollouts: Rollouts, wanted: int) -> Rollouts:
        """``wanted`` groups of the rollout: those with signal first, in order of sampling."""
        groups = Groups.from_ids(rollouts.group_ids_N)
        signal_G = self._with_signal(rollouts)
        chosen_G = torch.argsort((~signal_G).to(torch.int64), stable=True)[:wanted]
        keep_G = torch.zeros(groups.count, dtype=torch.bool)
        keep_G[chosen_G] = True
        return rollouts.select(groups.spread(keep_G))
