"""Graders that do what a completion names. Workers import this file: it must not import torch."""

import ctypes
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from nemo_apo.tasks import Prompt, SortTask

GIBIBYTE = 2**30
NOT_CALLABLE = "a string"


class NumberLike:
    """What a tensor of one element looks like."""

    def __float__(self) -> float:
        return 1.0


class OwnBase(BaseException):
    """What a handler for ``Exception`` does not see."""


def raise_error() -> float:
    raise ValueError("holds a canary-message")


def raise_base() -> float:
    raise OwnBase


def recurse() -> float:
    return recurse() + 1.0


def leave() -> float:
    raise SystemExit(3)


def hang() -> float:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(60)


def spin() -> float:
    while True:
        pass


def fill_memory() -> float:
    held = []
    while True:
        held.append(bytearray(2**24))


def fill_memory_and_hang() -> float:
    try:
        return fill_memory()
    except MemoryError:
        return hang()


def print_a_gibibyte() -> float:
    line = b"x" * 2**20
    for fd in (1, 2):
        for _ in range(GIBIBYTE // len(line) // 2):
            os.write(fd, line)
    print("y" * 2**20)
    return 1.0


def write_a_file() -> float:
    with open(os.environ["GRADING_TEST_FILE"], "w") as file:
        file.write("x" * 2**20)
    return 1.0


def fork_and_hang() -> float:
    """Leaves the session in a grandchild, too, as a daemon does."""
    for in_session in (True, False):
        if os.fork() == 0:
            if not in_session:
                os.setsid()
                if os.fork() > 0:
                    os._exit(0)
            hang()
    return hang()


def fork_and_return() -> float:
    if os.fork() == 0:
        os.setsid()
        hang()
    return 1.0


def fork_bomb() -> float:
    """Doubles as long as it lives, but ends by itself at 512 processes: a test may fail."""
    for _ in range(9):
        os.fork()
        time.sleep(0.02)
    os.setsid() if os.getpid() != os.getpgrp() else None
    return hang()


def end_of_supervisor() -> float:
    os.kill(os.getppid(), signal.SIGKILL)
    return hang()


def stop_supervisor() -> float:
    os.kill(os.getppid(), signal.SIGSTOP)
    return 1.0


def write_to_every_pipe() -> float:
    for fd in range(3, 64):
        try:
            os.write(fd, b"\x05\x00\x00\x00GRADE" * 10)
        except OSError:
            continue
    return 1.0


def claim_a_huge_reply() -> float:
    for fd in range(3, 64):
        try:
            os.write(fd, b"\xff\xff\xff\xff")
        except OSError:
            continue
    return 1.0


def close_every_pipe() -> float:
    os.closerange(3, 64)
    return 1.0


def speak_later() -> float:
    def later() -> None:
        time.sleep(0.2)
        write_to_every_pipe()

    threading.Thread(target=later).start()
    return 1.0


def answer_again_later() -> float:
    """Sends a second, well-formed answer to its own request while the next one is at work."""
    grade = struct.pack("<QBd", 1, 0, 9.0)
    message = struct.pack("<I", len(grade)) + grade

    def later() -> None:
        time.sleep(0.5)
        for fd in range(3, 64):
            try:
                os.write(fd, message)
            except OSError:
                continue

    threading.Thread(target=later).start()
    return 1.0


def take_two_seconds() -> float:
    time.sleep(2.0)
    return 0.5


def spoil_the_process() -> float:
    sys.stdout.close()
    sys.stderr = None  # type: ignore[assignment]
    os.chdir("/")
    sys.setrecursionlimit(60)
    return 1.0


def count_secrets() -> float:
    """How many variables hold a canary, here or in what the kernel shows of this process."""
    with open("/proc/self/environ", "rb") as file:
        inherited = file.read().count(b"canary")
    with open("/proc/self/cmdline", "rb") as file:
        arguments = file.read().count(b"canary")
    return float(inherited + arguments + str(dict(os.environ)).count("canary"))


def heavy_modules() -> float:
    return float(sum(name in sys.modules for name in ("torch", "megatron", "numpy", "omegaconf")))


def open_sockets() -> float:
    """Sockets and devices of the trainer that were inherited."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{fd}").startswith(("socket:", "/dev/nvidia"))
        except OSError:
            continue
    return float(count)


def threads() -> float:
    return float(len(os.listdir("/proc/self/task")))


def run_a_program() -> float:
    return float(len(subprocess.run(["true"], check=True, capture_output=True).stdout))


def core_limit() -> float:
    return float(resource.getrlimit(resource.RLIMIT_CORE)[0])


def own_socket() -> float:
    with socket.socket() as made:
        return float(made.fileno() > 0)


DEEDS: dict[str, Callable[[], object]] = {
    deed.__name__: deed
    for deed in (
        raise_error,
        raise_base,
        recurse,
        leave,
        hang,
        spin,
        fill_memory,
        fill_memory_and_hang,
        print_a_gibibyte,
        write_a_file,
        fork_and_hang,
        fork_and_return,
        fork_bomb,
        end_of_supervisor,
        stop_supervisor,
        write_to_every_pipe,
        claim_a_huge_reply,
        close_every_pipe,
        speak_later,
        answer_again_later,
        take_two_seconds,
        spoil_the_process,
        count_secrets,
        heavy_modules,
        open_sockets,
        threads,
        run_a_program,
        core_limit,
        own_socket,
    )
} | {
    "exit at once": lambda: os._exit(0),
    "segfault": lambda: ctypes.string_at(0),
    "kill itself": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "string": lambda: "0.5",
    "none": lambda: None,
    "list": lambda: [1.0, 0.0],
    "empty list": list,
    "number-like": NumberLike,
    "complex": lambda: 1j,
    "unpicklable": lambda: lambda: 1.0,
    "huge text": lambda: "x" * 10**8,
    "huge number": lambda: 10**400,
    "nan": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "true": lambda: True,
    "integer": lambda: 3,
}


def grade(prompt: str, completion: str, reference: str) -> object:
    """Do what the completion names; a number is the grade itself."""
    deed = DEEDS.get(completion)
    return float(completion) if deed is None else deed()


@dataclass(frozen=True)
class MisbehavingTask(SortTask):
    """Sorting's prompts; the deed depends on the token ids, and most completions get a grade."""

    length: int = 4
    broken_where: str = ""

    def __post_init__(self) -> None:
        if self.broken_where and self.broken_where == os.environ.get("GRADING_TEST_RANK"):
            raise RuntimeError("no grader here")

    def grade(self, prompt: Prompt, completion: list[int]) -> float:
        deed = deed_of(completion)
        return sum(completion) % 7 / 7.0 if deed is None else DEEDS[deed]()  # type: ignore[return-value]


# What MisbehavingTask does by the sum of the token ids, modulo 16, and the reason it is counted by.
DEED_OF_SUM = {3: "raise_error", 7: "exit at once", 11: "hang", 13: "string", 15: "nan"}
REASON_OF_DEED = {
    "raise_error": "raised",
    "exit at once": "exited",
    "hang": "timeout",
    "string": "type",
    "nan": "not_finite",
}


def deed_of(completion: list[int]) -> str | None:
    """The deed for a completion; None for a proper grade."""
    return DEED_OF_SUM.get(sum(completion) % 16)


def slow_grade(prompt: str, completion: str, reference: str) -> float:
    """A number, after a while."""
    time.sleep(0.2)
    return float(completion)
