"""``nemo-apo bench``: measure the log-prob kernel or the trainer's optimizer steps."""

import argparse
import importlib.util
import os
import sys
import warnings
from pathlib import Path

from nemo_apo.cli.output_files import require_writable
from nemo_apo.cli.overrides import add_config_arguments
from nemo_apo.cli.train import require_transformer_impl, world_size
from nemo_apo.compose import compose
from nemo_apo.config import ConfigError
from nemo_apo.config_rules import validate

DEVICES = ("cpu", "cuda")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two benchmarks and their options."""
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    _add_logprobs(
        benchmarks.add_parser("logprobs", help="log-probs from hidden states, against other ways")
    )
    _add_step(benchmarks.add_parser("step", help="the trainer's optimizer steps, by parts"))


def _add_logprobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", nargs="+", type=_count, default=[1024, 4096], metavar="T")
    parser.add_argument("--hidden", type=_count, default=1024, metavar="H")
    parser.add_argument("--vocab", type=_count, default=151936, metavar="V")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], help="bf16, fp32 or both")
    parser.add_argument("--mode", nargs="+", default=["exact", "bf16"], help="of this kernel")
    parser.add_argument(
        "--variants", nargs="+", help="unless given, all that can run here at some speed"
    )
    parser.add_argument("--repeats", type=_count, default=5)
    parser.add_argument("--threads", type=_count, default=1, help="of the CPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")


def _add_step(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--sequences", type=_count, default=2048, metavar="N")
    parser.add_argument("--length", type=_count, default=64, help="completion tokens of each")
    parser.add_argument("--vocab", type=_count, metavar="V", help="the task's unless given")
    parser.add_argument("--repeats", type=_count, default=3)
    parser.add_argument(
        "--peak-tflops",
        type=_positive,
        help="the device's peak in 1e12 operations per second, for the utilisation",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")


def main(arguments: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        ConfigError: for a value that cannot be measured, before anything is.
    """
    require_writable("--json", arguments.json)
    # megatron-core says at import what it does without Apex and Transformer Engine.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    {"logprobs": _logprobs, "step": _step}[arguments.benchmark](arguments)


def _logprobs(arguments: argparse.Namespace) -> None:
    from nemo_apo.bench import logprobs, machine, report
    from nemo_apo.bench.variants import VARIANTS, default_variants
    from nemo_apo.parallel.logprobs import MODES

    variants = arguments.variants or default_variants(arguments.device)
    _among("--dtype", arguments.dtype, logprobs.DTYPES)
    _among("--mode", arguments.mode, MODES)
    _among("--variants", variants, VARIANTS)
    _among("--device", [arguments.device], DEVICES)
    _check_device(arguments.device)
    if world_size() > 1:
        raise ConfigError(f"bench logprobs runs on one rank, not on {world_size()}")
    request = logprobs.Request(
        tokens=tuple(arguments.tokens),
        hidden=arguments.hidden,
        vocab=arguments.vocab,
        dtypes=tuple(dict.fromkeys(arguments.dtype)),
        modes=tuple(dict.fromkeys(arguments.mode)),
        variants=tuple(dict.fromkeys(variants)),
        repeats=arguments.repeats,
        threads=arguments.threads,
        device=arguments.device,
    )
    result = logprobs.run(request, _say)
    notes = [f"left out: {name}: {reason}" for name, reason in result.left_out.items()]
    described = machine.machine(arguments.device)
    title = f"{described.get('gpu', described['processor'])}, medians of {arguments.repeats}"
    report.print_table(result.rows, title, notes)
    if arguments.json is not None:
        report.write_json(
            arguments.json, result.rows, described, machine.versions(), result.left_out
        )


def _step(arguments: argparse.Namespace) -> None:
    _require_megatron()
    from nemo_apo.bench import machine, report, step

    overrides = [*step.OVERRIDES, *arguments.overrides]
    config = compose(overrides, arguments.config, arguments.config_dir)
    request = step.Request(
        sequences=arguments.sequences,
        length=arguments.length,
        vocab=arguments.vocab,
        repeats=arguments.repeats,
        peak_tflops=arguments.peak_tflops,
    )
    config = step.fit(config, request)
    validate(config, world_size())
    require_transformer_impl(config)
    row, device = step.run(config, request)
    if os.environ.get("RANK", "0") != "0":
        return
    described = machine.machine(device)
    title = f"{described.get('gpu', described['processor'])}, medians of {arguments.repeats}"
    report.print_fields(row, title)
    if arguments.json is not None:
        report.write_json(arguments.json, [row], described, machine.versions(), {})


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be > 0 and finite, got {text}")
    return value


def _among(option: str, values: list[str], choices: object) -> None:
    names = list(choices)  # type: ignore[call-overload]
    for value in values:
        if value not in names:
            raise ConfigError(f"{option} {value}: must be one of {', '.join(names)}")


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here")
    if device == "cpu" and torch.cuda.is_available():
        raise ConfigError("--device cpu: hide the GPUs with CUDA_VISIBLE_DEVICES= first")


def _require_megatron() -> None:
    if importlib.util.find_spec("megatron") is None:
        raise ConfigError(
            "bench step needs megatron, which is not installed: pip install 'nemo_apo[trainer]'"
        )


def _say(text: str) -> None:
    """Progress goes to stderr: stdout holds the table."""
    print(text, file=sys.stderr, flush=True)
