"""Which process is meant: enough to tell it from any other, on this machine or elsewhere.

A process id alone is given out again, and means something else in another container.
"""

import contextlib
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process; started and namespace are empty where /proc does not tell them.

    Attributes:
        host: name of its machine.
        pid: its number in its namespace.
        started: when it started, in clock ticks since the machine did.
        namespace: the namespace of its number, and the boot of its machine's kernel.
    """

    host: str
    pid: int
    started: str
    namespace: str


def this_process() -> Process:
    """The process that asks."""
    return Process(socket.gethostname(), os.getpid(), _started(os.getpid()), _namespace())


def kill(process: Process) -> None:
    """Kill a process of this machine if it is certainly the one meant; else nothing happens."""
    here = process.host == socket.gethostname() and process.namespace == _namespace() != ""
    if not here or not process.started:
        return
    # It may be gone, or another user's.
    with contextlib.suppress(OSError):
        handle = os.pidfd_open(process.pid)
        try:
            # The handle stays with this process, whoever gets the number next.
            if _started(process.pid) == process.started:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


def _started(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # Field 22; the second is a name that may hold spaces and parentheses.
    return stat.rpartition(")")[2].split()[19]


def _namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{os.readlink('/proc/self/ns/pid')} {boot}"
    except OSError:
        return ""
