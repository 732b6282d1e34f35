"""Whether all ranks, each of which reads the data for itself, have read the same."""

from nemo_apo.parallel.gather import all_gather_objects
from nemo_apo.tasks import Task
from nemo_apo.trainer.run_folder import TrainingStopped


def check_same_data(task: Task) -> None:
    """Compare the digests of the task's prompts and answers; collective.

    Raises:
        TrainingStopped: on all ranks, if a rank has other data than rank 0, or none.
    """
    digests, errors = zip(*all_gather_objects(_digest(task)), strict=True)
    failed = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error]
    if failed:
        raise TrainingStopped("; ".join(failed))
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise TrainingStopped(
            f"rank {others[0]} has read other data than rank 0: the SHA-256 of its prompts and "
            f"answers is {digests[others[0]]}, on rank 0 {digests[0]}"
        )


def _digest(task: Task) -> tuple[str, str]:
    """The digest, or why there is none."""
    try:
        return task.fingerprint(), ""
    except ValueError as error:
        return "", str(error)
