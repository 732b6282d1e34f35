"""The typed configuration of a run, and the rules that tie its fields together.

Groups whose choice is a class (``objective``, ``schedule``, ``tau``, ``task``) are tagged by their
``name`` field and described where the class lives; everything else is described here. A value that
breaks a rule raises ``ConfigError`` with the key, the value and the rule, before any process group
or file is made. Defaults stand here and, commented, in ``conf/``; a test holds them equal.
"""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_apo.core.alpha_schedule import SCHEDULES, GuardedSchedule, Schedule
from nemo_apo.core.anchoring import ANCHORS
from nemo_apo.core.diagnostics import Thresholds
from nemo_apo.core.filtering import GroupRules
from nemo_apo.core.objectives import OBJECTIVES, Apo, Objective, Regularizers
from nemo_apo.core.temperature import TEMPERATURES, FixedTemperature, Temperature
from nemo_apo.grading.graders import GRADERS, NEEDS_WORKER
from nemo_apo.grading.pool import longest_call_s
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
    return _task_vocabulary(config.task) if own is None else own


def _task_vocabulary(task: Task) -> int:
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


def validate(config: Config, world_size: int, reads_files: bool = True) -> None:
    """Check every rule that the sections do not check themselves.

    Args:
        config: the typed configuration.
        world_size: number of ranks that will run it.
        reads_files: whether what a tokenizer says is checked, too.

    Raises:
        ConfigError: naming key, value and rule.
    """
    _check_run(config.run)
    _check_model(config.model)
    if reads_files:
        _check_vocabulary(config)
    _check_layout(config, world_size)
    _check_keeping(config)
    _check_anchor(config.anchor)
    _check_grading(config.grading, config.parallel)
    _check_shaping(config.shaping, config.task)
    _check_rollout(config.rollout)
    _check_engine(config)
    _check_sampling_ranks(config, world_size)
    _check_update(config.update, config.rollout)
    _check_optimizer(config.optimizer)
    _check_warm_start(config.warm_start, config.task)
    _check_evaluation(config.evaluation)


def check_task_data(config: Config) -> list[str]:
    """Load the task's data and check it against the configuration.

    Returns:
        What was kept and dropped, in lines.

    Raises:
        ConfigError: if data is missing, cannot be read or is too little.
    """
    try:
        report, held_out = config.task.data_report(), config.task.test_size
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if held_out is not None:
        prompts = config.evaluation.prompts
        rule = f"must not exceed the {held_out} held-out prompts"
        require(prompts <= held_out, "evaluation.prompts", prompts, rule)
    return report


def _at_least(section: str, values: object, minimum: int, *keys: str) -> None:
    for key in keys:
        value = getattr(values, key)
        require(value >= minimum, f"{section}.{key}", value, f"must be at least {minimum}")


def _positive(section: str, values: object, *keys: str) -> None:
    for key in keys:
        value = getattr(values, key)
        require(0.0 < value < math.inf, f"{section}.{key}", value, "must be > 0 and finite")


def _non_negative(section: str, values: object, *keys: str) -> None:
    for key in keys:
        value = getattr(values, key)
        require(0.0 <= value < math.inf, f"{section}.{key}", value, "must be >= 0 and finite")


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, key, value, f"must be one of {', '.join(choices)}")


def _check_run(run: RunConfig) -> None:
    allowed = run.name not in ("", ".", "..") and not set(run.name) & set("/\\\0")
    require(allowed, "run.name", run.name, "must be the name of one folder")
    _at_least("run", run, 0, "seed", "save_every", "samples_every")
    _at_least("run", run, 1, "steps", "samples_groups")
    _one_of("run.if_exists", run.if_exists, IF_EXISTS_RULES)
    _one_of("run.console", run.console, CONSOLES)
    if run.threads is not None:
        _at_least("run", run, 1, "threads")
    if run.stop_after is not None:
        rule = f"must lie in 1..run.steps={run.steps}"
        require(1 <= run.stop_after <= run.steps, "run.stop_after", run.stop_after, rule)
    if run.max_time is not None:
        try:
            seconds_of_time(run.max_time)
        except ValueError as error:
            raise ConfigError(f"run.max_time={run.max_time}: {error}") from None


