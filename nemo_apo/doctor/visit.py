"""All checks in order, in bounded time, with the same answer on every node."""

import os
import sys
import threading
import time
from collections.abc import Iterator

from nemo_apo.doctor.findings import Finding, failure
from nemo_apo.doctor.machine import Wanted, check_machine, versions
from nemo_apo.doctor.meeting import Meeting, as_data
from nemo_apo.doctor.place import Place

# What a check may take beyond the limit before the process is ended.
_GRACE_S = 15.0


def visit(place: Place, wanted: Wanted, seconds: float) -> tuple[list[Finding], bool]:
    """The findings of all nodes, the same on every rank, and that it met the others.

    Where they cannot be met: those of this node alone, and False. A check that hangs
    ends the process with status 1 and its name.
    """
    progress = _Progress(place.node, seconds + _GRACE_S)
    deadline = time.monotonic() + seconds
    progress.now("the machine")
    local = check_machine(place.node, wanted)
    if place.world_size == 1:
        return local, True
    progress.now(f"meeting at {place.address}:{place.port}")
    try:
        meeting = Meeting(place, deadline)
        return [*_together(meeting, place, wanted, local, progress)], True
    except RuntimeError as error:
        return [*local, _not_met(place, error)], False


def _together(
    meeting: Meeting, place: Place, wanted: Wanted, local: list[Finding], progress: "_Progress"
) -> Iterator[Finding]:
    missing = meeting.missing()
    mine = list(local)
    if not missing:
        progress.now("clock")
        mine.append(meeting.clock())
        for folder in wanted.shared:
            progress.now(f"shared folder {folder}")
            mine += meeting.shared_folder(folder)
        for backend in ("gloo", "nccl") if wanted.gpus else ("gloo",):
            progress.now(backend)
            mine.append(meeting.reach(backend))
    progress.now("collecting")
    reports = meeting.everybody("findings", as_data(mine))
    yield from (Finding(**data) for rank in sorted(reports) for data in reports[rank])
    yield from missing
    yield from _differences(meeting.everybody("versions", versions()), place)
    # Whoever opened the store leaves last.
    meeting.everybody("done", None)
    if place.hosts_store:
        time.sleep(1.0)


def _differences(versions_by_rank: dict[int, dict[str, str]], place: Place) -> Iterator[Finding]:
    """The nodes whose versions are not those of rank 0."""
    first = versions_by_rank[0]
    for rank, found in versions_by_rank.items():
        names = sorted(name for name in {*first, *found} if first.get(name) != found.get(name))
        if names:
            told = ", ".join(f"{name} {found.get(name, 'missing')}" for name in names)
            told += " against " + ", ".join(first.get(name, "missing") for name in names)
            cure = "one environment for all nodes: a container, or a shared one (cluster.python)"
            yield failure(place.node_of(rank), "versions", told, cure)


def _not_met(place: Place, error: RuntimeError) -> Finding:
    told = f"cannot reach {place.address}:{place.port} from here: {str(error).splitlines()[0]}"
    cure = (
        f"is {place.node_of(0)} up, and does MASTER_ADDR name it for this node "
        "(cluster.master_addr)? are its ports open?"
    )
    if place.hosts_store:  # it opened the meeting point itself
        cure = (
            "MASTER_ADDR must name this node (cluster.master_addr; null does), and the port be free"
        )
    return failure(place.node, "present", told, cure)


class _Progress:
    """What is under way, and the end of the process if that takes too long."""

    def __init__(self, node: str, seconds: float) -> None:
        self._node, self._what = node, ""
        timer = threading.Timer(seconds, self._end)
        timer.daemon = True
        timer.start()

    def now(self, what: str) -> None:
        self._what = what

    def _end(self) -> None:
        print(f"nemo-apo: doctor: {self._node} hangs at {self._what}", file=sys.stderr, flush=True)
        os._exit(1)
