"""The YAML files against the dataclasses, and what composition refuses."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_apo.compose import compose, conf_dir, group_options, to_yaml
from nemo_apo.compose.schema import all_keys, nearest
from nemo_apo.config import TAGGED_SECTIONS, Config, ConfigError, seconds_of_time, unread_sections
from nemo_apo.config_rules import validate
from nemo_apo.core.anchoring import ANCHORS
from nemo_apo.core.objectives import OBJECTIVES
from tests.tasks.tiny_chat import save_tokenizer

CONF = conf_dir()
OPTIONS = [(group, option) for group, named in group_options().items() for option in named]
# One that stands alone; model=hf needs a checkpoint (tests/hf_checkpoint).
COMPOSABLE = [pair for pair in OPTIONS if pair != ("model", "hf")]
EXPERIMENTS = [option for group, option in OPTIONS if group == "experiment"]
# Objectives that read every section, so that any key can be set beside them.
READS_ALL = [name for name, objective in OBJECTIVES.items() if not unread_sections(objective)]


def refusal(*overrides: str, ranks: int = 1, **files: Any) -> str:
    """The message with which a configuration is refused."""
    with pytest.raises(ConfigError) as error:
        validate(compose(overrides, **files), ranks)
    message = str(error.value)
    assert "\n" not in message
    return message


def config_with(section: str, name: str) -> list[str]:
    """Overrides that choose a class of a tagged section where it can be chosen."""
    return [f"{section}={name}"] if section in TAGGED_SECTIONS else []


def literal(value: object) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, str) and " " in value:
        return f"'{value}'"
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def instances() -> dict[tuple[str, str], Any]:
    """The default value of every section, for every class it may have."""
    found = {}
    for field in dataclasses.fields(Config):
        plain = {"": getattr(Config(), field.name)}
        for name, value in TAGGED_SECTIONS.get(field.name, plain).items():
            found[field.name, name] = value
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint's tokenizer."""
    return save_tokenizer(tmp_path_factory.mktemp("checkpoint"))


def bases_of(defaults: list[Any]) -> list[str]:
    """The options that an experiment's own values are laid over, as on the command line."""
    others = [entry for entry in defaults if entry != "_self_"]
    return [
        f"experiment={entry}"
        if isinstance(entry, str)
        else "=".join(next(iter(entry.items()))).removeprefix("override /")
        for entry in others
    ]


