"""What the host's side of the contract does, small: a policy class that shards, cuts and steps.

It stands for ``nemo_rl.models.policy.lm_policy.Policy`` where NeMo-RL is not installed, so that our
side can be tested everywhere; the same is tested with the real one by the test_host_* files. The
model is a table: the logits of a token depend on the token before it alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_apo.nemo_rl.baselines import HISTOGRAM, ApoLogger, Baselines
from nemo_apo.nemo_rl.policy import ApoRun, RunSizes, policy_factory
from nemo_apo.nemo_rl.settings import read_settings

VOCABULARY = 7
GROUP = 4
LR = 0.5


class Batch(dict):
    """The part of the host's ``BatchedDataDict`` that its policies use."""

    @property
    def size(self) -> int:
        return len(self["input_ids"])

    def slice(self, start: int, end: int) -> "Batch":
        return Batch({name: column[start:end] for name, column in self.items()})

    def get_multimodal_dict(self, as_tensors: bool) -> dict[str, Any]:
        return {}


def batch_with(**columns: Tensor) -> Batch:
    return Batch(columns)


@dataclass
class Cut:
    """How a policy cuts a global batch.

    Attributes:
        order: of its rows, before they are dealt to ranks.
        ranks: data-parallel.
        micro_batch_size: of a rank's part.
    """

    order: Callable[[int], Sequence[int]] = range
    ranks: int = 1
    micro_batch_size: int = 100


class SmallPolicy:
    """The contract of the host's policy, over one table of logits."""

    cut = Cut()

    def __init__(self, config: dict[str, Any], tokenizer: Any, weights_path: Any = None) -> None:
        self.cfg = config
        self.table = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
        self.gradients: list[Tensor] = []
        self.read_modes: list[str] = []
        self._mode = "train"
        if weights_path is not None:
            self.table = torch.load(weights_path, weights_only=True)

    def get_logprobs(self, data: Batch, timer: Any = None) -> Batch:
        self.read_modes.append(self._mode)
        return Batch(logprobs=logprobs_of(self.table, data["input_ids"]))

    def prepare_for_lp_inference(self) -> None:
        self._mode = "inference"

    def prepare_for_training(self) -> None:
        self._mode = "train"

    def train(
        self,
        data: Batch,
        loss_fn: Any,
        eval_mode: bool = False,
        gbs: int | None = None,
        mbs: int | None = None,
        timer: Any = None,
    ) -> dict[str, Any]:
        """Every global batch: ranks, micro-batches, sum of gradients, one step."""
        assert self._mode == "train"
        if eval_mode:
            return {"evaluated": data.size}
        size = gbs or self.cfg["train_global_batch_size"]
        metrics: dict[str, list[float]] = {}
        losses, norm = [], 0.0
        for start in range(0, data.size, size):
            table = self.table.clone().requires_grad_(True)
            batch = data.slice(start, start + size)
            mask = batch["token_mask"][:, 1:] * batch["sample_mask"][:, None]
            counts = {"seqs": batch["sample_mask"].sum(), "toks": mask.sum()}
            losses.append(0.0)
            for part in micro_batches(batch, self.cut):
                logprobs = logprobs_of(table, part["input_ids"])[:, 1:]
                loss, figures = loss_fn(part, counts["seqs"], counts["toks"], logprobs)
                loss.backward()
                losses[-1] += float(loss.detach())
                figures |= {"global_valid_toks": float(counts["toks"]), "lr": LR}
                for name, value in figures.items():
                    metrics.setdefault(name, []).append(value)
            self.gradients.append(table.grad)
            norm = float(table.grad.norm())
            self.table = self.table - LR * table.grad
        return {
            "loss": torch.tensor(losses),
            "grad_norm": torch.tensor([norm]),
            "all_mb_metrics": metrics,
            "total_flops": 5.0,
        }

    def save_checkpoint(self, weights_path: str, optimizer_path: str | None = None) -> None:
        Path(weights_path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.table, weights_path)


