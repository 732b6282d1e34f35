"""Where the metrics of a run go: metrics.jsonl, TensorBoard, Weights & Biases. Rank 0 only.

Completions that are kept go beside them, to samples.jsonl.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_apo import record
from nemo_apo.compose import to_yaml
from nemo_apo.config import Config
from nemo_apo.core.diagnostics import Finding
from nemo_apo.record import KeptGroup
from nemo_apo.trainer.step_lines import append_lines, cut_after


class MetricsLog:
    """Writes one record per RL step to every sink that the configuration asks for.

    Args:
        folder: the run's folder.
        config: the run's configuration.
        first_step: steps after this one are about to be written; lines of ``metrics.jsonl`` and
            ``samples.jsonl`` from an interrupted run beyond it are removed.
    """

    def __init__(self, folder: Path, config: Config, first_step: int) -> None:
        self._path = folder / record.METRICS_FILE
        self._samples_path = folder / record.SAMPLES_FILE
        for path in (self._path, self._samples_path):
            cut_after(path, first_step)
        self._tensorboard = None
        self._wandb = None
        if config.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / record.TENSORBOARD_DIR))
        if config.run.wandb:
            self._wandb = _start_wandb(folder, config)

    def write(
        self,
        step: int,
        metrics: dict[str, float],
        findings: list[Finding],
        kept: Sequence[KeptGroup] = (),
    ) -> None:
        """Append a step's metrics (names of ``nemo_apo.record``), findings and kept samples."""
        line: dict[str, Any] = {record.STEP: step}
        line |= {name: _json_number(value) for name, value in metrics.items()}
        line[record.FINDINGS] = [asdict(finding) for finding in findings]
        if kept:
            append_lines(self._samples_path, [asdict(group) for group in kept])
        append_lines(self._path, [line])
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def close(self) -> None:
        """Flush and close every sink."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _start_wandb(folder: Path, config: Config) -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError(
            "run.wandb=true needs the wandb extra: pip install 'nemo_apo[wandb]'"
        ) from None
    return wandb.init(
        project=config.run.wandb_project,
        name=config.run.name,
        dir=str(folder),
        config={"config": to_yaml(config)},
    )
