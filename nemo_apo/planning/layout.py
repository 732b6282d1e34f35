"""A layout of GPUs, and what it has to divide.

Ranks are numbered as megatron-core does by default: tensor ranks side by side, then context, data
and pipeline ranks. What stands next to each other shares a node.
"""

from dataclasses import dataclass

from nemo_apo.config import ConfigError
from nemo_apo.planning.settings import Question
from nemo_apo.planning.shapes import Shapes

TENSOR = "parallel.tensor_model_parallel_size"
PIPELINE = "parallel.pipeline_model_parallel_size"
CONTEXT = "parallel.context_parallel_size"
VIRTUAL = "parallel.virtual_pipeline_model_parallel_size"


class Refused(ConfigError):
    """A layout that cannot be launched; the message names key, value, rule and the numbers."""


@dataclass(frozen=True)
class Layout:
    """How the GPUs share the work.

    Attributes:
        tensor, pipeline, context, data: parallel sizes; their product is the number of GPUs.
        virtual: model chunks per pipeline stage.
        sequence_parallel: norms and residuals are split over the tensor ranks.
        micro_batches: forward and backward passes of a GPU per optimizer step.
    """

    tensor: int
    pipeline: int
    context: int
    data: int
    virtual: int
    sequence_parallel: bool
    micro_batches: int

    @property
    def model_ranks(self) -> int:
        """GPUs that share one copy of the model, TP x PP x CP."""
        return self.tensor * self.pipeline * self.context

    @property
    def replicas(self) -> int:
        """GPUs that hold the same weights, over which the distributed optimizer is split."""
        return self.data * self.context

    @property
    def residual_split(self) -> int:
        """Over how many GPUs norms and residuals are split, apart from context parallelism."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def bubble(self) -> float:
        """Idle time of the pipeline over its working time, equal stages assumed."""
        return (self.pipeline - 1) / (self.virtual * self.micro_batches)

    def in_flight(self, stage: int) -> int:
        """Model chunks whose activations a stage holds at once under 1F1B, at most."""
        behind = self.pipeline - stage
        if self.virtual > 1:
            behind = 2 * (behind - 1) + (self.virtual - 1) * self.pipeline + 1
        return min(behind, self.virtual * self.micro_batches)

    def __str__(self) -> str:
        return f"TP {self.tensor} x PP {self.pipeline} x CP {self.context} x DP {self.data}"


def checked_layout(
    question: Question, shapes: Shapes, tensor: int, pipeline: int, context: int
) -> Layout:
    """The layout with these sizes, every rule kept.

    Raises:
        Refused: naming what does not divide what.
    """
    parallel, gpus = question.parallel, question.cluster.gpus
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    sequence_parallel = parallel.sequence_parallel
    if sequence_parallel is None:
        sequence_parallel = tensor > 1
    _check_tensor(shapes, tensor, sequence_parallel)
    _check_pipeline(shapes, pipeline, virtual)
    _check_context(question, context)
    _check_sequence(question, tensor if sequence_parallel else 1, context)
    _check_world(tensor, pipeline, context, gpus)
    data = gpus // (tensor * pipeline * context)
    micro_batches = _micro_batches(question, data)
    _require(
        virtual == 1 or micro_batches % pipeline == 0,
        VIRTUAL,
        virtual,
        f"its interleaved schedule needs micro-batches in multiples of {PIPELINE}={pipeline}, "
        f"there are {micro_batches}",
    )
    return Layout(tensor, pipeline, context, data, virtual, sequence_parallel, micro_batches)


def _require(holds: bool, key: str, value: object, rule: str) -> None:
    if not holds:
        raise Refused(f"{key}={str(value).lower()}: {rule}")


def _check_world(tensor: int, pipeline: int, context: int, gpus: int) -> None:
    product = tensor * pipeline * context
    _require(
        gpus % product == 0,
        "parallel (TP x PP x CP)",
        f"{tensor}x{pipeline}x{context}",
        f"its {product} GPUs must divide the cluster's {gpus} "
        "(cluster.nodes x cluster.gpus_per_node)",
    )


def _check_tensor(shapes: Shapes, tensor: int, sequence_parallel: bool) -> None:
    divided = {
        "model.num_attention_heads": shapes.heads,
        "model.num_query_groups": shapes.groups,
        "model.ffn_hidden_size": shapes.feed_forward,
        "the padded vocabulary": shapes.vocabulary,
    }
    for key, value in divided.items():
        _require(value % tensor == 0, TENSOR, tensor, f"must divide {key}={value}")
    _require(
        tensor > 1 or not sequence_parallel,
        "parallel.sequence_parallel",
        True,
        f"splits norms over tensor ranks, so it needs {TENSOR} of at least 2, which is {tensor}",
    )


def _check_pipeline(shapes: Shapes, pipeline: int, virtual: int) -> None:
    layers = f"must divide model.num_layers={shapes.layers}"
    _require(shapes.layers % pipeline == 0, PIPELINE, pipeline, layers)
    _require(
        virtual == 1 or pipeline > 1,
        VIRTUAL,
        virtual,
        f"cuts pipeline stages into chunks, so it needs {PIPELINE} of at least 2, which is "
        f"{pipeline}",
    )
    per_stage = shapes.layers // pipeline
    _require(
        per_stage % virtual == 0,
        VIRTUAL,
        virtual,
        f"must divide the {per_stage} layers of a stage ({shapes.layers} layers over {PIPELINE}="
        f"{pipeline})",
    )


def _check_context(question: Question, context: int) -> None:
    attention, length = question.workload.attention, question.workload.sequence_length
    _require(
        context == 1 or attention != "unfused",
        CONTEXT,
        context,
        f"workload.attention={attention} attends within one GPU only; must be 1, or the attention "
        "fused or gathered",
    )
    # Each rank holds one piece from the front and one from the back, so that a causal mask gives
    # all of them the same work.
    _require(
        context == 1 or length % (2 * context) == 0,
        CONTEXT,
        context,
        f"cuts a sequence into {2 * context} pieces, two for each rank, which must divide "
        f"workload.sequence_length={length}",
    )


def _check_sequence(question: Question, residual_split: int, context: int) -> None:
    length = question.workload.sequence_length
    _require(
        length % (context * residual_split) == 0,
        "workload.sequence_length",
        length,
        f"must be a multiple of {context * residual_split}, context times tensor ranks "
        f"({context} x {residual_split}), for sequence parallelism",
    )


def _micro_batches(question: Question, data: int) -> int:
    workload = question.workload
    sequences, size = workload.sequences, workload.micro_batch_size
    _require(
        sequences % (data * size) == 0,
        "workload.sequences",
        sequences,
        f"must be a multiple of {data * size}, data ranks times workload.micro_batch_size "
        f"({data} x {size})",
    )
    return sequences // (data * size)
