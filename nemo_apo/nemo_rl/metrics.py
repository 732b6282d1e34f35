"""The figures of an RL step as the host's trainer wants them from ``policy.train``.

The host sums a list of numbers, one per micro-batch, under each name (and takes the mean of a few),
and logs the result as ``train/<name>``. Ours come after it as ``apo/<name>``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nemo_apo.nemo_rl.loss import TOKEN_SUMS

# What the host takes the mean of; everything else it sums.
_HOST_MEANS = frozenset({"lr", "wd", "global_valid_seqs", "global_valid_toks"})
# What it reads by name after training, and what stands there if no optimizer step was taken.
_REQUIRED = {
    "loss": float("nan"),
    "num_valid_samples": 0.0,
    "token_mult_prob_error": float("nan"),
    "gen_kl_error": float("nan"),
    "global_valid_seqs": 0.0,
    "global_valid_toks": 0.0,
}
# Figures of a whole call that add up over calls.
_ADDED = ("total_flops", "train_elapsed_seconds")
# Sections of ``nemo_apo.record`` that say nothing more in the host's list of names.
_PLAIN_SECTIONS = frozenset({"schedule", "policy", "update", "time"})

MicroBatchMetrics = dict[str, list[float]]


def logged_name(name: str) -> str:
    """The host's name for a metric of ``nemo_apo.record``."""
    section, _, last = name.partition("/")
    return f"apo/{last}" if section in _PLAIN_SECTIONS else f"apo/{section}_{last}"


def token_sum(result: Mapping[str, Any], name: str) -> float:
    """One of ``TOKEN_SUMS`` of an optimizer step, over its micro-batches and all ranks."""
    return float(sum(result["all_mb_metrics"].get(name, [])))


def joined(
    results: Sequence[Mapping[str, Any]], ours: Mapping[str, float], loss: float, grad_norm: float
) -> dict[str, Any]:
    """What several calls of the host's ``train`` gave, as if it had been one.

    Args:
        results: of each optimizer step that was taken.
        ours: metrics by their names in ``nemo_apo.record``.
        loss, grad_norm: of the RL step, in place of the host's.
    """
    together: dict[str, Any] = dict(results[-1]) if results else {}
    for name in _ADDED:
        if name in together:
            together[name] = sum(result[name] for result in results)
    metrics = _micro_batch_metrics([result["all_mb_metrics"] for result in results])
    # The host takes its loss from here, too, if there is one.
    metrics["loss"] = [loss]
    metrics |= {logged_name(name): [float(value)] for name, value in ours.items()}
    return together | {
        "loss": torch.tensor([loss]),
        "grad_norm": torch.tensor([grad_norm]),
        "all_mb_metrics": metrics,
    }


def _micro_batch_metrics(calls: Sequence[Mapping[str, Sequence[float]]]) -> MicroBatchMetrics:
    """The lists of all calls, so weighed that the host's sum is the mean over the calls."""
    if not calls:
        return {name: [value] for name, value in _REQUIRED.items()}
    metrics: MicroBatchMetrics = {}
    for name in calls[0].keys() - set(TOKEN_SUMS):
        values = [value for call in calls for value in call.get(name, [])]
        is_extreme = "_min" in name or "_max" in name
        scale = 1.0 if name in _HOST_MEANS or is_extreme else 1.0 / len(calls)
        metrics[name] = [value * scale for value in values]
    return metrics
