"""The block ``apo`` of a NeMo-RL configuration against the dataclasses."""

from dataclasses import fields
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_apo.compose.files import conf_dir
from nemo_apo.config import TAGGED_SECTIONS, ConfigError
from nemo_apo.nemo_rl.settings import BLOCK, SHIPPED, read_settings
from nemo_apo.plugin.settings import ApoSettings

TAGGED = ("objective", "schedule", "tau")
NAMED = [(section, name) for section in TAGGED for name in TAGGED_SECTIONS[section]]


def shipped_with(**changes: Any) -> dict[str, Any]:
    block = OmegaConf.create(BLOCK.shipped())
    for key, value in changes.items():
        OmegaConf.update(block, key, value, force_add=True)
    return OmegaConf.to_container(block)


@pytest.mark.parametrize("block", [None, {}, BLOCK.shipped(), OmegaConf.create(BLOCK.shipped())])
def test_nothing_and_the_shipped_block_are_the_defaults(block: Any) -> None:
    assert read_settings(block) == ApoSettings()


@pytest.mark.parametrize(("section", "name"), NAMED)
def test_a_name_alone_is_the_class_with_its_defaults(section: str, name: str) -> None:
    for block in ({section: {"name": name}}, shipped_with(**{f"{section}.name": name})):
        assert getattr(read_settings(block), section) == TAGGED_SECTIONS[section][name]


def test_all_keys_are_shipped_and_no_other() -> None:
    shipped = BLOCK.shipped()
    assert shipped.keys() == set(BLOCK.schema.defaults)
    for section in TAGGED:
        assert shipped[section].keys() == set(BLOCK.schema.keys_of(section)), section
    for field in fields(ApoSettings):
        if field.name in shipped and field.name not in TAGGED:
            assert shipped[field.name] == vars(getattr(ApoSettings(), field.name)), field.name


@pytest.mark.parametrize("section", TAGGED)
def test_a_shipped_value_is_the_default_of_every_class_that_has_its_key(section: str) -> None:
    for key, value in BLOCK.shipped()[section].items():
        if key == "name" or value is None:
            continue
        defaults = [vars(c)[key] for c in TAGGED_SECTIONS[section].values() if key in vars(c)]
        assert defaults == [value] * len(defaults), key


def test_every_key_has_a_comment() -> None:
    lines = (conf_dir() / "nemo_rl" / SHIPPED).read_text(encoding="utf-8").splitlines()
    commented = [line for line in lines if line.startswith("    ") and ": " in line.split("#")[0]]
    assert len(commented) == sum(len(section) for section in BLOCK.shipped().values())
    assert [line for line in commented if "#" not in line] == []


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (
            {"schedule": {"alpha_mim": 0.4}},
            ["alpha_mim=0.4", "did you mean apo.schedule.alpha_min"],
        ),
        ({"shedule": {"name": "fixed"}}, ["apo.shedule: there is no such key", "apo.schedule"]),
        ({"groups": {"truncated": "drop"}}, ["apo.groups: there is no such key"]),
        ({"vocab_size": 100}, ["apo.vocab_size: there is no such key"]),
        ({"anchor": {"name": "ema"}}, ["apo.anchor.name", "old, reference", "ema"]),
        ({"schedule": "ess"}, ["apo.schedule=ess", "is a section"]),
        ("guarded", ["apo=guarded: is a section"]),
    ],
)
def test_what_is_wrong_with_a_block(block: Any, said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read_settings(block)
    assert all(part in str(error.value) for part in said), str(error.value)
    assert "did you mean apo.vocab_size" not in str(error.value)
