"""A task that the tiny actor can learn in a dozen RL steps, sampled and graded in the test.

The reward is the share of an answer's tokens that are small ids. Sampling runs the real model token
by token, since the host's inference backends need a GPU; everything after it is the host's.
"""

from typing import Any

import torch

from tests.aligner import grpo_session

ANSWER = 6
SMALL_IDS = 64
TASK = "sort"  # the name that ``grpo_session.collate`` gives every prompt


def dataset(count: int = 64) -> list[dict[str, Any]]:
    """Prompts of equal length; two of them, far apart, have the same tokens."""
    draw = torch.Generator().manual_seed(3)
    prompts = torch.randint(1, 250, (count, grpo_session.PROMPT_WIDTH), generator=draw)
    prompts[count // 2] = prompts[0]
    return [{"text": prompt} for prompt in prompts]


def sampling_actor_class() -> type:
    """The APO actor with a sampler of the test's own (one pipeline rank)."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from nemo_apo.aligner.grpo import ApoGRPOActor

    class SamplingActor(ApoGRPOActor):
        calls = 0
        rl_step = 0

        @torch.no_grad()
        def infer(self, inference_batch: Any, use_greedy: bool = False) -> dict[str, Any]:
            rank = parallel_state.get_data_parallel_rank()
            draw = torch.Generator().manual_seed(1000 * self.rl_step + 10 * self.calls + rank)
            self.calls += 1
            tokens = inference_batch["text"]
            for _ in range(ANSWER):
                padded = torch.nn.functional.pad(tokens, (0, 1))
                mask, _, positions = self.get_ltor_masks_and_position_ids(padded)
                logits = gather_from_tensor_model_parallel_region(
                    self.model(padded, positions, mask, labels=None)
                )[:, -2]
                p = torch.softmax(logits[:, : self.apo_vocab_size], dim=-1)
                tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=draw)], dim=1)
            answers = tokens[:, -ANSWER:]
            rewards = (answers < SMALL_IDS).float().mean(dim=1)
            count = len(tokens)
            return {
                "response_tokens": tokens,
                "response_lengths": torch.full((count,), tokens.shape[1]),
                "response_trt_lps": torch.zeros(tokens.shape),
                "prompt_lengths": inference_batch["length"],
                "is_end": torch.ones(count, dtype=torch.bool),
                "extra_verifier_info": [{"reward": float(reward)} for reward in rewards],
            }

    return SamplingActor


def rollout_generator(config: Any, actor: Any) -> Any:
    """The host's own generator, graded by what the sampler noted."""
    from nemo_aligner.experimental.grpo.experience.interfaces import EnvironmentInterface
    from nemo_aligner.experimental.grpo.experience.rollout_generator import (
        SequenceRewardRolloutGenerator,
    )

    class Grader(EnvironmentInterface):
        def start_step(self, interactions: Any, metadata: Any, *args: Any, **kw: Any) -> Any:
            return metadata

        def finish_step(self, future: Any, *args: Any, **kw: Any) -> Any:
            rewards = torch.tensor([info["reward"] for info in future])
            return None, None, rewards, torch.ones(len(future))

        def global_post_process_and_metrics(self, batch: Any) -> Any:
            return batch, {}

    class Freed:
        def free(self) -> None:
            pass

    class Generator(SequenceRewardRolloutGenerator):
        def generate_rollouts(self, *args: Any, **kw: Any) -> Any:
            # The host frees its backend after sampling, and must not find one when it prepares.
            actor.inference_backend = Freed()
            try:
                return super().generate_rollouts(*args, **kw)
            finally:
                actor.inference_backend = None

    return Generator(config, {TASK: Grader()})
