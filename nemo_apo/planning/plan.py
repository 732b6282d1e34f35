"""A layout checked, or the smallest one that fits found."""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nemo_apo.planning.communication import Traffic, communication
from nemo_apo.planning.layout import CONTEXT, PIPELINE, TENSOR, Layout, Refused, checked_layout
from nemo_apo.planning.memory import Memory, SamplerRoom, fullest_stage, gigabytes, sampler_room
from nemo_apo.planning.settings import Question
from nemo_apo.planning.shapes import Shapes

SIZES = {
    TENSOR: "tensor_model_parallel_size",
    PIPELINE: "pipeline_model_parallel_size",
    CONTEXT: "context_parallel_size",
}


@dataclass(frozen=True)
class Rejected:
    """Layouts over as many GPUs per copy of the model, none of which will do.

    Attributes:
        gpus: TP x PP x CP.
        reason: what the one that needs least memory needs; if none divides, why the first does not.
        layout: the one that needs least; None if none divides.
        needed: its bytes; 0 without it.
        considered: layouts that divide.
    """

    gpus: int
    reason: str
    layout: Layout | None
    needed: int
    considered: int


@dataclass(frozen=True)
class Plan:
    """A layout that fits.

    Attributes:
        question: what was asked.
        shapes, layout: the model and its layout.
        stage, memory: the fullest pipeline stage and its memory.
        traffic: communication of an optimizer step, by kind.
        sampler: the inference engine's share, if it has one.
        rejected: why each smaller TP x PP x CP was passed over.
    """

    question: Question
    shapes: Shapes
    layout: Layout
    stage: int
    memory: Memory
    traffic: dict[str, Traffic]
    sampler: SamplerRoom | None
    rejected: tuple[Rejected, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, with the sums that properties hold."""
        cluster = self.question.cluster
        return {
            **dataclasses.asdict(self),
            "parameters": self.shapes.parameters,
            "total_bytes": self.memory.total,
            "usable_bytes": cluster.usable,
            "pipeline_bubble": self.layout.bubble,
        }


def make_plan(question: Question) -> Plan:
    """The plan of the given layout; sizes left null are those of the smallest layout that fits.

    Among layouts of the same TP x PP x CP the one with the fewest stages comes first, since it
    idles least, then the one with the least context parallelism.

    Raises:
        Refused: if what is given does not divide, or nothing fits.
    """
    shapes = Shapes.of(question.model, question.vocab_size)
    rejected: list[Rejected] = []
    sizes = sorted(_sizes(question, shapes), key=_order)
    for gpus, same in itertools.groupby(sizes, key=math.prod):
        layouts, refusals = _layouts(question, shapes, same)
        for layout in layouts:
            stage, memory = fullest_stage(question, shapes, layout)
            if memory.total <= question.cluster.usable:
                return _plan(question, shapes, layout, stage, memory, tuple(rejected))
        rejected.append(_rejected(question, shapes, gpus, layouts, refusals))
    raise Refused(_refusal(question, shapes, rejected))


def _plan(
    question: Question,
    shapes: Shapes,
    layout: Layout,
    stage: int,
    memory: Memory,
    rejected: tuple[Rejected, ...],
) -> Plan:
    sampler = sampler_room(question, shapes, layout)
    traffic = communication(question, shapes, layout)
    return Plan(question, shapes, layout, stage, memory, traffic, sampler, rejected)


def _layouts(
    question: Question, shapes: Shapes, sizes: Iterable[tuple[int, int, int]]
) -> tuple[list[Layout], list[Refused]]:
    """The layouts that divide, and why the others do not."""
    layouts, refusals = [], []
    for tensor, pipeline, context in sizes:
        try:
            layouts.append(checked_layout(question, shapes, tensor, pipeline, context))
        except Refused as error:
            refusals.append(error)
    return layouts, refusals


def _order(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    tensor, pipeline, context = sizes
    return tensor * pipeline * context, pipeline, context


def _sizes(question: Question, shapes: Shapes) -> list[tuple[int, int, int]]:
    """Tensor, pipeline and context sizes to consider.

    Where they are not given: tensor ranks of one node, and powers of two of context ranks where the
    attention knows them. Sizes that the GPUs are no multiple of are left out unless all are.
    """
    parallel, cluster = question.parallel, question.cluster
    alone = question.workload.attention == "unfused"
    tensor = parallel.tensor_model_parallel_size
    pipeline = parallel.pipeline_model_parallel_size
    context = parallel.context_parallel_size
    powers = [1] if alone else [2**k for k in range(cluster.gpus.bit_length())]
    sizes = itertools.product(
        [tensor] if tensor else _divisors(cluster.gpus_per_node),
        [pipeline] if pipeline else _divisors(shapes.layers),
        [context] if context else powers,
    )
    every = list(sizes)
    return [one for one in every if cluster.gpus % math.prod(one) == 0] or every


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def _rejected(
    question: Question,
    shapes: Shapes,
    gpus: int,
    layouts: list[Layout],
    refusals: list[Refused],
) -> Rejected:
    if not layouts:
        return Rejected(gpus, str(refusals[0]), None, 0, 0)
    needs = [fullest_stage(question, shapes, layout)[1].total for layout in layouts]
    needed = min(needs)
    layout = layouts[needs.index(needed)]
    reason = f"{layout} needs {gigabytes(needed)}"
    return Rejected(gpus, reason, layout, needed, len(layouts))


def _refusal(question: Question, shapes: Shapes, rejected: list[Rejected]) -> str:
    """One sentence for a question without a layout."""
    dividing = [one for one in rejected if one.layout is not None]
    if not dividing:
        return rejected[0].reason
    closest = min(dividing, key=lambda one: one.needed)
    return _nothing_fits(question, shapes, closest, sum(one.considered for one in dividing))


def _nothing_fits(question: Question, shapes: Shapes, closest: Rejected, considered: int) -> str:
    """What was given, what it needs, what there is, and where the bytes are."""
    cluster, layout = question.cluster, closest.layout
    assert layout is not None
    stage, memory = fullest_stage(question, shapes, layout)
    parts = sorted(vars(memory).items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name.replace('_', '-')} {gigabytes(count)}" for name, count in parts[:3])
    least = f", the least demanding of {considered} layouts," if considered > 1 else ""
    return (
        f"{_given(question)}: {shapes.name} must fit in the {gigabytes(cluster.usable)} usable on "
        f"a GPU ({cluster.gpu}, {gigabytes(cluster.memory)}, less "
        f"cluster.reserve={cluster.reserve:g}); {layout}{least} needs "
        f"{gigabytes(memory.total)} on stage {stage} ({largest})"
        f"{_with_recompute(question)}"
    )


def _given(question: Question) -> str:
    """The setting that a person would change first, as ``key=value``."""
    given = {key: getattr(question.parallel, field) for key, field in SIZES.items()}
    written = [f"{key}={value}" for key, value in given.items() if value is not None]
    return ", ".join(written) or f"cluster.nodes={question.cluster.nodes}"


def _with_recompute(question: Question) -> str:
    """The end of a refusal: whether recomputing whole layers would help."""
    if question.parallel.recompute == "full":
        return ""
    parallel = dataclasses.replace(question.parallel, recompute="full")
    try:
        plan = make_plan(dataclasses.replace(question, parallel=parallel))
    except Refused:
        return "; parallel.recompute=full does not help"
    fits = f"{plan.layout} needs {gigabytes(plan.memory.total)}"
    return f"; with parallel.recompute=full {fits}"
