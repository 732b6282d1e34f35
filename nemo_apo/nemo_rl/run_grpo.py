"""Train with APO on NeMo-RL's synchronous GRPO.

    python -m nemo_apo.nemo_rl.run_grpo --config qwen3_1p7b_math3_dtensor \\
        data.train.data_path=TRAIN data.validation.data_path=VALIDATION \\
        apo.schedule.alpha_min=0.4

``--config`` takes a recipe of ``conf/nemo_rl`` by its name, or any YAML file, NeMo-RL's own as
well; overrides are Hydra's. Run it in NeMo-RL's folder and environment, in place of its
``examples/run_grpo.py``, whose steps it takes. The configuration is checked first, then whether the
host is one that this package knows, and only then does Ray start: a mistake ends with status 2 and
one sentence, a run that cannot go on with status 1. ``--check`` ends after the first of these, with
the settings.
"""

import argparse
import contextlib
import copy
import dataclasses
import importlib
import os
import sys
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf

import nemo_apo
from nemo_apo.compose.schema import first_line
from nemo_apo.config import ConfigError, require
from nemo_apo.nemo_rl import host_rules, interface_guard, recipes
from nemo_apo.nemo_rl.host_rules import value_of
from nemo_apo.nemo_rl.settings import BLOCK, read_settings
from nemo_apo.plugin.bookkeeping import TrainingStopped
from nemo_apo.plugin.interface_guard import InterfaceMismatch
from nemo_apo.plugin.rollout import RolloutError
from nemo_apo.plugin.settings import ApoSettings

USER_ERROR = 2
# Set where all of NeMo-RL's workers run in the environment of this process.
_ONE_ENVIRONMENT = "NEMO_RL_PY_EXECUTABLES_SYSTEM"
_SITES = ("site-packages", "dist-packages")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    asked = _parser().parse_intermixed_args(arguments)
    try:
        interface_guard.check(interface_guard.CONFIGURATION)
        host = Path(asked.nemo_rl) if asked.nemo_rl else host_folder()
        config = recipes.compose(asked.config, asked.overrides, host)
        settings = check(config)
        recipes.check_read(asked.overrides, settings.objective)
        if asked.check:
            print(summary(config, settings))
            return
        interface_guard.check()
        share_with_workers()
        run(config, settings)
    except (ConfigError, InterfaceMismatch) as error:
        _leave(str(error))
    except (RolloutError, TrainingStopped) as stopped:
        raise SystemExit(f"nemo-apo: {stopped}") from None


def check(config: Mapping[str, Any]) -> ApoSettings:
    """All rules that need nothing but the configuration; the settings of ``apo``.

    Raises:
        ConfigError: naming key, value and rule.
    """
    settings = read_settings(config.get(BLOCK.path))
    host_rules.check(config, settings)
    return settings


def host_folder() -> Path:
    """The folder of NeMo-RL that is imported: its examples lie beside its package."""
    return Path(importlib.import_module("nemo_rl").__file__ or "").resolve().parent.parent


def summary(config: Mapping[str, Any], settings: ApoSettings) -> str:
    """The settings, and what an RL step will be."""
    block = {key: dataclasses.asdict(getattr(settings, key)) for key in BLOCK.schema.defaults}
    prompts, size = value_of(config, host_rules.PROMPTS), value_of(config, host_rules.GROUP_SIZE)
    steps = prompts * size // value_of(config, host_rules.BATCH_SIZE)
    shape = f"{prompts} groups of {size} answers, in {steps} optimizer step{'s' * (steps > 1)}"
    return f"{OmegaConf.to_yaml({BLOCK.path: block})}\nAn RL step takes {shape}; every rule holds."


def share_with_workers() -> None:
    """Let workers, which have environments of their own, import this package.

    NeMo-RL hands them the environment variables of this process, so the folder that holds the
    package goes onto PYTHONPATH; on other nodes it must lie under the same path.

    Raises:
        ConfigError: if that folder holds other packages, too.
    """
    folder = Path(nemo_apo.__file__).resolve().parent.parent
    if folder.name in _SITES:
        rule = "would hide the packages of the workers' own environments; install nemo_apo into a "
        rule += "folder of its own (pip install --no-deps --target DIR) and put DIR on PYTHONPATH"
        require(os.environ.get(_ONE_ENVIRONMENT) == "1", "PYTHONPATH", folder, rule)
        return
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(folder) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*paths, str(folder)]))


