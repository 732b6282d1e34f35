"""The benchmarks on tiny sizes: complete and finite figures, correct ways to the same log-probs."""

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import nemo_apo
from nemo_apo import cli
from nemo_apo.bench import logprobs, report
from nemo_apo.bench.example import Example, draw, float64_logprob_sum
from nemo_apo.bench.flops import model_flops
from nemo_apo.bench.memory import peak_mib
from nemo_apo.bench.timing import Times, interleaved
from nemo_apo.bench.variants import VARIANTS, Setting, Variant
from nemo_apo.config import ModelConfig

REPOSITORY = str(Path(nemo_apo.__file__).parent.parent)
CPU = torch.device("cpu")
# Nothing else belongs to a row of the log-prob benchmark.
LOGPROB_KEYS = {
    "variant": str,
    "tokens": int,
    "hidden": int,
    "vocab": int,
    "dtype": str,
    "threads": int,
    "time_s": float,
    "gemm_ratio": float,
    "peak_mib": float,
    "sum_error_nats": float,
    "entropy": bool,
    "mode": str,
}
TINY = ("--tokens", "64", "--hidden", "64", "--vocab", "2000", "--repeats", "1")
FEW = ("--sequences", "16", "--length", "5", "--repeats", "1")


def bench(folder: Path, *arguments: str, launcher: Sequence[str] = ("nemo_apo",)) -> dict[str, Any]:
    """What ``nemo-apo bench`` writes, run as a process: threads and process groups end with it."""
    out = folder / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "bench", *arguments, "--json", str(out)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": REPOSITORY, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert set(figures) == {"machine", "versions", "rows", "left_out"}
    assert figures["versions"]["torch"] == torch.__version__
    assert figures["machine"]["device"] == "cpu"
    return figures


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every variant that needs no compiler, in every mode."""
    return bench(
        tmp_path_factory.mktemp("logprobs"),
        *("logprobs", *TINY, "--dtype", "bf16", "fp32", "--mode", "exact", "bf16", "keep_logits"),
        *("--variants", "nemo_apo", "naive", "megatron", "torch_chunked", "liger_fused"),
    )


class TestLogProbs:
    def test_every_row_has_every_figure_in_its_type(self, figures: dict[str, Any]) -> None:
        for row in figures["rows"]:
            assert list(row) == list(LOGPROB_KEYS)
            bare, kernel = row["variant"] == "gemm_8thv", row["variant"] == "nemo_apo"
            absent = {"sum_error_nats"} if bare else set()
            absent |= set() if kernel else {"mode"}
            for key, value in row.items():
                if key in absent:
                    assert value is None
                    continue
                assert type(value) is LOGPROB_KEYS[key], key
                assert not isinstance(value, float) or (math.isfinite(value) and value >= 0.0), key

    def test_which_rows_there_are(self, figures: dict[str, Any]) -> None:
        found = {(r["variant"], r["dtype"], r["mode"], r["entropy"]) for r in figures["rows"]}
        assert len(found) == len(figures["rows"])
        for dtype, modes in (
            ("bf16", ("exact", "bf16", "keep_logits")),
            ("fp32", ("exact", "keep_logits")),  # "bf16" would be "exact" once more
        ):
            for entropy in (False, True):
                assert ("naive", dtype, None, entropy) in found
                kernel = {m for v, d, m, e in found if (v, d, e) == ("nemo_apo", dtype, entropy)}
                assert kernel == set(modes)
            assert ("gemm_8thv", dtype, None, False) in found
            assert ("megatron", dtype, None, False) in found
        # Its kernels are for GPUs: asked for or not, it is not run here.
        assert "liger_fused" not in {variant for variant, *_ in found}
        assert figures["left_out"] == {}

    def test_full_precision_log_probs_are_right(self, figures: dict[str, Any]) -> None:
        kernel = [row for row in figures["rows"] if row["variant"] == "nemo_apo"]
        exact = [row for row in kernel if row["dtype"] == "fp32" or row["mode"] == "exact"]
        assert exact
        for row in exact:
            assert row["sum_error_nats"] < 1e-4

    def test_the_others_compute_the_same(self, figures: dict[str, Any]) -> None:
        others = [row for row in figures["rows"] if row["sum_error_nats"] is not None]
        for row in others:
            # A sum of about 800 nats; what is returned in bf16 has three digits.
            assert row["sum_error_nats"] < (10.0 if row["dtype"] == "bf16" else 1e-3)

    @pytest.mark.slow(reason="torch.compile calls a C++ compiler several times")
    def test_the_fused_cross_entropy(self, tmp_path: Path) -> None:
        figures = bench(
            tmp_path, "logprobs", *TINY, "--dtype", "fp32", "--variants", "megatron_fused"
        )
        rows = {row["variant"]: row for row in figures["rows"]}
        if figures["left_out"]:
            pytest.skip(f"{figures['left_out']}")
        assert rows["megatron_fused"]["sum_error_nats"] < 1e-3


class TestStep:
    def test_an_optimizer_step(self, tmp_path: Path) -> None:
        figures = bench(
            tmp_path,
            *("step", *FEW, "--vocab", "40", "--peak-tflops", "100"),
            "update.micro_batch_size=8",
        )
        (row,) = figures["rows"]
        assert (row["layout"], row["sequences"], row["length"]) == ("TP1 x PP1 x DP1", 16, 5)
        assert (row["optimizer_steps"], row["skipped_steps"]) == (2, 0)
        parts = row["train_s"] + row["weigh_s"] + row["refresh_s"]
        assert row["step_s"] == pytest.approx(parts)
        assert row["refresh_s"] > 0.0
        assert row["objective_share"] == pytest.approx(row["weigh_s"] / row["step_s"])
        assert row["refresh_share"] == pytest.approx(row["refresh_s"] / row["step_s"])
        assert row["tokens_per_s"] == pytest.approx(2 * 16 * 5 / row["step_s"])
        assert row["mfu"] == pytest.approx(row["model_tflops_per_s"] / 100)

    def test_an_objective_that_needs_no_refresh(self, tmp_path: Path) -> None:
        figures = bench(tmp_path, "step", "objective=grpo", *FEW)
        (row,) = figures["rows"]
        assert (row["refresh_s"], row["refresh_share"], row["mfu"]) == (0.0, 0.0, None)

    @pytest.mark.slow(reason="starts two ranks by torchrun")
    def test_tensor_parallel_ranks(self, tmp_path: Path) -> None:
        launcher = ("torch.distributed.run", "--nproc-per-node", "2", "-m", "nemo_apo")
        figures = bench(tmp_path, "step", "parallel=tp2", *FEW, launcher=launcher)
        (row,) = figures["rows"]
        assert (row["layout"], row["skipped_steps"]) == ("TP2 x PP1 x DP1", 0)

    def test_operations_of_a_model_by_hand(self) -> None:
        model = ModelConfig(
            num_layers=3,
            hidden_size=8,
            ffn_hidden_size=20,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=6,
        )
        # A layer: queries and output 8 x 24 each, keys and values 8 x 12 each, SwiGLU 3 x 8 x 20.
        weights = 3 * (2 * 192 + 2 * 96 + 480) + 8 * 50
        # Causal attention over 10 tokens: 2 products x 24 x 5 tokens on average, 2 operations
        # each, three times (forward, and twice as much backward), in 3 layers.
        attention = 3 * 3 * 2 * 2 * 24 * 5
        assert model_flops(model, vocab=50, length=10) == 6 * weights + attention


class TestPieces:
    def test_the_float64_sum(self) -> None:
        example = draw(5, 8, 30, torch.float32, CPU)
        logits = example.hidden_TH.detach().double() @ example.weight_VH.detach().double().t()
        expected = torch.log_softmax(logits, dim=-1)[torch.arange(5), example.targets_T].sum()
        assert float64_logprob_sum(example) == pytest.approx(float(expected), abs=1e-12)

    def test_a_ratio_is_to_the_products_on_both_sides(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = iter([1.0, 6.0, 2.0, 9.0, 4.0])  # products, a, products, b, products
        monkeypatch.setattr("nemo_apo.bench.timing.seconds_of", lambda work, device: next(clock))
        works = {"a": lambda: None, "b": lambda: None}
        times, bare = interleaved(works, lambda: None, 1, CPU)
        assert times == {"a": Times([6.0], [4.0]), "b": Times([9.0], [3.0])}
        assert (bare.seconds, bare.time_s) == ([1.0, 2.0, 4.0], 2.0)

    def test_medians(self) -> None:
        times = Times([3.0, 1.0, 2.0], [9.0, 7.0, 8.0])
        assert (times.time_s, times.ratio) == (2.0, 8.0)

    def test_a_figure_that_is_not_finite_is_null(self, tmp_path: Path) -> None:
        path = tmp_path / "figures.json"
        report.write_json(path, [Figure(1.5), Figure(math.nan)], {}, {}, {"a": "no compiler"})
        written = json.loads(path.read_text())
        assert written["rows"] == [{"value": 1.5}, {"value": None}]
        assert written["left_out"] == {"a": "no compiler"}

    def test_the_peak_counts_what_is_freed_again(self) -> None:
        peak = peak_mib(lambda: torch.ones(64, 2**20).sum(), CPU)
        if peak is None:
            pytest.skip("this system does not tell")
        assert 250.0 < peak < 400.0

    def test_a_variant_that_fails_is_left_out_with_the_reason(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(example: Example, setting: Setting) -> torch.Tensor:
            raise RuntimeError("no compiler\nand a long trace")

        monkeypatch.setitem(VARIANTS, "naive", Variant(fail))
        monkeypatch.setattr(logprobs, "group_of_one", lambda device: contextlib.nullcontext())
        request = logprobs.Request((4,), 8, 30, ("fp32",), ("exact",), ("naive",), 1, 1, "cpu")
        result = logprobs.run(request, lambda text: None)
        assert result.left_out == {"naive, 4 tokens, fp32": "no compiler"}
        assert [row.variant for row in result.rows] == ["gemm_8thv"]


@dataclass(frozen=True)
class Figure:
    value: float


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            (["logprobs", "--dtype", "fp8"], "--dtype fp8: must be one of bf16, fp32"),
            (["logprobs", "--mode", "fast"], "--mode fast: must be one of exact, bf16"),
            (["logprobs", "--variants", "best"], "--variants best: must be one of nemo_apo"),
            (["logprobs", "--device", "tpu"], "--device tpu: must be one of cpu, cuda"),
            (["logprobs", "--tokens", "0"], "must be a whole number, at least 1, got 0"),
            (["logprobs", "--json", "none/figures.json"], "must be a file in a folder"),
            (["step", "--sequences", "7"], "must be a multiple of rollout.group_size=8"),
            (["step", "--peak-tflops", "-1"], "must be > 0 and finite, got -1"),
            (["step", "objectiv=apo"], "did you mean objective?"),
            (["step", "parallel=tp2"], "must divide the number of ranks, which is 1"),
            ([], "required: BENCHMARK"),
        ],
    )
    def test_one_line_on_stderr_and_status_2(
        self, arguments: list[str], part: str, capsys: pytest.CaptureFixture
    ) -> None:
        assert cli.main(["bench", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert part in captured.err
