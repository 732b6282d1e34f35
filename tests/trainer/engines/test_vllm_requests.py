"""What vLLM is told and what is taken of its answers, without vLLM: plain data on both sides."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from nemo_apo.config import ConfigError, RolloutConfig
from nemo_apo.trainer.engines.interface import Sampling
from nemo_apo.trainer.engines.vllm_requests import (
    BadAnswer,
    check_vllm,
    completions_of,
    engine_arguments,
    request_arguments,
    seeds,
)
from nemo_apo.trainer.sampler import uniforms

from ..tiny_runs import TINY_MODEL, TokenSumTask, tiny_config

TASK = TokenSumTask()
SAMPLING = Sampling.of(TASK, 16, 0.7, 64)
TORCHRUN = {"RANK": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}


@dataclass
class Logprob:
    logprob: float


@dataclass
class Said:
    """The fields of vLLM's ``CompletionOutput`` that are read."""

    token_ids: Any
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = "stop"


@dataclass
class Answer:
    """The field of vLLM's ``RequestOutput`` that is read."""

    outputs: list[Said] = field(default_factory=list)


def answer(tokens: list[int], finish_reason: str | None = "stop") -> Answer:
    """Log-probs of -0.5, -1.0 and so on; at each place another token's is given as well."""
    logprobs = [
        {99: Logprob(-0.1), token: Logprob(-0.5 * (place + 1))}
        for place, token in enumerate(tokens)
    ]
    return Answer([Said(tuple(tokens), logprobs, finish_reason)])


class TestRequests:
    def test_nothing_cuts_or_bends_the_distribution(self) -> None:
        arguments = request_arguments(SAMPLING, 5)
        assert arguments["temperature"] == 0.7
        assert (arguments["top_k"], arguments["top_p"], arguments["min_p"]) == (-1, 1.0, 0.0)
        assert arguments["repetition_penalty"] == 1.0
        assert arguments["presence_penalty"] == arguments["frequency_penalty"] == 0.0
        assert arguments["logprobs"] == 0
        assert arguments["seed"] == 5
        assert arguments["n"] == 1

    def test_a_completion_ends_where_the_task_says(self) -> None:
        arguments = request_arguments(SAMPLING, 5)
        assert arguments["stop_token_ids"] == [TASK.end_id]
        assert arguments["ignore_eos"] is True
        assert arguments["max_tokens"] == TASK.max_response_length
        assert arguments["stop"] == []
        assert arguments["detokenize"] is False
        stopping = request_arguments(replace(SAMPLING, stop_strings=("</a>", "\n")), 5)
        assert stopping["stop"] == ["</a>", "\n"]
        assert stopping["include_stop_str_in_output"] is True
        assert stopping["detokenize"] is True

    def test_without_a_seed_it_is_greedy(self) -> None:
        arguments = request_arguments(SAMPLING, None)
        assert (arguments["temperature"], arguments["seed"]) == (0.0, None)

    def test_seeds_follow_from_the_uniform_numbers_of_the_row(self) -> None:
        draws = uniforms(0, "rollout/1/0", 50, 3)
        found = seeds(draws)
        assert found == seeds(draws)
        assert len(set(found)) == 50
        assert all(0 <= seed < 2**53 for seed in found)
        assert [seed * 2.0**-53 for seed in found] == draws[:, 0].tolist()
        assert found != seeds(uniforms(0, "rollout/2/0", 50, 3))

    def test_the_engine_is_that_of_the_trainer(self) -> None:
        config = tiny_config(
            model=replace(TINY_MODEL, path="/models/m", params_dtype="bfloat16"),
            rollout=RolloutConfig(
                gpu_memory_utilization=0.3, micro_batch_size=32, tensor_model_parallel_size=2
            ),
        )
        arguments = engine_arguments(config)
        assert arguments["model"] == "/models/m"
        assert arguments["dtype"] == "bfloat16"
        assert arguments["tensor_parallel_size"] == 2
        assert arguments["distributed_executor_backend"] == "external_launcher"
        assert arguments["logprobs_mode"] == "processed_logprobs"
        assert arguments["gpu_memory_utilization"] == 0.3
        assert arguments["max_num_seqs"] == 32
        assert arguments["max_model_len"] == TASK.max_prompt_length + TASK.max_response_length


class TestAnswers:
    def test_answers_become_completions(self) -> None:
        done = completions_of(
            [answer([5, 6, TASK.end_id]), answer([7] * 6, "length"), answer([3])], SAMPLING
        )
        assert done.tokens_NR.tolist() == [
            [5, 6, TASK.end_id, 0, 0, 0],
            [7] * 6,
            [3, 0, 0, 0, 0, 0],
        ]
        assert TASK.pad_id == 0
        assert done.lengths_N.tolist() == [3, 6, 1]
        assert done.finished_N.tolist() == [True, False, True]
        assert done.logprobs_NR[0].tolist() == [-0.5, -1.0, -1.5, 0.0, 0.0, 0.0]
        assert done.logprob_sums_N.tolist() == [-3.0, -10.5, -0.5]
        assert done.tokens_NR.dtype == done.lengths_N.dtype == torch.int64
        assert done.logprobs_NR.dtype == torch.float32
        assert done.logprob_sums_N.dtype == torch.float64
        assert done.finished_N.dtype == torch.bool

    def test_a_token_that_comes_twice_has_its_own_log_prob_at_each_place(self) -> None:
        done = completions_of([answer([4, 4])], SAMPLING)
        assert done.logprobs_NR[0, :2].tolist() == [-0.5, -1.0]

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (Answer([]), "0 completions of a prompt"),
            (Answer([*answer([3]).outputs, *answer([3]).outputs]), "2 completions of a prompt"),
            (answer([]), "a completion of 0 tokens"),
            (answer([3] * 7, "length"), "a completion of 7 tokens"),
            (answer([3, 16]), "token id 16 outside the vocabulary of 16"),
            (answer([-1]), "token id -1 outside"),
            (Answer([Said([3], None)]), "without a log-prob for each"),
            (Answer([Said([3, 4], [{3: Logprob(-1.0)}])]), "without a log-prob for each"),
            (Answer([Said([3], [{4: Logprob(-1.0)}])]), "no log-prob for token id 3"),
            (answer([3], None), "ended by None"),
            (answer([3], "abort"), "ended by 'abort'"),
        ],
    )
    def test_what_cannot_be_taken_is_refused(self, bad: Answer, message: str) -> None:
        with pytest.raises(BadAnswer, match=message):
            completions_of([answer([5, TASK.end_id]), bad], SAMPLING)


class TestRefusals:
    CONFIG = tiny_config(rollout=RolloutConfig(tensor_model_parallel_size=2))

    def test_what_it_needs_is_there(self) -> None:
        check_vllm(self.CONFIG, True, True, TORCHRUN)

    @pytest.mark.parametrize(
        ("has_gpus", "is_installed", "environment", "message"),
        [
            (False, True, TORCHRUN, "on GPUs only"),
            (True, False, TORCHRUN, r"pip install 'nemo_apo\[vllm\]'"),
            (True, True, {}, "must be started by torchrun"),
            (True, True, {**TORCHRUN, "LOCAL_WORLD_SIZE": "3"}, "on one machine, which has 3"),
        ],
    )
    def test_what_is_missing_is_said(
        self, has_gpus: bool, is_installed: bool, environment: dict[str, str], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=f"^rollout.engine=vllm: .*{message}"):
            check_vllm(self.CONFIG, has_gpus, is_installed, environment)
