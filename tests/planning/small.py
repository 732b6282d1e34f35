"""A decoder small enough for its bytes to be added up by hand, on one node of 8 GPUs."""

from typing import Any

from nemo_apo.config import ModelConfig
from nemo_apo.planning.layout import Layout, checked_layout
from nemo_apo.planning.settings import Cluster, Parallel, Question, Workload
from nemo_apo.planning.shapes import Shapes

SMALL = ModelConfig(
    name="small",
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=2,
    params_dtype="bfloat16",
    make_vocab_size_divisible_by=32,
)


def question(
    model: ModelConfig = SMALL,
    cluster: Cluster | None = None,
    workload: dict[str, Any] | None = None,
    **parallel: Any,
) -> Question:
    """4 sequences of 8 tokens; further arguments are those of the section ``parallel``."""
    sizes = {"sequence_length": 8, "sequences": 4, "vocab_size": 32}
    return Question(
        model=model,
        cluster=cluster or Cluster(),
        parallel=Parallel(**parallel),
        workload=Workload(**{**sizes, **(workload or {})}),
    )


def shapes_of(asked: Question) -> Shapes:
    """The shapes of the question's model."""
    return Shapes.of(asked.model, asked.vocab_size)


def layout_of(asked: Question, tensor: int = 1, pipeline: int = 1, context: int = 1) -> Layout:
    """The layout with these sizes."""
    return checked_layout(asked, shapes_of(asked), tensor, pipeline, context)
