"""How often a test of abuse tries: a few times in CI, often with NEMO_APO_ABUSE=long.

``scripts/abuse.sh`` runs the long form. Every test prints what it tried and what was lost, which is
where the figures of ``docs/reliability.md`` come from (``pytest -s``).
"""

import os

IS_LONG = os.environ.get("NEMO_APO_ABUSE") == "long"


def tries(short: int, long: int) -> int:
    """How many times to try."""
    return long if IS_LONG else short


def spread(total: int, count: int) -> list[int]:
    """About ``count`` whole numbers from 1 to ``total``, evenly spread, the ends included."""
    if count >= total:
        return list(range(1, total + 1))
    return sorted({1 + round(index * (total - 1) / (count - 1)) for index in range(count)})


def report(what: str, count: int, losses: int = 0) -> None:
    """State a test's figures."""
    print(f"\nabuse: {what}: {count} tries, {losses} losses")
