"""Checkpoints by ``megatron.core.dist_checkpointing``, with the trainer's own state beside them.

``checkpoints/step_000040/`` holds megatron's sharded weights, optimizer moments and remembered
weights, and ``trainer_state.json`` (``TrainerState``). The folder is written under a temporary
name and renamed when complete, so that an interrupted save is never taken for a checkpoint.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from nemo_apo.config import Config, ConfigError
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.diagnostics import DiagnosticsState
from nemo_apo.trainer.anchors import ROLES, RememberedWeights
from nemo_apo.trainer.policy import Policy

STATE_FILE = "trainer_state.json"
_FORMAT = 2
# Sections that decide what the weights, the schedule's memory and the data stream mean.
_FIXED_SECTIONS = (
    "task",
    "model",
    "objective",
    "schedule",
    "tau",
    "anchor",
    "regularizers",
    "rollout",
    "optimizer",
)


class CheckpointError(ConfigError):
    """A checkpoint that cannot be resumed from."""


@dataclass(frozen=True)
class TrainerState:
    """Everything that the loop carries from one RL step to the next, besides weights.

    Prompts and samples need no state: they are a function of the seed and the step.

    Attributes:
        step: RL steps completed.
        schedule: the alpha schedule's memory.
        diagnostics: the windows of the failure signatures.
        optimizer_steps, skipped_steps, skipped_in_a_row: optimizer steps of the RL phase.
        samples: completions drawn.
        wall_s, warm_start_s: seconds spent so far, and of these in the warm start.
        accuracy_start, reward_start: held-out greedy figures before RL.
    """

    step: int
    schedule: ScheduleState
    diagnostics: DiagnosticsState
    optimizer_steps: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    samples: int = 0
    wall_s: float = 0.0
    warm_start_s: float = 0.0
    accuracy_start: float = 0.0
    reward_start: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "TrainerState":
        """The inverse of ``state_dict``."""
        schedule = ScheduleState.from_state_dict(state["schedule"])
        diagnostics = DiagnosticsState.from_state_dict(state["diagnostics"])
        return cls(**{**state, "schedule": schedule, "diagnostics": diagnostics})


def _sharded(policy: Policy, remembered: RememberedWeights, is_loading: bool) -> dict[str, Any]:
    """What megatron saves or loads: weights, optimizer and remembered weights of this rank."""
    model = _chunks(policy)
    state: dict[str, Any] = {
        "model": model,
        "optimizer": policy.optimizer.sharded_state_dict(model, is_loading=is_loading),
    }
    for role in ROLES:
        weights = getattr(remembered, role)
        if weights is not None:
            with policy.holding(weights):
                state[role] = {
                    chunk: _as_held(entries)
                    for chunk, entries in _chunks(policy, f"{role}.").items()
                }
    return state


def _chunks(policy: Policy, prefix: str = "") -> dict[str, dict[str, Any]]:
    """megatron's entries for the weights of each chunk of this rank's stage."""
    return {
        f"chunk{number}": chunk.module.sharded_state_dict(prefix=prefix)
        for number, chunk in enumerate(policy.chunks)
    }


def _take(policy: Policy, loaded: dict[str, dict[str, Any]], prefix: str = "") -> None:
    """Put loaded weights into the chunks of this rank's stage."""
    for number, chunk in enumerate(policy.chunks):
        entries = loaded[f"chunk{number}"].items()
        chunk.module.load_state_dict({key.removeprefix(prefix): value for key, value in entries})


def _as_held(state: dict[str, Any]) -> dict[str, Any]:
    """The entries with the values that the parameters hold now.

    megatron's entries refer to the parameters themselves, which get the trained weights back
    before anything is written or read.
    """
    for entry in state.values():
        if isinstance(entry, ShardedTensor | ShardedTensorFactory):
            entry.data = entry.data.detach()
    return state


def save(
    root: Path, policy: Policy, remembered: RememberedWeights, state: TrainerState, config: Config
) -> Path:
    """Write a checkpoint; collective. Returns its folder."""
    folder = root / f"step_{state.step:06d}"
    partial = root / f".partial_{folder.name}"
    is_first = dist.get_rank() == 0
    if is_first:
        for old in (partial, folder):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_sharded(policy, remembered, is_loading=False), str(partial))
    dist.barrier()
    if is_first:
        content = {
            "format": _FORMAT,
            "state": state.state_dict(),
            "config": _fixed_config(config),
            "remembered": _roles(remembered),
        }
        (partial / STATE_FILE).write_text(json.dumps(content, indent=1))
        partial.rename(folder)
    dist.barrier()
    return folder


def save_weights(folder: Path, policy: Policy) -> None:
    """Write the weights alone, to start other runs from (``warm_start.load``); collective."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save({"model": _chunks(policy)}, str(folder))


def load_weights(folder: Path, policy: Policy) -> None:
    """Take the weights of a checkpoint, whole or weights alone; collective.

    Raises:
        CheckpointError: if the folder is not a checkpoint.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise CheckpointError(f"warm_start.load={folder}: not a checkpoint folder")
    _take(policy, dist_checkpointing.load({"model": _chunks(policy)}, str(folder))["model"])


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint under a folder, or None."""
    complete = sorted(path.parent for path in root.glob(f"step_*/{STATE_FILE}"))
    return complete[-1] if complete else None


def load(
    folder: Path, policy: Policy, remembered: RememberedWeights, config: Config
) -> TrainerState:
    """Restore weights, optimizer, remembered weights and state; collective.

    Raises:
        CheckpointError: if the checkpoint belongs to another configuration or format.
    """
    content = json.loads((folder / STATE_FILE).read_text())
    if content["format"] != _FORMAT:
        raise CheckpointError(f"{folder} has format {content['format']}, expected {_FORMAT}")
    _check_config(folder, content["config"], _fixed_config(config))
    if content["remembered"] != _roles(remembered):
        raise CheckpointError(
            f"cannot resume from {folder}: it remembers the weights of {content['remembered']}, "
            f"this configuration needs {_roles(remembered)} (update.monitor_reference_kl, "
            "regularizers.kl_coef)"
        )
    loaded = dist_checkpointing.load(_sharded(policy, remembered, is_loading=True), str(folder))
    _take(policy, loaded["model"])
    policy.optimizer.load_state_dict(loaded["optimizer"])
    for role in ROLES:
        weights = getattr(remembered, role)
        if weights is not None:
            with policy.holding(weights):
                _take(policy, loaded[role], f"{role}.")
    return TrainerState.from_state_dict(content["state"])


def _roles(remembered: RememberedWeights) -> list[str]:
    return [role for role in ROLES if getattr(remembered, role) is not None]


def _fixed_config(config: Config) -> dict[str, Any]:
    fixed = {name: dataclasses.asdict(getattr(config, name)) for name in _FIXED_SECTIONS}
    return {**fixed, "run.seed": config.run.seed}


def _check_config(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, now in wanted.items():
        if saved[key] != now:
            raise CheckpointError(
                f"cannot resume from {folder}: {key} was {saved[key]} and is now {now}"
            )
