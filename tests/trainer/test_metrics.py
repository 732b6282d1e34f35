import json
from pathlib import Path

import pytest

from nemo_apo import record
from nemo_apo.trainer import durable_files
from nemo_apo.trainer.metrics import MetricsLog

from .tiny_runs import tiny_config


def lines(path: Path) -> list[int]:
    return [json.loads(line)[record.STEP] for line in path.read_text().splitlines()]


def test_lines_beyond_the_checkpoint_go_and_a_crash_on_the_way_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = tiny_config(), tmp_path / record.METRICS_FILE
    log = MetricsLog(tmp_path, config, -1)
    for step in range(4):
        log.write(step, {}, [])
    log.close()

    def crash(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(durable_files.os, "fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            MetricsLog(tmp_path, config, 2)
    assert lines(path) == [0, 1, 2, 3]
    MetricsLog(tmp_path, config, 2).close()
    assert lines(path) == [0, 1, 2]
