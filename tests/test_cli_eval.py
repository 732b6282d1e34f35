"""``nemo-apo eval``: real checkpoints of a real run, in several layouts, and what it refuses."""

import contextlib
import io
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from nemo_apo import cli, record
from nemo_apo.config import Config, EvaluationConfig, WarmStartConfig
from nemo_apo.tasks import SortTask
from nemo_apo.trainer import checkpoint, loop
from tests.hf_checkpoint.tiny_checkpoints import make_model
from tests.parallel.ranks import run_ranks
from tests.tasks.tiny_chat import math_rows, save_tokenizer, write_jsonl
from tests.trainer.tiny_runs import begin, tiny_config

TWO_RANKS = ["parallel.backend=gloo"]


class Outcome(NamedTuple):
    """How the command ended on one rank."""

    status: Any
    out: str
    err: str


def config_of(root: Path) -> Config:
    config = tiny_config(
        task=SortTask(length=3, teacher_drop=0.2),
        warm_start=WarmStartConfig(steps=80, batch_size=32, lr=5e-3),
        evaluation=EvaluationConfig(every=1, prompts=20, pass_prompts=12, pass_k=3),
    )
    return replace(config, run=replace(config.run, root=str(root), steps=2, save_every=1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints of two steps."""
    root = tmp_path_factory.mktemp("runs")
    run_ranks(1, loop.run, config_of(root))
    return root / "tiny"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "tiny"))


def evaluated(*arguments: object, ranks: int = 1) -> list[Outcome]:
    """The command on forked ranks."""

    def work() -> Outcome:
        os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(ranks)}
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status: Any = cli.main(["eval", *map(str, arguments)])
            except SystemExit as left:
                status = left.code
        return Outcome(status, out.getvalue(), err.getvalue())

    return run_ranks(ranks, work)


def refused(*arguments: object, ranks: int = 1) -> str:
    """What the first rank says; all end with the status of a mistake."""
    first, *others = evaluated(*arguments, ranks=ranks)
    assert (first.status, first.out) == (2, ""), first
    assert first.err.count("\n") == 1
    assert all((other.status, other.out, other.err) == (2, "", "") for other in others)
    return first.err


def metrics_at(run: Path, step: int) -> dict[str, float]:
    lines = map(json.loads, (run / record.METRICS_FILE).read_text().splitlines())
    return next(line for line in lines if line[record.STEP] == step)


def told(file: Path) -> dict[str, float]:
    """The figures of a JSON file by the names of the run's metrics."""
    figures = json.loads(file.read_text())["figures"]
    return {
        record.EVAL_ACCURACY: figures["accuracy"]["value"],
        record.EVAL_ACCURACY_ERROR: figures["accuracy"]["standard_error"],
        record.EVAL_REWARD: figures["reward"]["value"],
        record.EVAL_PASS_AT_K: figures["pass_at"]["3"]["value"],
        record.EVAL_MAJ_AT_K: figures["maj_at_k"]["value"],
        record.EVAL_SAMPLED_ACCURACY: figures["pass_at"]["1"]["value"],
        record.EVAL_RESPONSE_LENGTH: figures["response_length"]["value"],
        record.EVAL_TRUNCATED_SHARE: figures["truncated_share"]["value"],
    }


def assert_tells(file: Path, wanted: dict[str, float]) -> None:
    got = told(file)
    assert got == {name: wanted[name] for name in got}
    assert 0.0 < got[record.EVAL_ACCURACY] < 1.0, "the example shows nothing"


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, []),
        (2, TWO_RANKS),
        (2, [*TWO_RANKS, "parallel=tp2"]),
        (2, [*TWO_RANKS, "parallel=pp2"]),
    ],
    ids=["one rank", "DP2", "TP2", "PP2"],
)
def test_a_checkpoint_tells_what_the_run_told_whatever_the_layout(
    trained: Path, tmp_path: Path, ranks: int, overrides: list[str]
) -> None:
    file = tmp_path / "figures.json"
    first, *others = evaluated(trained, *overrides, "--json", file, ranks=ranks)
    assert first.status == 0, first
    assert all((other.status, other.out) == (0, "") for other in others)
    assert_tells(file, metrics_at(trained, 2))
    content = json.loads(file.read_text())
    assert (content["step"], content["ranks"]["world_size"]) == (2, ranks)
    if "parallel=tp2" in overrides:
        assert content["ranks"]["layout"].startswith("TP2")
    accuracy = content["figures"]["accuracy"]
    line = next(line for line in first.out.splitlines() if line.startswith("greedy accuracy"))
    assert line.split() == [
        *("greedy", "accuracy"),
        f"{accuracy['value']:.3f}",
        f"{accuracy['standard_error']:.3f}",
        "20",
    ]


