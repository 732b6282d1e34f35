"""A stand-in for the host's generation engine: vLLM needs a GPU.

It answers sums of two numbers, prompts such as ``3+4=``, from the policy's present weights in
Hugging Face's model. Half of the answers are the right one whatever the policy thinks, so that a
model that has learnt nothing earns rewards; log-probs are the policy's all the same. What it draws
depends on the prompt and on the place in the batch alone, so that a resumed run draws the same.
"""

from typing import Any

import torch

from tests.nemo_rl import tiny_model
from tests.nemo_rl.host_config import MAX_NEW_TOKENS


class Generation:
    """Takes the place of the host's ``VllmGeneration``; the host's trainer calls its methods."""

    requires_kv_scale_sync = False

    def __init__(self, cluster: Any, config: dict[str, Any], **_: Any) -> None:
        name = config["model_name"]
        self.model = tiny_model.load(name)
        self.tokenizer = tiny_model.load_tokenizer(name)

    @torch.no_grad()
    def generate(self, data: Any, greedy: bool = False) -> Any:
        from nemo_rl.distributed.batched_data_dict import BatchedDataDict

        tokens, lengths = data["input_ids"], data["input_lengths"]
        width = tokens.shape[1] + MAX_NEW_TOKENS
        output = torch.full((len(lengths), width), tiny_model.PAD_ID)
        logprobs = torch.zeros(output.shape)
        ends = lengths.clone()
        for row, length in enumerate(lengths.tolist()):
            answer, their_logprobs = self._answer(tokens[row, :length].tolist(), row)
            ends[row] += len(answer)
            output[row, :length] = tokens[row, :length]
            output[row, length : ends[row]] = torch.tensor(answer)
            logprobs[row, length : ends[row]] = torch.tensor(their_logprobs)
        return BatchedDataDict(
            {
                "output_ids": output,
                "generation_lengths": ends - lengths,
                "unpadded_sequence_lengths": ends,
                "logprobs": logprobs,
                "truncated": torch.zeros(len(lengths), dtype=torch.bool),
            }
        )

    def _answer(self, prompt: list[int], row: int) -> tuple[list[int], list[float]]:
        draw = torch.Generator().manual_seed(sum(prompt) * 1000 + row)
        terms = self.tokenizer.decode(prompt).rstrip("=").split("+")
        right = self.tokenizer(str(sum(map(int, terms))))["input_ids"] + [tiny_model.END_ID]
        is_right = bool(torch.rand((), generator=draw) < 0.5)
        answer: list[int] = []
        logprobs: list[float] = []
        while len(answer) < MAX_NEW_TOKENS and tiny_model.END_ID not in answer:
            logits = self.model(torch.tensor([prompt + answer])).logits[0, -1]
            log_p = torch.log_softmax(logits, dim=-1)
            drawn = int(torch.multinomial(log_p.exp(), 1, generator=draw))
            answer.append(right[len(answer)] if is_right else drawn)
            logprobs.append(float(log_p[answer[-1]]))
        return answer, logprobs

    def prepare_for_generation(self, *_: Any, **__: Any) -> bool:
        return True

    def finish_generation(self, *_: Any, **__: Any) -> bool:
        return True

    def prepare_refit_info(self, info: Any) -> None:
        pass

    def clear_logger_metrics(self) -> None:
        pass

    def get_logger_metrics(self) -> dict[str, Any]:
        return {}

    def shutdown(self) -> bool:
        return True


def refit(policy: Any, generation: Generation, *_: Any, **__: Any) -> dict[str, float]:
    """Takes the place of the host's ``refit_policy_generation``: the policy's weights, copied."""
    generation.model.load_state_dict(policy.weights())
    return {}