class TestShippedFiles:
    def test_the_defaults_are_those_of_the_dataclasses(self) -> None:
        assert compose([]) == Config()

    @pytest.mark.parametrize(("group", "option"), COMPOSABLE)
    def test_every_option_composes_and_runs(self, group: str, option: str, tokenizer: Path) -> None:
        needed = []
        if group == "task" and option != "sort":
            needed = [f"task.tokenizer={tokenizer}", "warm_start.steps=0", "grading.workers=1"]
        config = compose([f"{group}={option}", *needed])
        parallel = config.parallel
        ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        # The checkpoints of the recipes are not here.
        reads_files = group != "experiment"
        validate(config, ranks * parallel.context_parallel_size, reads_files)

    @pytest.mark.parametrize(("section", "name"), [k for k in instances() if k[1]])
    def test_an_option_has_the_defaults_of_its_class(self, section: str, name: str) -> None:
        chosen = getattr(compose([f"{section}={name}"]), section)
        assert chosen == TAGGED_SECTIONS[section][name]
        assert type(chosen) is type(TAGGED_SECTIONS[section][name])

    @pytest.mark.parametrize("name", ANCHORS)
    def test_an_anchor_differs_from_the_default_in_its_name(self, name: str) -> None:
        assert compose([f"anchor={name}"]).anchor == dataclasses.replace(Config().anchor, name=name)

    @pytest.mark.parametrize(
        ("option", "tensor", "pipeline"),
        [("single", 1, 1), ("tp2", 2, 1), ("pp2", 1, 2), ("tp2_pp2", 2, 2)],
    )
    def test_layouts(self, option: str, tensor: int, pipeline: int) -> None:
        assert compose([f"parallel={option}"]).parallel == dataclasses.replace(
            Config().parallel,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
        )

    @pytest.mark.parametrize(
        ("option", "changes"),
        [
            ("cp2", {"context_parallel_size": 2}),
            ("tp2_sp", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        ],
    )
    def test_layouts_that_split_the_sequence(self, option: str, changes: dict) -> None:
        expected = dataclasses.replace(Config().parallel, **changes)
        assert compose([f"parallel={option}"]).parallel == expected

    def test_every_option_of_a_tagged_section_has_a_file(self) -> None:
        options = group_options()
        for section, classes in TAGGED_SECTIONS.items():
            assert set(options[section]) == set(classes)
        assert set(options["anchor"]) == set(ANCHORS)

    @pytest.mark.parametrize(("group", "option"), OPTIONS)
    def test_a_file_of_a_group_holds_every_field_and_an_experiment_only_differences(
        self, group: str, option: str
    ) -> None:
        written = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
        if group == "experiment":
            base = dataclasses.asdict(compose(bases_of(written.pop("defaults", []))))
            same = [
                f"{section}.{key}"
                for section, values in written.items()
                for key, value in values.items()
                if base[section][key] == value
            ]
            # What was published is written out, the defaults among it too.
            assert not same or option == "apo_qwen3_1p7b_math3", same
        else:
            composed = (group, option) in COMPOSABLE
            section = getattr(compose([f"{group}={option}"] if composed else []), group)
            assert set(written) == {field.name for field in dataclasses.fields(section)}

    def test_the_main_file_holds_every_other_field(self) -> None:
        written = yaml.safe_load((CONF / "config.yaml").read_text())
        groups = {next(iter(entry)) for entry in written.pop("defaults") if isinstance(entry, dict)}
        sections = {field.name for field in dataclasses.fields(Config)}
        assert set(written) == sections - groups
        for section, values in written.items():
            wanted = {field.name for field in dataclasses.fields(getattr(Config(), section))}
            assert set(values) == wanted

    @pytest.mark.parametrize(("group", "option"), OPTIONS)
    def test_every_option_is_described(self, group: str, option: str) -> None:
        assert len(group_options()[group][option]) > 10

    def test_two_modes(self) -> None:
        config = compose(["experiment=two_modes"])
        assert config.task.reward == "two_modes"
        assert config.run.steps == 150
        assert config.objective.no_signal == "drop"


class TestOverrides:
    @pytest.mark.parametrize(("section", "name"), instances())
    def test_every_field_can_be_set(self, section: str, name: str) -> None:
        wanted = instances()[section, name]
        values = dataclasses.asdict(wanted)
        overrides = [f"{section}.{key}={literal(value)}" for key, value in values.items()]
        assert getattr(compose([*config_with(section, name), *overrides]), section) == wanted

    def test_a_set_value_arrives(self) -> None:
        config = compose(
            ["run.steps=7", "optimizer.lr=3e-5", "run.report=false", "objective.ratio_clip=4"]
        )
        assert (config.run.steps, config.optimizer.lr) == (7, 3e-5)
        assert config.run.report is False
        assert config.objective.ratio_clip == 4.0
        assert type(config.objective.ratio_clip) is float

    def test_the_last_override_wins(self) -> None:
        assert compose(["run.steps=7", "run.steps=8"]).run.steps == 8
        assert compose(["objective=gspo", "objective=sapo"]).objective.name == "sapo"

    def test_overrides_win_over_experiments_in_any_order(self) -> None:
        assert compose(["run.steps=7", "experiment=two_modes"]).run.steps == 7

    def test_a_name_chooses_the_option(self) -> None:
        assert compose(["schedule.name=linear"]).schedule == TAGGED_SECTIONS["schedule"]["linear"]

    def test_values_may_refer_to_each_other(self) -> None:
        assert compose(["run.name=${task.reward}_run"]).run.name == "exact_run"


def misspellings(key: str) -> set[str]:
    """The key with a letter of its last part left out, doubled, or swapped with the next."""
    section, leaf = key.split(".")
    middle = len(leaf) // 2
    wrong = {
        leaf[:middle] + leaf[middle + 1 :],
        leaf[:middle] + leaf[middle] + leaf[middle:],
        leaf[: middle - 1] + leaf[middle] + leaf[middle - 1] + leaf[middle + 1 :],
    }
    return {f"{section}.{leaf}" for leaf in wrong} - set(all_keys())


class TestMistakes:
    @pytest.mark.parametrize("key", all_keys())
    def test_a_misspelt_key_is_answered_with_the_right_one(self, key: str) -> None:
        for wrong in misspellings(key):
            message = refusal(f"{wrong}=1")
            assert message.startswith(f"{wrong}=1: there is no such key; did you mean ")
            assert key in message

    @pytest.mark.parametrize("key", all_keys())
    def test_a_misspelt_section_is_answered_with_the_right_key(self, key: str) -> None:
        section, leaf = key.split(".")
        assert key in refusal(f"{section}{section[-1]}.{leaf}=1")

    @pytest.mark.parametrize("key", all_keys())
    def test_a_missing_section_is_answered_with_a_key_of_that_name(self, key: str) -> None:
        leaf = key.split(".")[1]
        suggested = refusal(f"{leaf}=1")
        assert any(f"{section}.{leaf}" in suggested for section in instances_by_section())

    def test_what_is_like_nothing_gets_no_suggestion(self) -> None:
        assert refusal("qqq=1") == "qqq=1: there is no such key"
        assert nearest("qqq", all_keys()) == []

    @pytest.mark.parametrize(
        ("wrong", "right"),
        [
            ("objective=apoo", "did you mean apo"),
            ("experiment=twomodes", "did you mean two_modes"),
            ("schedule=guard", "did you mean guarded"),
            ("schedule.name=guard", "did you mean guarded"),
            ("objectives=gspo", "did you mean objective"),
            ("parallel=tp3", "single"),
            ("anchor=oldest", "did you mean old"),
            ("task=maths", "did you mean math"),
        ],
    )
    def test_an_unknown_option_is_answered_with_the_nearest(self, wrong: str, right: str) -> None:
        assert right in refusal(wrong)

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("run.steps=2.5", "a whole number (int)"),
            ("run.steps=abc", "a whole number (int)"),
            ("run.steps='5'", "a whole number (int)"),
            ("run.steps=true", "a whole number (int)"),
            ("run.steps=null", "a whole number (int)"),
            ("run.steps=", "a whole number (int)"),
            ("run.steps=[1]", "a whole number (int)"),
            ("run.threads=x", "a whole number (int) or null"),
            ("run.report=1", "true or false (bool)"),
            ("run.report=yes", "true or false (bool)"),
            ("run.name=5", "text (str)"),
            ("run.name=true", "text (str)"),
            ("run.name=null", "text (str)"),
            ("schedule.alpha_min=high", "a number (float)"),
            ("schedule.alpha_min=nan", "a number (float)"),
            ("schedule.alpha_min=false", "a number (float)"),
            ("objective.ratio_clip=x", "a number (float) or null"),
            ("tau.base=null", "a number (float)"),
        ],
    )
    def test_a_wrong_type_is_answered_with_the_right_one(
        self, override: str, expected: str
    ) -> None:
        message = refusal(override)
        assert message.startswith(override.split("=")[0] + "=")
        assert f"must be {expected}" in message

    @pytest.mark.parametrize(
        "overrides",
        [
            ["schedule.alpha_min=-0.1"],
            ["schedule.alpha_max=1.1"],
            ["schedule.alpha_min=0.9", "schedule.alpha_max=0.5"],
            ["schedule.rho=1"],
            ["schedule.rho_r=-0.1"],
            ["schedule.improvement_scale=0"],
            ["schedule.confidence=sure"],
            ["schedule=fixed", "schedule.alpha=2"],
            ["schedule=linear", "schedule.decay_steps=0"],
            ["schedule=cosine", "schedule.alpha_end=inf"],
            ["schedule=ess", "schedule.ess_target=0"],
            ["schedule=ess", "schedule.max_change=0"],
            ["tau.base=0"],
            ["tau.base=-1"],
            ["tau.base=inf"],
            ["tau=adaptive", "tau.min=0"],
            ["objective.beta_r=0"],
            ["objective.advantages=gae"],
            ["objective.logprob_reduction=max"],
            ["objective.ratio_clip=0"],
            ["objective=grpo", "objective.clip_low=1"],
            ["objective=grpo", "objective.aggregation=mean"],
            ["objective=sapo", "objective.gate_negative=0"],
            ["anchor.decay=1"],
            ["anchor.refresh_every=0"],
            ["anchor.name=older"],
            ["regularizers.kl_coef=-1"],
            ["regularizers.kl_estimator=k4"],
            ["groups.truncated=maybe"],
            ["groups.failed_reward=inf"],
            ["grading.workers=-1"],
            ["grading.grader=exact_matches"],
            ["grading.grader=module:"],
            ["grading.workers=1", "grading.wall_s=0"],
            ["grading.workers=1", "grading.start_s=inf"],
            ["grading.workers=1", "grading.cpu_s=0"],
            ["grading.workers=1", "grading.memory_mib=64"],
            ["grading.workers=1", "grading.file_mib=-1"],
            ["grading.workers=1", "grading.processes=0"],
            ["grading.workers=1", "grading.total_s=413"],
            ["grading.grader=numeric", "grading.tolerance=-1"],
            ["rollout.engine=vlm"],
            ["rollout.gpu_memory_utilization=0"],
            ["rollout.gpu_memory_utilization=1"],
            ["shaping.format=-1"],
            ["shaping.repetition=inf"],
            ["shaping.repetition_ngram=5"],
            ["shaping.repetition=1", "shaping.repetition_ngram=0"],
            ["shaping.overlong_cache=8"],
            ["shaping.overlong=1", "shaping.overlong_cache=9"],
            ["rollout.group_size=1"],
            ["rollout.prompts=0"],
            ["rollout.temperature=0"],
            ["rollout.top_p=0.9"],
            ["rollout.top_k=5"],
            ["rollout.resample=-1"],
            ["rollout.importance_cap=0.9"],
            ["rollout.importance_cap=inf"],
            ["update.epochs=0"],
            ["update.micro_batch_size=0"],
            ["optimizer.lr=0"],
            ["optimizer.adam_beta2=1"],
            ["optimizer.clip_grad=-1"],
            ["warm_start.steps=-1"],
            ["evaluation.pass_k=0"],
            ["evaluation.prompts=100", "evaluation.pass_prompts=200"],
            ["task.reward=approximate"],
            ["task.length=1"],
            ["task=math", "task.levels=[6]"],
            ["task=math", "task.levels=[a]"],
            ["task=math", "task.subjects=[1]"],
            ["task=math", "task.max_prompt_length=0"],
            ["task=math", "task.max_response_length=0"],
            ["task=gsm8k", "task.long_prompts=cut"],
            ["task=gsm8k", "task.held_out_share=0.2"],
            ["task=dataset", "task.held_out_share=1"],
            ["task=dataset", "task.stop_strings=['']"],
            ["task=dataset", "task.answer_format=last"],
            ["task=dataset", "task.tokenizer=null"],
            ["task.teacher_drop=1.5"],
            ["model.kv_channels=15"],
            ["model.num_query_groups=3"],
            ["model.init_method_std=0"],
            ["evaluation.pass_samples=7"],
            ["parallel.backend=mpi"],
            ["parallel.timeout_minutes=0"],
            ["run.steps=0"],
            ["run.stop_after=1000"],
            ["run.name=a/b"],
            ["run.name="],
            ["run.if_exists=ask"],
            ["run.console=loud"],
            ["run.threads=0"],
            ["run.keep_last=0"],
            ["run.keep_best=-1"],
            ["run.keep_best_metric=policy/kl_reference"],
            ["run.allow_changed=task"],
            ["run.allow_changed=[1]"],
            ["run.seed=-1"],
            ["diagnostics.window=1"],
            ["diagnostics.heavy_tail=-1"],
        ],
        ids="+".join,
    )
    def test_a_value_out_of_range_is_refused_by_key(self, overrides: list[str]) -> None:
        message = refusal(*overrides)
        assert overrides[-1].split("=")[0].split(".")[1] in message
        assert " must " in message

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (
                ["run.allow_changed=[task,model]"],
                "run.allow_changed=model: may hold task, objective, schedule, tau, anchor, "
                "regularizers, rollout, grading, shaping, optimizer",
            ),
            (["run.keep_best=2"], "run.keep_best=2: needs run.keep_last, else all are kept"),
            (
                ["run.keep_best=2", "run.keep_last=1", "run.save_every=5"],
                "run.save_every=5: must be a multiple of evaluation.every=10, else no checkpoint "
                "has the run.keep_best_metric=eval/accuracy that run.keep_best goes by",
            ),
        ],
    )
    def test_what_is_kept_and_what_may_change(self, overrides: list[str], message: str) -> None:
        assert refusal(*overrides) == message

    def test_a_metric_of_every_step_ranks_checkpoints_of_any_step(self) -> None:
        overrides = ["run.keep_best=2", "run.keep_last=1", "run.save_every=5"]
        validate(compose([*overrides, "run.keep_best_metric=reward/mean"]), 1)
        assert compose(["run.allow_changed=[task,tau]"]).run.allow_changed == ("task", "tau")

    def test_prompts_that_mini_batches_do_not_divide(self) -> None:
        message = refusal("rollout.prompts=30", "update.mini_batches=4")
        assert message.startswith("update.mini_batches=4: must divide rollout.prompts=30")

    @pytest.mark.parametrize("grader", ["math_verify", "package.module:function"])
    def test_a_grader_that_needs_a_worker_is_refused_without_one(self, grader: str) -> None:
        message = refusal(f"grading.grader='{grader}'")
        assert message.startswith("grading.workers=0: must be at least 1 for this grader")
        validate(compose([f"grading.grader='{grader}'", "grading.workers=1"]), 1)

    def test_a_separate_engine_needs_a_checkpoint_and_a_check(self) -> None:
        message = refusal("rollout.engine=vllm")
        assert message.startswith("rollout.engine=vllm: needs model.path")
        config = compose(["rollout.engine=vllm"])
        named = dataclasses.replace(config, model=dataclasses.replace(config.model, path="/m"))
        with pytest.raises(ConfigError, match=r"needs update\.max_sampler_mismatch"):
            validate(named, 1)
        checked = dataclasses.replace(config.update, max_sampler_mismatch=0.05)
        validate(dataclasses.replace(named, update=checked), 1)
        message = refusal("rollout.gpu_memory_utilization=0.3")
        assert "is of the vllm engine alone (rollout.engine=static)" in message

    def test_ranks_wait_longer_than_a_call_may_last(self) -> None:
        # Beside total_s: wall_s=10 and a grace of 15, twice start_s=60 and 15, 12 to end; 187.
        validate(compose(["grading.workers=1", "grading.total_s=412"]), 1)
        message = refusal("grading.workers=1", "grading.total_s=413")
        assert message.startswith("grading.total_s=413.0: must be less: ")
        assert "a call may last 600 s, but ranks wait parallel.timeout_minutes=10" in message

    @pytest.mark.parametrize(
        ("override", "reason"),
        [
            ("grading.wall_s=1", "without a worker (grading.workers=0)"),
            ("grading.memory_mib=512", "without a worker (grading.workers=0)"),
            ("grading.tolerance=0.1", "of the numeric grader alone (grading.grader=task)"),
        ],
    )
    def test_a_setting_of_grading_that_nothing_would_read(self, override: str, reason: str) -> None:
        assert reason in refusal(override)

    @pytest.mark.parametrize(
        ("overrides", "ranks", "rule"),
        [
            (["parallel=tp2"], 3, "must divide the number of ranks, which is 3"),
            (["parallel=tp2"], 1, "must divide the number of ranks, which is 1"),
            (["parallel=tp2_pp2"], 2, "must divide the number of ranks, which is 2"),
            (["parallel.tensor_model_parallel_size=3"], 3, "must divide model.num_attention_heads"),
            (["parallel.tensor_model_parallel_size=4"], 4, "must divide model.num_query_groups"),
            (["parallel.pipeline_model_parallel_size=4"], 4, "must divide model.num_layers"),
            (["parallel.pipeline_model_parallel_size=0"], 1, "must be at least 1"),
            (["parallel=cp2"], 3, "must divide the number of ranks, which is 3"),
            (["parallel.sequence_parallel=true"], 1, "tensor_model_parallel_size > 1"),
            (["parallel.virtual_pipeline_model_parallel_size=2"], 1, "_model_parallel_size > 1"),
            (
                ["parallel=pp2", "parallel.virtual_pipeline_model_parallel_size=2"],
                2,
                "must divide model.num_layers=2",
            ),
            (["parallel.recompute=all"], 1, "must be one of none, selective, full"),
            (["model.params_dtype=float16"], 1, "must be one of float32, bfloat16"),
        ],
    )
    def test_a_layout_that_does_not_fit(self, overrides: list[str], ranks: int, rule: str) -> None:
        assert rule in refusal(*overrides, ranks=ranks)

    @pytest.mark.parametrize(
        ("overrides", "reason"),
        [
            (["objective=gspo", "schedule.alpha_min=0.4"], "gspo has no alpha"),
            (["objective=gspo", "schedule=linear"], "gspo has no alpha"),
            (["objective=grpo", "tau.base=0.3"], "grpo has no anchor"),
            (["objective=dapo", "anchor=ema"], "dapo has no anchor"),
            (["objective=adpo_softmax", "schedule.rho=0.5"], "adpo_softmax has no alpha"),
            (["schedule.alpha_min=0.35", "objective=gspo"], "gspo has no alpha"),
        ],
    )
    def test_what_the_objective_never_reads_cannot_be_set(
        self, overrides: list[str], reason: str
    ) -> None:
        message = refusal(*overrides)
        assert reason in message
        assert message.split(":")[0] in overrides

    @pytest.mark.parametrize(
        ("overrides", "part"),
        [
            (["objective=gspo", "objective.beta_r=0.3"], "objective=gspo has no beta_r"),
            (["schedule=fixed", "schedule.alpha_min=0.3"], "schedule=fixed has no alpha_min"),
            (["experiment=two_modes", "objective=gspo"], "(in experiment=two_modes)"),
        ],
    )
    def test_a_key_of_another_class_is_named_as_such(self, overrides: list[str], part: str) -> None:
        message = refusal(*overrides)
        assert part in message
        assert "its keys are" in message

    @pytest.mark.parametrize(
        "override",
        [
            "+x=1",
            "+run.steps=3",
            "++run.steps=3",
            "~run.steps",
            "~objective",
            "run.steps",
            "",
            "=3",
            "run=3",
            "run={steps: 3}",
            "objective={name: gspo}",
            "objective=[apo,gspo]",
            "objective=null",
            "objective@run=apo",
            "run.steps=1,2",
            "run.name=a=b",
            "run.name=${task.rewar}",
            "hydra.verbose=true",
            "run.steps.x=3",
        ],
    )
    def test_other_grammar_is_refused(self, override: str) -> None:
        refusal(override)


