"""Tasks from data sets, by the real ``datasets`` library on tiny files: what is kept and why."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="the math extra comes with requirements/test.txt")

import datasets

from nemo_apo import cli
from nemo_apo.compose import compose
from nemo_apo.config import Config, ConfigError, EvaluationConfig
from nemo_apo.config_rules import check_task_data, validate
from nemo_apo.grading import GradingSettings, Sample
from nemo_apo.grading.pool import WorkerPool
from nemo_apo.grading.settings import Order
from nemo_apo.tasks import PromptTurn
from nemo_apo.tasks.curation import (
    CONFLICT,
    DUPLICATE,
    EMPTY_PROMPT,
    IN_TEST_SET,
    NO_ANSWER,
    NO_TEXT,
    OTHER_LEVEL,
    OTHER_SUBJECT,
    TOO_LONG,
)
from nemo_apo.tasks.data_sets import DatasetTask, Gsm8kTask, MathTask
from nemo_apo.trainer import loop
from nemo_apo.trainer.fixed_config import changes, fixed_values

from .tiny_chat import gsm8k_rows, math_rows, save_tokenizer, write_jsonl

FIRST = PromptTurn(seed=0, step=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture
def math(tmp_path: Path, tokenizer: str) -> MathTask:
    """20 problems to train on and 5 held out."""
    return MathTask(
        tokenizer=tokenizer,
        path=write_jsonl(tmp_path / "train.jsonl", math_rows(20)),
        test_path=write_jsonl(tmp_path / "test.jsonl", math_rows(5, start=100)),
    )


def qa(*pairs: tuple[object, object]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]


def dataset_of(tmp_path: Path, tokenizer: str, rows: Sequence[dict], **changes: Any) -> DatasetTask:
    """A task of some rows and two held-out ones."""
    held_out = write_jsonl(tmp_path / "held_out.jsonl", qa(("What is 50?", "50"), ("51?", "51")))
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return DatasetTask(tokenizer=tokenizer, path=path, test_path=held_out, **changes)


def dropped(task: Any) -> dict[str, int]:
    """Dropped training rows by reason, as the first line of the report has them."""
    line = task.data_report()[0]
    assert line.startswith("training prompts: kept ")
    _, _, reasons = line.partition("; dropped: ")
    pairs = [part.rstrip(")").rsplit(" (", 1) for part in reasons.split("), ")] if reasons else []
    return {reason: int(count) for reason, count in pairs}


def texts(task: Any, count: int = 100) -> set[str]:
    return {prompt.text for prompt in task.train_prompts(count, FIRST)}


def refusal(task: Any) -> str:
    with pytest.raises(ValueError, match=r"^\S") as error:
        task.data_report()
    assert "\n" not in str(error.value)
    return str(error.value)


class TestMath:
    def test_prompts_answers_and_ids(self, math: MathTask) -> None:
        prompts = math.train_prompts(20, FIRST)
        assert {(p.text, p.reference) for p in prompts} == {
            (f"What is $1+{n}$?", str(n + 1)) for n in range(20)
        }
        assert {prompt.id for prompt in prompts} == {f"training/{n}" for n in range(20)}
        assert math.text(list(prompts[0].tokens)).endswith(
            f"user\n{prompts[0].text}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert math.reference(prompts[0]) == prompts[0].reference
        assert [prompt.text for prompt in math.test_prompts(2)] == [
            "What is $1+100$?",
            "What is $1+101$?",
        ]
        assert math.test_size == 5
        assert not math.has_demonstrations

    @pytest.mark.parametrize(
        ("solution", "answer"),
        [
            (r"So \boxed{1}, no: $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
            (r"$\boxed 7$.", "7"),
            (r"$\fbox{C}$", "C"),
            (r"$\boxed{\text{(A) } \{1,2\}}$", r"\text{(A) } \{1,2\}"),
        ],
    )
    def test_the_answer_is_the_last_box(
        self, solution: str, answer: str, tmp_path: Path, math: MathTask
    ) -> None:
        rows = [{**math_rows(1)[0], "solution": solution}]
        task = replace(math, path=write_jsonl(tmp_path / "one.jsonl", rows))
        assert task.train_prompts(1, FIRST)[0].reference == answer

    def test_levels_and_subjects_choose_training_prompts_only(
        self, tmp_path: Path, math: MathTask
    ) -> None:
        rows = math_rows(4, level=3) + math_rows(3, start=4, level=5)
        rows += [{**row, "type": "Geometry"} for row in math_rows(2, start=7)]
        task = replace(math, path=write_jsonl(tmp_path / "mixed.jsonl", rows))
        assert len(texts(task)) == 9
        fifth = replace(task, levels=(4, 5))
        assert texts(fifth) == {row["problem"] for row in rows[4:7]}
        assert dropped(fifth) == {OTHER_LEVEL: 6}
        geometry = replace(task, subjects=("Geometry",))
        assert texts(geometry) == {row["problem"] for row in rows[7:]}
        assert dropped(geometry) == {OTHER_SUBJECT: 7}
        assert geometry.test_size == fifth.test_size == 5
        message = refusal(replace(task, subjects=("Geometri",)))
        assert "no training prompt is of it, there are Algebra, Geometry; did you mean" in message

    def test_a_level_may_be_a_number_and_a_subject_a_column_of_that_name(
        self, tmp_path: Path, math: MathTask
    ) -> None:
        """As in MATH-500."""
        rows = [{"subject": row.pop("type"), **row, "level": 2} for row in math_rows(3)]
        task = replace(math, path=write_jsonl(tmp_path / "other.jsonl", rows))
        assert len(texts(replace(task, levels=(2,), subjects=("Algebra",)))) == 3

    def test_a_level_that_is_none_is_of_no_level(self, tmp_path: Path, math: MathTask) -> None:
        rows = [{**math_rows(1)[0], "level": "Level ?"}, *math_rows(2, start=1)]
        task = replace(math, path=write_jsonl(tmp_path / "odd.jsonl", rows), levels=(3,))
        assert dropped(task) == {OTHER_LEVEL: 1}


class TestGsm8k:
    def test_the_answer_follows_the_hashes(self, tmp_path: Path, tokenizer: str) -> None:
        folder = tmp_path / "gsm8k"
        folder.mkdir()
        for split, start in (("train", 0), ("test", 50)):
            rows = datasets.Dataset.from_list(gsm8k_rows(4, start))
            rows.to_parquet(folder / f"{split}.parquet")
        task = Gsm8kTask(tokenizer=tokenizer, path=str(folder), subset=None)
        assert {p.reference for p in task.train_prompts(4, FIRST)} == {
            "1,000",
            "1,001",
            "1,002",
            "1,003",
        }
        assert task.test_prompts(1)[0].reference == "1,050"
        assert (task.text_grader, task.reward) == ("numeric", "numeric")

    def test_subsets_of_a_downloaded_data_set(self, tmp_path: Path, tokenizer: str) -> None:
        """Laid out like the repository on the hub: a folder per subset, named in its card."""
        for subset, start in (("main", 0), ("socratic", 20)):
            (tmp_path / subset).mkdir()
            for split in ("train", "test"):
                rows = gsm8k_rows(3, start + (0 if split == "train" else 10))
                file = tmp_path / subset / f"{split}-00000-of-00001.parquet"
                datasets.Dataset.from_list(rows).to_parquet(file)
        card = "---\nconfigs:\n"
        for subset in ("main", "socratic"):
            card += f"- config_name: {subset}\n  data_files:\n"
            for split in ("train", "test"):
                card += f"  - split: {split}\n    path: {subset}/{split}-*\n"
        (tmp_path / "README.md").write_text(card + "---\n")
        task = Gsm8kTask(tokenizer=tokenizer, path=str(tmp_path))
        assert min(prompt.reference for prompt in task.train_prompts(3, FIRST)) == "1,000"
        other = replace(task, subset="socratic")
        assert min(prompt.reference for prompt in other.train_prompts(3, FIRST)) == "1,020"
        assert other.test_prompts(1)[0].reference == "1,030"


class TestPlaces:
    def test_a_folder_saved_by_datasets(self, tmp_path: Path, math: MathTask) -> None:
        splits = datasets.DatasetDict(
            train=datasets.Dataset.from_list(math_rows(6)),
            exam=datasets.Dataset.from_list(math_rows(2, start=50)),
        )
        splits.save_to_disk(tmp_path / "saved")
        saved = str(tmp_path / "saved")
        task = replace(math, path=saved, test_path=None, test_split="exam")
        assert (len(texts(task)), task.test_size) == (6, 2)
        message = refusal(replace(task, test_split="exams"))
        assert message.startswith("task.test_split=exams: ")
        assert message.endswith("has no such split, it has train, exam; did you mean exam?")
        alone = datasets.Dataset.from_list(math_rows(6))
        alone.save_to_disk(tmp_path / "alone")
        assert len(texts(replace(math, path=str(tmp_path / "alone")))) == 6

    def test_a_folder_of_files(self, tmp_path: Path, math: MathTask) -> None:
        folder = tmp_path / "files"
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", math_rows(6))
        write_jsonl(folder / "test.jsonl", math_rows(2, start=50))
        task = replace(math, path=str(folder), test_path=None)
        assert (len(texts(task)), task.test_size) == (6, 2)

    def test_a_share_is_held_out_by_hash_where_there_is_no_test_set(
        self, tmp_path: Path, math: MathTask
    ) -> None:
        path = write_jsonl(tmp_path / "many.jsonl", math_rows(500))
        task = replace(math, path=path, test_path=None, test_split=None)
        held_out = {prompt.text for prompt in task.test_prompts(task.test_size)}
        train = texts(task, 500)
        assert 30 <= len(held_out) <= 70  # 50 is the mean, 6.7 the standard deviation
        assert held_out.isdisjoint(train)
        assert len(held_out | train) == 500
        # More rows, in another order: nobody changes sides.
        mixed = write_jsonl(tmp_path / "more.jsonl", math_rows(700)[::-1])
        more = replace(task, path=mixed)
        assert held_out <= {prompt.text for prompt in more.test_prompts(more.test_size)}
        half = replace(task, held_out_share=0.5)
        assert 200 <= half.test_size <= 300

    def test_a_file_changed_in_place_is_read_again(self, tmp_path: Path, math: MathTask) -> None:
        """No cache of the library hands out the old rows."""
        before = math.fingerprint()
        stamp = Path(math.path).stat()
        write_jsonl(Path(math.path), math_rows(20, start=30))
        os.utime(math.path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        again = replace(math)
        assert again.fingerprint() != before
        assert "What is $1+30$?" in texts(again)

    def test_files_needed_are_listed(self, math: MathTask, tmp_path: Path) -> None:
        assert math.check_files() == [
            f"{math.tokenizer}: tokenizer, found",
            f"{math.path}: training prompts, found",
            f"{math.test_path}: held-out prompts, found",
        ]
        lost = replace(math, path="/none/train.jsonl", tokenizer=None, chat_template="/none.jinja")
        assert lost.check_files()[:3] == [
            "None: tokenizer, missing (set the key)",
            "/none.jinja: chat template, missing (copy it there)",
            "/none/train.jsonl: training prompts, missing (there is no such file or folder)",
        ]
        hub = replace(math, path="some/set", test_path=None)
        assert (
            "some/set, split train: training prompts, missing in the cache" in hub.check_files()[1]
        )
        assert "hf download --repo-type dataset --local-dir FOLDER some/set" in hub.check_files()[1]


class TestCounts:
    def test_every_reason_is_counted(self, tmp_path: Path, tokenizer: str) -> None:
        rows = qa(
            ("A good one?", "1"),
            ("  ", "2"),
            ("", "2"),
            (None, "2"),
            ("No answer?", None),
            ("Empty answer?", " "),
            ("A  good\none?", "1"),
            ("A good one?", "3"),
            ("What is  50?", "50"),
            ("x" * 2000, "4"),
            ("Cafe\u0301?", "5"),
            ("Caf\u00e9?", "5"),
        )
        task = dataset_of(tmp_path, tokenizer, rows)
        assert dropped(task) == {
            EMPTY_PROMPT: 2,
            NO_TEXT: 1,
            NO_ANSWER: 2,
            DUPLICATE: 2,
            CONFLICT: 1,
            IN_TEST_SET: 1,
            TOO_LONG: 1,
        }
        assert "kept 2 of 12" in task.data_report()[0]
        assert task.data_report()[1].startswith("held-out prompts: kept 2 of 2 (")
        assert {p.reference for p in task.train_prompts(2, FIRST)} == {"1", "5"}

    @pytest.mark.parametrize(
        ("column", "cell"), [("solution", "It is 4."), ("solution", None), ("problem", None)]
    )
    def test_rows_of_math_without_an_answer_or_a_problem(
        self, column: str, cell: str | None, tmp_path: Path, math: MathTask
    ) -> None:
        rows = [*math_rows(2), {**math_rows(1, start=2)[0], column: cell}]
        task = replace(math, path=write_jsonl(tmp_path / "holes.jsonl", rows))
        assert dropped(task) == {NO_ANSWER if column == "solution" else NO_TEXT: 1}

    def test_rows_of_gsm8k_without_hashes(self, tmp_path: Path, tokenizer: str) -> None:
        rows = [*gsm8k_rows(2), {"question": "How many?", "answer": "Four."}]
        rows.append({"question": "How much?", "answer": "#### "})
        held_out = write_jsonl(tmp_path / "test.jsonl", gsm8k_rows(2, start=7))
        path = write_jsonl(tmp_path / "train.jsonl", rows)
        task = Gsm8kTask(tokenizer=tokenizer, path=path, test_path=held_out, subset=None)
        assert dropped(task) == {NO_ANSWER: 2}

    def test_held_out_rows_are_counted_too(self, tmp_path: Path, math: MathTask) -> None:
        rows = [*math_rows(2, start=100), *math_rows(1, start=100)]
        task = replace(math, test_path=write_jsonl(tmp_path / "twice.jsonl", rows))
        assert task.test_size == 2
        assert task.data_report()[1].endswith(f"dropped: {DUPLICATE} (1)")

    def test_long_prompts_may_be_refused(self, math: MathTask) -> None:
        longest = max(
            len(p.tokens) for p in (*math.train_prompts(20, FIRST), *math.test_prompts(5))
        )
        held_out = len(math.test_prompts(1)[0].tokens)
        assert longest == held_out
        short = replace(math, max_prompt_length=longest - 1)
        assert "nothing is left: held-out prompts: kept 0 of 5" in refusal(short)
        strict = replace(short, long_prompts="error")
        assert f"5 held-out prompts are longer, the longest has {longest} tokens" in refusal(strict)
        replace(math, max_prompt_length=longest, long_prompts="error").data_report()


class TestColumns:
    def test_names_ids_and_formats_of_answers(self, tmp_path: Path, tokenizer: str) -> None:
        rows = [
            {"q": "1+1?", "a": r"It is \boxed{2}.", "key": 7},
            {"q": "1+2?", "a": r"It is \boxed{3}.", "key": 8},
        ]
        columns = {"prompt_column": "q", "answer_column": "a", "id_column": "key"}
        held_out = write_jsonl(tmp_path / "t.jsonl", [{"q": "5?", "a": r"\boxed{5}", "key": 7}])
        task = DatasetTask(
            tokenizer=tokenizer,
            path=write_jsonl(tmp_path / "q.jsonl", rows),
            test_path=held_out,
            answer_format="boxed",
            **columns,
        )
        assert {(p.id, p.reference) for p in task.train_prompts(2, FIRST)} == {
            ("7", "2"),
            ("8", "3"),
        }
        plain = replace(task, answer_format="plain")
        assert plain.test_prompts(1)[0].reference == r"\boxed{5}"

    def test_numbers_are_answers(self, tmp_path: Path, tokenizer: str) -> None:
        task = dataset_of(tmp_path, tokenizer, qa(("1+1?", 2), ("1+2?", 3)))
        assert {p.reference for p in task.train_prompts(2, FIRST)} == {"2", "3"}

    def test_a_missing_column_is_named_with_the_nearest(
        self, tmp_path: Path, tokenizer: str, math: MathTask
    ) -> None:
        task = dataset_of(tmp_path, tokenizer, qa(("1?", "1")), prompt_column="prompts")
        assert refusal(task).endswith(
            "has no column prompts, its columns are prompt, answer; did you mean prompt?"
        )
        rows = [{"kind": row.pop("type"), **row} for row in math_rows(2)]
        other = replace(math, path=write_jsonl(tmp_path / "kinds.jsonl", rows))
        assert len(texts(other)) == 2
        assert "has no column type or subject" in refusal(replace(other, subjects=("Algebra",)))

    def test_ids_that_stand_twice_are_refused(self, tmp_path: Path, tokenizer: str) -> None:
        rows = [{**row, "id": "same"} for row in qa(("1?", "1"), ("2?", "2"))]
        held_out = write_jsonl(tmp_path / "t.jsonl", [{"prompt": "5?", "answer": "5", "id": "a"}])
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        task = DatasetTask(tokenizer=tokenizer, path=path, test_path=held_out, id_column="id")
        assert "ids must differ, but 1 of them stand more than once, such as 'same'" in refusal(
            task
        )


class TestRefusals:
    def test_places(self, tmp_path: Path, tokenizer: str, math: MathTask) -> None:
        assert "task.path=null: must be" in refusal(DatasetTask(tokenizer=tokenizer))
        lost = str(tmp_path / "none.jsonl")
        assert refusal(replace(math, path=lost)) == (
            f"task.path={lost}: there is no such file or folder"
        )
        assert refusal(replace(math, test_path=lost)).startswith("task.test_path=")
        table = tmp_path / "table.csv"
        table.write_text("problem,solution\n")
        assert "must be a folder or end in .jsonl, .json, .parquet" in refusal(
            replace(math, path=str(table))
        )
        one = refusal(replace(math, test_path=None))
        assert "is one set without splits; set task.test_path, or task.test_split=null" in one
        folder = tmp_path / "folder"
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", math_rows(2))
        assert "must name a split" in refusal(replace(math, test_path=str(folder), test_split=None))

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("broken.jsonl", b'{"problem": '),
            ("binary.jsonl", bytes(range(256))),
            ("broken.parquet", b"PAR1 not really"),
            ("empty.parquet", b""),
        ],
    )
    def test_damaged_files(self, name: str, content: bytes, tmp_path: Path, math: MathTask) -> None:
        (tmp_path / name).write_bytes(content)
        message = refusal(replace(math, path=str(tmp_path / name)))
        assert message.startswith(f"task.path={tmp_path / name}: ")

    def test_nothing_left(self, tmp_path: Path, math: MathTask, tokenizer: str) -> None:
        message = refusal(replace(math, levels=(1,)))
        assert message.endswith(
            f"nothing is left: training prompts: kept 0 of 20 ({math.path}); "
            f"dropped: {OTHER_LEVEL} (20)"
        )
        assert "kept 0 of 1" in refusal(dataset_of(tmp_path, tokenizer, qa(("", "1"))))
        (tmp_path / "void").mkdir()
        assert refusal(replace(math, path=str(tmp_path / "void"))).startswith("task.path=")

    def test_more_held_out_prompts_than_there_are(self, math: MathTask) -> None:
        with pytest.raises(ValueError, match="6 held-out prompts are asked for, there are 5"):
            math.test_prompts(6)
        config = Config(task=math, evaluation=EvaluationConfig(prompts=6, pass_prompts=1))
        with pytest.raises(ConfigError, match=r"evaluation\.prompts=6: must not exceed the 5 held"):
            check_task_data(config)
        enough = replace(config, evaluation=EvaluationConfig(prompts=5, pass_prompts=1))
        assert check_task_data(enough) == math.data_report()
        with pytest.raises(ConfigError, match=r"^task\.path="):
            check_task_data(replace(config, task=replace(math, path="/none.jsonl")))

    def test_a_name_on_the_hub_without_a_network(self, tmp_path: Path, tokenizer: str) -> None:
        program = (
            "from nemo_apo.tasks.data_sets import Gsm8kTask\n"
            f"task = Gsm8kTask(tokenizer={tokenizer!r})\n"
            "try:\n    task.data_report()\nexcept ValueError as error:\n    print(error)\n"
        )
        path = ":".join(filter(None, sys.path))
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=offline, check=True
        )
        (line,) = done.stdout.splitlines()
        assert line.startswith("task.path=openai/gsm8k: cannot be had from the hub (")
        assert "run 'hf download --repo-type dataset --local-dir FOLDER openai/gsm8k'" in line
        assert line.endswith("copy FOLDER to this machine and set task.path=FOLDER")


class TestIdentity:
    def test_the_same_data_elsewhere_is_the_same(self, tmp_path: Path, math: MathTask) -> None:
        copy = shutil.copy(math.path, tmp_path / "copy.jsonl")
        assert replace(math, path=str(copy)).fingerprint() == math.fingerprint()

    @pytest.mark.parametrize("part", ["path", "test_path"])
    def test_another_answer_is_other_data(self, part: str, tmp_path: Path, math: MathTask) -> None:
        file = Path(getattr(math, part))
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[-1]["solution"] = r"\boxed{77}"
        other = write_jsonl(tmp_path / "other.jsonl", rows)
        assert replace(math, **{part: other}).fingerprint() != math.fingerprint()

    def test_other_tokens_are_other_data(self, math: MathTask) -> None:
        assert replace(math, system_prompt=None).fingerprint() != math.fingerprint()

    def test_a_checkpoint_is_tied_to_the_data_and_not_to_its_place(
        self, tmp_path: Path, math: MathTask
    ) -> None:
        config = Config(task=math)
        moved = replace(
            config, task=replace(math, path=str(shutil.copy(math.path, tmp_path / "m.jsonl")))
        )
        assert changes(fixed_values(config), fixed_values(moved), ()) == []
        other = replace(math, path=write_jsonl(tmp_path / "o.jsonl", math_rows(19)))
        (told,) = changes(fixed_values(config), fixed_values(replace(config, task=other)), ())
        assert told == (
            f'task.prompts_sha256 was "{math.fingerprint()}" and is now "{other.fingerprint()}"'
        )

    def test_a_new_process_has_the_same_prompts(self, math: MathTask) -> None:
        program = (
            "from nemo_apo.tasks import PromptTurn\n"
            "from nemo_apo.tasks.data_sets import MathTask\n"
            f"task = {math!r}\n"
            "print(task.fingerprint(), *(p.id for p in task.train_prompts(9, PromptTurn(3, 5))))"
        )
        path = ":".join(filter(None, sys.path))
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": path, "PYTHONHASHSEED": "5"},
            check=True,
        )
        ids = [prompt.id for prompt in math.train_prompts(9, PromptTurn(3, 5))]
        assert done.stdout.split() == [math.fingerprint(), *ids]


class TestCommand:
    @pytest.fixture
    def overrides(self, math: MathTask) -> list[str]:
        return [
            "task=math",
            f"task.tokenizer={math.tokenizer}",
            f"task.path={math.path}",
            f"task.test_path={math.test_path}",
            "warm_start.steps=0",
            "grading.grader=exact_match",
            "evaluation.prompts=5",
            "evaluation.pass_prompts=2",
        ]

    def test_the_report_is_printed_before_training(
        self,
        overrides: list[str],
        math: MathTask,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
    ) -> None:
        monkeypatch.setattr(loop, "run", lambda config: print("training begins"))
        assert cli.main(["train", *overrides]) in (0, None)
        assert capsys.readouterr().out.splitlines() == [*math.data_report(), "training begins"]

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ("task.path=/none.jsonl", "task.path=/none.jsonl: there is no such file or folder"),
            ("task.tokenizer=/none", "task.tokenizer=/none: there is no such folder"),
            ("task.tokenizer=null", "task.tokenizer=null: must be a checkpoint's folder"),
            (
                "evaluation.prompts=6",
                "evaluation.prompts=6: must not exceed the 5 held-out prompts",
            ),
            ("warm_start.steps=1", "warm_start.steps=1: must be 0 (or set warm_start.load): task="),
            ("grading.grader=task", "grading.workers=0: must be at least 1 for this grader"),
        ],
    )
    def test_what_is_wrong_is_said_before_anything_starts(
        self,
        wrong: str,
        message: str,
        overrides: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
    ) -> None:
        monkeypatch.setattr(loop, "run", lambda config: pytest.fail("training begins"))
        monkeypatch.chdir(tmp_path)
        try:
            status = cli.main(["train", *overrides, wrong])
        except SystemExit as ended:
            status = ended.code
        assert status == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "runs").exists()

    def test_numbers_are_graded_without_a_worker(self, overrides: list[str]) -> None:
        config = compose(["task=gsm8k", *overrides[1:5]])
        validate(config, 1)
        assert (config.grading.grader, config.grading.workers) == ("numeric", 0)


def test_graded_by_text(math: MathTask) -> None:
    """Its own grade compares characters; training uses the grader by name."""
    prompt = math.test_prompts(1)[0]
    right = list(math._chat.encode([rf"\boxed{{{prompt.reference}}}"])[0])
    assert math.solved(prompt, right)
    assert math.grade(prompt, right[:-20]) == 0.0
    assert Config(task=math).grading.grader == "math_verify"
    assert Config().grading.grader == "task"


def test_a_grading_worker_needs_neither_data_nor_tokenizer() -> None:
    task = Gsm8kTask(path="/none.jsonl", tokenizer="/none", stop_strings=("</answer>",))
    order = Order.of(GradingSettings(grader="numeric", workers=1), task)
    with contextlib.closing(WorkerPool(order)) as pool:
        grades = pool.grade([Sample("?", (), "<answer>1005</answer>", (), "1,005")])
    assert [grade.value for grade in grades] == [1.0]


def test_a_task_comes_back_from_its_fields() -> None:
    """As a worker makes it, from JSON."""
    task = MathTask(levels=(3, 4), subjects=("Algebra",), stop_strings=("a",))
    fields = Order.from_bytes(Order.of(GradingSettings(), task).to_bytes()).task_fields
    assert MathTask(**fields) == task
    assert hash(MathTask(**fields)) == hash(task)


def test_importing_the_tasks_loads_no_library() -> None:
    program = (
        "import sys, nemo_apo.tasks, nemo_apo.grading.worker, nemo_apo.grading.loading\n"
        "nemo_apo.tasks.TASKS['math']()\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'jinja2'} & set(sys.modules)))"
    )
    path = ":".join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": path},
        check=True,
    )
    assert done.stdout.strip() == "[]"
