"""What vLLM is told and what it answers, as plain data: no vLLM is needed here.

Written against vLLM's interface of 0.10.2 and later. Axes: N prompts of one call, R response
tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_apo.config import Config, ConfigError
from nemo_apo.trainer.engines.interface import Sampling
from nemo_apo.trainer.rollouts import Completions

# Uniform numbers are multiples of this.
_UNIFORM_STEP = 2.0**-53


class BadAnswer(RuntimeError):
    """vLLM said what the trainer cannot take."""


def check_vllm(
    config: Config, has_gpus: bool, is_installed: bool, environment: Mapping[str, str]
) -> None:
    """Refuse the engine where it cannot run.

    Args:
        config: validated, with ``rollout.engine=vllm``.
        has_gpus: whether the ranks have CUDA devices.
        is_installed: whether the package is.
        environment: of this process, in which torchrun tells its ranks who they are.

    Raises:
        ConfigError: with the reason.
    """
    key = "rollout.engine=vllm"
    if not has_gpus:
        raise ConfigError(f"{key}: runs on GPUs only, and torch sees no CUDA device here")
    if not is_installed:
        raise ConfigError(
            f"{key}: needs vllm, which is not installed: pip install 'nemo_apo[vllm]'"
        )
    if not {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= environment.keys():
        raise ConfigError(f"{key}: the ranks must be started by torchrun, also a single one")
    together, on_node = config.rollout.tensor_model_parallel_size, environment["LOCAL_WORLD_SIZE"]
    if int(on_node) % together != 0:
        raise ConfigError(
            f"{key}: the ranks of rollout.tensor_model_parallel_size={together} hold one engine "
            f"and must be on one machine, which has {on_node} ranks"
        )


def engine_arguments(config: Config) -> dict[str, Any]:
    """How the engine of this rank is built: in its process, over the ranks that share it.

    Weights come from the policy before anything is generated, so none are read.
    """
    task, rollout = config.task, config.rollout
    return {
        "model": config.model.path,
        "load_format": "dummy",
        "dtype": config.model.params_dtype,
        "seed": config.run.seed,
        "tensor_parallel_size": rollout.tensor_model_parallel_size,
        "distributed_executor_backend": "external_launcher",
        "enable_sleep_mode": True,
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "max_model_len": task.max_prompt_length + task.max_response_length,
        "max_num_seqs": rollout.micro_batch_size,
        # Log-probs of the tempered distribution, as the trainer's are.
        "logprobs_mode": "processed_logprobs",
        # The checkpoint's own wishes for temperature and the like do not count.
        "generation_config": "vllm",
        "trust_remote_code": False,
    }


def request_arguments(sampling: Sampling, seed: int | None) -> dict[str, Any]:
    """How one prompt is completed; without a seed greedily.

    Nothing may cut or bend the distribution: the trainer's log-probs are those of the whole
    tempered one. Only the task's end token and stop strings end a completion, and their tokens
    belong to it.
    """
    return {
        "n": 1,
        "temperature": 0.0 if seed is None else sampling.temperature,
        "seed": seed,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": sampling.max_response_length,
        "min_tokens": 0,
        "ignore_eos": True,
        "stop_token_ids": [sampling.end_id],
        "stop": list(sampling.stop_strings),
        "include_stop_str_in_output": True,
        "detokenize": bool(sampling.stop_strings),
        # The chosen token's alone.
        "logprobs": 0,
    }


def seeds(uniforms_NR: Tensor) -> list[int]:
    """A seed for each row, a function of its first uniform number."""
    return [int(uniform / _UNIFORM_STEP) for uniform in uniforms_NR[:, 0].tolist()]


def completions_of(answers: Sequence[Any], sampling: Sampling) -> Completions:
    """vLLM's answers, one ``RequestOutput`` per prompt in the prompts' order.

    Raises:
        BadAnswer: if one of them is not a single completion of known tokens with a log-prob for
            each, or ended otherwise than at the end token, a stop string or the length limit.
    """
    count, limit = len(answers), sampling.max_response_length
    tokens_NR = torch.full((count, limit), sampling.pad_id)
    logprobs_NR = torch.zeros((count, limit), dtype=torch.float64)
    lengths_N = torch.zeros(count, dtype=torch.int64)
    finished_N = torch.zeros(count, dtype=torch.bool)
    for row, answer in enumerate(answers):
        tokens, logprobs, finished = _completion(answer, sampling)
        tokens_NR[row, : len(tokens)] = torch.tensor(tokens)
        logprobs_NR[row, : len(tokens)] = torch.tensor(logprobs, dtype=torch.float64)
        lengths_N[row], finished_N[row] = len(tokens), finished
    return Completions(
        tokens_NR, lengths_N, finished_N, logprobs_NR.to(torch.float32), logprobs_NR.sum(dim=1)
    )


def _completion(answer: Any, sampling: Sampling) -> tuple[list[int], list[float], bool]:
    """Token ids, their log-probs and whether it came to an end of its own."""
    if len(answer.outputs) != 1:
        raise BadAnswer(f"{len(answer.outputs)} completions of a prompt, one was asked for")
    (said,) = answer.outputs
    tokens = list(said.token_ids)
    if not 1 <= len(tokens) <= sampling.max_response_length:
        raise BadAnswer(f"a completion of {len(tokens)} tokens, not 1 to its limit")
    unknown = [token for token in tokens if not 0 <= token < sampling.vocab_size]
    if unknown:
        raise BadAnswer(f"token id {unknown[0]} outside the vocabulary of {sampling.vocab_size}")
    if said.logprobs is None or len(said.logprobs) != len(tokens):
        raise BadAnswer("a completion without a log-prob for each of its tokens")
    for token, known in zip(tokens, said.logprobs, strict=True):
        if token not in known:
            raise BadAnswer(f"no log-prob for token id {token}, which was chosen")
    if said.finish_reason not in ("stop", "length"):
        raise BadAnswer(f"a completion that ended by {said.finish_reason!r}")
    logprobs = [known[token].logprob for token, known in zip(tokens, said.logprobs, strict=True)]
    return tokens, logprobs, said.finish_reason == "stop"
