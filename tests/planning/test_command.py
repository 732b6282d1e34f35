"""``nemo-apo plan`` and the tables of the documentation."""

import json
from pathlib import Path

import pytest

import nemo_apo
from nemo_apo import cli
from nemo_apo.cli import plan as plan_command
from nemo_apo.config import ConfigError
from nemo_apo.planning import tables

DOCUMENT = Path(nemo_apo.__file__).parent.parent / "docs" / "scaling.md"


def test_the_plan_is_printed(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["plan", "model=qwen3_8b", "cluster.nodes=4"]) == 0
    out = capsys.readouterr().out
    assert "TP 2 x PP 1 x CP 1 x DP 16, sequence parallel, distributed optimizer" in out
    assert "computed, not measured" in out
    assert "TP x PP x CP = 1: TP 1 x PP 1 x CP 1 x DP 32 needs 73.4 GB" in out


def test_a_pipeline_and_a_sampler_are_told(capsys: pytest.CaptureFixture) -> None:
    sizes = ["parallel.pipeline_model_parallel_size=2", "sampler.share=0.3"]
    sizes += ["parallel.virtual_pipeline_model_parallel_size=2"]
    assert cli.main(["plan", "model=qwen3_4b", *sizes]) == 0
    out = capsys.readouterr().out
    assert "2 chunks per stage" in out
    assert "idles 0.4% of its working time" in out
    assert "the sampler's share: weights 8.0 GB" in out


def test_what_cannot_fit_ends_with_status_2_and_one_sentence(
    capsys: pytest.CaptureFixture,
) -> None:
    assert cli.main(["plan", "model=qwen3_32b", "cluster.nodes=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("nemo-apo: cluster.nodes=1: qwen3_32b must fit")


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "plan.json"
    assert cli.main(["plan", "model=qwen3_1.7b", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["layout"]["data"] == 8


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--tables", "none.md"], "cannot be read"),
        (["--tables", "none.md", "model=qwen3_8b"], "takes no other argument"),
        (["model=qwen3_1.7b", "--json", "none/plan.json"], "cannot be written"),
    ],
)
def test_files_that_do_not_do(
    arguments: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", *arguments]) == 2
    assert part in capsys.readouterr().err


def test_an_unknown_table() -> None:
    with pytest.raises(ConfigError, match="table:none: must be one of models, nodes"):
        plan_command.with_tables("<!-- table:none -->\n<!-- end -->")


# The source distribution leaves the documentation out.
documented = pytest.mark.skipif(not DOCUMENT.is_file(), reason="docs/scaling.md is not here")


@documented
@pytest.mark.parametrize(
    "arguments",
    [["model=qwen3_8b", "parallel.tensor_model_parallel_size=3"], ["model=qwen3_32b"]],
)
def test_the_document_quotes_refusals_as_they_are(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["plan", *arguments]) == 2
    text = " ".join(DOCUMENT.read_text(encoding="utf-8").split())
    assert f"$ nemo-apo plan {' '.join(arguments)} {capsys.readouterr().err.strip()}" in text


@documented
def test_the_document_holds_every_table_as_computed() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for name in tables.TABLES:
        assert f"<!-- table:{name} -->" in text
    assert plan_command.with_tables(text) == text


@pytest.mark.parametrize("example", cli.COMMANDS["plan"].examples)
def test_the_examples_have_a_plan(example: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = example.split("  ")[0].split()
    assert cli.main(words[1:]) == 0
