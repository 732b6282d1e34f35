"""``nemo-apo train``: compose, check, then train, or with ``run.dry_run=true`` print the plan."""

import argparse
import contextlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace

from nemo_apo.cli.dry_run import plan
from nemo_apo.cli.overrides import add_config_arguments, composed
from nemo_apo.compose.hf_model import check_checkpoint
from nemo_apo.config import Config, ConfigError, RunConfig, require
from nemo_apo.config_rules import check_task_data, validate
from nemo_apo.grading import GradingBroken
from nemo_apo.grading.service import check_grader
from nemo_apo.planning.memory import gigabytes
from nemo_apo.planning.run_memory import run_memory
from nemo_apo.trainer.transformer_impl import chosen_impl

# How the warnings start that are about what this trainer chose on purpose.
_FALLBACKS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
)
_CHECKPOINTING = (r"megatron\.core\.dist_checkpointing", r"torch\.distributed\.checkpoint")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_config_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    """Train by the composed configuration.

    Raises:
        ConfigError: for a configuration that cannot be run, before any process group or file.
        SystemExit: with status 1 if training cannot go on, with ``EXIT_STOPPED_EARLY`` after a
            signal or ``run.max_time``.
    """
    config = composed(arguments)
    ranks = world_size()
    dry = config.run.dry_run
    validate(config, ranks, reads_files=not dry)
    require_grader(config)
    if config.run.check_memory:
        _check_memory(config, ranks, gpu_memory(config.parallel.backend))
    first = os.environ.get("RANK", "0") == "0"
    if dry:
        if first:
            print(plan(config, ranks), flush=True)
        validate(config, ranks)
        check_checkpoint(config)
    require_transformer_impl(config)
    for line in check_task_data(config):
        if first:
            print(line, flush=True)
    if dry:
        return
    ignore_fallback_warnings()
    _require_packages_of(config.run)
    from nemo_apo.trainer.loop import run

    with ended_by_status("run.if_exists=resume goes on"):
        run(config)


@contextlib.contextmanager
def ended_by_status(how_to_go_on: str) -> Iterator[None]:
    """Work of the ranks; what ends it early becomes an exit status and one message.

    Args:
        how_to_go_on: said after a signal or ``run.max_time``.

    Raises:
        SystemExit: see ``main``.
    """
    from nemo_apo.parallel.liveness import RanksLost
    from nemo_apo.trainer.interruption import EXIT_STOPPED_EARLY, StoppedEarly
    from nemo_apo.trainer.run_folder import TrainingStopped

    first = os.environ.get("RANK", "0") == "0"
    try:
        yield
    except StoppedEarly as stopped:
        if first:
            print(f"nemo-apo: stopped early: {stopped}; {how_to_go_on}", flush=True)
        raise SystemExit(EXIT_STOPPED_EARLY) from None
    except RanksLost as lost:
        # Any rank may be the one that says it. What is left of the groups would wait at an
        # orderly end.
        print(f"nemo-apo: {lost}", file=sys.stderr, flush=True)
        os._exit(1)
    except (TrainingStopped, GradingBroken) as stopped:
        raise SystemExit(f"nemo-apo: {stopped}" if first else 1) from None


def on_gpus(backend: str) -> bool:
    """Whether a run with this ``parallel.backend`` is on GPUs here."""
    import torch

    return backend != "gloo" and torch.cuda.is_available()


def gpu_memory(backend: str) -> int | None:
    """Bytes of the first GPU; None where the run is not on GPUs."""
    import torch

    if not on_gpus(backend):
        return None
    return torch.cuda.get_device_properties(0).total_memory


def _check_memory(config: Config, ranks: int, available: int | None) -> None:
    """Raise ``ConfigError`` if a rank needs more memory than its GPU has in all."""
    if available is None:
        return
    layers = chosen_impl(config.model, on_gpu=True)
    config = replace(config, model=replace(config.model, transformer_impl=layers))
    memory, parallel = run_memory(config, ranks), config.parallel
    require(
        memory.total <= available,
        "parallel (TP x PP x CP)",
        f"{parallel.tensor_model_parallel_size}x{parallel.pipeline_model_parallel_size}"
        f"x{parallel.context_parallel_size}",
        f"a rank needs {memory} and its GPU has {gigabytes(available)}; more ranks per copy of the "
        "model, smaller micro-batches or parallel.recompute need less (nemo-apo plan), and "
        "run.check_memory=false tries it all the same",
    )


def require_transformer_impl(config: Config) -> None:
    """Raise ``ConfigError`` for transformer layers that cannot run on this machine."""
    chosen_impl(config.model, on_gpus(config.parallel.backend))


def require_grader(config: Config) -> None:
    """Raise ``ConfigError`` for a grader that a worker cannot import or call."""
    try:
        check_grader(config.grading, config.task)
    except GradingBroken as broken:
        raise ConfigError(f"grading.grader={config.grading.grader}: {broken}") from None


def ignore_fallback_warnings() -> None:
    """megatron-core says at import, several times over, what it uses without Apex and TE.

    The embedded trainer chooses those fallbacks itself, and the README states it.
    """
    for message in _FALLBACKS:
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    # What megatron's and torch's own code for checkpoints will have to change in itself.
    for module in _CHECKPOINTING:
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


def world_size() -> int:
    """Number of ranks that torchrun started; 1 without it."""
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"WORLD_SIZE={value}: must be a whole number, at least 1")
    return int(value)


def _require_packages_of(run: RunConfig) -> None:
    """Raise ``ConfigError`` if training would fail, perhaps at its end, for a missing package."""
    needed = {"megatron": "trainer"}
    if run.tensorboard:
        needed["tensorboard"] = "trainer"
    if run.report:
        needed |= dict.fromkeys(("matplotlib", "plotly", "jinja2"), "report")
    if run.wandb:
        needed["wandb"] = "wandb"
    require_packages(needed)


def require_packages(needed: Mapping[str, str]) -> None:
    """Raise ``ConfigError`` for a package that is missing; the extra of each brings it."""
    for package, extra in needed.items():
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"this run needs {package}, which is not installed: pip install 'nemo_apo[{extra}]'"
            )
