"""Bytes that a GPU sends in one optimizer step, and the seconds they take at full bandwidth.

Rings are assumed: over n ranks and a tensor of S bytes a GPU sends (n - 1) / n S for an all-gather
or a reduce-scatter and twice that for an all-reduce. With T tokens of a micro-batch on this context
rank, A = b T h bytes of hidden states, M micro-batches, l layers on the GPU, t tensor ranks:

    tensor, sequence parallel   l M 10 all-gathers or reduce-scatters of A; 14 with recompute=full
    tensor alone                l M 4 all-reduces of A; 6 with recompute=full
    pipeline                    M A to the next stage and M A back, for each chunk; / t under
                                sequence parallelism
    context                     l M 3 (c - 1) times the keys and values of T tokens; 4 where
                                attention is computed again; 2 and 3 for attention=gathered
    data                        reduce-scatter of 4 P and all-gather of b P; one all-reduce of 4 P
                                without the distributed optimizer
    group scalars               8 float64 per sequence, all-gathered over the data ranks

Tensor parallelism is that of arXiv 1909.08053, sequence parallelism that of 2205.05198 (gathered
inputs are gathered again in the backward pass). Context parallelism is the ring of 2310.01889; its
backward pass sends keys and values once more, and their gradients. The distributed optimizer is the
first stage of 1910.02054. The ends of the model add the embedding's sum and, in the log-probs, a
gather of the hidden states and the sum of their float32 gradient. Forward passes without gradient
(old and reference log-probs) and sampling are not part of an optimizer step.
"""

from dataclasses import dataclass

from nemo_apo.planning.activations import FLOAT, local_tokens
from nemo_apo.planning.layout import Layout
from nemo_apo.planning.memory import GIGABYTE, stage_parameters
from nemo_apo.planning.settings import Cluster, Question
from nemo_apo.planning.shapes import Shapes

SCALARS = 8
DOUBLE = 8


@dataclass(frozen=True)
class Traffic:
    """What one kind of parallelism sends.

    Attributes:
        bytes: from one GPU in one optimizer step.
        link: "NVLink" or "InfiniBand", whichever the group's slowest hop takes.
        seconds: the same at full bandwidth, without latency and without overlap.
    """

    bytes: int
    link: str
    seconds: float


def communication(question: Question, shapes: Shapes, layout: Layout) -> dict[str, Traffic]:
    """The traffic of a GPU on the last stage, by kind."""
    sent = {
        "tensor": _tensor(question, shapes, layout),
        "context": _context(question, shapes, layout),
        "data": _data(question, shapes, layout),
        "group scalars": _scalars(question, layout),
        "pipeline": _pipeline(question, shapes, layout),
    }
    places = _places(layout)
    return {kind: _traffic(question.cluster, count, *places[kind]) for kind, count in sent.items()}


def _places(layout: Layout) -> dict[str, tuple[int, int]]:
    """For each kind the ranks of its group and how far apart their numbers are."""
    inner = layout.tensor * layout.context
    return {
        "tensor": (layout.tensor, 1),
        "context": (layout.context, layout.tensor),
        # Data and context ranks together hold the same weights.
        "data": (layout.replicas, layout.tensor),
        "group scalars": (layout.data, inner),
        "pipeline": (layout.pipeline, inner * layout.data),
    }


def _traffic(cluster: Cluster, count: int, ranks: int, stride: int) -> Traffic:
    if ranks * stride <= cluster.gpus_per_node:
        return Traffic(count, "NVLink", count / (cluster.nvlink_gb_per_s * GIGABYTE))
    # A group's ranks in one node have as many network ports, and its rings use all of them.
    ports = max(1, cluster.gpus_per_node // stride)
    speed = min(ports * cluster.infiniband_gb_per_s, cluster.nvlink_gb_per_s)
    return Traffic(count, "InfiniBand", count / (speed * GIGABYTE))


def _ring(count: int, ranks: int) -> int:
    """Bytes sent for an all-gather or a reduce-scatter of a tensor of ``count`` bytes."""
    return count * (ranks - 1) // ranks


def _tensor(question: Question, shapes: Shapes, layout: Layout) -> int:
    hidden = question.number_bytes * local_tokens(question, layout) * shapes.hidden
    layers = shapes.layers // layout.pipeline
    again = question.parallel.recompute == "full"
    # The last stage has the log-probs: with sequence parallelism hidden states gathered and their
    # gradient scattered, else their float32 gradient summed. Alone it has the embedding too.
    if layout.sequence_parallel:
        per_layer, embedding, log_probs = (14 if again else 10), 2, 2 * hidden
    else:
        per_layer, embedding = 2 * (6 if again else 4), 2
        log_probs = 2 * FLOAT * hidden // question.number_bytes
    ends = embedding if layout.pipeline == 1 else 0
    return layout.micro_batches * _ring(
        (per_layer * layers + ends) * hidden + log_probs, layout.tensor
    )


def _context(question: Question, shapes: Shapes, layout: Layout) -> int:
    keys_and_values = 2 * shapes.key_width * question.number_bytes // layout.tensor
    block = local_tokens(question, layout) * keys_and_values
    # Forward and backward of a gather; the ring sends keys and values in the backward pass again.
    passes = 2 if question.workload.attention == "gathered" else 3
    passes += question.parallel.recompute != "none"
    layers = shapes.layers // layout.pipeline
    return layout.micro_batches * layers * passes * (layout.context - 1) * block


def _data(question: Question, shapes: Shapes, layout: Layout) -> int:
    parameters = stage_parameters(shapes, layout, layout.pipeline - 1)
    gradients, weights = FLOAT * parameters, question.number_bytes * parameters
    if question.parallel.distributed_optimizer:
        return _ring(gradients + weights, layout.replicas)
    return _ring(2 * gradients, layout.replicas)


def _scalars(question: Question, layout: Layout) -> int:
    return _ring(SCALARS * DOUBLE * question.workload.sequences, layout.data)


def _pipeline(question: Question, shapes: Shapes, layout: Layout) -> int:
    """Sends of a middle stage; with two stages of one chunk each there is none."""
    if layout.pipeline == 1:
        return 0
    hidden = question.number_bytes * local_tokens(question, layout) * shapes.hidden
    directions = 1 if layout.pipeline == 2 and layout.virtual == 1 else 2
    sends = directions * layout.virtual * layout.micro_batches
    return sends * hidden // layout.residual_split
