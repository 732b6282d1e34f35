"""Bytes of one GPU while it trains.

With P parameters on the GPU, b bytes per number (2 for bfloat16) and n data x context ranks:

    weights        b P
    gradients      4 P                              float32, the buffer that is reduced
    optimizer      12 P (8 P for float32 weights)   main weights and two moments; / n if distributed
    activations    of a layer, times the layers and micro-batches in flight, see ``activations``

The micro-batches in flight are those of 1F1B and its interleaved form, arXiv 2104.04473. Adam's
bytes follow arXiv 1910.02054.
"""

from dataclasses import dataclass

from nemo_apo.planning.activations import (
    FLOAT,
    attention_core,
    layer_activations,
    local_tokens,
    residual,
    split,
    whole_layer,
)
from nemo_apo.planning.layout import Layout, Refused
from nemo_apo.planning.settings import Question
from nemo_apo.planning.shapes import Shapes

GIGABYTE = 1e9
# Vocabulary rows at a time in ``nemo_apo.parallel.logprobs``. A test holds the two equal: importing
# it from there would make arithmetic need that package's kernels.
LOG_PROB_CHUNK = 8192


def gigabytes(count: int) -> str:
    """Bytes for a person to read."""
    return f"{count / GIGABYTE:.1f} GB" if count >= GIGABYTE // 10 else f"{count / 1e6:.1f} MB"


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU of a pipeline stage, part by part.

    Attributes:
        weights, gradients, optimizer: of the parameters on this GPU.
        activations: kept between forward and backward, all micro-batches in flight.
        working: of the layer that is worked on.
        log_probs: workspace of log-probs and entropies; on the last stage.
        reference: a second copy of the weights.
        sampler: what the inference engine keeps.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    log_probs: int
    reference: int
    sampler: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(vars(self).values())


def stage_memory(question: Question, shapes: Shapes, layout: Layout, stage: int) -> Memory:
    """Memory of a GPU of a pipeline stage.

    The workspace of log-probs and that of a layer are never in use together, but a caching
    allocator rarely gives one to the other, so both count.
    """
    number = question.number_bytes
    parameters = stage_parameters(shapes, layout, stage)
    is_last = stage == layout.pipeline - 1
    kept = layout.in_flight(stage) * (shapes.layers // (layout.pipeline * layout.virtual))
    activations = kept * layer_activations(question, shapes, layout)
    if is_last:
        # The final norm's input and output.
        activations += 2 * residual(question, shapes, layout)
    return Memory(
        weights=number * parameters,
        gradients=FLOAT * parameters,
        optimizer=optimizer_bytes(question, parameters, layout.replicas),
        activations=activations,
        working=_working(question, shapes, layout),
        log_probs=log_prob_workspace(question, shapes, layout) if is_last else 0,
        reference=number * parameters if question.workload.reference_on_gpu else 0,
        sampler=int(question.cluster.memory * question.sampler.share),
    )


def fullest_stage(question: Question, shapes: Shapes, layout: Layout) -> tuple[int, Memory]:
    """The stage with the most memory, and its memory."""
    # A stage between the ends holds fewer micro-batches than the first, and no embedding.
    stages = sorted({0, layout.pipeline - 1})
    memories = [(stage, stage_memory(question, shapes, layout, stage)) for stage in stages]
    return max(memories, key=lambda pair: pair[1].total)


def stage_parameters(shapes: Shapes, layout: Layout, stage: int) -> int:
    """Parameters on one GPU of a stage; a tied embedding has a copy on the last stage."""
    layers = shapes.layers // layout.pipeline
    held = layers * (shapes.layer_divided // layout.tensor + shapes.layer_norms)
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    matrices = int(is_first) + int(is_last and not (is_first and shapes.tied))
    return held + matrices * (shapes.embedding // layout.tensor) + is_last * shapes.hidden


def optimizer_bytes(question: Question, parameters: int, replicas: int) -> int:
    """Adam's two moments in float32, and main weights where the weights are shorter."""
    numbers = 2 if question.number_bytes == FLOAT else 3
    shards = replicas if question.parallel.distributed_optimizer else 1
    return numbers * FLOAT * split(parameters, shards)


def _working(question: Question, shapes: Shapes, layout: Layout) -> int:
    """The layer in its backward pass: the feed-forward's gradients, input and input gradient.

    Under sequence parallelism the last two are gathered. What is computed again is held as well.
    """
    number, tokens = question.number_bytes, local_tokens(question, layout)
    feed_forward = 3 * number * split(tokens * shapes.feed_forward, layout.tensor)
    again = {
        "none": 0,
        "selective": attention_core(question, shapes, layout),
        "full": whole_layer(question, shapes, layout),
    }
    working = feed_forward + 2 * number * tokens * shapes.hidden
    return working + again[question.parallel.recompute]


def log_prob_workspace(question: Question, shapes: Shapes, layout: Layout) -> int:
    """Peak of ``linear_logprobs`` (mode "exact", Triton), read off its tensors.

    For T tokens, gathered over the tensor ranks, and chunks of c rows: a chunk of float32 logits
    and its slope; the float32 gradient of the hidden states, one chunk's product beside it and the
    hidden states themselves; one chunk's float32 product on its way to the gradient buffer.
    """
    number, tokens = question.number_bytes, local_tokens(question, layout)
    chunk = min(LOG_PROB_CHUNK, shapes.vocabulary // layout.tensor)
    per_token = chunk * (FLOAT + number) + shapes.hidden * (2 * FLOAT + number)
    return tokens * per_token + FLOAT * chunk * shapes.hidden


@dataclass(frozen=True)
class SamplerRoom:
    """How the inference engine's share of a GPU divides.

    Attributes:
        tensor: GPUs over which its weights are split.
        weights: bytes of its weights on a GPU.
        cache: bytes left to keys and values.
        cached_tokens: tokens whose keys and values fit there.
    """

    tensor: int
    weights: int
    cache: int
    cached_tokens: int


def sampler_room(question: Question, shapes: Shapes, layout: Layout) -> SamplerRoom | None:
    """The share of the inference engine, divided; None where it keeps nothing.

    Raises:
        Refused: if its GPUs do not divide, or its share cannot hold the weights and one sequence.
    """
    share = int(question.cluster.memory * question.sampler.share)
    if share == 0:
        return None
    tensor = question.sampler.tensor_model_parallel_size or layout.tensor
    _check_sampler_size(question, shapes, tensor)
    number = question.number_bytes
    weights = number * split(shapes.parameters, tensor)
    per_token = 2 * number * shapes.layers * shapes.key_width // tensor
    cache = share - weights
    if cache < per_token * question.workload.sequence_length:
        raise Refused(
            f"sampler.share={question.sampler.share}: must hold the sampler's weights and one "
            f"sequence, {gigabytes(weights)} and "
            f"{gigabytes(per_token * question.workload.sequence_length)} on "
            f"each of its {tensor} GPUs, and is {gigabytes(share)}"
        )
    return SamplerRoom(tensor, weights, cache, cache // per_token)


def _check_sampler_size(question: Question, shapes: Shapes, tensor: int) -> None:
    for key, value in (
        ("cluster.gpus_per_node", question.cluster.gpus_per_node),
        ("model.num_query_groups", shapes.groups),
    ):
        if value % tensor:
            raise Refused(f"sampler.tensor_model_parallel_size={tensor}: must divide {key}={value}")
