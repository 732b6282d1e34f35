"""What a run in one of the hosts remembers besides weights: explicit data, saved by the host."""

from dataclasses import dataclass, field
from typing import Any

from nemo_apo.config import ConfigError
from nemo_apo.core.alpha_schedule import ScheduleState
from nemo_apo.core.diagnostics import DiagnosticsState
from nemo_apo.plugin.settings import ApoSettings

_FIELDS = {"rl_steps", "schedule_name", "schedule", "diagnostics", "skipped_in_a_row"}


@dataclass(frozen=True)
class ApoState:
    """State after ``rl_steps`` RL steps.

    Attributes:
        rl_steps: RL steps done.
        schedule: memory of the schedule.
        diagnostics: recent figures.
        skipped_in_a_row: optimizer steps skipped in a row up to now.
    """

    rl_steps: int = 0
    schedule: ScheduleState = field(default_factory=ScheduleState)
    diagnostics: DiagnosticsState = field(default_factory=DiagnosticsState)
    skipped_in_a_row: int = 0

    def state_dict(self, settings: ApoSettings) -> dict[str, Any]:
        """The state as plain values."""
        return {
            "rl_steps": self.rl_steps,
            "schedule_name": _schedule_name(settings),
            "schedule": self.schedule.state_dict(),
            "diagnostics": self.diagnostics.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], settings: ApoSettings) -> "ApoState":
        """The inverse of ``state_dict``.

        Raises:
            ConfigError: if the state is not one of ours, or of another schedule.
        """
        if set(state) != _FIELDS:
            raise ConfigError(
                f"the checkpoint's APO state has fields {sorted(state)}, expected {sorted(_FIELDS)}"
            )
        saved, chosen = state["schedule_name"], _schedule_name(settings)
        if saved != chosen:
            raise ConfigError(
                f"{settings.prefix}schedule.name={chosen}: the checkpoint was trained with "
                f"schedule={saved}, whose state does not fit; resume with the same schedule"
            )
        return cls(
            rl_steps=state["rl_steps"],
            schedule=ScheduleState.from_state_dict(state["schedule"]),
            diagnostics=DiagnosticsState.from_state_dict(state["diagnostics"]),
            skipped_in_a_row=state["skipped_in_a_row"],
        )


def _schedule_name(settings: ApoSettings) -> str:
    return settings.schedule.name  # type: ignore[attr-defined]