def _check_model(model: ModelConfig) -> None:
    _at_least(
        "model",
        model,
        1,
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "rotary_base",
        "make_vocab_size_divisible_by",
    )
    even = model.kv_channels >= 2 and model.kv_channels % 2 == 0
    require(even, "model.kv_channels", model.kv_channels, "must be even and at least 2 (RoPE)")
    require(
        model.num_attention_heads % model.num_query_groups == 0,
        "model.num_query_groups",
        model.num_query_groups,
        f"must divide model.num_attention_heads={model.num_attention_heads}",
    )
    _positive("model", model, "layernorm_epsilon", "init_method_std")
    _one_of("model.params_dtype", model.params_dtype, PARAMS_DTYPES)
    impl = model.transformer_impl
    _one_of("model.transformer_impl", impl, TRANSFORMER_IMPLS)
    rule = f"needs model.params_dtype=bfloat16, not {model.params_dtype}"
    fits = impl != TRANSFORMER_ENGINE or model.params_dtype == "bfloat16"
    require(fits, "model.transformer_impl", impl, rule)


def _check_vocabulary(config: Config) -> None:
    model, task = config.model, config.task
    own, needed = model.vocab_size, _task_vocabulary(task)
    rule = f"must be at least the {needed} tokens of task={task.name}"
    require(own is None or own >= needed, "model.vocab_size", own, rule)


def _check_layout(config: Config, world_size: int) -> None:
    parallel, model = config.parallel, config.model
    sizes = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
    )
    _at_least("parallel", parallel, 1, *sizes)
    _one_of("parallel.backend", parallel.backend, BACKENDS)
    _one_of("parallel.recompute", parallel.recompute, RECOMPUTE)
    _positive("parallel", parallel, "timeout_minutes")
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    _check_tensor_size(config, "parallel.tensor_model_parallel_size", tp)
    require(
        model.num_layers % pp == 0,
        "parallel.pipeline_model_parallel_size",
        pp,
        f"must divide model.num_layers={model.num_layers}",
    )
    _check_virtual(parallel, model)
    rule = "needs parallel.tensor_model_parallel_size > 1, over whose ranks it splits"
    require(tp > 1 or not parallel.sequence_parallel, "parallel.sequence_parallel", "true", rule)
    cp, key = parallel.context_parallel_size, "parallel.tensor_model_parallel_size x "
    key += "parallel.pipeline_model_parallel_size"
    require(
        world_size % (tp * pp * cp) == 0,
        f"{key} x parallel.context_parallel_size" if cp > 1 else key,
        f"{tp}x{pp}x{cp}" if cp > 1 else f"{tp}x{pp}",
        f"must divide the number of ranks, which is {world_size} "
        "(NPROC=n scripts/quickstart.sh starts n ranks)",
    )


def _check_tensor_size(config: Config, key: str, size: int) -> None:
    """Whether the model can be split over so many tensor-parallel ranks."""
    model = config.model
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        value = getattr(model, name)
        require(value % size == 0, key, size, f"must divide model.{name}={value}")
    padded = padded_vocab_size(vocab_size(config), model)
    rule = f"must divide the padded vocabulary of {padded} tokens "
    rule += f"(model.make_vocab_size_divisible_by={model.make_vocab_size_divisible_by})"
    require(padded % size == 0, key, size, rule)


def _check_virtual(parallel: ParallelConfig, model: ModelConfig) -> None:
    chunks, key = parallel.virtual_pipeline_model_parallel_size, "parallel.virtual_pipeline_model_"
    key += "parallel_size"
    if chunks is None:
        return
    require(chunks >= 2, key, chunks, "must be at least 2, or null for none")
    stages = parallel.pipeline_model_parallel_size
    require(stages > 1, key, chunks, "needs parallel.pipeline_model_parallel_size > 1")
    rule = f"times parallel.pipeline_model_parallel_size={stages} must divide "
    rule += f"model.num_layers={model.num_layers}"
    require(model.num_layers % (stages * chunks) == 0, key, chunks, rule)


