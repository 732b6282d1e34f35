"""Checkpoints of a run: megatron's sharded files and the trainer's own state, under one seal.

``checkpoints/step_000040/`` holds megatron's weights, optimizer moments and remembered weights,
``trainer_state.json`` (``TrainerState`` and the values that a resumed run may not change),
``random_RANK.json`` (the generators of each rank), ``rollout.safetensors`` where the run was
stopped between two optimizer steps of a rollout, and the manifest that seals them. A checkpoint
is prepared under a hidden name, written out to disk and renamed once; nothing is read from it
before its seal has been verified (``checkpoint_search``).
"""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint import CheckpointException

from nemo_apo.config import LOCAL, Config
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.diagnostics import DiagnosticsState
from nemo_apo.parallel.together import RankError, on_first
from nemo_apo.trainer.anchors import ROLES, RememberedWeights
from nemo_apo.trainer.checkpoint_search import CheckpointError, Verified, free_name, verify
from nemo_apo.trainer.checkpoint_write import SaveFailed, write_sealed
from nemo_apo.trainer.durable_files import make_partial, remove_folder, remove_leftovers
from nemo_apo.trainer.fixed_config import (
    PROMPTS,
    changes,
    fingerprint,
    fixed_values,
    model_changes,
)
from nemo_apo.trainer.optimizer_state import optimizer_entries, take_optimizer
from nemo_apo.trainer.pending import StoredRollout
from nemo_apo.trainer.policy import Policy
from nemo_apo.trainer.random_state import read_random_state, set_random_state
from nemo_apo.trainer.retention import IN_ROLLOUT, METRICS, Kept, prune
from nemo_apo.trainer.sealed_folder import DamagedFolder
from nemo_apo.trainer.shard_files import read_shards

STATE_FILE = "trainer_state.json"
ROLLOUT_FILE = "rollout.safetensors"
_FORMAT = 5
# A key of the state file: the checkpoint that the first weights came from, for its tokenizer.
ORIGIN = "model_path"
# What the layers are made of, in what the manifest says about the layout.
_IMPL = "transformer_impl"
# Keys of the state file where there is a rollout.
_ROLLOUT, _UPDATE = "rollout", "update"


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


def save(
    root: Path,
    policy: Policy,
    remembered: RememberedWeights,
    state: TrainerState,
    config: Config,
    metrics: Mapping[str, float],
    rollout: StoredRollout | None = None,
) -> Path:
    """Write a checkpoint, then remove those that ``run.keep_last`` lets go; collective.

    Args:
        root: the run's folder of checkpoints.
        policy, remembered, state: what is saved.
        config: the run's configuration.
        metrics: of the step, by the names of ``nemo_apo.record``; ``run.keep_best`` goes by them.
        rollout: the one that is under training, if the next RL step has begun.

    Returns:
        The checkpoint's folder.

    Raises:
        SaveFailed: on every rank, if one could not write or remove.
    """
    run, fixed, layout = config.run, fixed_values(config), policy.layout
    own = {_random_file(layout.rank): _json(read_random_state(layout.device))}
    if layout.rank == 0:
        content = {
            "format": _FORMAT,
            "state": state.state_dict(),
            "config": fixed,
            ORIGIN: config.model.path,
            "remembered": _roles(remembered),
        }
        if rollout is not None:
            content |= {_ROLLOUT: rollout.numbers, _UPDATE: _split(config)}
            own[ROLLOUT_FILE] = safetensors.torch.save(dict(rollout.tensors))
        own[STATE_FILE] = _json(content)
    about = {
        "step": state.step,
        "config_sha256": fingerprint(fixed),
        "prompts_sha256": fixed[PROMPTS],
        "layout": _layout(policy, config),
        METRICS: {name: value for name, value in metrics.items() if math.isfinite(value)},
        IN_ROLLOUT: rollout is not None,
    }

    def prepare() -> Path:
        remove_leftovers(root)
        return make_partial(root, f"step_{state.step:06d}")

    entries = _sharded(policy, remembered, is_loading=False)
    folder = write_sealed(prepare, lambda: free_name(root, state.step), entries, own, about)
    kept = Kept(run.keep_last, run.keep_best, run.keep_best_metric)
    try:
        on_first(lambda: prune(root, folder, kept))
    except RankError as error:
        raise SaveFailed(f"{folder} is saved, but an older one stays ({error})") from error
    return folder


