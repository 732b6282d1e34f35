"""What both trainers note of an RL step's optimizer steps, and what they carry to the next."""

from dataclasses import replace

from torch import Tensor

from nemo_apo.core.diagnostics import observe
from nemo_apo.core.objectives import Objective, Weighing
from nemo_apo.core.objectives.anchored import uses_stale_logprobs
from nemo_apo.plugin.settings import ApoSettings
from nemo_apo.plugin.settled import SettledRollout
from nemo_apo.plugin.state import ApoState
from nemo_apo.step_metrics import Stopwatch, Tally, coefficient_error, step_figures


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why."""


def note_staleness(
    tally: Tally,
    objective: Objective,
    stale: Weighing,
    settled: SettledRollout,
    rows_m: Tensor,
    current_m: Tensor,
) -> None:
    """With ``refresh: stale``, the relative error of the coefficients just used.

    Args:
        current_m: sequence log-probs that the optimizer step's own forward pass saw, nats; they
            tell what the coefficients should have been, at no extra cost.
    """
    if not uses_stale_logprobs(objective) or tally.steps == 0:
        return
    exact = replace(settled.part(rows_m), logprob_sums_N=current_m)
    tally.refresh_bias = coefficient_error(stale, objective.weigh(exact, settled.alpha))


def stop_if_stuck(tally: Tally, apo: ApoSettings, rl_step: int) -> None:
    """Give up after too many optimizer steps in a row that were not finite.

    Raises:
        TrainingStopped: naming the key that sets the number.
    """
    limit = apo.update.max_skipped_steps
    if tally.in_a_row >= limit:
        raise TrainingStopped(
            f"{tally.in_a_row} optimizer steps in a row were skipped because something was not "
            f"finite ({apo.prefix}update.max_skipped_steps={limit}); RL step {rl_step}"
        )


def finish_rl_step(
    state: ApoState, settled: SettledRollout, tally: Tally, watch: Stopwatch, apo: ApoSettings
) -> tuple[dict[str, float], list[str], ApoState]:
    """The metrics of the optimizer steps together, failure signatures in words, and the next state.

    Args:
        state: as it was when the rollout was settled.
    """
    metrics = tally.skip_metrics() | watch.seconds
    if tally.values:
        metrics |= tally.metrics(apo.objective)
    diagnostics, findings = state.diagnostics, []
    figures = step_figures(settled.metrics | metrics, apo.schedule)
    if figures is not None:
        findings, diagnostics = observe(diagnostics, figures, apo.diagnostics)
    following = replace(
        state,
        rl_steps=state.rl_steps + 1,
        schedule=settled.schedule,
        diagnostics=diagnostics,
        skipped_in_a_row=tally.in_a_row,
    )
    told = [f"{finding.name}: {finding.message}; {finding.advice}" for finding in findings]
    return metrics, told, following
