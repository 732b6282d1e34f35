"""The ranks of one node: torchrun, but with the status of its processes, and deaf to signals.

    python -m nemo_apo.launch.node RANKS train OVERRIDE...

Started once per node by srun, with MASTER_ADDR and MASTER_PORT set. USR1 and TERM reach every
process of a job step. They are held back here and, by inheritance, in the ranks, until these listen
(``nemo_apo.trainer.interruption``): a signal that comes during their imports is kept, and the
launcher of the ranks outlives it.
"""

import os
import signal
import sys
from collections.abc import Sequence

_HELD_BACK = (signal.SIGUSR1, signal.SIGTERM)


def main(argv: Sequence[str]) -> int:
    """Run ``python -m nemo_apo`` on every rank; the status of the one that failed first."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    # Only now: an import of torch takes seconds, in which a signal would end this process.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    ranks, *command = argv
    environment = os.environ
    options = [
        f"--nnodes={environment['SLURM_JOB_NUM_NODES']}",
        f"--node-rank={environment['SLURM_NODEID']}",
        f"--nproc-per-node={ranks}",
        f"--master-addr={environment['MASTER_ADDR']}",
        f"--master-port={environment['MASTER_PORT']}",
        # Every start has a store of its own.
        f"--rdzv-id={environment['SLURM_JOB_ID']}-{environment.get('SLURM_RESTART_COUNT', '0')}",
        "--max-restarts=0",
    ]
    try:
        run.run(run.parse_args([*options, "-m", "nemo_apo", *command]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"nemo_apo: rank {rank} ended with {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
