"""What a grading process may use, and which of the trainer's variables it sees."""

import math
import re
import resource
from collections.abc import Mapping

from nemo_apo.grading.settings import GradingSettings

_SECRET_NAME = re.compile(r"TOKEN|SECRET|KEY|PASSW|CREDENTIAL|COOKIE|_AUTH", re.IGNORECASE)
# A user name and a password inside an address.
_SECRET_VALUE = re.compile(r"://[^/\s]*:[^/\s]*@")


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables whose name and value do not look like a secret."""
    return {
        name: value
        for name, value in environment.items()
        if not _SECRET_NAME.search(name) and not _SECRET_VALUE.search(value)
    }


def limit_this_process(settings: GradingSettings) -> None:
    """Bound memory and files; no core dumps."""
    _limit(resource.RLIMIT_AS, settings.memory_mib * 2**20)
    _limit(resource.RLIMIT_FSIZE, settings.file_mib * 2**20)
    _limit(resource.RLIMIT_CORE, 0)


def allow_cpu(seconds: int) -> None:
    """Bound CPU time from now on; the kernel ends the process by SIGXCPU."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = math.ceil(usage.ru_utime + usage.ru_stime)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    wanted = used + seconds
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    # The hard limit stays: the next sample's soft limit lies above this one's.
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _limit(which: int, value: int) -> None:
    """Lower a limit for good; one that is lower already stays."""
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))
