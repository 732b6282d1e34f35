"""Tests of a host that is pinned to an environment of its own, beside tests that run anywhere.

A run that promises the host, by an environment variable set to 1, takes the marked tests only, and
fails those whose host is not there. Any other run takes the rest, and the marked ones too if all
that the host needs happens to be there.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class PinnedHost:
    """One host.

    Attributes:
        folder: of its tests.
        promise: the environment variable.
        marks: of tests that need it, with what they say.
        missing: what is not there of all that the host needs.
    """

    folder: Path
    promise: str
    marks: dict[str, str]
    missing: Callable[[], list[str]]

    def add_markers(self, config: pytest.Config) -> None:
        for name, meaning in self.marks.items():
            config.addinivalue_line("markers", f"{name}: {meaning}")

    def leave_out(
        self,
        config: pytest.Config,
        items: list[pytest.Item],
        belongs: Callable[[pytest.Item], bool],
    ) -> None:
        """Deselect those of the folder's tests that do not belong into this run."""
        apart = [item for item in items if self.folder in item.path.parents and not belongs(item)]
        if apart:
            config.hook.pytest_deselected(items=apart)
            items[:] = [item for item in items if item not in apart]

    def belongs(self, item: pytest.Item) -> bool:
        """Whether this run is the one for a test."""
        promised = os.environ.get(self.promise) == "1"
        if not self.marks_of(item):
            return not promised
        return promised or not self.missing()

    def marks_of(self, item: pytest.Item) -> set[str]:
        """The marks of a test that say that it needs the host."""
        return {mark.name for mark in item.iter_markers()} & self.marks.keys()

    def fail_if_missing(self, item: pytest.Item) -> None:
        """To be called before a test runs."""
        if self.marks_of(item) and (missing := self.missing()):
            pytest.fail(f"{self.promise}=1, but not there: {', '.join(missing)}", pytrace=False)