def run(config: Mapping[str, Any], settings: ApoSettings) -> None:
    """Train as a checked configuration says: the steps of the host's script, with our parts.

    Raises:
        ConfigError: if the host's own classes refuse the configuration, the newest checkpoint
            cannot be gone on from, or the data are too few.
    """
    from nemo_rl.algorithms import grpo
    from nemo_rl.algorithms.utils import get_tokenizer
    from nemo_rl.data.utils import setup_response_data
    from nemo_rl.distributed.virtual_cluster import init_ray
    from nemo_rl.utils.logger import get_next_experiment_dir

    from nemo_apo.nemo_rl.baselines import ApoLogger, Baselines
    from nemo_apo.nemo_rl.loss import ApoLoss
    from nemo_apo.nemo_rl.policy import ApoRun, RunSizes, policy_factory

    master = _master_config(grpo.MasterConfig, config)
    _check_checkpoint(master.checkpointing, settings)
    master.logger["log_dir"] = get_next_experiment_dir(master.logger["log_dir"])
    init_ray()
    tokenizer = get_tokenizer(master.policy["tokenizer"])
    _complete_generation(master.policy, tokenizer)
    dataset, val_dataset, environments, val_environments = setup_response_data(
        tokenizer, master.data, master.env
    )
    sizes = RunSizes(
        group_size=value_of(config, host_rules.GROUP_SIZE),
        total_steps=total_steps(config, dataset),
        max_response_length=value_of(config, host_rules.RESPONSE_LENGTH),
    )
    apo_run = ApoRun(settings, sizes, Baselines(), _report)
    policy, generation, _, _, loader, val_loader, _, logger, checkpointer, state, master, *_ = (
        grpo.setup(
            master,
            tokenizer,
            dataset,
            val_dataset,
            policy_factory=policy_factory(apo_run),
        )
    )
    with _closing(grpo, checkpointer, generation, environments, val_environments):
        grpo.grpo_train(
            policy=policy,
            policy_generation=generation,
            wrapped_dataloader=loader,
            val_dataloader=val_loader,
            tokenizer=tokenizer,
            loss_fn=ApoLoss(
                settings.objective,
                settings.regularizers,
                host_rules.has_fused_linear_logprobs(config),
            ),
            task_to_env=environments,
            val_task_to_env=val_environments,
            logger=ApoLogger(logger, apo_run.baselines),
            checkpointer=checkpointer,
            grpo_save_state=state,
            master_config=master,
        )


def total_steps(config: Mapping[str, Any], dataset: Sized | Mapping[str, Any]) -> int:
    """RL steps of the whole run: at most, where dynamic sampling takes several batches for one.

    Args:
        dataset: the training prompts; several by name where each has a loader of its own, which
            never ends.

    Raises:
        ConfigError: if there are none.
    """
    steps = value_of(config, host_rules.STEPS)
    if not value_of(config, "data.use_multiple_dataloader", False):
        batch = value_of(config, host_rules.PROMPTS)
        if value_of(config, host_rules.DYNAMIC_SAMPLING, False):
            batch = int(batch * value_of(config, "grpo.batch_multiplier", 1))
        steps = min(steps, value_of(config, host_rules.EPOCHS) * (len(dataset) // batch))
        rule = f"leaves no RL step: the training data hold {len(dataset)} prompts"
        require(steps > 0, host_rules.PROMPTS, batch, rule)
    return steps


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nemo_apo.nemo_rl.run_grpo", description="Train with APO on NeMo-RL's GRPO."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, or a recipe")
    parser.add_argument("--nemo-rl", metavar="DIR", help="NeMo-RL's folder, with its examples")
    parser.add_argument("--check", action="store_true", help="check, print the settings, and end")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    return parser


def _master_config(master_config: type, config: Mapping[str, Any]) -> Any:
    """The host's classes for a copy of the configuration; a mistake that they find, as ours."""
    try:
        return master_config(**copy.deepcopy(dict(config)))
    except ValueError as error:
        details = getattr(error, "errors", list)()
        if not details:
            raise ConfigError(first_line(error)) from None
        key = ".".join(map(str, details[0]["loc"]))
        raise ConfigError(f"{key}: {details[0]['msg']}") from None


def _check_checkpoint(checkpointing: Any, settings: ApoSettings) -> None:
    """Refuse early what the policy factory would refuse once Ray has started."""
    from nemo_rl.utils.checkpoint import CheckpointManager

    from nemo_apo.nemo_rl.checkpoint import load_state

    checkpoints = CheckpointManager(checkpointing)
    weights, _ = checkpoints.get_resume_paths(checkpoints.get_latest_checkpoint_path())
    load_state(weights, settings)


def _complete_generation(policy: Any, tokenizer: Any) -> None:
    """What the sampler's section takes from the tokenizer."""
    from nemo_rl.models.generation import configure_generation_config

    policy["generation"] = configure_generation_config(
        policy["generation"],
        tokenizer,
        has_refit_draft_weights=bool(value_of(policy, "draft.enabled", False)),
        trains_mtp=bool(value_of(policy, "megatron_cfg.mtp_num_layers", 0)),
    )


@contextlib.contextmanager
def _closing(grpo: Any, checkpointer: Any, generation: Any, *environments: Any) -> Any:
    """End what a version has to be ended: main saves in the background, 0.7.0 leaves all to Ray."""
    manages = hasattr(checkpointer, "__exit__")
    try:
        with checkpointer if manages else contextlib.nullcontext():
            yield
    finally:
        if hasattr(grpo, "shutdown_environments"):
            grpo.shutdown_environments(*environments)
            _shut_down(generation)


def _shut_down(generation: Any) -> None:
    """End the sampler; should that fail, the run has ended all the same."""
    try:
        generation.shutdown()
    except Exception as error:
        _report(f"the sampler did not shut down: {error}")


def _report(line: str) -> None:
    print(line, flush=True)


def _leave(message: str) -> NoReturn:
    print(f"nemo-apo: {message}", file=sys.stderr)
    raise SystemExit(USER_ERROR)


if __name__ == "__main__":
    main()
