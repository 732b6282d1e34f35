"""How a question is read."""

import pytest

from nemo_apo.compose import compose
from nemo_apo.config import ConfigError
from nemo_apo.planning.settings import model_named, model_names, read_question


def refusal(*overrides: str) -> str:
    """The message with which a question is refused."""
    with pytest.raises(ConfigError) as error:
        read_question(overrides)
    return str(error.value)


@pytest.mark.parametrize("name", [name for name in model_names() if name != "hf"])
def test_the_model_is_the_trainers(name: str) -> None:
    assert model_named(name) == compose([f"model={name}"]).model


def test_values_arrive_and_the_last_one_wins() -> None:
    question = read_question(
        ["cluster.nodes=2", "model.num_layers=8", "model=qwen3_1.7b", "cluster.nodes=4",
         "sequence_length=8192", "workload.micro_batch_size=2", "cluster.reserve=0"]
    )  # fmt: skip
    assert (question.model.name, question.model.num_layers) == ("qwen3_1.7b", 8)
    assert (question.cluster.nodes, question.cluster.reserve) == (4, 0.0)
    assert (question.workload.sequence_length, question.workload.micro_batch_size) == (8192, 2)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ([], "model: must be chosen, one of hf, qwen2.5_7b, qwen3_0.6b"),
        (["model=hf"], "model.path=null: model=hf needs the folder of a checkpoint"),
        (["model=hf", "model.path=none"], "model.path=none: there is no such folder"),
        (["model=qwen3_7b"], "did you mean qwen3_"),
        (["model=qwen3_8b", "cluster.node=4"], "did you mean cluster.nodes"),
        (["model=qwen3_8b", "sequence_lenght=4"], "did you mean workload.sequence_length"),
        (["model=qwen3_8b", "cluster.nodes=two"], "cluster.nodes=two: must be a whole number"),
        (["model=qwen3_8b", "cluster.nodes=0"], "cluster.nodes must be at least 1, got 0"),
        (["model=qwen3_8b", "cluster.gpu=a100"], "cluster.gpu must be one of h100, h200"),
        (["model=qwen3_8b", "cluster.reserve=1"], "cluster.reserve must lie in [0, 1)"),
        (["model=qwen3_8b", "sampler.share=-1"], "sampler.share must lie in [0, 1)"),
        (["model=qwen3_8b", "cluster.nvlink_gb_per_s=0"], "nvlink_gb_per_s must be > 0"),
        (["model=qwen3_8b", "vocab_size=1"], "workload.vocab_size must be at least 2"),
        (["model=qwen3_8b", "attention=flash"], "must be one of fused, unfused, gathered"),
        (["model=qwen3_8b", "parallel.recompute=all"], "recompute must be one of none, selective"),
        (["model=qwen3_8b", "parallel.context_parallel_size=0"], "must be at least 1, got 0"),
        (["model=qwen3_8b", "model.num_query_groups=7"], "model.num_query_groups=7: must divide"),
        (["model=qwen3_8b", "parallel=tp2"], "parallel=tp2: is a section"),
        (["model=qwen3_8b", "cluster.nodes=1,2"], "takes one value"),
        (["model=qwen3_8b", "cluster.nodes"], "must be key=value"),
        (["model=qwen3_8b", "+cluster.nodes=1"], "must be key=value"),
        (["model=qwen3_8b", "cluster.nodes={"], "cannot be read"),
    ],
)  # fmt: skip
def test_a_mistake(overrides: list[str], part: str) -> None:
    assert part in refusal(*overrides)
