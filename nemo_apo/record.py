"""What a run leaves behind: the names of its files and of its metrics, each written once.

A run folder holds

    config.yaml     the resolved configuration
    metrics.jsonl   one JSON object per RL step (and one for the evaluation before the first step)
    samples.jsonl   some completions of some RL steps, one JSON object per group (``KeptGroup``)
    summary.json    the figures of the finished run
    report.html, report.png, tensorboard/, checkpoints/

A line of ``metrics.jsonl`` is a flat mapping from the names below to numbers, plus ``step`` (RL
steps completed when it was written; 0 is the evaluation before training) and ``findings`` (a list
of ``{"name", "message", "advice"}``, see ``nemo_apo.core.diagnostics``). A metric that was not
computed at a step is absent from its line. A number that is not finite is written as ``null``.
"""

from dataclasses import dataclass
from typing import Any

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
SUMMARY_FILE = "summary.json"
REPORT_HTML = "report.html"
REPORT_PNG = "report.png"
TENSORBOARD_DIR = "tensorboard"
CHECKPOINT_DIR = "checkpoints"

STEP = "step"
FINDINGS = "findings"

REWARD_MEAN = "reward/mean"
REWARD_STD = "reward/std"
REWARD_FAILED = "reward/failed_grades"
# Of the first round's completions: the grader's own value, where it did not fail, and the terms of
# ``shaping`` before their weights; a term that is off is absent.
REWARD_CORRECT = "reward/correct"
SHAPING_TERMS = {name: f"reward/{name}" for name in ("format", "repetition", "overlong")}

# Failed grades by reason (a key of ``nemo_apo.grading.REASONS``), those of resampled groups
# included; a reason that did not occur is absent.
FAILED_GRADES_BY_REASON = {
    reason: f"{REWARD_FAILED}_{reason}"
    for reason in (
        "raised",
        "type",
        "not_finite",
        "refused",
        "memory",
        "timeout",
        "cpu",
        "processes",
        "exited",
        "protocol",
    )
}

ALPHA = "schedule/alpha"
ALPHA_TARGET = "schedule/target"
CONFIDENCE = "schedule/confidence"
IMPROVEMENT = "schedule/improvement"

TOKEN_ENTROPY = "policy/token_entropy"
ANCHOR_DRIFT = "policy/anchor_drift"
ESS_SHARE = "policy/ess_share"
KL_REFERENCE = "policy/kl_reference"
MAX_LOG_RATIO = "policy/max_log_ratio"
CLIPPED_SHARE = "policy/clipped_share"
SAMPLER_MISMATCH = "policy/sampler_mismatch"
SAMPLER_MISMATCH_MAX = "policy/sampler_mismatch_max"
SAMPLER_WEIGHT_SPREAD = "policy/sampler_weight_spread"
IMPORTANCE_WEIGHT = "policy/importance_weight"
IMPORTANCE_CAPPED_SHARE = "policy/importance_capped_share"

OBJECTIVE_VALUE = "update/objective"
GRAD_NORM = "update/grad_norm"
LEARNING_RATE = "update/learning_rate"
SKIPPED_STEPS = "update/skipped_steps"
SKIPPED_LOGPROBS = "update/skipped_logprobs"
SKIPPED_COEFFICIENTS = "update/skipped_coefficients"
SKIPPED_LOSS = "update/skipped_loss"
SKIPPED_GRADIENT = "update/skipped_gradient"
COEFFICIENT_TOP_SHARE = "update/coefficient_top_share"
REFRESH_BIAS = "update/refresh_bias"
TAU_MEAN = "update/tau_mean"

RESPONSE_LENGTH = "rollout/response_length"
TRUNCATED_SHARE = "rollout/truncated_share"
TOKENS_PER_SECOND = "rollout/tokens_per_s"

NO_SIGNAL_SHARE = "groups/no_signal_share"
DROPPED_GROUPS = "groups/dropped"
RESAMPLED_GROUPS = "groups/resampled"