def test_a_step_and_a_folder_are_what_they_say(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    folder = run / record.CHECKPOINT_DIR / "step_000001"
    for chosen in ([run, "--checkpoint", "1"], [folder]):
        assert evaluated(*chosen, "--json", file)[0].status == 0
        assert_tells(file, metrics_at(run, 1))


def test_every_completion_is_written_and_the_figures_follow_from_them(
    trained: Path, tmp_path: Path
) -> None:
    figures, samples = tmp_path / "figures.json", tmp_path / "samples.jsonl"
    asked = ["evaluation.pass_samples=5", "--json", figures, "--samples", samples]
    assert evaluated(trained, *asked)[0].status == 0
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    greedy, sampled = lines[:20], lines[20:]
    assert [line["sample"] for line in greedy] == [None] * 20
    assert [(line["prompt_number"], line["sample"]) for line in sampled] == [
        (prompt, sample) for prompt in range(12) for sample in range(5)
    ]
    for line in lines:
        right = line["completion"] == "".join(sorted(line["prompt"])) == line["reference"]
        assert line["correct"] == (right and not line["truncated"])
        assert line["failure"] is None
    content = json.loads(figures.read_text())["figures"]
    assert content["accuracy"]["value"] == sum(line["correct"] for line in greedy) / 20
    right = Counter(line["prompt_number"] for line in sampled if line["correct"])
    for k in range(1, 6):
        wanted = sum(
            (1 - Fraction(comb(5 - right[prompt], k), comb(5, k)) for prompt in range(12)),
            Fraction(0),
        )
        assert content["pass_at"][str(k)]["value"] == pytest.approx(float(wanted / 12), rel=1e-14)
    # By the first three samples of each prompt.
    elected = 0
    for prompt in range(12):
        first = [line for line in sampled if line["prompt_number"] == prompt][:3]
        votes = [line["completion"] for line in first if not line["truncated"]]
        if votes:
            winner = max(dict.fromkeys(votes), key=votes.count)
            elected += winner == first[0]["reference"]
    assert content["maj_at_k"]["value"] == elected / 12


def test_only_what_the_weights_are_tied_to_must_be_as_it_was(run: Path) -> None:
    other = ["objective=gspo", "run.seed=9", "optimizer.lr=0.5", "rollout.prompts=8"]
    other += ["task.reward=graded", "task.length=4"]
    assert evaluated(run, *other)[0].status == 0
    wider = refused(run, "model.hidden_size=64", *TWO_RANKS, ranks=2)
    assert "model.hidden_size was 32 and is now 64" in wider
    assert "step_000002" in wider


def test_a_damaged_checkpoint_is_refused_by_name_and_no_other_one_taken(run: Path) -> None:
    damaged = run / record.CHECKPOINT_DIR / "step_000002" / "common.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    message = refused(run, *TWO_RANKS, ranks=2)
    assert "step_000002 is damaged: the content of common.pt has changed" in message
    assert evaluated(run, "--checkpoint", "1")[0].status == 0
    manifest = damaged.with_name("manifest.json")
    manifest.write_text(manifest.read_text()[:-20])
    assert "step_000002 is damaged" in refused(run, "--checkpoint", "best")


def test_weights_without_a_run(tmp_path: Path, trained: Path) -> None:
    """Alone, as ``warm_start.load`` takes them, with a configuration beside them."""
    config = trained / record.CONFIG_FILE
    weights = tmp_path / "weights"

    def work() -> None:
        training = begin(config_of(tmp_path))
        checkpoint.save_weights(weights, training.policy)

    run_ranks(1, work)
    outcomes = []
    for way in ([weights], [f"warm_start.load={weights}"]):
        file = tmp_path / "figures.json"
        assert evaluated(*way, "--config", config, "--json", file)[0].status == 0
        outcomes.append(told(file))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] != told_by(trained, tmp_path)
    assert "there is no config.yaml of its run above" not in refused(weights, "--config", "none")
    assert "is neither" not in refused(f"warm_start.load={tmp_path / 'none'}", "--config", config)


