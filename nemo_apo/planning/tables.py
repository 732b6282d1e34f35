"""The tables of ``docs/scaling.md``, in Markdown."""

import dataclasses
from collections.abc import Callable, Iterable

from nemo_apo.planning.communication import communication
from nemo_apo.planning.layout import Refused, checked_layout
from nemo_apo.planning.memory import GIGABYTE, fullest_stage
from nemo_apo.planning.plan import Plan, make_plan
from nemo_apo.planning.settings import Cluster, Parallel, Question, Workload, model_named
from nemo_apo.planning.shapes import Shapes

MODELS = ("qwen3_1.7b", "qwen3_4b", "qwen3_8b", "qwen3_14b", "qwen3_32b")
NODES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
GPUS = ("h100", "h200")
NONE_FITS = "none fits"


def models() -> str:
    """Sizes and parameter counts."""
    head = ["model", "layers", "hidden", "feed-forward", "heads", "groups", "tied", "parameters"]
    rows = []
    for name in MODELS:
        shapes = _shapes(name)
        sizes = (shapes.layers, shapes.hidden, shapes.feed_forward, shapes.heads, shapes.groups)
        tied = "yes" if shapes.tied else "no"
        rows.append([name, *map(str, sizes), tied, f"{shapes.parameters:,}"])
    return _table(head, rows)


def nodes() -> str:
    """The smallest layout for every model and cluster."""
    head = ["model", "nodes", "GPUs"]
    head += [f"{gpu.upper()}: {what}" for gpu in GPUS for what in ("TP·PP·CP·DP", "GB", "s")]
    rows = []
    for name in MODELS:
        for count in NODES:
            answers = [_answer(_question(name, nodes=count, gpu=gpu)) for gpu in GPUS]
            cells = [cell for answer in answers for cell in _short(answer)]
            rows.append([name, str(count), str(8 * count), *cells])
    return _table(head, rows)


def parts() -> str:
    """Memory and communication part by part, for the smallest layouts on 4 nodes."""
    plans = [make_plan(_question(name, nodes=4)) for name in MODELS]
    rows = [["layout", *map(_dots, plans)]]
    for part in vars(plans[0].memory):
        counts = [getattr(plan.memory, part) for plan in plans]
        rows += [[f"{part.replace('_', '-')}, GB", *map(_gb, counts)]] if any(counts) else []
    rows.append(["total, GB", *(_gb(plan.memory.total) for plan in plans)])
    for kind in plans[0].traffic:
        counts = [plan.traffic[kind].bytes for plan in plans]
        rows += [[f"{kind}, GB sent", *map(_sent, counts)]] if any(counts) else []
    rows.append(["seconds at full bandwidth", *map(_seconds, plans)])
    return _table(["", *MODELS], rows)


def lengths() -> str:
    """The smallest layout by sequence length, as much kept as possible and as little."""
    head = ["model", "tokens"]
    head += [f"{kind}: {what}" for kind in ("none", "full") for what in ("TP·PP·CP·DP", "GB", "s")]
    rows = []
    for name in ("qwen3_8b", "qwen3_32b"):
        for length in LENGTHS:
            answers = [
                _answer(_question(name, nodes=4, length=length, recompute=recompute))
                for recompute in ("none", "full")
            ]
            cells = [cell for answer in answers for cell in _short(answer)]
            rows.append([name, str(length), *cells])
    return _table(head, rows)


def sizes() -> str:
    """Qwen3-8B on 4 nodes, one parallel size changed at a time, whether it fits or not."""
    question = _question("qwen3_8b", nodes=4, length=8192)
    shapes = Shapes.of(question.model, question.vocab_size)
    one_by_one = [(n, 1, 1) for n in (1, 2, 4, 8)]
    one_by_one += [(1, n, 1) for n in (2, 4)] + [(1, 1, n) for n in (2, 4)]
    rows = [_layout_row(question, shapes, *layout) for layout in (*one_by_one, (2, 2, 2))]
    parts = ("weights", "gradients", "optimizer", "activations", "total")
    kinds = ("tensor", "pipeline", "context", "data")
    return _table(["TP·PP·CP·DP", *parts, *(f"{kind}, GB sent" for kind in kinds)], rows)


def _layout_row(
    question: Question, shapes: Shapes, tensor: int, pipeline: int, context: int
) -> list[str]:
    layout = checked_layout(question, shapes, tensor, pipeline, context)
    _, memory = fullest_stage(question, shapes, layout)
    traffic = communication(question, shapes, layout)
    held = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
    sent = (traffic[kind].bytes for kind in ("tensor", "pipeline", "context", "data"))
    first = f"{tensor}·{pipeline}·{context}·{layout.data}"
    return [first, *map(_gb, held), *map(_sent, sent)]


TABLES: dict[str, Callable[[], str]] = {
    "models": models,
    "nodes": nodes,
    "parts": parts,
    "lengths": lengths,
    "sizes": sizes,
}


def _question(
    name: str, nodes: int, gpu: str = "h100", length: int = 4096, recompute: str = "none"
) -> Question:
    return Question(
        model=model_named(name),
        cluster=Cluster(nodes=nodes, gpu=gpu),
        parallel=Parallel(recompute=recompute),
        workload=dataclasses.replace(Workload(), sequence_length=length),
    )


def _shapes(name: str) -> Shapes:
    question = _question(name, nodes=1)
    return Shapes.of(question.model, question.vocab_size)


def _answer(question: Question) -> Plan | None:
    try:
        return make_plan(question)
    except Refused:
        return None


def _short(plan: Plan | None) -> list[str]:
    if plan is None:
        return [NONE_FITS, "", ""]
    return [_dots(plan), _gb(plan.memory.total), _seconds(plan)]


def _dots(plan: Plan) -> str:
    layout = plan.layout
    return f"{layout.tensor}·{layout.pipeline}·{layout.context}·{layout.data}"


def _gb(count: int) -> str:
    return f"{count / GIGABYTE:.1f}"


def _sent(count: int) -> str:
    size = count / GIGABYTE
    if 0.0 < size < 0.001:
        return "<0.001"
    return f"{size:,.0f}" if size >= 10.0 else f"{size:.2g}"


def _seconds(plan: Plan) -> str:
    return f"{sum(traffic.seconds for traffic in plan.traffic.values()):.2f}"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
