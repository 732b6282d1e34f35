"""The ranks of a run, from the start of their groups to the end; a lost one is named."""

import contextlib
from collections.abc import Iterator

from nemo_apo.config import Config, seconds_of_time
from nemo_apo.grading import GradingBroken
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.parallel.layout import Layout
from nemo_apo.parallel.liveness import Liveness, RanksLost, end_silent, told
from nemo_apo.parallel.together import RankError
from nemo_apo.trainer.interruption import Interruption, StopCheck
from nemo_apo.trainer.run_folder import TrainingStopped

# All ranks raise these together, so none is missing.
_RAISED_BY_ALL = (TrainingStopped, GradingBroken, RankError)


@contextlib.contextmanager
def ranks(config: Config) -> Iterator[tuple[Layout, StopCheck]]:
    """The ranks while they work; whatever ends the work ends their groups.

    Raises:
        RanksLost: if a collective failed and ranks, or the store, do not answer; the groups stay
            as they are.
    """
    layout = parallel_layout.initialize(config.parallel, config.run.seed)
    limit = config.run.max_time
    max_time_s = None if limit is None else seconds_of_time(limit)
    timeout_s = 60.0 * config.parallel.timeout_minutes
    try:
        # Signals are heard to the end: a launcher sends them to all when it has lost one.
        with Interruption(layout.device, max_time_s) as stop, Liveness(timeout_s) as alive:
            try:
                yield layout, stop
            except _RAISED_BY_ALL:
                raise
            except RuntimeError as error:  # gloo's own kind, for want of a better
                _name_the_lost(alive, error)
                raise
    except RanksLost:
        raise  # groups with a lost rank cannot be ended in order
    except BaseException:
        parallel_layout.shut_down()
        raise
    parallel_layout.shut_down()


def _name_the_lost(alive: Liveness, error: Exception) -> None:
    silent = alive.silent()
    if not silent:
        return
    end_silent(silent)
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    raise RanksLost(f"{told(silent)}; a collective failed: {reason}") from error