def micro_batches(batch: Batch, cut: Cut) -> list[Batch]:
    rows = list(cut.order(batch.size))
    share = len(rows) // cut.ranks
    parts = []
    for rank in range(cut.ranks):
        mine = rows[rank * share : (rank + 1) * share]
        for first in range(0, share, cut.micro_batch_size):
            chosen = torch.tensor(mine[first : first + cut.micro_batch_size])
            parts.append(Batch({name: column[chosen] for name, column in batch.items()}))
    return parts


def logprobs_of(table: Tensor, tokens_NS: Tensor) -> Tensor:
    """Log-probs by tokens [N, S]; 0 for the first, as in the host."""
    log_p = torch.log_softmax(table, dim=-1)
    rest = log_p[tokens_NS[:, :-1], tokens_NS[:, 1:]]
    return torch.nn.functional.pad(rest, (1, 0))


class Recorder:
    """A logger of the host, as far as it matters."""

    def __init__(self) -> None:
        self.histograms: list[str] = []

    def log_histogram(self, histogram: Any, step: int, name: str) -> None:
        self.histograms.append(name)

    def log_metrics(self, metrics: dict[str, Any], step: int, prefix: str = "") -> str:
        return "forwarded"


@dataclass
class Session:
    """A policy of ours over ``SmallPolicy``, and what goes with it."""

    apo: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    cut: Cut = field(default_factory=Cut)
    weights_path: Any = None
    total_steps: int = 10

    def __post_init__(self) -> None:
        self.lines: list[str] = []
        self.baselines = Baselines()
        self.logger = ApoLogger(Recorder(), self.baselines)
        sizes = RunSizes(GROUP, self.total_steps, max_response_length=6)
        self.run = ApoRun(read_settings(self.apo), sizes, self.baselines, self.lines.append)
        base = type("Cutting", (SmallPolicy,), {"cut": self.cut})
        self.policy = policy_factory(self.run, base)(
            config={"train_global_batch_size": self.batch_size},
            tokenizer=range(VOCABULARY),
            weights_path=self.weights_path,
        )

    def train(self, data: Batch, rewards: Tensor, loss: Any) -> dict[str, Any]:
        """What the host's trainer does with a rollout from its rewards on."""
        given = self.given(data, rewards)
        return self.policy.train(given, loss)

    def given(self, data: Batch, rewards: Tensor) -> Batch:
        means = rewards.view(-1, GROUP).mean(dim=1).repeat_interleave(GROUP)
        self.logger.log_histogram(means.numpy(), 1, HISTOGRAM)
        old = self.policy.get_logprobs(data)["logprobs"]
        advantages = (rewards - means)[:, None].expand_as(old)
        self.logger.log_histogram(advantages.numpy(), 1, "train/advantages/histogram")
        zeros = torch.zeros_like(old)
        given = {"prev_logprobs": old, "advantages": advantages, "reference_policy_logprobs": zeros}
        return Batch({**data, "generation_logprobs": old + 0.01, **given})


def rollout(seed: int, groups: int = 4) -> tuple[Batch, Tensor]:
    """Prompts of one to three tokens, answers of one to five, and rewards; right-padded with 0."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    rows, masks, lengths = [], [], []
    for _ in range(groups):
        prompt = [number(1, VOCABULARY) for _ in range(number(1, 4))]
        for _ in range(GROUP):
            answer = [number(1, VOCABULARY) for _ in range(number(1, 6))]
            rows.append(prompt + answer)
            masks.append([0.0] * len(prompt) + [1.0] * len(answer))
            lengths.append(len(rows[-1]))
    width = max(lengths)
    data = batch_with(
        input_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        input_lengths=torch.tensor(lengths),
        token_mask=torch.tensor([mask + [0.0] * (width - len(mask)) for mask in masks]),
        sample_mask=torch.ones(len(rows)),
    )
    rewards = torch.rand(len(rows), generator=draw)
    assert math.isfinite(float(rewards.sum()))
    return data, rewards
