"""Sampling with megatron's static inference context (KV cache), on a model without parallelism.

A token is drawn by inverting the cumulative distribution at one uniform number, and the uniform
numbers of an RL step are a function of the seed and the step alone: the samples do not depend on
how prompts are spread over ranks or batches. Axes: B sequences, S prompt tokens, R response
tokens, V vocabulary.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemo_apo.tasks import Prompt
from nemo_apo.trainer.engines.interface import Sampling
from nemo_apo.trainer.engines.stop_strings import stops
from nemo_apo.trainer.rollouts import Completions


def uniforms(seed: int, stream: str, rows: int, columns: int) -> Tensor:
    """Uniform numbers in [0, 1), [rows, columns] float64, a function of the arguments alone."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(rows, columns, generator=generator, dtype=torch.float64)


@torch.no_grad()
def generate(
    model: GPTModel,
    prompts: Sequence[Prompt],
    uniforms_NR: Tensor | None,
    sampling: Sampling,
    between: Callable[[], None] = lambda: None,
) -> Completions:
    """Complete every prompt.

    Args:
        model: the whole model, on this rank.
        prompts: one per completion wanted, of any lengths.
        uniforms_NR: one uniform number per token to draw, [N, R]; None decodes greedily.
        sampling: how.
        between: called before each batch; what it raises ends the generation.
    """
    parts = []
    with _evaluating(model):
        for start in range(0, len(prompts), sampling.micro_batch_size):
            between()
            rows = slice(start, start + sampling.micro_batch_size)
            batch = _Batch(model, prompts[rows], sampling)
            parts.append(batch.complete(None if uniforms_NR is None else uniforms_NR[rows]))
    return Completions(
        tokens_NR=torch.cat([part.tokens_NR for part in parts]),
        lengths_N=torch.cat([part.lengths_N for part in parts]),
        finished_N=torch.cat([part.finished_N for part in parts]),
        logprobs_NR=torch.cat([part.logprobs_NR for part in parts]),
        logprob_sums_N=torch.cat([part.logprob_sums_N for part in parts]),
    )


@contextlib.contextmanager
def _evaluating(model: GPTModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Batch:
    """One batch under generation: prompts padded on the left, and their KV cache."""

    def __init__(self, model: GPTModel, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        self.model = model
        self.sampling = sampling
        self.device = next(model.parameters()).device
        self.rows = len(prompts)
        self.prompt_width = max(len(prompt.tokens) for prompt in prompts)
        pads = [self.prompt_width - len(prompt.tokens) for prompt in prompts]
        self.prompt_BS = torch.tensor(
            [[*([sampling.pad_id] * pad), *p.tokens] for pad, p in zip(pads, prompts, strict=True)],
            device=self.device,
        )
        total = self.prompt_width + sampling.max_response_length
        self.padding_BT = (
            torch.arange(total, device=self.device)
            < torch.tensor(pads, device=self.device)[:, None]
        )
        self.context = StaticInferenceContext(self.rows, total)

    def complete(self, draws_BR: Tensor | None) -> Completions:
        sampling, limit = self.sampling, self.sampling.max_response_length
        tokens_BR = torch.full((self.rows, limit), sampling.pad_id, device=self.device)
        lengths_B = torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        logprobs_BR = torch.zeros_like(tokens_BR, dtype=torch.float32)
        logprob_sums_B = torch.zeros(self.rows, dtype=torch.float64, device=self.device)
        open_B = torch.ones(self.rows, dtype=torch.bool, device=self.device)
        logits_BV = self._prefill()
        for step in range(limit):
            log_p_BV = _log_softmax(
                logits_BV[:, : sampling.vocab_size], draws_BR, sampling.temperature
            )
            token_B = (
                log_p_BV.argmax(dim=-1)
                if draws_BR is None
                else draw(log_p_BV, draws_BR[:, step].to(self.device))
            )
            chosen_B = log_p_BV.gather(1, token_B[:, None]).squeeze(1)
            chosen_B = torch.where(open_B, chosen_B, 0.0)
            logprobs_BR[:, step] = chosen_B
            logprob_sums_B += chosen_B
            tokens_BR[:, step] = torch.where(open_B, token_B, sampling.pad_id)
            lengths_B += open_B
            open_B &= token_B != sampling.end_id
            if sampling.stop_strings:
                self._close_stopped(tokens_BR[:, : step + 1], open_B)
            if step + 1 == limit or not bool(open_B.any()):
                break
            logits_BV = self._decode(tokens_BR[:, step : step + 1], step)
        return Completions(tokens_BR, lengths_B, ~open_B, logprobs_BR, logprob_sums_B)

    def _close_stopped(self, tokens_Br: Tensor, open_B: Tensor) -> None:
        """Close the rows whose text holds a stop string, now that r tokens are drawn."""
        sampling, rows_b = self.sampling, open_B.nonzero().squeeze(1)
        for row, tokens in zip(rows_b.tolist(), tokens_Br[rows_b].tolist(), strict=True):
            if stops(tokens, sampling.stop_strings, sampling.text):
                open_B[row] = False

    def _prefill(self) -> Tensor:
        width = self.prompt_width
        future_SS = torch.ones(width, width, dtype=torch.bool, device=self.device).triu(1)
        hidden_BSS = future_SS | self.padding_BT[:, None, :width]
        # A padded row would attend to nothing at all; let it see itself, nobody reads it.
        hidden_BSS &= ~torch.eye(width, dtype=torch.bool, device=self.device)
        positions_BS = torch.arange(width, device=self.device).expand(self.rows, width)
        return self._forward(self.prompt_BS, positions_BS, hidden_BSS[:, None])

    def _decode(self, tokens_B1: Tensor, step: int) -> Tensor:
        self.context.enable_decode_mode()
        position = self.prompt_width + step
        positions_B1 = torch.full((self.rows, 1), position, device=self.device)
        return self._forward(
            tokens_B1, positions_B1, self.padding_BT[:, None, None, : position + 1]
        )

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        logits_B1V = self.model(
            tokens, positions, mask, inference_context=self.context, runtime_gather_output=True
        )
        self.context.sequence_len_offset += tokens.shape[1]
        return logits_B1V[:, -1]


def _log_softmax(logits_BV: Tensor, draws: Tensor | None, temperature: float) -> Tensor:
    scale = 1.0 if draws is None else temperature
    return torch.log_softmax(logits_BV.to(torch.float64) / scale, dim=-1)


def draw(log_p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes the uniform number, [B] int64."""
    cumulative_BV = torch.cumsum(torch.exp(log_p_BV), dim=-1)
    at_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    index_B1 = torch.searchsorted(cumulative_BV, at_B1, right=True)
    return index_B1.squeeze(1).clamp(max=log_p_BV.shape[-1] - 1)
