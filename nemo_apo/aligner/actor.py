"""The actor mixin: the host's own forward pass, our loss.

It stands before an actor class of NeMo-Aligner (``class Actor(ApoActorMixin, HostActor)``) and
replaces what happens to the logits: log-probs are those of the unpadded vocabulary in float32, the
loss is an objective's plain token sum over columns that were settled on the global batch. Forward,
pipeline schedule, gradient reduction and metrics loop stay the host's.

Axes: B sequences of a micro-batch, b of this rank's part of an optimizer step, N of all ranks,
T tokens (targets), V vocabulary (v on this rank).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from torch import Tensor

from nemo_apo.aligner import columns
from nemo_apo.aligner.settings import read_settings
from nemo_apo.aligner.state import CHECKPOINT_KEY, restored
from nemo_apo.config import ConfigError
from nemo_apo.core.anchoring import sequence_sums
from nemo_apo.core.objectives import ClippedRatio, Objective
from nemo_apo.core.objectives.interface import masked
from nemo_apo.parallel.gather import all_gather_rows, broadcast_from_last, sum_over
from nemo_apo.parallel.logits_logprobs import vocab_parallel_logprobs
from nemo_apo.plugin.columns import attached
from nemo_apo.plugin.settings import ApoSettings
from nemo_apo.plugin.state import ApoState

# What a micro-batch keeps besides the log-prob sums of its sequences, in this order.
_TOTALS = ("loss", "clipped", "tokens", "ratio", "ratio_clamped", "entropy")


@dataclass(frozen=True)
class Reading:
    """A forward pass without gradient over this rank's sequences, [b, T].

    Attributes:
        logprobs_bT: log-prob of each target, nats.
        entropy_bT: entropy of each next-token distribution, nats.
    """

    logprobs_bT: Tensor
    entropy_bT: Tensor


@dataclass(frozen=True)
class StepSums:
    """What one optimizer step's forward passes left, the same on all ranks.

    Attributes:
        totals: by the names in ``_TOTALS``, summed over the tokens of all ranks.
        logprob_sums_N: sequence log-probs before the update, in data-parallel rank order, nats.
    """

    totals: dict[str, float]
    logprob_sums_N: Tensor


class ApoActorMixin:
    """See the module's docstring.

    Attributes:
        apo: the settings, from ``cfg.apo``.
        apo_state: schedule and diagnostics; the trainer replaces it once per RL step.
        apo_reading: the last forward pass without gradient under the current policy.
        apo_step_sums: what the last ``get_loss_and_metrics`` left.
    """

    # The host's metric names, and which of ours stands behind each (see ``_figures``).
    host_metrics: ClassVar[Mapping[str, str]] = {"loss": "loss"}

    def __init__(self, cfg: Any, trainer: Any) -> None:
        settings = read_settings(cfg.get("apo"))
        super().__init__(cfg, trainer)  # type: ignore[call-arg]
        self.apo: ApoSettings = settings
        self.apo_state = ApoState()
        self.apo_reading: Reading | None = None
        self.apo_step_sums: StepSums | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._check_vocab_size()

    @property
    def apo_vocab_size(self) -> int:
        """Size of the unpadded vocabulary."""
        return self.apo.vocab_size or self.tokenizer.vocab_size  # type: ignore[attr-defined]

    def get_actor_forward_output_and_loss_func(self) -> Callable[..., tuple[Tensor, Any]]:
        """The host's forward step with our loss."""
        host_forward = super().get_actor_forward_output_and_loss_func()  # type: ignore[misc]

        def forward(data_iterator: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
            micro_batch = next(data_iterator)
            logits, _ = host_forward(iter([micro_batch]), model)
            return logits, lambda logits_BTv: self._loss(micro_batch, logits_BTv)

        return forward

    def get_loss_and_metrics(
        self, batch: dict[str, Any], forward_only: bool
    ) -> tuple[float, dict[str, float]]:
        """The host's forward and backward; its metrics are the optimizer step's, over all ranks."""
        self._kept = []
        super().get_loss_and_metrics(batch=batch, forward_only=forward_only)  # type: ignore[misc]
        self.apo_step_sums = self._gather_kept(batch[columns.TOKENS].shape[0])
        figures = _figures(self.apo_step_sums.totals, self.apo.regularizers.entropy_coef)
        metrics = {host: figures[ours] for host, ours in self.host_metrics.items()}
        return figures["loss"], metrics

    def get_logprob_output_only_func(self, inference_only: bool = True) -> Any:
        """The host's forward step with our log-probs, and entropies beside them in one tensor."""
        host_forward = super().get_logprob_output_only_func(inference_only)  # type: ignore[misc]

        def forward(data_iterator: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
            micro_batch = next(data_iterator)
            logits, _ = host_forward(iter([micro_batch]), model)

            def read(logits_BTv: Tensor, non_loss_data: bool = True) -> Tensor:
                named = micro_batch if isinstance(micro_batch, Mapping) else None
                tokens_BT = micro_batch[0] if named is None else named[columns.TOKENS]
                return torch.cat(self._token_logprobs(named, tokens_BT, logits_BTv), dim=1)

            return logits, read

        return forward

    @torch.no_grad()
    def get_inference_log_probs(
        self, response_tokens: Tensor, forward_micro_batch_size: int | None = None
    ) -> Tensor:
        """Log-probs [b, T] of the policy as it stands; entropies are kept in ``apo_reading``."""
        both = super().get_inference_log_probs(  # type: ignore[misc]
            response_tokens, forward_micro_batch_size=forward_micro_batch_size
        )
        logprobs_bT, entropy_bT = both.chunk(2, dim=1)
        self.apo_reading = Reading(logprobs_bT.contiguous(), entropy_bT.contiguous())
        return self.apo_reading.logprobs_bT

    def get_init_policy_logprobs(self, response_tokens: Tensor) -> Tensor:
        """The host's reference log-probs; they leave the policy's own reading alone."""
        reading = self.apo_reading
        try:
            return super().get_init_policy_logprobs(response_tokens)  # type: ignore[misc]
        finally:
            self.apo_reading = reading

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add our state to the host's checkpoint."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        checkpoint[CHECKPOINT_KEY] = self.apo_state.state_dict(self.apo)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take our state out of a training checkpoint; initial weights have none."""
        state = restored(checkpoint, self.apo)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if state is not None:
            self.apo_state = state

    def _loss(
        self, micro_batch: Mapping[str, Tensor], logits_BTv: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's loss, scaled for the host, and its share of the host's metrics."""
        objective, regularizers = self.apo.objective, self.apo.regularizers
        tokens_BT = micro_batch[columns.TOKENS]
        read_BT = self._token_logprobs(micro_batch, tokens_BT, logits_BTv)
        inputs = columns.token_inputs(micro_batch, *read_BT)
        weights = attached(micro_batch, inputs.logprobs_BT)
        loss = objective.token_loss(inputs, weights) + regularizers.token_loss(inputs, weights)
        with torch.no_grad():
            ratio_BT = torch.exp(
                masked(inputs.logprobs_BT - inputs.old_logprobs_BT, inputs.mask_BT)
            )
            totals = {
                "loss": loss.detach(),
                "clipped": objective.clipped_tokens(inputs, weights),
                "tokens": inputs.mask_BT.sum(),
                "ratio": masked(ratio_BT, inputs.mask_BT).sum(),
                "ratio_clamped": masked(_clamped(objective, ratio_BT), inputs.mask_BT).sum(),
                "entropy": masked(read_BT[1], inputs.mask_BT).sum(),
            }
            sums_B = sequence_sums(inputs.logprobs_BT, inputs.mask_BT)
        self._kept.append((torch.stack([totals[name].double() for name in _TOTALS]), sums_B))
        # The host's loop wants each of its metrics here; get_loss_and_metrics replaces them.
        return loss * _undo_host_averaging(), dict.fromkeys(self.host_metrics, totals["loss"])

    def _token_logprobs(
        self, micro_batch: Mapping[str, Any] | None, tokens_BT: Tensor, logits_BTv: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-prob of each target and entropy of each position, both [B, T]."""
        tokens_BT, logits_BTv = self._whole_sequences(micro_batch, tokens_BT, logits_BTv)
        return vocab_parallel_logprobs(
            logits_BTv[:, :-1],
            tokens_BT[:, 1:].to(logits_BTv.device),
            self.apo_vocab_size,
            parallel_state.get_tensor_model_parallel_group(),
        )

    def _whole_sequences(
        self, micro_batch: Mapping[str, Any] | None, tokens_BT: Tensor, logits_BTv: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens and logits of whole sequences; an actor with context parallelism gathers them."""
        return tokens_BT, logits_BTv

    def _gather_kept(self, rows: int) -> StepSums:
        """Bring what the last pipeline stage kept to all ranks."""
        device = torch.device(torch.cuda.current_device())
        totals = torch.zeros(len(_TOTALS), dtype=torch.float64, device=device)
        sums_b = torch.zeros(rows, dtype=torch.float64, device=device)
        if self._kept:
            totals = torch.stack([part for part, _ in self._kept]).sum(dim=0)
            sums_b = torch.cat([part_B for _, part_B in self._kept])
        stages = parallel_state.get_pipeline_model_parallel_group()
        ranks = parallel_state.get_data_parallel_group()
        totals = sum_over(broadcast_from_last(totals, stages), ranks)
        sums_N = all_gather_rows(broadcast_from_last(sums_b, stages), ranks)
        return StepSums(dict(zip(_TOTALS, totals.tolist(), strict=True)), sums_N)

    def _check_vocab_size(self) -> None:
        padded = self.padded_vocab_size  # type: ignore[attr-defined]
        if self.apo_vocab_size > padded:
            raise ConfigError(
                f"model.apo.vocab_size={self.apo_vocab_size}: the model's output layer has only "
                f"{padded} rows, padding included"
            )


def _undo_host_averaging() -> int:
    """The factor by which the host divides: micro-batches of a step times data-parallel ranks.

    Megatron's schedule divides each loss by the number of micro-batches, and NeMo averages the
    gradient over data-parallel (times context-parallel) ranks; the context-parallel part cancels
    against the sum that the gathering of logits makes in its backward pass.
    """
    return get_num_microbatches() * parallel_state.get_data_parallel_world_size()


def _clamped(objective: Objective, ratio_BT: Tensor) -> Tensor:
    """The ratio within the objective's token clip, where it has one."""
    if not isinstance(objective, ClippedRatio):
        return ratio_BT
    return ratio_BT.clamp(1.0 - objective.clip_low, 1.0 + objective.clip_high)


def _figures(totals: Mapping[str, float], entropy_coef: float) -> dict[str, float]:
    """The host's metrics of an optimizer step: the loss and means over its completion tokens."""
    tokens = max(1.0, totals["tokens"])
    return {
        "loss": totals["loss"],
        "ratio": totals["ratio"] / tokens,
        "ratio_clamped": totals["ratio_clamped"] / tokens,
        "scaled_entropy": entropy_coef * totals["entropy"] / tokens,
    }
