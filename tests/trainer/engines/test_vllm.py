"""Which calls of vLLM's are made, with what and in which order. vLLM itself is not run."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_apo.compose.hf_model import decoder_of
from nemo_apo.config import ConfigError, ParallelConfig, vocab_size
from nemo_apo.trainer.engines.by_name import check_engine
from nemo_apo.trainer.engines.vllm import VllmEngine
from nemo_apo.trainer.hf_weights import tensors_of
from nemo_apo.trainer.loop import run
from nemo_apo.trainer.run_folder import TrainingStopped
from nemo_apo.trainer.sampler import uniforms
from nemo_apo.trainer.sampling import complete
from tests.parallel.ranks import run_ranks

from ..tiny_runs import Training, begin, tiny_config
from .test_vllm_requests import Answer, answer


class StandIn:
    """Notes what is asked of it and answers each prompt with its last token and the end token."""

    def __init__(self, arguments: dict[str, Any], wrong_rank: int | None = None) -> None:
        self.arguments = arguments
        self.wrong = wrong_rank == torch.distributed.get_rank()
        self.calls: list[Any] = []
        self.weights: dict[str, Tensor] = {}
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


def with_stand_in(shared_by: int, wrong_rank: int | None = None) -> tuple[Training, StandIn]:
    """A policy that is tensor-parallel itself, and an engine for every ``shared_by`` ranks."""
    # What is imported of vLLM when requests are made.
    stub = ModuleType("vllm")
    stub.SamplingParams = lambda **arguments: arguments  # type: ignore[attr-defined]
    sys.modules["vllm"] = stub
    config = tiny_config(parallel=ParallelConfig(2))
    rollout = replace(config.rollout, tensor_model_parallel_size=shared_by)
    training = begin(replace(config, rollout=rollout))
    made: list[StandIn] = []

    def start(arguments: dict[str, Any]) -> StandIn:
        made.append(StandIn(arguments, wrong_rank))
        return made[0]

    training.policy.engine = VllmEngine(training.policy, training.config, start)
    return training, made[0]


def completed(shared_by: int) -> tuple[list[str], dict[str, Tensor]]:
    """The prompts that this rank's engine was given last, and the weights."""
    training, llm = with_stand_in(shared_by)
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
    assert llm.arguments["tensor_parallel_size"] == shared_by
    assert all(request["seed"] is not None for request in llm.requests)
    complete(training.policy, task, training.config.rollout, prompts, None)
    assert all(request["seed"] is None for request in llm.requests)
    return [str(prompt["prompt_token_ids"]) for prompt in llm.prompts], llm.weights


@pytest.mark.parametrize("shared_by", [1, 2])
def test_a_round_of_the_engine(shared_by: int) -> None:
    (first, _), (second, _) = run_ranks(2, completed, shared_by)
    assert (first == second) == (shared_by == 2)
    assert len(first) == (5 if shared_by == 2 else 3)


def whole_weights() -> dict[str, Tensor]:
    """The same weights by the code that exports them, on one rank."""
    config = tiny_config()
    policy = begin(config).policy
    return dict(tensors_of(policy.stage, decoder_of(config.model, vocab_size(config))))


@pytest.mark.parametrize("shared_by", [1, 2])
def test_every_rank_hands_over_the_whole_model_by_the_checkpoints_names(shared_by: int) -> None:
    (wanted,) = run_ranks(1, whole_weights)
    assert "model.layers.1.mlp.down_proj.weight" in wanted
    for _, handed in run_ranks(2, completed, shared_by):
        assert handed.keys() == wanted.keys()
        assert all(torch.equal(handed[name], wanted[name]) for name in wanted)


def stopped() -> str:
    training, _ = with_stand_in(1, wrong_rank=1)
    task = training.config.task
    with pytest.raises(TrainingStopped) as error:
        complete(training.policy, task, training.config.rollout, task.test_prompts(4), None)
    return str(error.value)


def test_a_bad_answer_on_one_rank_ends_the_run_on_all() -> None:
    messages = run_ranks(2, stopped)
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