def save_weights(folder: Path, policy: Policy) -> None:
    """Write the weights alone, to start other runs from (``warm_start.load``); collective.

    Raises:
        SaveFailed: on every rank, if one could not write.
    """

    def name() -> Path:
        if folder.exists():
            remove_folder(folder)
        return folder

    entries = {"model": _chunks(policy)}
    about = {"layout": {_IMPL: policy.transformer_impl}}
    write_sealed(lambda: make_partial(folder.parent, folder.name), name, entries, {}, about)


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode()


def load(
    found: Verified, policy: Policy, remembered: RememberedWeights, config: Config
) -> tuple[TrainerState, StoredRollout | None]:
    """Restore weights, optimizer, remembered weights and generators; collective.

    Returns:
        The state, and the rollout of the next RL step if the run was stopped in it.

    Raises:
        CheckpointError: if the checkpoint belongs to another configuration or format.
    """
    folder = found.folder
    if STATE_FILE not in found.manifest.files:
        raise CheckpointError(f"cannot resume from {folder}: it holds weights alone")
    content = state_content(folder)
    # What is left of a rollout is trained as it began, so nothing may change.
    allowed = () if _ROLLOUT in content else config.run.allow_changed
    _check_config(folder, content["config"], config, allowed)
    _check_impl(found, policy)
    _check_layout(folder, found.manifest.about["layout"], config)
    if content["remembered"] != _roles(remembered):
        raise CheckpointError(
            f"cannot resume from {folder}: it remembers the weights of {content['remembered']}, "
            f"this configuration needs {_roles(remembered)} (update.monitor_reference_kl, "
            "regularizers.kl_coef, anchor.name)"
        )
    state = TrainerState.from_state_dict(content["state"])
    if state.step > config.run.steps:
        raise CheckpointError(
            f"cannot resume from {folder}: run.steps={config.run.steps}: must be at least the "
            f"checkpoint's {state.step}"
        )
    rollout = _rollout(folder, content, config)
    # Nothing has been changed up to here.
    loaded = _read(folder, _sharded(policy, remembered, is_loading=True))
    _take(policy, loaded["model"])
    take_optimizer(policy.optimizer, loaded["optimizer"])
    for role in ROLES:
        weights = getattr(remembered, role)
        if weights is not None:
            with policy.holding(weights):
                _take(policy, loaded[role], f"{role}.")
    if found.manifest.about["layout"] == _layout(policy, config):
        text = (folder / _random_file(policy.layout.rank)).read_text()
        set_random_state(json.loads(text), policy.layout.device)
    return state, rollout


def state_content(folder: Path) -> dict[str, Any]:
    """What the state file of a verified checkpoint holds.

    Raises:
        CheckpointError: if it is of another format.
    """
    content = json.loads((folder / STATE_FILE).read_text())
    if content["format"] != _FORMAT:
        raise CheckpointError(f"{folder} has format {content['format']}, expected {_FORMAT}")
    return content


def _rollout(folder: Path, content: dict[str, Any], config: Config) -> StoredRollout | None:
    """The rollout that the run was stopped in."""
    if _ROLLOUT not in content:
        return None
    was, now = content[_UPDATE], _split(config)
    if was != now:
        raise CheckpointError(
            f"cannot resume from {folder}: it was saved between the optimizer steps of a rollout "
            f"with {was}, and there is now {now}"
        )
    return StoredRollout(safetensors.torch.load_file(folder / ROLLOUT_FILE), content[_ROLLOUT])


