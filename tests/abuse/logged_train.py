"""``nemo-apo train`` that also writes down what it trains on: python -m ... LOG [arguments].

One line per rollout with its step and its tokens, prompts and completions, before the step that
trains on it.
"""

import json
import sys
from pathlib import Path

from nemo_apo.cli import main
from nemo_apo.trainer.rollout_source import RolloutSource
from nemo_apo.trainer.rollouts import Rollouts


def log_rollouts(path: Path) -> None:
    """Let every rollout source write its rollouts to a file."""
    sample = RolloutSource._sample

    def logged(self: RolloutSource, step: int, again: int, count: int) -> Rollouts:
        rollouts = sample(self, step, again, count)
        line = {"step": step, "again": again, "tokens": rollouts.tokens_NT.tolist()}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return rollouts

    RolloutSource._sample = logged  # type: ignore[method-assign]


if __name__ == "__main__":
    log_rollouts(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
