"""What a layout has to divide, and how many micro-batches its stages hold."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_apo.config import ConfigError
from nemo_apo.planning.layout import Layout, Refused
from nemo_apo.planning.settings import Cluster
from tests.planning.small import layout_of, question


@pytest.mark.parametrize(
    ("asked", "sizes", "message"),
    [
        ({}, (3, 1, 1), "tensor_model_parallel_size=3: must divide model.num_attention_heads=4"),
        ({}, (4, 1, 1), "tensor_model_parallel_size=4: must divide model.num_query_groups=2"),
        ({}, (1, 3, 1), "pipeline_model_parallel_size=3: must divide model.num_layers=4"),
        ({}, (2, 2, 4), "must divide the cluster's 8"),
        (
            {"workload": {"sequence_length": 6}},
            (1, 1, 2),
            "context_parallel_size=2: cuts a sequence into 4 pieces, two for each rank, which must "
            "divide workload.sequence_length=6",
        ),
        (
            {"workload": {"sequence_length": 7}},
            (2, 1, 1),
            "workload.sequence_length=7: must be a multiple of 2",
        ),
        (
            {"workload": {"sequences": 6}},
            (2, 1, 1),
            "workload.sequences=6: must be a multiple of 4, data ranks times "
            "workload.micro_batch_size (4 x 1)",
        ),
        (
            {"sequence_parallel": True},
            (1, 2, 1),
            "parallel.sequence_parallel=true: splits norms over tensor ranks, so it needs "
            "parallel.tensor_model_parallel_size of at least 2, which is 1",
        ),
        (
            {"workload": {"attention": "unfused"}},
            (1, 1, 2),
            "context_parallel_size=2: workload.attention=unfused attends within one GPU only",
        ),
        ({"virtual_pipeline_model_parallel_size": 2}, (1, 1, 1), "needs parallel.pipeline_model"),
        (
            {"virtual_pipeline_model_parallel_size": 4},
            (1, 2, 1),
            "=4: must divide the 2 layers of a stage (4 layers over",
        ),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            (1, 2, 1),
            "=2: its interleaved schedule needs micro-batches in multiples of "
            "parallel.pipeline_model_parallel_size=2, there are 1",
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_the_numbers(
    asked: dict[str, Any], sizes: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(Refused) as error:
        layout_of(question(**asked), *sizes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ConfigError)


def test_the_vocabulary_and_the_feed_forward_are_divided_too() -> None:
    wide = {"num_attention_heads": 16, "num_query_groups": 16}
    base = question()
    for change, message in (
        ({"ffn_hidden_size": 20}, "=8: must divide model.ffn_hidden_size=20"),
        ({"make_vocab_size_divisible_by": 36}, "=8: must divide the padded vocabulary=36"),
    ):
        model = type(base.model)(**{**vars(base.model), **wide, **change})
        with pytest.raises(Refused, match=message):
            layout_of(question(model), tensor=8)


def test_data_parallelism_takes_what_is_left() -> None:
    layout = layout_of(question(cluster=Cluster(nodes=2)), tensor=2, pipeline=2)
    assert layout == Layout(2, 2, 1, 4, 1, True, 1)
    assert str(layout) == "TP 2 x PP 2 x CP 1 x DP 4"
    assert layout.bubble == 1.0


def test_sequence_parallelism_can_be_off() -> None:
    assert layout_of(question(sequence_parallel=False), tensor=2).residual_split == 1
    assert layout_of(question(), tensor=2).residual_split == 2
    assert layout_of(question(workload={"sequences": 8})).residual_split == 1


def held_under_1f1b(pipeline: int, stage: int, micro_batches: int) -> int:
    """The most micro-batches that a stage holds, by walking through its schedule."""
    warm_up = min(pipeline - stage - 1, micro_batches)
    order = ["F"] * warm_up + ["F", "B"] * (micro_batches - warm_up) + ["B"] * warm_up
    held = peak = 0
    for step in order:
        held += 1 if step == "F" else -1
        peak = max(peak, held)
    assert held == 0
    return peak


@given(st.integers(1, 8), st.integers(1, 12), st.data())
def test_micro_batches_in_flight(pipeline: int, micro_batches: int, data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, pipeline - 1))
    layout = Layout(1, pipeline, 1, 1, 1, False, micro_batches)
    assert layout.in_flight(stage) == held_under_1f1b(pipeline, stage, micro_batches)


def test_chunks_in_flight_of_an_interleaved_schedule() -> None:
    """4 stages of 2 chunks: 3 x 2 + 1 x 4 warm-up forwards on the first, and the one of 1F1B."""
    layout = Layout(1, 4, 1, 1, 2, False, 16)
    assert [layout.in_flight(stage) for stage in range(4)] == [11, 9, 7, 5]
    assert Layout(1, 4, 1, 1, 2, False, 4).in_flight(0) == 8
