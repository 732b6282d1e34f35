"""The engine of the trainer's own code: megatron's static KV cache on the policy's weights."""

from collections.abc import Callable, Sequence

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_apo.config import Config
from nemo_apo.tasks import Prompt
from nemo_apo.trainer.engines.interface import Sampling
from nemo_apo.trainer.policy import Policy
from nemo_apo.trainer.rollouts import Completions
from nemo_apo.trainer.sampler import generate


class StaticEngine:
    """Completes prompts on the trained weights, or on a whole copy of them.

    The copy is split over ``rollout.tensor_model_parallel_size`` ranks, 1 by default. Its memory is
    the policy's: there is nothing to wake or to put to sleep.
    """

    def __init__(self, policy: Policy, config: Config) -> None:
        self._policy = policy
        self.ranks_per_copy = policy.sampling_ranks
        self._model: GPTModel | None = None

    def wake(self) -> None:
        pass

    def refit(self) -> None:
        self._model = self._policy.refit_sampler()

    def generate(
        self,
        prompts: Sequence[Prompt],
        uniforms_NR: Tensor | None,
        sampling: Sampling,
        between: Callable[[], None],
    ) -> Completions:
        assert self._model is not None, "refit comes first"
        return generate(self._model, prompts, uniforms_NR, sampling, between)

    def sleep(self) -> None:
        pass
