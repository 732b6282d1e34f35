"""Supervised warm start on the task's demonstrations, by the same passes as RL.

The loss is the mean cross-entropy over completion tokens of the batch, written as a plain sum:
every token's weight, minus one over the number of tokens, is settled before the split.
"""

import math
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from nemo_apo.config import Config, OptimizerConfig
from nemo_apo.core.anchoring import sequence_sums
from nemo_apo.core.objectives import Columns
from nemo_apo.tasks import Prompt, Task
from nemo_apo.trainer.micro_batch import MicroBatch
from nemo_apo.trainer.policy import Policy
from nemo_apo.trainer.rollouts import check_tokens


def run_warm_start(
    policy: Policy, config: Config, task: Task, on_step: Callable[[int, float], None]
) -> None:
    """Imitate demonstrations for ``warm_start.steps`` optimizer steps.

    Args:
        policy: trained in place; its optimizer is fresh before and after.
        config: the whole configuration.
        task: gives the demonstrations.
        on_step: called with the number of steps done and the mean loss, nats per token.
    """
    warm = config.warm_start
    policy.set_optimizer(_optimizer(warm.lr))
    rng = Random(f"warm start/{config.run.seed}")
    for step in range(warm.steps):
        batch = demonstration_batch(task, task.demonstrations(warm.batch_size, rng))
        kept, _ = policy.accumulate(batch, config.update.micro_batch_size, _loss(policy))
        lr = 0.5 * warm.lr * (1.0 + math.cos(math.pi * step / warm.steps))
        policy.update(lr, float(kept["loss"]))
        on_step(step + 1, float(kept["loss"]))
    policy.set_optimizer(config.optimizer)


def _optimizer(lr: float) -> OptimizerConfig:
    return OptimizerConfig(lr=lr, adam_beta1=0.9, adam_beta2=0.95, clip_grad=1.0)


def demonstration_batch(task: Task, examples: list[tuple[Prompt, list[int]]]) -> MicroBatch:
    """Rows of prompt and demonstrated completion, with the weight of the mean cross-entropy."""
    width = task.max_prompt_length + task.max_response_length
    rows, masks = [], []
    for prompt, completion in examples:
        row = [*prompt.tokens, *completion]
        padding = width - len(row)
        rows.append(row + [task.pad_id] * padding)
        mask = [False] * len(prompt.tokens) + [True] * len(completion) + [False] * padding
        masks.append(mask[1:])
    mask_BT = torch.tensor(masks)
    weight_B = torch.full((len(rows),), -1.0, dtype=torch.float64) / mask_BT.sum()
    columns = Columns(
        coefficient_N=weight_B,
        advantage_N=torch.zeros_like(weight_B),
        token_weight_N=torch.zeros_like(weight_B),
    )
    tokens_BT = torch.tensor(rows)
    check_tokens(tokens_BT, task.vocab_size)
    return MicroBatch.of(tokens_BT, mask_BT, columns=columns)


def _loss(policy: Policy) -> Callable[[Tensor, MicroBatch], tuple[Tensor, dict[str, Tensor]]]:
    def loss(hidden_BTH: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.columns is not None
        logprobs_BT, _ = policy.token_logprobs(hidden_BTH, batch)
        sums_B = torch.where(batch.mask_BT, logprobs_BT, 0.0).sum(dim=1)
        value = (batch.columns.coefficient_N.to(sums_B.dtype) * sums_B).sum()
        return value, {
            "loss": value.detach().clone(),
            "clipped": torch.zeros_like(value),
            "logprob_sums": sequence_sums(logprobs_BT.detach(), batch.mask_BT),
        }

    return loss
