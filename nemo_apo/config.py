"""The typed configuration of a run; ``nemo_apo.config_rules`` ties its fields together.

Groups whose choice is a class (``objective``, ``schedule``, ``tau``, ``task``) are tagged by their
``name`` field and described where the class lives; everything else is described here. Defaults
stand here and, commented, in ``conf/``; a test holds them equal.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_apo.core.alpha_schedule import SCHEDULES, GuardedSchedule, Schedule
from nemo_apo.core.diagnostics import Thresholds
from nemo_apo.core.filtering import GroupRules
from nemo_apo.core.objectives import OBJECTIVES, Apo, Objective, Regularizers
from nemo_apo.core.temperature import TEMPERATURES, FixedTemperature, Temperature
from nemo_apo.grading.settings import TASK_GRADER, GradingSettings
from nemo_apo.grading.shaping import Shaping
from nemo_apo.tasks import TASKS, SortTask, Task


class ConfigError(ValueError):
    """A configuration that cannot be run; its message names key, value and rule."""


IF_EXISTS_RULES = ("error", "overwrite", "resume")
CONSOLES = ("auto", "plain", "off")
BACKENDS = ("auto", "gloo", "nccl")
PARAMS_DTYPES = ("float32", "bfloat16")
RECOMPUTE = ("none", "selective", "full")
LOCAL, TRANSFORMER_ENGINE = "local", "transformer_engine"
TRANSFORMER_IMPLS = (LOCAL, TRANSFORMER_ENGINE, "auto")
# The keys of ``nemo_apo.trainer.engines.ENGINES``.
ROLLOUT_ENGINES = ("static", "vllm")
LR_DECAY_STYLES = ("constant", "linear", "cosine")
# Sections that a checkpoint is tied to, unless run.allow_changed names them.
ALLOWED_CHANGES = (
    "task",
    "objective",
    "schedule",
    "tau",
    "anchor",
    "regularizers",
    "rollout",
    "grading",
    "shaping",
    "optimizer",
)
# Metrics of which more is better.
BEST_METRICS = (
    "eval/accuracy",
    "eval/reward",
    "eval/pass_at_k",
    "eval/maj_at_k",
    "reward/mean",
)


_MAX_TIME = re.compile(r"(?:(\d+):)?(\d{1,2}):([0-5]\d):([0-5]\d)")


def seconds_of_time(text: str) -> float:
    """Seconds of "[days:]hours:minutes:seconds", as NeMo writes a time.

    Raises:
        ValueError: for anything else, and for no time at all.
    """
    match = _MAX_TIME.fullmatch(text)
    days, hours, minutes, seconds = map(int, match.groups(default="0") if match else "0000")
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ValueError("must be '[days:]hours:minutes:seconds' in quotes, such as '03:45:00'")
    return float(total)


def require(holds: bool, key: str, value: object, rule: str) -> None:
    """Raise ``ConfigError`` unless the rule holds for the value of the key."""
    if not holds:
        raise ConfigError(f"{key}={value}: {rule}")


@dataclass(frozen=True)
class RunConfig:
    """One run: where it is written, how long it is, what it shows.

    Attributes:
        name: folder under ``root``.
        root: parent folder of runs, relative to the working directory.
        seed: of weights, prompts and sampling.
        steps: RL steps.
        if_exists: "error", "overwrite" or "resume" where the folder already holds a run.
        dry_run: check and print, train nothing.
        check_memory: on GPUs, refuse a run whose computed memory exceeds the GPU's.
        save_every: RL steps between checkpoints, the last step included; 0 saves none (but
            stopping early and ``stop_after`` do).
        keep_last: newest checkpoints that are kept; null keeps all.
        keep_best: checkpoints that are kept besides, the best by ``keep_best_metric``.
        keep_best_metric: one of ``BEST_METRICS``.
        allow_changed: sections whose values may differ from those of the checkpoint that is
            resumed; any other change of a section that a checkpoint is tied to is refused.
        max_time: "[days:]hours:minutes:seconds" from the start of the ranks, after which the run
            stops early and saves, to be resumed later; null is no limit.
        stop_after: stop (and save) after this RL step, to be resumed later; null runs to the end.
        threads: CPU threads per rank; null shares the machine's cores among its ranks (the tiny
            model is fastest on one).
        console: "auto" (live on a terminal, plain lines elsewhere), "plain" or "off".
        tensorboard: write TensorBoard event files.
        wandb: also log to Weights & Biases (the ``wandb`` extra).
        wandb_project: its project.
        samples_every: RL steps between those of which completions are kept in ``samples.jsonl``
            (the first and the last are always among them); 0 keeps none.
        samples_groups: how many groups of such a step are kept.
        report: write report.html and report.png at the end.
    """

    name: str = "quickstart"
    root: str = "runs"
    seed: int = 0
    steps: int = 60
    if_exists: str = "error"
    dry_run: bool = False
    check_memory: bool = True
    save_every: int = 40
    keep_last: int | None = None
    keep_best: int = 0
    keep_best_metric: str = "eval/accuracy"
    allow_changed: tuple[str, ...] = ()
    max_time: str | None = None
    stop_after: int | None = None
    threads: int | None = 1
    console: str = "auto"
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "nemo_apo"
    samples_every: int = 10
    samples_groups: int = 2
    report: bool = True

    def __post_init__(self) -> None:
        # OmegaConf reads a list, which would leave a configuration without a hash.
        object.__setattr__(self, "allow_changed", tuple(self.allow_changed))


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder as Qwen3 and Qwen2.5: RMSNorm, SwiGLU, RoPE, grouped-query attention.

    Attributes:
        path: folder of a checkpoint in Hugging Face's format whose weights training starts from,
            and whose ``config.json`` the shapes must agree with; null starts from random weights.
        vocab_size: tokens of the vocabulary, without padding; null is the task's.
        num_layers, hidden_size, ffn_hidden_size: sizes.
        num_attention_heads, num_query_groups: query heads and key/value heads.
        kv_channels: size of one head.
        qk_layernorm: RMSNorm on queries and keys (Qwen3).
        add_qkv_bias: queries, keys and values have a bias (Qwen2.5).
        rotary_base: RoPE base.
        layernorm_epsilon: RMSNorm epsilon.
        tied_embeddings: one matrix for input embedding and output projection.
        params_dtype: "float32", or "bfloat16" with float32 main weights and gradients.
        transformer_impl: what the layers are made of: "local" (megatron's own modules),
            "transformer_engine", or "auto" (that one where it is installed, on GPUs, in bfloat16).
        init_method_std: standard deviation of initial weights.
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this, whatever the
            layout; padded rows never enter a log-prob, an entropy or a sample.
    """

    name: str = "tiny_qwen3"
    path: str | None = None
    vocab_size: int | None = None
    num_layers: int = 2
    hidden_size: int = 64
    ffn_hidden_size: int = 168
    num_attention_heads: int = 4
    num_query_groups: int = 2
    kv_channels: int = 16
    qk_layernorm: bool = True
    add_qkv_bias: bool = False
    rotary_base: int = 10000
    layernorm_epsilon: float = 1e-6
    tied_embeddings: bool = False
    params_dtype: str = "float32"
    transformer_impl: str = LOCAL
    init_method_std: float = 0.07
    make_vocab_size_divisible_by: int = 8


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is laid out over the ranks; data parallelism takes what is left.

    Attributes:
        tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size: sizes.
        virtual_pipeline_model_parallel_size: chunks of layers that each pipeline stage is cut into,
            to wait less for the others; null is one.
        sequence_parallel: split what is outside attention and MLP over the tensor-parallel ranks
            too, along the sequence.
        recompute: what is computed again in the backward pass instead of kept: "none",
            "selective" (attention) or "full" (whole layers).
        distributed_optimizer: shard main weights and moments over the data-parallel ranks.
        backend: "auto" (NCCL where CUDA is available, gloo otherwise), "gloo" or "nccl".
        timeout_minutes: of any collective; a rank that waits longer ends the job.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False
    recompute: str = "none"
    distributed_optimizer: bool = False
    backend: str = "auto"
    timeout_minutes: float = 10.0