ROLLOUT_SECONDS = "time/rollout_s"
LOGPROB_SECONDS = "time/logprobs_s"
WEIGH_SECONDS = "time/weigh_s"
REFRESH_SECONDS = "time/refresh_s"
TRAIN_SECONDS = "time/train_s"
STEP_SECONDS = "time/step_s"

EVAL_ACCURACY = "eval/accuracy"
EVAL_REWARD = "eval/reward"
EVAL_ACCURACY_ERROR = "eval/accuracy_error"
EVAL_PASS_AT_K = "eval/pass_at_k"
EVAL_MAJ_AT_K = "eval/maj_at_k"
EVAL_SAMPLED_ACCURACY = "eval/sampled_accuracy"
EVAL_RESPONSE_LENGTH = "eval/response_length"
EVAL_TRUNCATED_SHARE = "eval/truncated_share"
EVAL_FAILED_GRADES = "eval/failed_grades"

SAMPLES = "progress/samples"


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is shown to a person: label and unit ("" for a plain number)."""

    label: str
    unit: str = ""


METRICS: dict[str, MetricInfo] = {
    REWARD_MEAN: MetricInfo("mean reward"),
    REWARD_STD: MetricInfo("reward standard deviation"),
    REWARD_FAILED: MetricInfo("failed grades", "samples"),
    REWARD_CORRECT: MetricInfo("mean grade before shaping"),
    SHAPING_TERMS["format"]: MetricInfo("share in the format"),
    SHAPING_TERMS["repetition"]: MetricInfo("share of repeated n-grams"),
    SHAPING_TERMS["overlong"]: MetricInfo("share of the overlong cache used"),
    **{
        name: MetricInfo(f"failed grades, {reason.replace('_', ' ')}", "samples")
        for reason, name in FAILED_GRADES_BY_REASON.items()
    },
    ALPHA: MetricInfo("alpha"),
    ALPHA_TARGET: MetricInfo("alpha target"),
    CONFIDENCE: MetricInfo("confidence gate"),
    IMPROVEMENT: MetricInfo("improvement gate"),
    TOKEN_ENTROPY: MetricInfo("token entropy", "nats/token"),
    ANCHOR_DRIFT: MetricInfo("anchor drift (std of u)"),
    ESS_SHARE: MetricInfo("effective sample size / P at alpha"),
    KL_REFERENCE: MetricInfo("KL to the reference", "nats/token"),
    MAX_LOG_RATIO: MetricInfo("largest |log q - log p|", "nats"),
    CLIPPED_SHARE: MetricInfo("clipped share"),
    SAMPLER_MISMATCH: MetricInfo("sampler/trainer sequence log-prob gap", "nats/token"),
    SAMPLER_MISMATCH_MAX: MetricInfo("sampler/trainer log-prob gap (largest)", "nats/sequence"),
    SAMPLER_WEIGHT_SPREAD: MetricInfo("spread of trainer/sampler importance weights"),
    IMPORTANCE_WEIGHT: MetricInfo("mean importance weight of a token"),
    IMPORTANCE_CAPPED_SHARE: MetricInfo("share of tokens at the importance cap"),
    OBJECTIVE_VALUE: MetricInfo("objective"),
    GRAD_NORM: MetricInfo("gradient norm"),
    LEARNING_RATE: MetricInfo("learning rate"),
    SKIPPED_STEPS: MetricInfo("skipped optimizer steps", "steps"),
    SKIPPED_LOGPROBS: MetricInfo("skipped: log-probs not finite", "steps"),
    SKIPPED_COEFFICIENTS: MetricInfo("skipped: coefficients not finite", "steps"),
    SKIPPED_LOSS: MetricInfo("skipped: loss not finite", "steps"),
    SKIPPED_GRADIENT: MetricInfo("skipped: gradient not finite", "steps"),
    COEFFICIENT_TOP_SHARE: MetricInfo("share of sum |c| in the top 10% of sequences"),
    REFRESH_BIAS: MetricInfo("relative error of stale coefficients"),
    TAU_MEAN: MetricInfo("mean tau"),
    RESPONSE_LENGTH: MetricInfo("response length", "tokens"),
    TRUNCATED_SHARE: MetricInfo("truncated share"),
    TOKENS_PER_SECOND: MetricInfo("rollout speed", "tokens/s"),
    NO_SIGNAL_SHARE: MetricInfo("share of groups without signal"),
    DROPPED_GROUPS: MetricInfo("dropped groups", "groups"),
    RESAMPLED_GROUPS: MetricInfo("resampled groups", "groups"),
    ROLLOUT_SECONDS: MetricInfo("rollout", "s"),
    LOGPROB_SECONDS: MetricInfo("log-prob pass", "s"),
    WEIGH_SECONDS: MetricInfo("weigh and gather", "s"),
    REFRESH_SECONDS: MetricInfo("coefficient refresh", "s"),
    TRAIN_SECONDS: MetricInfo("forward, backward, optimizer", "s"),
    STEP_SECONDS: MetricInfo("RL step", "s"),
    EVAL_ACCURACY: MetricInfo("held-out greedy accuracy"),
    EVAL_REWARD: MetricInfo("held-out greedy reward"),
    EVAL_ACCURACY_ERROR: MetricInfo("standard error of the held-out greedy accuracy"),
    EVAL_PASS_AT_K: MetricInfo("held-out pass@k"),
    EVAL_MAJ_AT_K: MetricInfo("held-out maj@k"),
    EVAL_SAMPLED_ACCURACY: MetricInfo("held-out accuracy of samples"),
    EVAL_RESPONSE_LENGTH: MetricInfo("held-out greedy response length", "tokens"),
    EVAL_TRUNCATED_SHARE: MetricInfo("held-out greedy truncated share"),
    EVAL_FAILED_GRADES: MetricInfo("failed grades of the evaluation", "completions"),
    SAMPLES: MetricInfo("samples", "completions"),
}


@dataclass(frozen=True)
class KeptCompletion:
    """A completion in ``samples.jsonl``.

    Attributes:
        text: as the task decodes it.
        reward: null where the grade failed.
        length: tokens, the end token included.
        truncated: cut at the length limit.
        failed: why the grade failed, a key of ``nemo_apo.grading.REASONS``; "" where it did not.
    """

    text: str
    reward: float | None
    length: int
    truncated: bool
    failed: str


@dataclass(frozen=True)
class KeptGroup:
    """A line of ``samples.jsonl``: a prompt and all that was said to it, as it was drawn.

    Attributes:
        step: the RL step, from 1.
        prompt, reference: what was asked, and the right answer; as graders are given them.
        completions: those of the group, in the order of sampling.
    """

    step: int
    prompt: str
    reference: str
    completions: tuple[KeptCompletion, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KeptGroup":
        """The inverse of ``dataclasses.asdict``."""
        completions = tuple(KeptCompletion(**one) for one in values["completions"])
        return cls(**{**values, "completions": completions})


@dataclass
class Summary:
    """``summary.json``: the figures of a finished run.

    Accuracies are greedy, on held-out prompts, in [0, 1]; ``wall_s`` covers warm start, RL and
    evaluations in seconds; ``schedule`` is "none" for an objective that has no alpha, and the
    two alphas are then None. ``peak_memory_mib`` is the largest over the ranks.
    """

    name: str
    objective: str
    schedule: str
    task: str
    reward: str
    seed: int
    accuracy_start: float
    accuracy_final: float
    reward_start: float
    reward_final: float
    pass_at_8: float | None
    pass_k: int
    pass_at_k: float
    steps: int
    samples: int
    optimizer_steps: int
    skipped_steps: int
    wall_s: float
    warm_start_s: float
    peak_memory_mib: float
    alpha_first: float | None
    alpha_last: float | None
    alpha_lowest: float | None
    confidence_highest: float | None
    improvement_highest: float | None
    refresh_share: float
    world_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    context_parallel_size: int
    data_parallel_size: int
    versions: dict[str, str]
