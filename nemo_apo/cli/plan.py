"""``nemo-apo plan``: what a layout costs each GPU, or the smallest layout that fits.

Computed, never measured: see ``docs/scaling.md``.
"""

import argparse
import json
import re
from pathlib import Path

from nemo_apo.config import ConfigError
from nemo_apo.planning.memory import GIGABYTE, gigabytes
from nemo_apo.planning.plan import Plan, make_plan
from nemo_apo.planning.settings import read_question
from nemo_apo.planning.tables import TABLES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="model=NAME and keys of the sections model, cluster, parallel, workload, sampler; "
        "docs/scaling.md lists them",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON too")
    parser.add_argument(
        "--tables",
        type=Path,
        metavar="FILE",
        help="plan nothing; fill in the tables of a Markdown file (docs/scaling.md)",
    )


def main(arguments: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        ConfigError: for a mistake, a layout that does not divide, or one that cannot fit.
    """
    if arguments.tables is not None:
        if arguments.overrides or arguments.json:
            raise ConfigError(f"--tables {arguments.tables}: takes no other argument")
        _write(arguments.tables, with_tables(_read(arguments.tables)))
        return
    plan = make_plan(read_question(arguments.overrides))
    if arguments.json is not None:
        _write(arguments.json, json.dumps(plan.as_dict(), indent=2) + "\n")
    print(plan_text(plan))


def plan_text(plan: Plan) -> str:
    """The plan for a person."""
    blocks = [_heading(plan), _memory(plan), _traffic(plan), _smaller(plan)]
    return "\n\n".join(filter(None, blocks))


def with_tables(text: str) -> str:
    """The text with a table between every ``<!-- table:NAME -->`` and ``<!-- end -->``.

    Raises:
        ConfigError: for a table that does not exist.
    """

    def filled(place: re.Match[str]) -> str:
        name = place.group(1)
        if name not in TABLES:
            raise ConfigError(f"table:{name}: must be one of {', '.join(TABLES)}")
        return f"<!-- table:{name} -->\n\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- table:(\S+) -->.*?<!-- end -->", filled, text, flags=re.DOTALL)


def _heading(plan: Plan) -> str:
    question, layout = plan.question, plan.layout
    cluster, workload, parallel = question.cluster, question.workload, question.parallel
    split = ", sequence parallel" if layout.sequence_parallel else ""
    chunks = f", {layout.virtual} chunks per stage" if layout.virtual > 1 else ""
    optimizer = "distributed" if parallel.distributed_optimizer else "replicated"
    rows = {
        "model": f"{plan.shapes.name}, {plan.shapes.parameters:,} parameters, "
        f"{question.model.params_dtype}",
        "cluster": f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}, "
        f"{gigabytes(cluster.usable)} usable of {gigabytes(cluster.memory)} each",
        "layout": f"{layout}{split}{chunks}, {optimizer} optimizer, recompute {parallel.recompute}",
        "step": f"{workload.sequences} sequences of {workload.sequence_length} tokens, "
        f"{layout.micro_batches} micro-batches of {workload.micro_batch_size} per GPU",
    }
    if layout.pipeline > 1:
        rows["pipeline"] = f"idles {layout.bubble:.1%} of its working time"
    return "\n".join(f"{label.ljust(8)}  {text}" for label, text in rows.items())


def _memory(plan: Plan) -> str:
    lines = [f"memory of a GPU of stage {plan.stage}, the fullest (computed, not measured)"]
    for part, count in vars(plan.memory).items():
        if count:
            lines.append(f"  {part.replace('_', '-').ljust(12)}{gigabytes(count):>12}")
    lines.append(f"  {'total'.ljust(12)}{gigabytes(plan.memory.total):>12}")
    lines.append(
        f"  {'free'.ljust(12)}{gigabytes(plan.question.cluster.usable - plan.memory.total):>12}"
    )
    room = plan.sampler
    if room is not None:
        lines.append(
            f"  the sampler's share: weights {gigabytes(room.weights)} (over {room.tensor} GPUs), "
            f"keys and values {gigabytes(room.cache)}, {room.cached_tokens:,} tokens"
        )
    return "\n".join(lines)


def _traffic(plan: Plan) -> str:
    lines = ["sent by a GPU in one optimizer step, at full bandwidth, nothing overlapped"]
    for kind, traffic in plan.traffic.items():
        if traffic.bytes:
            size = _sent(traffic.bytes)
            lines.append(f"  {kind.ljust(14)}{size:>12}{traffic.seconds:>10.3f} s  {traffic.link}")
    if len(lines) == 1:
        return "sent by a GPU in one optimizer step: nothing"
    return "\n".join(lines)


def _smaller(plan: Plan) -> str:
    if not plan.rejected:
        return ""
    lines = [f"smaller layouts, for {gigabytes(plan.question.cluster.usable)} usable"]
    for one in plan.rejected:
        others = f" (least of {one.considered} with this product)" if one.considered > 1 else ""
        lines.append(f"  TP x PP x CP = {one.gpus}: {one.reason}{others}")
    return "\n".join(lines)


def _sent(count: int) -> str:
    if count < 1e6:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < GIGABYTE else gigabytes(count)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--tables {path}: cannot be read: {error}") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from None
