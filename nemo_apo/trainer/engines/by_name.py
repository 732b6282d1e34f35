"""Rollout engines by the name that ``rollout.engine`` gives them."""

from collections.abc import Callable

from nemo_apo.config import Config
from nemo_apo.trainer.engines.interface import RolloutEngine
from nemo_apo.trainer.engines.static import StaticEngine
from nemo_apo.trainer.policy import Policy

ENGINES: dict[str, Callable[[Policy, Config], RolloutEngine]] = {"static": StaticEngine}