def instances_by_section() -> set[str]:
    """The sections of the configuration."""
    return {section for section, _ in instances()}


class TestFiles:
    @pytest.mark.parametrize(
        "overrides",
        [
            [],
            *([f"{group}={option}"] for group, option in COMPOSABLE),
            ["run.stop_after=5", "objective.ratio_clip=3", "optimizer.lr=1e-6", "run.name='1e-3'"],
            ["run.name='true'", "run.root='/tmp/a b: c'", "tau=adaptive", "tau.max=inf"],
        ],
        ids="+".join,
    )
    def test_a_saved_configuration_comes_back_equal(
        self, overrides: list[str], tmp_path: Path
    ) -> None:
        config = compose(overrides)
        saved = tmp_path / "config.yaml"
        saved.write_text(to_yaml(config))
        again = compose([], config_file=saved)
        assert again == config
        assert to_yaml(again) == to_yaml(config)

    def test_a_file_of_differences(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("objective: gspo\nexperiment: graded\nrun: {steps: 5, seed: 3}\n")
        config = compose(["run.seed=4"], config_file=file)
        assert config.objective == OBJECTIVES["gspo"]
        assert config.task.reward == "graded"
        assert (config.run.steps, config.run.seed) == (5, 4)

    def test_a_section_with_a_name_chooses_the_option(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("schedule: {alpha_end: 0.5, name: cosine}\n")
        wanted = dataclasses.replace(TAGGED_SECTIONS["schedule"]["cosine"], alpha_end=0.5)
        assert compose([], config_file=file).schedule == wanted

    def test_a_group_on_the_command_line_replaces_the_section_of_the_file(
        self, tmp_path: Path
    ) -> None:
        file = tmp_path / "config.yaml"
        file.write_text(to_yaml(compose(["objective.beta_r=0.5", "run.steps=9"])))
        config = compose(["objective=gspo"], config_file=file)
        assert config.objective == OBJECTIVES["gspo"]
        assert config.run.steps == 9
        assert compose(["objective=apo"], config_file=file).objective.beta_r == 0.5

    def test_also_one_of_a_section_without_a_name(self, tmp_path: Path) -> None:
        file = tmp_path / "config.yaml"
        file.write_text(to_yaml(compose(["run.steps=9"])))
        config = compose(["parallel=tp2"], config_file=file)
        assert config.parallel == compose(["parallel=tp2"]).parallel != Config().parallel
        assert config.run.steps == 9

    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ("- a", "must hold a mapping"),
            ("run: [", "not YAML, line"),
            ("run: {steps: 3, steps: 4}", "duplicate key"),
            ("run.steps: 3", "write it nested"),
            ("run: 3", "is a section"),
            ("schedule: null", "schedule=null: must be one of"),
            ("run: {stepps: 3}", "did you mean run.steps"),
            ("objectiv: gspo", "did you mean objective"),
            ("objective: gspoo", "did you mean gspo"),
            ("objective: {name: gspo, beta_r: 0.3}", "objective=gspo has no beta_r"),
            ("run: {name: {a: 1}}", "must be text"),
        ],
    )
    def test_a_mistake_in_a_file(self, text: str, part: str, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        assert part in refusal(config_file=file)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        assert "no such file" in refusal(config_file=tmp_path / "none.yaml")

    def test_unread_values_of_a_file_are_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("schedule: {alpha_min: 0.4}\n")
        assert "gspo has no alpha" in refusal("objective=gspo", config_file=file)


class TestConfigDir:
    def test_options_of_ones_own(self, tmp_path: Path) -> None:
        folder = tmp_path / "my conf"
        (folder / "experiment").mkdir(parents=True)
        (folder / "schedule").mkdir()
        (folder / "experiment" / "mine.yaml").write_text(
            "# @package _global_\n# Mine.\n"
            "defaults:\n  - override /objective: gspo\nrun:\n  steps: 7\n"
        )
        (folder / "schedule" / "slow.yaml").write_text("# Slow.\nname: guarded\nrho: 0.95\n")
        config = compose(["experiment=mine"], config_dir=folder)
        assert (config.objective.name, config.run.steps) == ("gspo", 7)
        assert compose(["experiment=mine", "objective=apo"], config_dir=folder).run.steps == 7
        assert compose(["schedule=slow"], config_dir=folder).schedule == dataclasses.replace(
            Config().schedule, rho=0.95
        )
        assert group_options(folder)["experiment"]["mine"] == "Mine."

    def test_a_shipped_option_cannot_be_shadowed(self, tmp_path: Path) -> None:
        (tmp_path / "objective").mkdir()
        (tmp_path / "objective" / "apo.yaml").write_text("name: apo\n")
        assert "objective=apo already exists" in refusal(config_dir=tmp_path)

    def test_a_folder_without_options(self, tmp_path: Path) -> None:
        assert "holds no option" in refusal(config_dir=tmp_path)
        assert "holds no option" in refusal(config_dir=tmp_path / "none")

    def test_an_unknown_key_of_an_experiment(self, tmp_path: Path) -> None:
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment" / "mine.yaml").write_text(
            "# @package _global_\nrun:\n  stepps: 7\n"
        )
        message = refusal("experiment=mine", config_dir=tmp_path)
        assert "did you mean run.steps" in message
        assert "(in experiment=mine)" in message

    def test_an_unknown_section_of_an_experiment(self, tmp_path: Path) -> None:
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nruns: {a: 1}\n")
        assert "runs: there is no such key" in refusal("experiment=mine", config_dir=tmp_path)


def test_some_objective_reads_everything() -> None:
    assert READS_ALL == ["apo"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("00:00:01", 1), ("1:30:00", 5400), ("03:45:10", 13510), ("02:00:00:00", 172800)],
)
def test_times_as_nemo_writes_them(text: str, seconds: float) -> None:
    assert seconds_of_time(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "1:30", "00:00:00", "1:60:00", "1:00:60", "-1:00:00"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be '\[days:\]hours:minutes:seconds' in quotes"):
        seconds_of_time(text)