@dataclass(frozen=True)
class AnchorConfig:
    """The policy behind l_ref.

    Attributes:
        name: "old", "reference", "ema" or "lagged", see ``nemo_apo.core.anchoring.ANCHORS``.
        decay: of the moving average of the weights, per RL step ("ema").
        refresh_every: RL steps between refreshes ("lagged").
    """

    name: str = "old"
    decay: float = 0.95
    refresh_every: int = 5


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of one RL step.

    Attributes:
        engine: what completes the prompts: "static" (the trainer's own model), or "vllm" (the
            ``vllm`` extra, on GPUs only, of the checkpoint at ``model.path``).
        gpu_memory_utilization: share of a GPU's memory that vLLM may take.
        prompts: prompts per rollout (groups).
        group_size: completions per prompt, P.
        temperature: of sampling; log-probs are those of the tempered policy throughout.
        top_k, top_p: not supported (they cut the policy's support); 0 and 1 mean off.
        resample: extra rounds of prompts drawn to replace groups without signal; 0 is off.
        micro_batch_size: sequences generated at once on a rank.
        tensor_model_parallel_size: ranks that share the model that samples; with "static" it is the
            trained one itself where that is laid out so, else a copy that is refitted.
        offload: keep gradients, moments and main weights out of the GPU's memory while completions
            are generated; on GPUs only.
        importance_cap: bound on the weight min(exp(old - sampler), cap) of each token's gradient,
            which corrects for a sampler whose log-probs are not quite the trainer's; None weighs
            nothing (``nemo_apo.core.importance``).
    """

    engine: str = "static"
    gpu_memory_utilization: float = 0.5
    prompts: int = 32
    group_size: int = 8
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    resample: int = 0
    micro_batch_size: int = 512
    tensor_model_parallel_size: int = 1
    offload: bool = False
    importance_cap: float | None = None


@dataclass(frozen=True)
class UpdateConfig:
    """What is done with a rollout: ``mini_batches * epochs`` optimizer steps.

    Attributes:
        mini_batches: optimizer steps per pass over the rollout; each holds whole groups.
        epochs: passes over the rollout.
        micro_batch_size: sequences per forward and backward on a rank. It changes memory and
            speed, never the gradient.
        log_prob_micro_batch_size: sequences per forward without gradient.
        max_skipped_steps: optimizer steps skipped in a row (not finite) after which the run ends.
        max_sampler_mismatch: gap of the sampler's and the trainer's sequence log-probs, nats per
            token, above which the run ends before it trains on the rollout; None is no limit.
        monitor_reference_kl: measure the KL to the policy at the start of RL every step.
    """

    mini_batches: int = 2
    epochs: int = 2
    micro_batch_size: int = 64
    log_prob_micro_batch_size: int = 256
    max_skipped_steps: int = 10
    max_sampler_mismatch: float | None = None
    monitor_reference_kl: bool = True


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of the RL phase.

    Attributes:
        lr: peak learning rate.
        lr_warmup_steps: optimizer steps of linear warm-up.
        lr_decay_style: "constant", or "linear" or "cosine" towards 0 over the run's RL steps.
        adam_beta1, adam_beta2, adam_eps, weight_decay: AdamW.
        clip_grad: bound on the global gradient norm; 0 is off.
    """

    lr: float = 2e-4
    lr_warmup_steps: int = 0
    lr_decay_style: str = "linear"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised steps on the task's own demonstrations before RL; 0 steps is off.

    Attributes:
        steps, batch_size: optimizer steps and demonstrations per step.
        lr: peak learning rate, decayed to 0 by a cosine.
        load: a checkpoint folder whose weights are taken instead of training; null trains.
    """

    steps: int = 300
    batch_size: int = 64
    lr: float = 2e-3
    load: str | None = None


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation.

    Attributes:
        every: RL steps between evaluations (the start and the end are always evaluated).
        prompts: held-out prompts for the greedy figures.
        pass_prompts: of these, how many are sampled for pass@k and maj@k.
        pass_k: their k.
        pass_samples: samples per prompt, from which pass@k is estimated; null is pass_k.
    """

    every: int = 10
    prompts: int = 512
    pass_prompts: int = 128
    pass_k: int = 8
    pass_samples: int | None = None


@dataclass(frozen=True)
class Config:
    """The whole configuration."""

    run: RunConfig = field(default_factory=RunConfig)
    task: Task = field(default_factory=SortTask)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    objective: Objective = field(default_factory=Apo)
    schedule: Schedule = field(default_factory=GuardedSchedule)
    tau: Temperature = field(default_factory=FixedTemperature)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    regularizers: Regularizers = field(default_factory=Regularizers)
    groups: GroupRules = field(default_factory=GroupRules)
    grading: GradingSettings = field(default_factory=GradingSettings)
    shaping: Shaping = field(default_factory=Shaping)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    diagnostics: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self) -> None:
        # "task" stands for the task's own grader; for a task of text, that is one by name.
        named = self.task.text_grader
        if self.grading.grader == TASK_GRADER and named is not None:
            object.__setattr__(self, "grading", replace(self.grading, grader=named))


