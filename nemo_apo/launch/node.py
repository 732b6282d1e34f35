"""The ranks of one node: torchrun, but with the status of its processes, and in charge of signals.

    python -m nemo_apo.launch.node RANKS train OVERRIDE...

Started once per node by srun, with MASTER_ADDR and MASTER_PORT set. USR1 and TERM are held back
here and, by inheritance, in the ranks, until these listen (``nemo_apo.trainer.interruption``): a
signal that comes during their imports is kept, and the launcher of the ranks outlives it. What
arrives here is passed on, as it may have come before there were ranks. NEMO_APO_STOP_FILE names a
file that says that the job was told to stop before this process was there to be told.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

# Exit status of a run that goes on later; ``nemo_apo.trainer.interruption`` has the same.
EXIT_STOPPED_EARLY = 75
STOP_FILE = "NEMO_APO_STOP_FILE"
_HELD_BACK = (signal.SIGUSR1, signal.SIGTERM)
_POLL_S = 0.05


def main(argv: Sequence[str]) -> int:
    """Run ``python -m nemo_apo`` on every rank; the status of the one that failed first."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    ranks, *command = argv
    if STOP_FILE in os.environ and Path(os.environ[STOP_FILE]).exists():
        print("nemo_apo: told to stop before the start of the ranks", file=sys.stderr)
        return EXIT_STOPPED_EARLY
    threading.Thread(target=_pass_signals_on, args=(int(ranks),), daemon=True).start()
    # Only now: an import of torch takes seconds, in which a signal would end this process.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args([*_options(ranks), "-m", "nemo_apo", *command]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"nemo_apo: rank {rank} ended with {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def _options(ranks: str) -> list[str]:
    """Options of torchrun, from Slurm's environment."""
    environment = os.environ
    return [
        f"--nnodes={environment['SLURM_JOB_NUM_NODES']}",
        f"--node-rank={environment['SLURM_NODEID']}",
        f"--nproc-per-node={ranks}",
        f"--master-addr={environment['MASTER_ADDR']}",
        f"--master-port={environment['MASTER_PORT']}",
        # Every start has a store of its own.
        f"--rdzv-id={environment['SLURM_JOB_ID']}-{environment.get('SLURM_RESTART_COUNT', '0')}",
        "--max-restarts=0",
    ]


def _pass_signals_on(ranks: int) -> None:
    """Give every signal that arrives here to all ranks, once they are there."""
    while True:
        number = signal.sigwait(_HELD_BACK)
        while len(children := _children()) < ranks:
            time.sleep(_POLL_S)
        for pid in children:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it has ended meanwhile


def _children() -> list[int]:
    listed = Path("/proc/self/task").glob("*/children")
    return [int(pid) for path in listed for pid in path.read_text().split()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
