"""Our state in the host's checkpoints: a JSON file beside the policy's weights.

The host writes a step's checkpoint into a temporary folder and renames it when it is whole, so our
file is in it or the checkpoint does not exist. The host's own save state would drop unknown keys.
"""

import json
import os
from pathlib import Path

from nemo_apo.config import ConfigError
from nemo_apo.plugin.settings import ApoSettings
from nemo_apo.plugin.state import ApoState

STATE_FILE = "nemo_apo.json"


def state_path(weights_path: str | os.PathLike[str]) -> Path:
    """Where the state of a checkpoint is, given where its weights are."""
    return Path(weights_path).parent / STATE_FILE


def save_state(
    weights_path: str | os.PathLike[str], state: ApoState, settings: ApoSettings
) -> None:
    """Write the state into the checkpoint that is being made."""
    path = state_path(weights_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(state.state_dict(settings), indent=1) + "\n")


def load_state(weights_path: str | os.PathLike[str] | None, settings: ApoSettings) -> ApoState:
    """The state to go on from; a new one without a checkpoint.

    Raises:
        ConfigError: for a checkpoint without our state, unless told to start fresh, and for one of
            another schedule.
    """
    if weights_path is None:
        return ApoState()
    path = state_path(weights_path)
    if path.exists():
        return ApoState.from_state_dict(_read(path), settings)
    if settings.resume.without_state == "fresh":
        return ApoState()
    raise ConfigError(
        f"the checkpoint to resume from holds no APO state ({path} is missing): the schedule would "
        f"start anew; set {settings.prefix}resume.without_state=fresh to let it"
    )


def _read(path: Path) -> dict:
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(state, dict):
        raise ConfigError(f"{path} holds no APO state, but {type(state).__name__}")
    return state