# The default value of every section whose class depends on its ``name`` field.
TAGGED_SECTIONS: dict[str, dict[str, Any]] = {
    "task": {name: task() for name, task in TASKS.items()},
    "objective": dict(OBJECTIVES),
    "schedule": {name: schedule() for name, schedule in SCHEDULES.items()},
    "tau": {name: temperature() for name, temperature in TEMPERATURES.items()},
}


def padded_vocab_size(vocab_size: int, model: ModelConfig) -> int:
    """The vocabulary rounded up to a multiple of ``make_vocab_size_divisible_by``."""
    step = model.make_vocab_size_divisible_by
    return (vocab_size + step - 1) // step * step


def vocab_size(config: Config) -> int:
    """Tokens that the model knows, without padding: its own vocabulary, else the task's.

    Raises:
        ConfigError: if the task's tokenizer cannot be read.
    """
    own = config.model.vocab_size
    return task_vocabulary(config.task) if own is None else own


def task_vocabulary(task: Task) -> int:
    """Tokens of the task.

    Raises:
        ConfigError: if its tokenizer cannot be read.
    """
    try:
        return task.vocab_size
    except ValueError as error:
        raise ConfigError(str(error)) from None


def unread_sections(objective: Objective) -> set[str]:
    """Sections that an objective never reads; setting one beside it is refused, not ignored."""
    unread: set[str] = set()
    if not objective.uses_alpha:
        unread.add("schedule")
    if not objective.uses_anchor:
        unread |= {"tau", "anchor"}
    return unread
