"""Proposals and refusals."""

import dataclasses
import itertools
import json

import pytest

from nemo_apo.planning.layout import Refused, checked_layout
from nemo_apo.planning.memory import fullest_stage
from nemo_apo.planning.plan import make_plan
from nemo_apo.planning.settings import model_names, read_question
from nemo_apo.planning.shapes import Shapes

QWEN = [name for name in model_names() if name.startswith("qwen3")]


def refusal(*overrides: str) -> str:
    """The message with which a question is refused."""
    with pytest.raises(Refused) as error:
        make_plan(read_question(overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", QWEN)
def test_no_smaller_layout_fits(name: str) -> None:
    question = read_question([f"model={name}", "cluster.nodes=4"])
    plan = make_plan(question)
    assert plan.memory.total <= question.cluster.usable == 72_000_000_000
    shapes = Shapes.of(question.model, 151936)
    powers = (1, 2, 4, 8, 16, 32)
    fitting = []
    for sizes in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), powers):
        try:
            layout = checked_layout(question, shapes, *sizes)
        except Refused:
            continue
        if fullest_stage(question, shapes, layout)[1].total <= question.cluster.usable:
            fitting.append(layout.model_ranks)
    assert plan.layout.model_ranks == min(fitting)


def test_smaller_layouts_come_with_what_they_need() -> None:
    plan = make_plan(read_question(["model=qwen3_32b", "cluster.nodes=4"]))
    assert [one.gpus for one in plan.rejected] == [1, 2, 4]
    assert all(one.needed > 72_000_000_000 for one in plan.rejected)
    assert plan.rejected[2].reason.startswith("TP 4 x PP 1 x CP 1 x DP 8 needs 78.7 GB")


def test_smaller_layouts_that_do_not_divide_come_with_the_rule() -> None:
    plan = make_plan(read_question(["model=qwen3_1.7b", "sequences=12"]))
    assert plan.layout.data == 4
    assert [one.reason for one in plan.rejected] == [
        "workload.sequences=12: must be a multiple of 8, data ranks times "
        "workload.micro_batch_size (8 x 1)"
    ]


def test_a_given_size_is_kept_and_the_others_are_found() -> None:
    plan = make_plan(read_question(["model=qwen3_8b", "parallel.pipeline_model_parallel_size=4"]))
    assert plan.layout.pipeline == 4


def test_a_whole_layout_is_checked_as_it_is() -> None:
    sizes = [f"parallel.{kind}_parallel_size=2" for kind in ("tensor_model", "context")]
    sizes.append("parallel.pipeline_model_parallel_size=1")
    plan = make_plan(read_question(["model=qwen3_1.7b", *sizes]))
    assert str(plan.layout) == "TP 2 x PP 1 x CP 2 x DP 2"
    assert plan.rejected == ()


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    message = refusal("model=qwen3_32b")
    assert message.startswith("cluster.nodes=1: qwen3_32b must fit in the 72.0 GB usable on a GPU")
    assert "h100, 80.0 GB, less cluster.reserve=0.1" in message
    assert "TP 8 x PP 1 x CP 1 x DP 1, the least demanding of " in message
    assert "needs 82.7 GB on stage 0 (optimizer 49.2 GB" in message
    assert message.endswith("parallel.recompute=full does not help")


def test_a_given_size_that_cannot_fit_is_named() -> None:
    sizes = [
        f"parallel.{kind}_parallel_size=1" for kind in ("tensor_model", "pipeline_model", "context")
    ]
    message = refusal("model=qwen3_8b", *sizes)
    assert message.startswith("parallel.tensor_model_parallel_size=1, ")
    assert "TP 1 x PP 1 x CP 1 x DP 8 needs 82.6 GB on stage 0 (gradients 32.8 GB" in message
    assert "with parallel.recompute=full TP 1 x PP 1 x CP 1 x DP 8 needs" in message


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["parallel.tensor_model_parallel_size=3"], "must divide model.num_attention_heads=32"),
        (["parallel.tensor_model_parallel_size=16"], "must divide model.num_query_groups=8"),
        (["parallel.pipeline_model_parallel_size=5"], "must divide model.num_layers=36"),
        (["parallel.context_parallel_size=3"], "must divide workload.sequence_length=4096"),
        (["parallel.context_parallel_size=16"], "16 GPUs must divide the cluster's 8"),
        (["parallel.pipeline_model_parallel_size=9"], "9 GPUs must divide the cluster's 8"),
        (["vocab_size=100", "model.make_vocab_size_divisible_by=1",
          "parallel.tensor_model_parallel_size=8"], "must divide the padded vocabulary=100"),
        (["sequences=12", "parallel.tensor_model_parallel_size=1",
          "parallel.pipeline_model_parallel_size=1", "parallel.context_parallel_size=1"],
         "workload.sequences=12: must be a multiple of 8"),
    ],
)  # fmt: skip
def test_what_is_given_and_does_not_divide(overrides: list[str], part: str) -> None:
    assert part in refusal("model=qwen3_8b", *overrides)


def test_a_tensor_size_larger_than_a_node_can_be_given() -> None:
    sizes = ["model.num_query_groups=16", "parallel.tensor_model_parallel_size=16"]
    plan = make_plan(read_question(["model=qwen3_8b", "cluster.nodes=2", *sizes]))
    assert plan.layout.tensor == 16
    assert plan.traffic["tensor"].link == "InfiniBand"


def test_a_larger_gpu_never_needs_a_larger_layout() -> None:
    for name in QWEN:
        question = read_question([f"model={name}", "cluster.nodes=8"])
        cluster = dataclasses.replace(question.cluster, gpu="h200")
        larger = make_plan(dataclasses.replace(question, cluster=cluster))
        assert larger.layout.model_ranks <= make_plan(question).layout.model_ranks


def test_as_plain_values() -> None:
    plan = make_plan(read_question(["model=qwen3_8b", "cluster.nodes=4"]))
    values = json.loads(json.dumps(plan.as_dict()))
    assert values["parameters"] == 8_190_735_360
    assert values["total_bytes"] == sum(values["memory"].values())
    assert values["question"]["cluster"]["nodes"] == 4