def _check_keeping(config: Config) -> None:
    run = config.run
    if run.keep_last is not None:
        _at_least("run", run, 1, "keep_last")
    _at_least("run", run, 0, "keep_best")
    _one_of("run.keep_best_metric", run.keep_best_metric, BEST_METRICS)
    for section in run.allow_changed:
        rule = f"may hold {', '.join(ALLOWED_CHANGES)}"
        require(section in ALLOWED_CHANGES, "run.allow_changed", section, rule)
    if run.keep_best == 0:
        return
    limited = run.keep_last is not None
    require(limited, "run.keep_best", run.keep_best, "needs run.keep_last, else all are kept")
    if run.keep_best_metric.startswith("eval/"):
        every = config.evaluation.every
        rule = f"must be a multiple of evaluation.every={every}, else no checkpoint has the "
        rule += f"run.keep_best_metric={run.keep_best_metric} that run.keep_best goes by"
        require(run.save_every % every == 0, "run.save_every", run.save_every, rule)


def _check_anchor(anchor: AnchorConfig) -> None:
    _one_of("anchor.name", anchor.name, tuple(ANCHORS))
    require(0.0 <= anchor.decay < 1.0, "anchor.decay", anchor.decay, "must lie in [0, 1)")
    _at_least("anchor", anchor, 1, "refresh_every")


def _check_grading(grading: GradingSettings, parallel: ParallelConfig) -> None:
    by_path = re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", grading.grader) is not None
    rule = f"must be {TASK_GRADER}, {', '.join(GRADERS)}, or package.module:function"
    known = by_path or grading.grader in (TASK_GRADER, *GRADERS)
    require(known, "grading.grader", grading.grader, rule)
    _positive("grading", grading, "wall_s", "start_s", "total_s")
    _non_negative("grading", grading, "tolerance")
    _at_least("grading", grading, 0, "workers", "file_mib")
    _at_least("grading", grading, 1, "cpu_s", "processes")
    _at_least("grading", grading, 128, "memory_mib")
    rule = "must be at least 1 for this grader, which may hang or evaluate what a model wrote"
    isolated = grading.workers > 0 or not (by_path or grading.grader in NEEDS_WORKER)
    require(isolated, "grading.workers", grading.workers, rule)
    _refuse_unread_grading(grading)
    longest_s = longest_call_s(grading)
    rule = "must be less: with grading.wall_s, grading.start_s twice and graces a call may last "
    rule += f"{longest_s:g} s, but ranks wait parallel.timeout_minutes={parallel.timeout_minutes:g}"
    in_time = grading.workers == 0 or longest_s < 60.0 * parallel.timeout_minutes
    require(in_time, "grading.total_s", grading.total_s, rule)


def _refuse_unread_grading(grading: GradingSettings) -> None:
    """Refuse a setting that nothing would read."""
    limits = ("wall_s", "cpu_s", "memory_mib", "file_mib", "processes", "start_s", "total_s")
    for key in limits if grading.workers == 0 else ():
        value = getattr(grading, key)
        rule = "would limit nothing without a worker (grading.workers=0)"
        require(value == getattr(GradingSettings, key), f"grading.{key}", value, rule)
    read = grading.grader == "numeric" or grading.tolerance == GradingSettings.tolerance
    rule = f"is of the numeric grader alone (grading.grader={grading.grader})"
    require(read, "grading.tolerance", grading.tolerance, rule)


def _check_shaping(shaping: Shaping, task: Task) -> None:
    limit = task.max_response_length
    fits = shaping.overlong == 0.0 or shaping.overlong_cache <= limit
    rule = f"must not exceed the length limit of {limit} tokens"
    require(fits, "shaping.overlong_cache", shaping.overlong_cache, rule)


