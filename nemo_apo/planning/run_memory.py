"""Bytes of one GPU during a run of the embedded trainer, phase by phase.

What is held all the time, on the fullest pipeline stage:

    training        weights, gradients and optimizer, as in ``memory``
    copies          the policy at the start of RL, an ``ema`` or ``lagged`` anchor
    replica         the model that samples, where it is not the one under training

and the larger of three, which are never held together:

    optimizer step  activations, the layer worked on and the log-prob workspace, as in ``memory``
    log-prob pass   the layer worked on and that workspace, for its own micro-batch
    sampling        keys and values of a batch, its prompts' attention scores in one layer, and the
                    float64 distribution over the vocabulary that a token is drawn from

Attention scores count in full: the trainer's layers are megatron-core's local ones, unless
``model.transformer_impl`` is "transformer_engine" ("auto" counts as "local"); the sampler's always
are. Whatever the allocator loses to fragments comes on top. Computed, not measured.
"""

from dataclasses import dataclass, replace

from nemo_apo.config import TRANSFORMER_ENGINE, Config, vocab_size
from nemo_apo.planning.activations import FLOAT, local_tokens, split
from nemo_apo.planning.layout import Layout
from nemo_apo.planning.memory import (
    Memory,
    fullest_stage,
    gigabytes,
    log_prob_workspace,
    stage_parameters,
)
from nemo_apo.planning.settings import Cluster, Parallel, Question, Workload
from nemo_apo.planning.shapes import Shapes

_DOUBLE = 8


@dataclass(frozen=True)
class RunMemory:
    """Bytes of the fullest GPU.

    Attributes:
        held: by name, what stays for the whole run.
        phases: by name, what each phase needs on top.
    """

    held: dict[str, int]
    phases: dict[str, int]

    @property
    def total(self) -> int:
        """The most that is in use at any time."""
        return sum(self.held.values()) + max(self.phases.values())

    def __str__(self) -> str:
        held = ", ".join(f"{name} {gigabytes(n)}" for name, n in self.held.items() if n)
        phase = max(self.phases, key=self.phases.__getitem__)
        return f"{gigabytes(self.total)} ({held}; {phase} {gigabytes(self.phases[phase])})"


def run_memory(config: Config, world_size: int) -> RunMemory:
    """The memory of a valid configuration on ``world_size`` ranks."""
    question = _question(config, world_size)
    shapes = Shapes.of(config.model, question.vocab_size)
    layout = _layout(config, world_size, question)
    stage, training = fullest_stage(question, shapes, layout)
    held = {
        "weights": training.weights,
        "gradients": training.gradients,
        "optimizer": training.optimizer,
        "copies": _copies(config) * training.weights,
        "replica": _replica(config, question, shapes, layout),
    }
    assert training.weights == question.number_bytes * stage_parameters(shapes, layout, stage)
    phases = {
        "optimizer step": _step(training),
        "log-prob pass": _log_prob_pass(config, question, shapes, layout),
        "sampling": _sampling(config, question, shapes, world_size),
    }
    return RunMemory(held, phases)


def _question(config: Config, world_size: int) -> Question:
    parallel, rollout, update = config.parallel, config.rollout, config.update
    task = config.task
    return Question(
        model=config.model,
        cluster=Cluster(nodes=1, gpus_per_node=world_size),
        parallel=Parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            sequence_parallel=parallel.sequence_parallel,
            recompute=parallel.recompute,
            distributed_optimizer=parallel.distributed_optimizer,
        ),
        workload=Workload(
            sequence_length=task.max_prompt_length + task.max_response_length,
            sequences=rollout.prompts * rollout.group_size // update.mini_batches,
            micro_batch_size=update.micro_batch_size,
            vocab_size=vocab_size(config),
            attention=_attention(config),
        ),
    )


def _attention(config: Config) -> str:
    """Which attention trains, in the terms of ``nemo_apo.planning.settings``."""
    if config.model.transformer_impl == TRANSFORMER_ENGINE:
        return "fused"
    return "gathered" if config.parallel.context_parallel_size > 1 else "unfused"


def _layout(config: Config, world_size: int, question: Question) -> Layout:
    """The run's layout; the trainer pads a last micro-batch, where the plan asks for whole ones."""
    parallel = config.parallel
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    tensor, pipeline, context = sizes
    data = world_size // (tensor * pipeline * context)
    workload = question.workload
    return Layout(
        tensor,
        pipeline,
        context,
        data,
        virtual=parallel.virtual_pipeline_model_parallel_size or 1,
        sequence_parallel=parallel.sequence_parallel,
        micro_batches=split(split(workload.sequences, data), workload.micro_batch_size),
    )


def _copies(config: Config) -> int:
    """Copies of a rank's weights beside those under training."""
    reference = config.regularizers.needs_reference or config.update.monitor_reference_kl
    return (reference or config.anchor.name == "reference") + (
        config.anchor.name in ("ema", "lagged")
    )


def _replica(config: Config, question: Question, shapes: Shapes, layout: Layout) -> int:
    """The model that samples, 0 where the one under training is laid out as it is asked for."""
    ranks = config.rollout.tensor_model_parallel_size
    like = (layout.pipeline * layout.context, layout.tensor) == (1, ranks)
    if like and not layout.sequence_parallel and question.workload.has_local_layers:
        return 0
    return question.number_bytes * split(shapes.parameters, ranks)


def _step(training: Memory) -> int:
    return training.activations + training.working + training.log_probs


def _log_prob_pass(config: Config, question: Question, shapes: Shapes, layout: Layout) -> int:
    """One layer's scores and feed-forward for the rows read at once, and the log-probs of them."""
    rows = config.update.log_prob_micro_batch_size
    workload = replace(question.workload, micro_batch_size=rows)
    question = replace(question, workload=workload)
    number, tokens = question.number_bytes, local_tokens(question, layout)
    scores = split(tokens * workload.sequence_length * shapes.heads, layout.tensor)
    scores *= workload.has_local_layers
    feed_forward = 3 * number * split(tokens * shapes.feed_forward, layout.tensor)
    layer = max((number + 2 * FLOAT) * scores, feed_forward) + 2 * number * tokens * shapes.hidden
    return max(layer, log_prob_workspace(question, shapes, layout))


def _sampling(config: Config, question: Question, shapes: Shapes, world_size: int) -> int:
    """A batch of the sampler on one of the ranks that share its model."""
    task, number = config.task, question.number_bytes
    ranks = config.rollout.tensor_model_parallel_size
    wanted = split(config.rollout.prompts * config.rollout.group_size, world_size // ranks)
    rows = min(config.rollout.micro_batch_size, wanted)
    tokens = rows * question.workload.sequence_length
    cache = split(2 * number * shapes.layers * shapes.key_width * tokens, ranks)
    prompt = task.max_prompt_length
    prefill = split((number + 2 * FLOAT) * rows * shapes.heads * prompt * prompt, ranks)
    distribution = 3 * _DOUBLE * rows * shapes.vocabulary
    return cache + max(prefill, distribution)
