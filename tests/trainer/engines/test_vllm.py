"""Which calls of vLLM's are made, with what and in which order. vLLM itself is not run."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_apo.config import ConfigError, ParallelConfig
from nemo_apo.trainer.engines.by_name import check_engine
from nemo_apo.trainer.engines.vllm import VllmEngine
from nemo_apo.trainer.loop import run
from nemo_apo.trainer.run_folder import TrainingStopped
from nemo_apo.trainer.sampler import uniforms
from nemo_apo.trainer.sampling import complete
from tests.parallel.ranks import run_ranks

from ..tiny_runs import begin, tiny_config
from .test_vllm_requests import Answer, answer


class StandIn:
    """Notes what is asked of it and answers each prompt with its last token and the end token."""

    def __init__(self, arguments: dict[str, Any], wrong_rank: int | None = None) -> None:
        self.arguments = arguments
        self.wrong = wrong_rank == torch.distributed.get_rank()
        self.calls: list[Any] = []
        self.weights: dict[str, torch.Tensor] = {}
        model = SimpleNamespace(load_weights=self._load)
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def _load(self, weights: Any) -> None:
        self.calls.append("load")
        self.weights = {name: value.clone() for name, value in weights}

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake", *tags))

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")

    def generate(self, prompts: Any, requests: Any, use_tqdm: bool) -> list[Answer]:
        self.calls.append("generate")
        self.prompts, self.requests = prompts, requests
        end = 99 if self.wrong else 1
        return [answer([prompt["prompt_token_ids"][-1], end]) for prompt in prompts]


def with_stand_in(parallel: ParallelConfig, wrong_rank: int | None = None) -> tuple[Any, StandIn]:
    # What is imported of vLLM when requests are made.
    stub = ModuleType("vllm")
    stub.SamplingParams = lambda **arguments: arguments  # type: ignore[attr-defined]
    sys.modules["vllm"] = stub
    training = begin(tiny_config(parallel=parallel))
    made: list[StandIn] = []

    def start(arguments: dict[str, Any]) -> StandIn:
        made.append(StandIn(arguments, wrong_rank))
        return made[0]

    training.policy.engine = VllmEngine(training.policy, training.config, start)
    return training, made[0]


def completed(parallel: ParallelConfig) -> list[str]:
    training, llm = with_stand_in(parallel)
    assert llm.calls == [("sleep", 1)], "an engine is made asleep"
    task = training.config.task
    prompts = task.test_prompts(5)
    draws = uniforms(0, "a stream", 5, task.max_response_length)
    done = complete(training.policy, task, training.config.rollout, prompts, draws)
    assert llm.calls[1:] == [
        ("wake", "weights"),
        "load",
        "reset",
        ("wake", "kv_cache"),
        "generate",
        ("sleep", 1),
    ]
    assert [done.row(row) for row in range(5)] == [[prompt.tokens[-1], 1] for prompt in prompts]
    assert llm.arguments["tensor_parallel_size"] == parallel.tensor_model_parallel_size
    # The weights are the policy's, under the checkpoint's names.
    embedding = training.weights()["embedding.word_embeddings.weight"]
    handed = llm.weights["model.embed_tokens.weight"]
    assert torch.equal(handed, embedding[: handed.shape[0]])
    assert any(name.endswith("layers.1.mlp.down_proj.weight") for name in llm.weights)
    assert all(request["seed"] is not None for request in llm.requests)
    complete(training.policy, task, training.config.rollout, prompts, None)
    assert all(request["seed"] is None for request in llm.requests)
    return [str(prompt["prompt_token_ids"]) for prompt in llm.prompts]


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_round_of_the_engine(tensor: int) -> None:
    first, second = run_ranks(2, completed, ParallelConfig(tensor))
    assert (first == second) == (tensor == 2)
    assert len(first) == (5 if tensor == 2 else 3)


def stopped(parallel: ParallelConfig) -> str:
    training, _ = with_stand_in(parallel, wrong_rank=1)
    task = training.config.task
    with pytest.raises(TrainingStopped) as error:
        complete(training.policy, task, training.config.rollout, task.test_prompts(4), None)
    return str(error.value)


def test_a_bad_answer_on_one_rank_ends_the_run_on_all() -> None:
    messages = run_ranks(2, stopped, ParallelConfig())
    assert messages[0] == messages[1]
    assert "rank 1: BadAnswer: token id 99 outside the vocabulary" in messages[0]
    assert "rank 0" not in messages[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is refused without a GPU only")
def test_without_a_gpu_nothing_is_begun(tmp_path: Path) -> None:
    config = tiny_config()
    config = replace(config, run=replace(config.run, root=str(tmp_path)))
    for values, key in (({"engine": "vllm"}, "rollout.engine"), ({"offload": True}, "rollout.off")):
        refused = replace(config, rollout=replace(config.rollout, **values))
        with pytest.raises(ConfigError, match=f"^{key}.*no CUDA device"):
            check_engine(refused)
        with pytest.raises(ConfigError, match=f"^{key}"):
            run(refused)
    check_engine(config)
    assert not list(tmp_path.iterdir())