def _split(config: Config) -> dict[str, int]:
    """How a rollout is cut into optimizer steps."""
    update = config.update
    return {"update.mini_batches": update.mini_batches, "update.epochs": update.epochs}


def load_weights(folder: Path, policy: Policy) -> None:
    """Take the weights of a checkpoint, whole or weights alone; collective.

    Raises:
        CheckpointError: if the folder is not a checkpoint, or a damaged one.
    """
    try:
        found = verify(folder)
    except DamagedFolder as fault:
        raise CheckpointError(
            f"warm_start.load={folder}: not a checkpoint folder, or a damaged one: {fault}"
        ) from None
    _load_model(found, policy)


def load_for_evaluation(found: Verified, policy: Policy, config: Config) -> None:
    """Take the weights of a checkpoint, whole or weights alone; collective.

    Raises:
        CheckpointError: if it is of another model or vocabulary; all else may differ.
    """
    if STATE_FILE in found.manifest.files:
        changed = model_changes(state_content(found.folder)["config"], config)
        if changed:
            raise CheckpointError(f"cannot evaluate {found.folder}: {'; '.join(changed)}")
    _load_model(found, policy)


def _load_model(found: Verified, policy: Policy) -> None:
    _check_impl(found, policy)
    _take(policy, _read(found.folder, {"model": _chunks(policy)})["model"])
    # Main weights of the optimizer, where it has some, would bring the old ones back.
    policy.optimizer.reload_model_params()


def _read(folder: Path, entries: dict[str, Any]) -> dict[str, Any]:
    try:
        return read_shards(folder, entries)
    except (RankError, UnpicklingError, CheckpointException) as error:
        raise CheckpointError(f"cannot read {folder}: {error}") from error


def _sharded(policy: Policy, remembered: RememberedWeights, is_loading: bool) -> dict[str, Any]:
    """What megatron saves or loads: weights, optimizer and remembered weights of this rank."""
    model = _chunks(policy)
    state: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer_entries(policy.optimizer, model, is_loading),
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


def _roles(remembered: RememberedWeights) -> list[str]:
    return [role for role in ROLES if getattr(remembered, role) is not None]


def _random_file(rank: int) -> str:
    return f"random_{rank:05d}.json"


def _layout(policy: Policy, config: Config) -> dict[str, Any]:
    """Where the ranks stand; the sizes that a checkpoint may be read with are free."""
    layout = policy.layout
    return {
        "tensor": layout.tensor_size,
        "pipeline": layout.pipeline_size,
        "virtual": layout.virtual_size,
        "context": layout.context_size,
        "data": layout.data_size,
        "distributed_optimizer": config.parallel.distributed_optimizer,
        _IMPL: policy.transformer_impl,
    }


def _check_config(
    folder: Path, saved: dict[str, Any], config: Config, allowed: Collection[str]
) -> None:
    changed = changes(saved, fixed_values(config), allowed)
    if changed:
        raise CheckpointError(
            f"cannot resume from {folder}: {'; '.join(changed)} (run.allow_changed names sections "
            "that may change, but not within a rollout)"
        )


def _check_impl(found: Verified, policy: Policy) -> None:
    """Refuse weights of other layers: megatron names them alike, but nobody has tried it."""
    stated = found.manifest.about.get("layout", {})
    was, now = stated.get(_IMPL, LOCAL), policy.transformer_impl
    if was != now:
        raise CheckpointError(
            f"cannot read {found.folder}: model.transformer_impl stood for {was} and now stands "
            f"for {now}, and weights are not carried from one to the other"
        )


def _check_layout(folder: Path, saved: dict[str, Any], config: Config) -> None:
    key = "distributed_optimizer"
    was, now = saved[key], config.parallel.distributed_optimizer
    if was != now:
        raise CheckpointError(
            f"cannot resume from {folder}: parallel.{key} was {str(was).lower()} and is now "
            f"{str(now).lower()}, and megatron saves the two kinds of state in different forms"
        )
