"""The trained policy of this rank: its megatron stage, optimizer, sampling replica and the passes
over token batches that the RL step is made of.

Rows go in and come out globally: every rank hands in the same N rows, works on its data-parallel
share and gets all N results back. Axes: N sequences, B of a micro-batch, T tokens (the columns of
``nemo_apo.trainer.rollouts``).
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.resharding.refit import swap_model_weights
from torch import Tensor

from nemo_apo.compose.hf_model import decoder_of
from nemo_apo.config import (
    LOCAL,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    padded_vocab_size,
)
from nemo_apo.parallel.gather import (
    all_gather_rows,
    broadcast_from_last,
    first_not_finite,
    sum_over,
)
from nemo_apo.parallel.layout import Layout
from nemo_apo.parallel.logprobs import linear_logprobs
from nemo_apo.parallel.step import (
    LossFunction,
    read_micro_batches,
    run_micro_batches,
)
from nemo_apo.trainer.engines.interface import RolloutEngine
from nemo_apo.trainer.hf_weights import load_hf_weights
from nemo_apo.trainer.layer_specs import LocalNames
from nemo_apo.trainer.micro_batch import MicroBatch
from nemo_apo.trainer.model import (
    Stage,
    build_optimizer,
    build_replica,
    build_training_model,
)
from nemo_apo.trainer.offload import offloaded
from nemo_apo.trainer.sharing import Share, share_of
from nemo_apo.trainer.transformer_impl import chosen_impl


@dataclass(frozen=True)
class Update:
    """What an optimizer step did.

    Attributes:
        grad_norm: before clipping.
        not_finite: what was not finite on some rank, so that no rank took the step: "loss" or
            "gradient"; None where the step was taken.
    """

    grad_norm: float
    not_finite: str | None = None


class Policy:
    """The model under training on this rank, and a replica of it that samples.

    Attributes:
        chunks: this rank's stage, wrapped by megatron's DDP; several under a virtual pipeline.
        stage: all its layers as one module.
        optimizer: megatron's optimizer of the current phase.
        vocab_size: the unpadded vocabulary.
        temperature: sampling temperature; log-probs are those of the tempered policy.
        transformer_impl: what its layers are made of, "local" or "transformer_engine".
        engine: completes prompts with its weights; set by whoever builds the policy.
        sampling_ranks: over how many ranks the model that samples is split, by tensor parallelism.
    """

    engine: RolloutEngine

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        layout: Layout,
        vocab_size: int,
        max_sequence_length: int,
        temperature: float,
        seed: int,
        parallel: ParallelConfig,
        sampling_ranks: int = 1,
        weights_follow: bool = False,
    ) -> None:
        """Build the model with its initial weights: random ones, or those at ``model.path``.

        Args:
            model, optimizer, parallel: of the configuration.
            layout: where this rank stands.
            vocab_size: the unpadded vocabulary.
            max_sequence_length: longest prompt and completion, tokens.
            temperature: of sampling.
            seed: of random weights.
            sampling_ranks: over how many ranks the model that samples is split.
            weights_follow: the caller loads other weights before any is used, so that those at
                ``model.path`` need not be there any more.

        Raises:
            ConfigError: on every rank, if one cannot read its part of ``model.path``, or for a
                ``model.transformer_impl`` that cannot run here.
        """
        self.layout = layout
        self.vocab_size = vocab_size
        self.temperature = temperature
        self.sampling_ranks = sampling_ranks
        # Every rank must hold equally many tokens of a sequence, in equal parts.
        self._width_multiple = 2 * layout.context_size if layout.context_size > 1 else 1
        if parallel.sequence_parallel:
            self._width_multiple *= layout.tensor_size
        self.transformer_impl = chosen_impl(model, layout.device.type == "cuda")
        model = replace(model, transformer_impl=self.transformer_impl)
        padded = padded_vocab_size(vocab_size, model)
        initialize = model.path is None
        torch.manual_seed(seed)
        self.chunks = build_training_model(
            model, layout, parallel, padded, max_sequence_length, initialize
        )
        modules = [chunk.module for chunk in self.chunks]
        self.stage = modules[0] if len(modules) == 1 else Stage(modules)
        self._replica: GPTModel | None = None
        is_local = self.transformer_impl == LOCAL
        self._refitted = self.stage if is_local else LocalNames(self.stage)
        if not is_local or _needs_replica(layout, parallel, sampling_ranks):
            torch.manual_seed(seed)
            self._replica = build_replica(
                model, layout, padded, max_sequence_length, sampling_ranks, initialize
            )
        if model.path is None:
            self._take_weights_of_replica()
        elif not weights_follow:
            load_hf_weights(model.path, decoder_of(model, vocab_size), modules, layout)
        self.set_optimizer(optimizer)

    def _take_weights_of_replica(self) -> None:
        """Random weights come from the replica, so they do not depend on the layout."""
        if self._replica is None:
            return
        with _without_tied_copy(self.stage):
            swap_model_weights(self._replica, self._refitted, self._refit_backend)
        # Fills that copy from the first stage; nothing to do where there is none.
        for chunk in self.chunks:
            chunk.module.setup_embeddings_and_output_layer()

    @property
    def _refit_backend(self) -> str:
        return "gloo" if self.layout.device.type == "cpu" else "nccl"

    def set_optimizer(self, optimizer: OptimizerConfig) -> None:
        """A fresh optimizer, with empty moments."""
        self.optimizer = build_optimizer(optimizer, self.chunks)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = optimizer.weight_decay * group["wd_mult"]

    def refit_sampler(self) -> GPTModel:
        """The model that samples, holding the current weights."""
        if self._replica is None:
            return self.stage
        swap_model_weights(self._refitted, self._replica, self._refit_backend)
        return self._replica

    def offloaded(self) -> contextlib.AbstractContextManager[None]:
        """Without the memory that only training needs; entered between optimizer steps."""
        return offloaded(self.chunks, self.optimizer)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Parameters of this rank's stage, in a fixed order."""
        return list(self.stage.parameters())

    def copy_weights(self) -> list[Tensor]:
        """A copy of this rank's weights."""
        return [parameter.detach().clone() for parameter in self.parameters()]

    @contextlib.contextmanager
    def holding(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Run with other weights in place of the trained ones, which come back afterwards."""
        parameters = self.parameters()
        own = [parameter.data for parameter in parameters]
        try:
            for parameter, values in zip(parameters, weights, strict=True):
                parameter.data = values
            yield
        finally:
            for parameter, values in zip(parameters, own, strict=True):
                parameter.data = values

    def token_logprobs(self, hidden_BTH: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probs of the targets and entropies under the tempered policy, [B, T] each.

        Only completion tokens are computed; elsewhere both are 0.
        """
        rows_n = batch.mask_BT.reshape(-1).nonzero().squeeze(1)
        hidden_nH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])[rows_n]
        last = self.chunks[-1].module
        values_n = linear_logprobs(
            hidden_nH,
            last.output_weight,
            batch.targets_BT.reshape(-1)[rows_n],
            vocab_size=self.vocab_size,
            group=self.layout.tensor_group,
            temperature=self.temperature,
            into_main_grad=True,
            sums_hidden_grad=not last.config.sequence_parallel,
        )
        logprobs_BT, entropy_BT = (
            value_n.new_zeros(batch.mask_BT.numel())
            .index_put((rows_n,), value_n)
            .view(batch.mask_BT.shape)
            for value_n in values_n
        )
        return logprobs_BT, entropy_BT

    def read_logprobs(self, batch: MicroBatch, micro_batch_size: int) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of N rows without gradient, [N, T] each, on the CPU."""

        def read(hidden_BTH: Tensor, micro_batch: MicroBatch) -> dict[str, Tensor]:
            logprobs_BT, entropy_BT = self.token_logprobs(hidden_BTH, micro_batch)
            return {"both": torch.stack([logprobs_BT, entropy_BT], dim=1)}

        share = self._share(batch, micro_batch_size)
        kept = read_micro_batches(self.chunks, share.micro_batches, read)
        both_N2T = self._collect([entry["both"] for entry in kept], share, tokens=True)
        both_N2T = both_N2T[: batch.rows].cpu()
        return both_N2T[:, 0], both_N2T[:, 1]

    def accumulate(
        self, batch: MicroBatch, micro_batch_size: int, loss_function: LossFunction
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradient of the loss sum over N rows, left in the gradient buffers.

        Args:
            batch: the N rows of the optimizer step.
            micro_batch_size: rows per forward and backward on a rank.
            loss_function: see ``nemo_apo.parallel.step``; the numbers it keeps are scalars to be
                summed, except "logprob_sums" [B].

        Returns:
            The kept scalars summed over all rows, and the kept ``logprob_sums`` [N] (CPU, float64).
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        share = self._share(batch, micro_batch_size)
        kept = run_micro_batches(self.chunks, share.micro_batches, loss_function)
        sums_N = self._collect([entry["logprob_sums"] for entry in kept], share)
        sums_N = sum_over(sums_N, self.layout.context_group)
        return self._sum_scalars(kept), sums_N[: batch.rows].cpu()

    def update(self, lr: float, loss_sum: float) -> Update:
        """One optimizer step, or none on any rank if the loss or the gradient is not finite."""
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        figures = {"loss": loss_sum, "gradient": grad_norm}
        not_finite = first_not_finite(figures, self.layout.device)
        if not_finite is not None:
            return Update(grad_norm, not_finite)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return Update(grad_norm)

    def _share(self, batch: MicroBatch, micro_batch_size: int) -> Share:
        return share_of(batch, micro_batch_size, self.layout, self._width_multiple)

    def _collect(self, parts: list[Tensor], share: Share, tokens: bool = False) -> Tensor:
        """Rows kept on the last stage of each replica, on all ranks, in global row order.

        Args:
            parts: per micro-batch one number per row [B], float64, or (``tokens``) two numbers per
                token [B, 2, t], float32; empty on other stages.
            share: whose micro-batches these are.
            tokens: which of the two.
        """
        rows, device = len(share.order_n), self.layout.device
        if parts:
            values = share.whole_tokens(parts, self.layout) if tokens else torch.cat(parts)
        elif tokens:
            values = torch.empty((rows, 2, share.width), dtype=torch.float32, device=device)
        else:
            values = torch.empty(rows, dtype=torch.float64, device=device)
        values = broadcast_from_last(values, self.layout.pipeline_group)
        return all_gather_rows(share.in_row_order(values), self.layout.data_group)

    def _sum_scalars(self, kept: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        names = ("loss", "clipped")
        totals = torch.zeros(len(names), dtype=torch.float64, device=self.layout.device)
        for entry in kept:
            totals += torch.stack([entry[name].to(torch.float64) for name in names])
        totals = sum_over(totals, self.layout.token_group)
        totals = broadcast_from_last(totals, self.layout.pipeline_group)
        return dict(zip(names, totals.cpu(), strict=True))


def _needs_replica(layout: Layout, parallel: ParallelConfig, sampling_ranks: int) -> bool:
    """Whether the model that samples is laid out unlike the one under training."""
    stages = layout.pipeline_size * layout.context_size
    like = (stages, layout.tensor_size) == (1, sampling_ranks)
    return not like or parallel.sequence_parallel


@contextlib.contextmanager
def _without_tied_copy(stage: torch.nn.Module) -> Iterator[None]:
    """Hide the copy of tied embeddings that megatron keeps on the last of several stages.

    The replica has no weight of that name, so the refit would not find where it comes from.
    """
    if stage.pre_process or not stage.post_process or not stage.share_embeddings_and_output_weights:
        yield
        return
    weight = stage.output_layer.weight
    stage.output_layer.weight = None
    try:
        yield
    finally:
        stage.output_layer.weight = weight
