"""The rules that tie the fields of a configuration together.

A value that breaks one raises ``ConfigError`` with the key, the value and the rule, before any
process group or file is made.
"""

import math
import re

from nemo_apo.config import (
    ALLOWED_CHANGES,
    BACKENDS,
    BEST_METRICS,
    CONSOLES,
    IF_EXISTS_RULES,
    LR_DECAY_STYLES,
    PARAMS_DTYPES,
    RECOMPUTE,
    ROLLOUT_ENGINES,
    TRANSFORMER_ENGINE,
    TRANSFORMER_IMPLS,
    AnchorConfig,
    Config,
    ConfigError,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    UpdateConfig,
    WarmStartConfig,
    padded_vocab_size,
    require,
    seconds_of_time,
    task_vocabulary,
    vocab_size,
)
from nemo_apo.core.anchoring import ANCHORS
from nemo_apo.grading.graders import GRADERS, NEEDS_WORKER
from nemo_apo.grading.pool import longest_call_s
from nemo_apo.grading.settings import TASK_GRADER, GradingSettings
from nemo_apo.grading.shaping import Shaping
from nemo_apo.tasks import Task


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
    own, needed = model.vocab_size, task_vocabulary(task)
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
