"""The panels of a report, in reading order, and the colours; both renderers use this table."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_apo import record
from nemo_apo.report.history import Run

# Okabe and Ito's colour-blind-safe colours without yellow (too pale on white), then darker ones of
# Paul Tol's "muted" set for the rare report of many runs. The order keeps the first ones apart.
PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#332288",
    "#882255",
    "#999933",
    "#661100",
    "#444444",
)


@dataclass(frozen=True)
class Panel:
    """One plot over RL steps.

    Attributes:
        title: its heading.
        metrics: names from ``nemo_apo.record``; those without data are left out of the plot.
        y_label: quantity and unit of the y axis.
        caption: one sentence on how to read it.
        y_range: fixed (low, high); high None lets it follow the data, None frees both ends.
        total: for metrics that are parts of a whole, the metric of the whole: one run is then
            drawn as stacked areas, several as bars of each part's mean.
    """

    title: str
    metrics: tuple[str, ...]
    y_label: str
    caption: str
    y_range: tuple[float, float | None] | None = None
    total: str | None = None


PANELS: tuple[Panel, ...] = (
    Panel(
        "Reward",
        (record.REWARD_MEAN, record.EVAL_REWARD),
        "reward",
        "Mean reward of the sampled completions, and of greedy ones on held-out prompts; a rising "
        "first without the second is overfitting to the training prompts.",
    ),
    Panel(
        "Held-out accuracy",
        (record.EVAL_ACCURACY, record.EVAL_PASS_AT_K, record.EVAL_MAJ_AT_K),
        "share of prompts",
        "Greedy accuracy is what the policy does, maj@k what k samples elect, pass@k what it still "
        "can do: first and last meeting means that diversity is spent.",
        (0.0, 1.0),
    ),
    Panel(
        "Alpha and its gates",
        (record.ALPHA, record.ALPHA_TARGET, record.CONFIDENCE, record.IMPROVEMENT),
        "alpha, gates",
        "Alpha near 1 covers the target, near 0 it seeks a mode; the guarded schedule lowers it "
        "only while both gates are open.",
        (0.0, 1.0),
    ),
    Panel(
        "Token entropy",
        (record.TOKEN_ENTROPY,),
        "nats per token",
        "A slow fall is learning; a fast fall while the reward stands still is collapse.",
        (0.0, None),
    ),
    Panel(
        "Anchor drift",
        (record.ANCHOR_DRIFT,),
        "std of u",
        "Spread of the anchored log-ratios u within groups: near 0 alpha hardly changes the "
        "gradient, large values mean the policy has left its anchor.",
        (0.0, None),
    ),
    Panel(
        "Effective sample size",
        (record.ESS_SHARE,),
        "share of the group",
        "Of the weights between policy and target at which alpha stands: near 1 every completion "
        "of a group counts alike, near 1/P one has all the weight.",
        (0.0, 1.0),
    ),
    Panel(
        "KL to the reference",
        (record.KL_REFERENCE,),
        "nats per token",
        "Distance from the reference policy; a sudden rise often comes before a fall of the "
        "held-out accuracy.",
    ),
    Panel(
        "Gradient norm",
        (record.GRAD_NORM,),
        "norm before clipping",
        "Lone spikes point to a few extreme sequences; compare with the two coefficient panels.",
        (0.0, None),
    ),
    Panel(
        "Concentration of the coefficients",
        (record.COEFFICIENT_TOP_SHARE,),
        "share of sum |c|",
        "Part of the gradient that the top 10% of the sequences hold: 0.1 is even, near 1 is "
        "heavy-tailed, and a ratio clip helps.",
        (0.0, 1.0),
    ),
    Panel(
        "Largest log ratio",
        (record.MAX_LOG_RATIO,),
        "nats",
        "Largest |log q - log p| of a sequence: values far above the rest of the run ask for a "
        "larger tau or a ratio clip.",
        (0.0, None),
    ),
    Panel(
        "Response length",
        (record.RESPONSE_LENGTH, record.EVAL_RESPONSE_LENGTH),
        "tokens",
        "Mean length of the sampled completions, and of greedy ones on held-out prompts; steady "
        "growth with a flat reward is padding.",
        (0.0, None),
    ),
    Panel(
        "Truncated and clipped shares",
        (record.TRUNCATED_SHARE, record.CLIPPED_SHARE, record.EVAL_TRUNCATED_SHARE),
        "share",
        "Completions that hit the length limit, sampled or greedy ones of held-out prompts, and "
        "terms held back by a clip: signal that the update did not get.",
        (0.0, None),
    ),
    Panel(
        "Groups without signal",
        (record.NO_SIGNAL_SHARE,),
        "share of groups",
        "Groups whose rewards are all equal teach nothing: a high share asks for other prompts or "
        "for resampling.",
        (0.0, 1.0),
    ),
    Panel(
        "Failed grades by reason",
        tuple(record.FAILED_GRADES_BY_REASON.values()),
        "completions per step",
        "Completions that the grader gave no grade: what becomes of them is set by "
        "groups.failed_grade.",
        (0.0, None),
    ),
    Panel(
        "Dropped and resampled groups",
        (record.DROPPED_GROUPS, record.RESAMPLED_GROUPS),
        "groups per step",
        "Groups left out of the update, and groups sampled again in their place.",
        (0.0, None),
    ),
    Panel(
        "Seconds of a step",
        (
            record.ROLLOUT_SECONDS,
            record.LOGPROB_SECONDS,
            record.WEIGH_SECONDS,
            record.REFRESH_SECONDS,
            record.TRAIN_SECONDS,
        ),
        "seconds",
        "Where the time of an RL step goes (several runs: the mean of each part); the coefficient "
        "refresh is the price of an anchored objective.",
        (0.0, None),
        total=record.STEP_SECONDS,
    ),
    Panel(
        "Stale coefficients",
        (record.REFRESH_BIAS,),
        "relative error",
        "How far coefficients that were not refreshed lie from fresh ones: the error that sparing "
        "the refresh buys.",
        (0.0, None),
    ),
    Panel(
        "Rollout speed",
        (record.TOKENS_PER_SECOND,),
        "tokens per second",
        "Tokens sampled per second of rollout.",
        (0.0, None),
    ),
    Panel(
        "Sampler and trainer agreement",
        (record.SAMPLER_MISMATCH,),
        "nats per token",
        "Gap between the log-probs of the sampler and of the trainer: it should stay near 0, or "
        "the ratios are of the wrong policy.",
        (0.0, None),
    ),
    Panel(
        "Importance correction",
        (record.IMPORTANCE_WEIGHT, record.IMPORTANCE_CAPPED_SHARE),
        "weight, share of tokens",
        "Mean weight of a token's gradient against the sampler's mismatch, 1 where there is none, "
        "and the share of tokens whose weight is cut off at the cap.",
        (0.0, None),
    ),
)


def metrics_with_data(panel: Panel, runs: Sequence[Run]) -> list[str]:
    """The panel's metrics that have a finite value in any run, in the panel's order."""
    return [metric for metric in panel.metrics if any(run.finite(metric) for run in runs)]


def split_by_data(runs: Sequence[Run]) -> tuple[list[Panel], list[Panel]]:
    """The panels that have data in some run, and those that have none."""
    shown = [panel for panel in PANELS if metrics_with_data(panel, runs)]
    return shown, [panel for panel in PANELS if panel not in shown]


def stacked_series(run: Run, metrics: Sequence[str]) -> tuple[list[int], list[list[float]]]:
    """Steps and one column per metric for a stack, in which a missing part counts as 0."""
    records = [r for r in run.records if any(r.values.get(m) is not None for m in metrics)]
    columns = [[r.values.get(metric) or 0.0 for r in records] for metric in metrics]
    return [r.step for r in records], columns


def last_step(runs: Sequence[Run]) -> int:
    """The last RL step of the longest run, at least 1: all panels share one x axis."""
    return max(1, *(run.steps for run in runs))


def y_limits(panel: Panel, runs: Sequence[Run]) -> tuple[float, float] | None:
    """Both ends of the y axis with a little air; None where the renderer may choose them."""
    if panel.y_range is None:
        return None
    low, high = panel.y_range
    if high is not None:
        air = 0.03 * (high - low)
        return low - air, high + air
    values = [value for run in runs for value in _heights(panel, run)]
    top = max(values, default=0.0)
    return low, low + 1.06 * (top - low) if top > low else low + 1.0


def _heights(panel: Panel, run: Run) -> list[float]:
    """The values that decide how high the y axis of a panel reaches."""
    values = [value for metric in panel.metrics for value in run.finite(metric)]
    if panel.total is not None:
        values += run.finite(panel.total)
        values += [sum(parts) for parts in zip(*stacked_series(run, panel.metrics)[1], strict=True)]
    return values


def colour(index: int) -> str:
    """The colour of the run (or, in a report of one run, of the metric) at ``index``."""
    return PALETTE[index % len(PALETTE)]
