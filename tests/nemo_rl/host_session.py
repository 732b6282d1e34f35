"""RL steps of the host's policy on made-up rollouts, and the same steps of the plain model.

Axes: N sequences of a rollout, S tokens, T = S - 1 targets.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemo_apo.nemo_rl.baselines import Baselines
from nemo_apo.nemo_rl.loss import ApoLoss
from nemo_apo.nemo_rl.policy import ApoPolicyMixin, ApoRun, RunSizes
from nemo_apo.nemo_rl.settings import read_settings
from tests.aligner.whole_group_loss import zscore
from tests.nemo_rl import tiny_model
from tests.nemo_rl.host_config import GROUP_SIZE

Named = dict[str, Tensor]

SIZE = 8  # sequences of an optimizer step
TOKENS, PROMPT = 16, 5
TOTAL_STEPS = 10


@dataclass
class Rollout:
    """What was sampled for the rollout's prompts, and the rewards, [N] and [N, S]."""

    tokens: Tensor
    lengths: Tensor
    rewards: Tensor
    sample_mask: Tensor

    @property
    def token_mask(self) -> Tensor:
        place = torch.arange(self.tokens.shape[1])
        return ((place >= PROMPT) & (place < self.lengths[:, None])).float()

    @property
    def mask(self) -> Tensor:
        """Which targets are completion tokens, [N, T]."""
        return self.token_mask[:, 1:].double()

    @property
    def baselines(self) -> Tensor:
        groups = self.rewards.view(-1, GROUP_SIZE)
        return groups.mean(dim=1, keepdim=True).expand_as(groups).reshape(-1)


def made_rollout(seed: int, groups: int = 4) -> Rollout:
    """Groups of answers of different lengths and rewards, each to a prompt of its own."""
    draw = torch.Generator().manual_seed(seed)
    count = groups * GROUP_SIZE
    tokens = torch.randint(3, 50, (count, TOKENS), generator=draw)
    tokens[:, :PROMPT] = tokens[::GROUP_SIZE, :PROMPT].repeat_interleave(GROUP_SIZE, dim=0)
    lengths = torch.randint(PROMPT + 2, TOKENS + 1, (count,), generator=draw)
    tokens[torch.arange(TOKENS) >= lengths[:, None]] = tiny_model.PAD_ID
    rewards = torch.rand(count, generator=draw)
    return Rollout(tokens, lengths, rewards, torch.ones(count))


def read(policy: Any, rollout: Rollout) -> Tensor:
    """Log-probs of the tokens under the policy, by the host's own pass, [N, S]."""
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    policy.prepare_for_lp_inference()
    return policy.get_logprobs(BatchedDataDict(_inputs(rollout)))["logprobs"]


def _inputs(rollout: Rollout) -> Named:
    return {
        "input_ids": rollout.tokens,
        "input_lengths": rollout.lengths,
        "token_mask": rollout.token_mask,
        "sample_mask": rollout.sample_mask.clone(),
    }


def training_data(policy: Any, rollout: Rollout) -> Any:
    """What the host's trainer hands to ``policy.train``."""
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    logprobs = read(policy, rollout)
    advantages = (rollout.rewards - rollout.baselines)[:, None].expand(rollout.tokens.shape)
    return BatchedDataDict(
        {
            **_inputs(rollout),
            "prev_logprobs": logprobs,
            "generation_logprobs": logprobs.clone(),
            "reference_policy_logprobs": torch.zeros_like(logprobs),
            "advantages": advantages.clone(),
        }
    )


@dataclass
class Session:
    """A policy of the host under APO from given weights on."""

    policy: Any
    run: ApoRun
    results: list[dict[str, Any]] = field(default_factory=list)

    def train(self, rollout: Rollout) -> list[Named]:
        """One RL step; the gradients of its optimizer steps."""
        data = training_data(self.policy, rollout)
        self.policy.prepare_for_training()
        self.run.baselines.note(rollout.baselines)
        settings = self.run.settings
        loss = ApoLoss(settings.objective, settings.regularizers)
        self.results.append(self.policy.train(data, loss))
        return self.policy.gradients()

    def figure(self, name: str) -> float:
        """A metric of the last RL step as the host would log it."""
        return float(sum(self.results[-1]["all_mb_metrics"][name]))


def open_session(policy: Any, weights: Named, **sections: Any) -> Session:
    """APO with the given sections of its block over a policy, reset to the given weights."""
    policy.put_weights(weights)
    policy.gradients()
    sizes = RunSizes(GROUP_SIZE, TOTAL_STEPS, TOKENS - PROMPT)
    run = ApoRun(read_settings(sections), sizes, Baselines(), report=lambda line: None)
    policy.start(run)
    return Session(policy, run)


def apo_policy_class(base: type) -> type:
    """The mixin over a class of the host, between them one that can cut a batch anew."""
    from nemo_apo.core.settling import RolloutLimits

    class Cutting(base):  # type: ignore[misc]
        order: Callable[[int], list[int]] | None = None
        micro_batch_size: int | None = None

        def train(self, data: Any, *args: Any, **kwargs: Any) -> Any:
            if self.order is not None:
                data = data.select_indices(torch.tensor(self.order(data.size)))
            return super().train(data, *args, **{**kwargs, "mbs": self.micro_batch_size})

    class Apo(ApoPolicyMixin, Cutting):
        def start(self, run: ApoRun) -> None:
            self.start_apo(run, RolloutLimits(tiny_model.ROWS, run.sizes.max_response_length))

    return Apo


class PlainModel:
    """The same model in Hugging Face's library alone, in float64, trained by plain SGD."""

    def __init__(self, name: str, lr: float) -> None:
        self.model = tiny_model.load(name, torch.float64)
        self.lr = lr

    def logprobs(self, tokens: Tensor) -> Tensor:
        """Log-prob of each token after the first, [N, T], differentiable."""
        log_p = torch.log_softmax(self.model(tokens).logits[:, :-1], dim=-1)
        return log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)

    def gradient(self, loss: Tensor) -> Named:
        self.model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}

    def step(self, loss: Tensor) -> Named:
        """The gradient, and one step down it."""
        gradient = self.gradient(loss)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter -= self.lr * parameter.grad
        return gradient

    def train(self, rollout: Rollout, loss: Callable[..., Tensor], size: int = SIZE) -> list[Named]:
        """Optimizer steps by autograd through the coupled loss of whole groups in one piece."""
        with torch.no_grad():
            old = self.logprobs(rollout.tokens)
        gradients = []
        for first in range(0, len(rollout.rewards), size):
            rows = slice(first, first + size)
            advantages = zscore(rollout.rewards[rows].double().view(-1, GROUP_SIZE))
            new = self.logprobs(rollout.tokens[rows])
            gradients.append(self.step(loss(new, old[rows], rollout.mask[rows], advantages)))
        return gradients


def largest_gap(found: Named, exact: Named) -> float:
    """The largest difference of two sets of tensors by name."""
    assert found.keys() == exact.keys()
    return max(float((found[name].double() - exact[name]).abs().max()) for name in exact)