def _check_rollout(rollout: RolloutConfig) -> None:
    _one_of("rollout.engine", rollout.engine, ROLLOUT_ENGINES)
    _at_least("rollout", rollout, 1, "prompts", "micro_batch_size")
    _at_least("rollout", rollout, 2, "group_size")
    _at_least("rollout", rollout, 0, "resample")
    _positive("rollout", rollout, "temperature")
    cut = "top-k and top-p cut the support of the policy, so its log-probs would be wrong; "
    require(rollout.top_k == 0, "rollout.top_k", rollout.top_k, cut + "must be 0")
    require(rollout.top_p == 1.0, "rollout.top_p", rollout.top_p, cut + "must be 1")
    cap, rule = rollout.importance_cap, "must be at least 1 and finite, or null for no correction"
    require(cap is None or 1.0 <= cap < math.inf, "rollout.importance_cap", cap, rule)


def _check_engine(config: Config) -> None:
    rollout, key = config.rollout, "rollout.gpu_memory_utilization"
    share, unset = rollout.gpu_memory_utilization, RolloutConfig.gpu_memory_utilization
    require(0.0 < share < 1.0, key, share, "must lie in (0, 1)")
    if rollout.engine != "vllm":
        rule = f"is of the vllm engine alone (rollout.engine={rollout.engine})"
        require(share == unset, key, share, rule)
        return
    key, path = "rollout.engine", config.model.path
    rule = "needs model.path: it builds its model by the checkpoint's config.json"
    require(path is not None, key, rollout.engine, rule)
    rule = "needs update.max_sampler_mismatch (such as 0.05): other code than the trainer's "
    rule += "computes its log-probs, and a run must end where they are not the trainer's"
    require(config.update.max_sampler_mismatch is not None, key, rollout.engine, rule)


def _check_sampling_ranks(config: Config, world_size: int) -> None:
    key = "rollout.tensor_model_parallel_size"
    ranks = config.rollout.tensor_model_parallel_size
    _at_least("rollout", config.rollout, 1, "tensor_model_parallel_size")
    require(world_size % ranks == 0, key, ranks, f"must divide the number of ranks, {world_size}")
    _check_tensor_size(config, key, ranks)


def _check_update(update: UpdateConfig, rollout: RolloutConfig) -> None:
    _at_least(
        "update",
        update,
        1,
        "mini_batches",
        "epochs",
        "micro_batch_size",
        "log_prob_micro_batch_size",
        "max_skipped_steps",
    )
    if update.max_sampler_mismatch is not None:
        _positive("update", update, "max_sampler_mismatch")
    require(
        rollout.prompts % update.mini_batches == 0,
        "update.mini_batches",
        update.mini_batches,
        f"must divide rollout.prompts={rollout.prompts}: an optimizer step holds whole groups",
    )


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    _positive("optimizer", optimizer, "lr", "adam_eps")
    _non_negative("optimizer", optimizer, "weight_decay", "clip_grad")
    _at_least("optimizer", optimizer, 0, "lr_warmup_steps")
    _one_of("optimizer.lr_decay_style", optimizer.lr_decay_style, LR_DECAY_STYLES)
    for key in ("adam_beta1", "adam_beta2"):
        value = getattr(optimizer, key)
        require(0.0 <= value < 1.0, f"optimizer.{key}", value, "must lie in [0, 1)")


def _check_warm_start(warm_start: WarmStartConfig, task: Task) -> None:
    _at_least("warm_start", warm_start, 0, "steps")
    _at_least("warm_start", warm_start, 1, "batch_size")
    _positive("warm_start", warm_start, "lr")
    rule = f"must be 0 (or set warm_start.load): task={task.name} has nothing to imitate"
    trains = warm_start.steps > 0 and warm_start.load is None
    require(task.has_demonstrations or not trains, "warm_start.steps", warm_start.steps, rule)


def _check_evaluation(evaluation: EvaluationConfig) -> None:
    _at_least("evaluation", evaluation, 1, "every", "prompts", "pass_prompts", "pass_k")
    require(
        evaluation.pass_prompts <= evaluation.prompts,
        "evaluation.pass_prompts",
        evaluation.pass_prompts,
        f"must not exceed evaluation.prompts={evaluation.prompts}",
    )
    samples, k = evaluation.pass_samples, evaluation.pass_k
    rule = f"must be at least evaluation.pass_k={k}"
    require(samples is None or samples >= k, "evaluation.pass_samples", samples, rule)
