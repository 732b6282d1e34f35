"""``nemo-apo export``: a run's weights as a folder that transformers loads."""

import argparse
import os
from pathlib import Path

from nemo_apo.cli.train import ignore_fallback_warnings, world_size
from nemo_apo.config import ConfigError
from nemo_apo.hf_checkpoint.decoder import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN",
        help="a run's folder, whose newest whole checkpoint is taken, or a checkpoint's",
    )
    parser.add_argument("target", type=Path, metavar="TARGET", help="a folder that does not exist")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="type of the weights; default: that of training"
    )
    parser.add_argument(
        "--origin",
        type=Path,
        metavar="DIR",
        help="where config.json and tokenizer are, if not where model.path said at training",
    )


def main(arguments: argparse.Namespace) -> None:
    """Export and say what was written.

    Raises:
        ConfigError: see ``nemo_apo.trainer.hf_export.export``.
    """
    if world_size() != 1:
        raise ConfigError("export is the work of one process, start it without torchrun")
    # The whole model need not fit on a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    ignore_fallback_warnings()
    from nemo_apo.trainer.hf_export import export

    done = export(arguments.source, arguments.target, arguments.dtype, arguments.origin)
    print(f"{done.checkpoint}, RL step {done.step} -> {arguments.target}: {', '.join(done.files)}")
