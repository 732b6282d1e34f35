"""What ends the work of the ranks, and whether a missing one is blamed for it."""

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from nemo_apo.config import Config
from nemo_apo.grading import GradingBroken
from nemo_apo.parallel import layout as parallel_layout
from nemo_apo.parallel.liveness import RanksLost
from nemo_apo.parallel.together import RankError
from nemo_apo.trainer.ranks import ranks
from nemo_apo.trainer.run_folder import TrainingStopped
from tests.parallel.ranks import run_ranks

from .tiny_runs import tiny_config


def raised_beside_an_absent_rank(config: Config, error: Exception, done: Path) -> str:
    """How the work of rank 0 ends that raises; rank 1 is in the groups and does not answer."""
    if dist.get_rank() == 1:
        parallel_layout.initialize(config.parallel, config.run.seed)
        while not done.exists():
            time.sleep(0.02)
        return ""
    try:
        with ranks(config):
            raise error
    except RuntimeError as seen:
        return f"{type(seen).__name__}: {seen}"
    finally:
        done.touch()


@pytest.mark.parametrize("kind", [TrainingStopped, GradingBroken, RankError])
def test_what_all_ranks_raise_is_nobodys_silence(kind: type[Exception], tmp_path: Path) -> None:
    told = run_ranks(2, raised_beside_an_absent_rank, tiny_config(), kind("why"), tmp_path / "done")
    assert told[0] == f"{kind.__name__}: why"


def test_an_absent_rank_is_named_with_the_error(tmp_path: Path) -> None:
    error = RuntimeError("closed\nby peer")
    told = run_ranks(2, raised_beside_an_absent_rank, tiny_config(), error, tmp_path / "done")
    assert told[0] == (
        f"{RanksLost.__name__}: rank 1 (never heard of) stopped answering; "
        "a collective failed: closed"
    )


def test_the_error_of_a_single_process_is_its_own() -> None:
    def work() -> None:
        with pytest.raises(RuntimeError, match=r"^out of memory$"), ranks(tiny_config()):
            raise RuntimeError("out of memory")
        assert not dist.is_initialized()

    run_ranks(1, work)
