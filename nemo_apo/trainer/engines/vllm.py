"""vLLM in the ranks' own processes, on their GPUs, with the policy's weights.

This file has not been run: neither vLLM nor a GPU was at hand. What can be told without them is in
``vllm_requests`` and tested there; here a stand-in for ``vllm.LLM`` has shown no more than which
calls are made, in which order. ``update.max_sampler_mismatch`` compares every rollout's log-probs
with the trainer's before anything is trained on them.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_apo.compose.hf_model import decoder_of
from nemo_apo.config import Config, vocab_size
from nemo_apo.parallel.together import RankError, together
from nemo_apo.tasks import Prompt
from nemo_apo.trainer.engines.hf_tensors import hf_tensors
from nemo_apo.trainer.engines.interface import Sampling
from nemo_apo.trainer.engines.vllm_requests import (
    completions_of,
    engine_arguments,
    request_arguments,
    seeds,
)
from nemo_apo.trainer.policy import Policy
from nemo_apo.trainer.rollouts import Completions
from nemo_apo.trainer.run_folder import TrainingStopped


def start_vllm(arguments: dict[str, Any]) -> Any:
    """An ``LLM`` of this process; all ranks start theirs together."""
    # Each rank's engine is a worker of the process group that is there already.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    return LLM(**arguments)


class VllmEngine:
    """One engine for every ``rollout.tensor_model_parallel_size`` ranks.

    Weights are handed over on the GPU, tensor by tensor, from the model that would sample were
    there no other engine. Asleep, the engine keeps its own in host memory (vLLM's level 1;
    level 2 also drops buffers that no weights bring back).

    Args:
        policy: whose weights it takes.
        config: validated, and accepted by ``check_vllm``.
        start: builds the ``LLM`` from its arguments.
    """

    def __init__(
        self,
        policy: Policy,
        config: Config,
        start: Callable[[dict[str, Any]], Any] = start_vllm,
    ) -> None:
        self.ranks_per_copy = policy.sampling_ranks
        self._policy = policy
        self._decoder = decoder_of(config.model, vocab_size(config))
        self._llm = start(engine_arguments(config))
        self.sleep()

    def wake(self) -> None:
        if self._policy.layout.device.type == "cuda":
            # vLLM asks CUDA for memory, not torch's allocator.
            torch.cuda.empty_cache()
        self._llm.wake_up(tags=["weights"])

    def refit(self) -> None:
        worker = self._llm.llm_engine.model_executor.driver_worker
        module = self._policy.refit_sampler()
        tensors = hf_tensors(module, self._decoder, self.ranks_per_copy)
        worker.model_runner.model.load_weights(tensors)
        # What was cached of prompts belongs to the old weights.
        self._llm.reset_prefix_cache()
        self._llm.wake_up(tags=["kv_cache"])

    def generate(
        self,
        prompts: Sequence[Prompt],
        uniforms_NR: Tensor | None,
        sampling: Sampling,
        between: Callable[[], None],
    ) -> Completions:
        between()
        answers = self._llm.generate(
            [{"prompt_token_ids": list(prompt.tokens)} for prompt in prompts],
            self._requests(len(prompts), uniforms_NR, sampling),
            use_tqdm=False,
        )
        return self._taken(answers, sampling)

    def sleep(self) -> None:
        self._llm.sleep(level=1)

    def _requests(self, count: int, uniforms_NR: Tensor | None, sampling: Sampling) -> list[Any]:
        from vllm import SamplingParams

        by_row = [None] * count if uniforms_NR is None else seeds(uniforms_NR)
        return [SamplingParams(**request_arguments(sampling, seed)) for seed in by_row]

    def _taken(self, answers: Sequence[Any], sampling: Sampling) -> Completions:
        """The answers on the rank's device; a bad one on any rank ends the run on all."""
        taken: list[Completions] = []
        try:
            together(lambda: taken.append(completions_of(answers, sampling)))
        except RankError as error:
            raise TrainingStopped(f"rollout.engine=vllm: {error}") from error
        return taken[0].to(self._policy.layout.device)