def test_a_pretrained_model_on_a_data_set(tmp_path: Path) -> None:
    """Before any training: weights, tokenizer and chat template of a checkpoint of transformers."""
    pytest.importorskip("datasets", reason="the math extra comes with requirements/test.txt")
    folder, samples = tmp_path / "model", tmp_path / "samples.jsonl"
    make_model("qwen3", vocab_size=300).save_pretrained(folder)
    save_tokenizer(folder)
    rows = write_jsonl(tmp_path / "problems.jsonl", math_rows(8))
    asked = ["model=hf", f"model.path={folder}", "model.params_dtype=float32", "task=math"]
    asked += [f"task.tokenizer={folder}", f"task.path={rows}", "task.held_out_share=0.4"]
    asked += ["task.test_split=null", "task.max_response_length=4", "grading.grader=exact_match"]
    asked += ["evaluation.prompts=2", "evaluation.pass_prompts=2", "evaluation.pass_k=2"]
    asked += ["warm_start.steps=0", "--samples", str(samples)]
    (outcome,) = evaluated(*asked)
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[0] == str(folder)
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == 2 + 2 * 2
    for line in lines:
        added = int(line["prompt"].split("+")[1].split("$")[0])
        assert line["reference"] == str(added + 1)
        assert line["correct"] == (line["completion"].strip() == line["reference"])
        assert line["reward"] == float(line["correct"])


def told_by(run: Path, folder: Path) -> dict[str, float]:
    file = folder / "run.json"
    assert evaluated(run, "--json", file)[0].status == 0
    return told(file)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "there is nothing to evaluate: give a run folder"),
        (["none"], "none: there is no such run folder or checkpoint folder"),
        (["{parent}"], "is neither a run folder, which holds config.yaml, nor a checkpoint"),
        (["{run}", "{run}"], "one folder is evaluated at a time"),
        (["{run}", "--checkpoint", "7"], "must be latest, best or a step of"),
        (["{run}", "--checkpoint"], "expected one argument"),
        (["{run}/checkpoints/step_000001", "--checkpoint", "1"], "is a checkpoint itself"),
        (["--checkpoint", "1"], "is of a run folder, and none is given"),
        (["{run}", "parallel=tp2"], "must divide the number of ranks, which is 1"),
        (["{run}", "evaluation.pass_samples=2"], "must be at least evaluation.pass_k=3"),
        (["{run}", "evaluation.pask_k=2"], "did you mean evaluation.pass_k?"),
        (["{run}", "--json", "no/such/folder.json"], "must be a file in a folder that exists"),
        (["{run}", "--samples", "{run}"], "must be a file in a folder that exists"),
        (
            ["{run}", "grading.workers=1", "grading.grader='no.such:grade'"],
            "grading.grader=no.such:grade: ModuleNotFoundError",
        ),
    ],
)
def test_a_mistake_is_one_sentence(trained: Path, arguments: list[str], part: str) -> None:
    places = {"run": trained, "parent": trained.parent}
    assert part in refused(*(text.format(**places) for text in arguments))
