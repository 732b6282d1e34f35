"""The ``nemo-apo`` command: one file per subcommand, listed in ``COMMANDS``.

A subcommand's module has ``add_arguments(parser)``, which declares its arguments, and
``main(arguments)``, which does the work and raises ``ConfigError`` for a mistake of the user. Such
a mistake ends the process with status 2 and one message on stderr.
"""

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from nemo_apo import __version__
from nemo_apo.cli import bench as bench_command
from nemo_apo.cli import config as config_command
from nemo_apo.cli import doctor as doctor_command
from nemo_apo.cli import eval as eval_command
from nemo_apo.cli import export as export_command
from nemo_apo.cli import launch as launch_command
from nemo_apo.cli import plan as plan_command
from nemo_apo.cli import report as report_command
from nemo_apo.cli import results as results_command
from nemo_apo.cli import train as train_command
from nemo_apo.config import ConfigError

USER_ERROR = 2


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        summary: one line for ``nemo-apo --help``.
        examples: lines shown at the end of its own help.
        add_arguments, main: of its module.
    """

    summary: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    main: Callable[[argparse.Namespace], None]


COMMANDS: dict[str, Command] = {
    "train": Command(
        summary="train, and write a run folder with metrics, checkpoints and a report",
        examples=(
            "nemo-apo train                                  the default run: runs/quickstart",
            "nemo-apo train run.dry_run=true                 check everything, train nothing",
            "nemo-apo train experiment=graded run.steps=100  a shipped experiment, changed",
            "nemo-apo train objective=gspo run.name=gspo     another objective",
            "nemo-apo train --config mine.yaml run.seed=1    your differences from a file",
            "torchrun --nproc-per-node 4 -m nemo_apo train parallel=tp2    TP 2 x DP 2",
        ),
        add_arguments=train_command.add_arguments,
        main=train_command.main,
    ),
    "launch": Command(
        summary="train on a Slurm cluster: render a job script, submit it, follow it",
        examples=(
            "nemo-apo launch slurm cluster.nodes=4 cluster.partition=h100 --dry-run    the script",
            "nemo-apo launch slurm cluster=mine.yaml run.name=first --follow",
            "nemo-apo launch slurm --sweep objective=apo,gspo run.seed=0,1,2    a job array",
            "nemo-apo launch slurm cluster=cpu cluster.nodes=2 parallel=tp2",
        ),
        add_arguments=launch_command.add_arguments,
        main=launch_command.main,
    ),
    "doctor": Command(
        summary="check the nodes that a job would use, and say what to do about each finding",
        examples=(
            "nemo-apo doctor                            this machine",
            "srun -N 4 --ntasks-per-node=1 nemo-apo doctor --gpus 8 --shared runs",
            "torchrun --nproc-per-node 2 -m nemo_apo doctor",
        ),
        add_arguments=doctor_command.add_arguments,
        main=doctor_command.main,
    ),
    "eval": Command(
        summary="evaluate a checkpoint on held-out prompts: accuracy, pass@k, majority vote",
        examples=(
            "nemo-apo eval runs/quickstart                   the newest checkpoint of a run",
            "nemo-apo eval runs/quickstart --checkpoint best evaluation.prompts=2000",
            "nemo-apo eval runs/quickstart --checkpoint 40 --json 40.json --samples 40.jsonl",
            "nemo-apo eval runs/mine/checkpoints/step_000040 evaluation.pass_samples=64",
            "nemo-apo eval model=hf model.path=MODEL task=math task.tokenizer=MODEL    untrained",
            "torchrun --nproc-per-node 2 -m nemo_apo eval runs/quickstart parallel=tp2",
        ),
        add_arguments=eval_command.add_arguments,
        main=eval_command.main,
    ),
    "report": Command(
        summary="write report.html and report.png of one run, or of several overlaid",
        examples=(
            "nemo-apo report runs/quickstart            into runs/quickstart",
            "nemo-apo report runs/apo runs/gspo         both in one report, into runs/report",
            "nemo-apo report runs/* --out compared      into compared",
        ),
        add_arguments=report_command.add_arguments,
        main=report_command.main,
    ),
    "config": Command(
        summary="print the complete configuration, or list what can be chosen",
        examples=(
            "nemo-apo config                            every key with its default",
            "nemo-apo config objective=gspo             what a run with these overrides would use",
            "nemo-apo config --groups                   objectives, schedules, experiments, ...",
        ),
        add_arguments=config_command.add_arguments,
        main=config_command.main,
    ),
    "export": Command(
        summary="write a run's weights as a folder that Hugging Face's transformers loads",
        examples=(
            "nemo-apo export runs/mine exported/mine         the newest whole checkpoint",
            "nemo-apo export runs/mine/checkpoints/step_000040 exported/step40 --dtype float32",
        ),
        add_arguments=export_command.add_arguments,
        main=export_command.main,
    ),
    "plan": Command(
        summary="memory and communication per GPU of a layout, on paper, or the smallest that fits",
        examples=(
            "nemo-apo plan model=qwen3_8b cluster.nodes=4    propose the smallest layout that fits",
            "nemo-apo plan model=qwen3_8b parallel.tensor_model_parallel_size=4   keep this size",
            "nemo-apo plan model=qwen3_32b cluster.nodes=8 cluster.gpu=h200 sequence_length=32768",
            "nemo-apo plan model=qwen3_8b --json plan.json   as JSON too",
        ),
        add_arguments=plan_command.add_arguments,
        main=plan_command.main,
    ),
    "results": Command(
        summary="run the studies behind docs/results.md and fill in its tables",
        examples=("nemo-apo results --studies exact --jobs 2",),
        add_arguments=results_command.add_arguments,
        main=results_command.main,
    ),
    "bench": Command(
        summary="measure the log-prob kernel or the trainer's optimizer steps",
        examples=(
            "nemo-apo bench logprobs --tokens 1024 --dtype bf16 --json logprobs.json",
            "nemo-apo bench logprobs --device cuda           the same on a GPU",
            "nemo-apo bench step objective=gspo              what an optimizer step spends",
            "torchrun --nproc-per-node 2 -m nemo_apo bench step parallel=tp2",
        ),
        add_arguments=bench_command.add_arguments,
        main=bench_command.main,
    ),
}


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and leave."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1, 2 for a user's mistake, or 130."""
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        COMMANDS[arguments.command].main(arguments)
    except ConfigError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader, such as `head`, left. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _fail(error: ConfigError) -> int:
    """Say once, on the first rank only, what is wrong; every rank ends with the same status."""
    if os.environ.get("RANK", "0") == "0":
        print(f"nemo-apo: {error}", file=sys.stderr)
    return USER_ERROR


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    if not argv:
        parser.print_help()
        raise SystemExit(0)
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise ConfigError(_unknown_command(argv[0]))
    arguments, rest = parser.parse_known_args(argv)
    # argparse leaves over the overrides that stand behind an option; their order is kept.
    stray = [text for text in rest if text.startswith("-") or not hasattr(arguments, "overrides")]
    if stray:
        parser.error(f"unrecognized argument {stray[0]}")
    if rest:
        arguments.overrides += rest
    return arguments


def _unknown_command(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"there is no command {name}, only {', '.join(COMMANDS)}{hint}"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nemo-apo",
        description="APO (Alpha-Divergence Preference Optimization): train and look at results.",
        epilog=_epilog(
            "nemo-apo train run.dry_run=true    check that everything is in place",
            "nemo-apo train                     train the default run (minutes on a laptop)",
            "nemo-apo train --help              more about a command",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nemo-apo {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=_epilog(*command.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
    return parser


def _epilog(*examples: str) -> str:
    return "examples:\n" + "\n".join(f"  {example}" for example in examples)
