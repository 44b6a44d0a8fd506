"""`PeftType.MOE_LORA` and `MOE_ESFT`: as good members as PEFT's own, and enough for PEFT to find the classes."""

from __future__ import annotations

import copy
import enum
import json
import pickle
from pathlib import Path

import peft
import pytest
from peft import PeftConfig, PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from trl_moe_ext.errors import HostVersionError
from trl_moe_ext.hosts.peft import add_member, register
from trl_moe_ext.hosts.seams import find_seam
from trl_moe_ext.hosts.tuner_types import TUNERS
from trl_moe_ext.tuners.moe_esft import MoeEsftConfig, MoeEsftModel
from trl_moe_ext.tuners.moe_lora import MoeLoraConfig, MoeLoraModel


class Colour(str, enum.Enum):  # noqa: UP042 - built as PEFT builds PeftType
    """A stand-in for PeftType, of which a test may spoil a copy."""

    RED = "RED"


add_member(Colour, "BLUE")


@pytest.mark.parametrize(("cls", "name"), [(PeftType, "MOE_LORA"), (PeftType, "MOE_ESFT"), (Colour, "BLUE")])
def test_member(cls: type[enum.Enum], name: str) -> None:
    member = getattr(cls, name)
    assert cls(name) is cls[name] is member
    assert isinstance(member, cls)
    assert (member.name, member.value) == (name, name)
    assert member == name
    assert member in list(cls)[-2:]
    assert len(cls) == len(list(cls)) == len(set(cls))
    assert name in list(cls)
    assert member in cls
    assert cls.__members__[name] is member
    assert {member: 1}[name] == 1
    assert {name: 1}[member] == 1
    assert pickle.loads(pickle.dumps(member)) is copy.copy(member) is copy.deepcopy(member) is member
    assert json.dumps(member) == f'"{name}"'
    assert repr(member) == f"<{cls.__name__}.{name}: '{name}'>"
    with pytest.raises(AttributeError, match="cannot reassign"):
        setattr(cls, name, "other")


def test_other_members_are_as_before() -> None:
    assert Colour("RED") is Colour.RED is next(iter(Colour))
    with pytest.raises(ValueError, match="GREEN"):
        Colour("GREEN")


def test_registering_again_changes_nothing() -> None:
    members, methods = list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    register()
    add_member(PeftType, "MOE_LORA")
    assert list(PeftType) == members
    assert methods == PEFT_TYPE_TO_TUNER_MAPPING


def test_registered_classes() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MOE_LORA] is MoeLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["MOE_LORA"] is MoeLoraModel
    assert PeftType.MOE_LORA not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    assert type(peft.get_peft_config({"peft_type": "MOE_LORA", "r": 3})) is MoeLoraConfig
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MOE_ESFT] is MoeEsftConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["MOE_ESFT"] is MoeEsftModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.MOE_ESFT] == "esft_"


def test_every_type_has_its_classes_and_its_words() -> None:
    for tuner in TUNERS:
        config, model = PEFT_TYPE_TO_CONFIG_MAPPING[tuner.peft_type], PEFT_TYPE_TO_TUNER_MAPPING[tuner.peft_type]
        assert (config.__module__.rpartition(".")[0], config.__name__) == (tuner.package, tuner.config)
        assert PEFT_TYPE_TO_PREFIX_MAPPING[tuner.peft_type] == tuner.prefix == model.prefix


def test_config_of_a_saved_adapter(tmp_path: Path) -> None:
    """As a file, and pickled inside another config: what Trainer and PEFT do with it."""
    config = MoeLoraConfig(r=4, expert_r=2, target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is MoeLoraConfig
    assert loaded.peft_type is PeftType.MOE_LORA
    assert (loaded.r, loaded.expert_r, loaded.target_modules) == (4, 2, {"q_proj"})
    assert pickle.loads(pickle.dumps(config)).peft_type is PeftType.MOE_LORA


def test_something_that_is_not_an_enum_of_strings() -> None:
    class Number(enum.Enum):
        ONE = 1

    with pytest.raises(HostVersionError, match=r"peft 0\.21.*PeftType is not an enum of strings.*Install peft>=0"):
        add_member(Number, "MOE_LORA")


def test_python_that_builds_enums_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(enum, "_proto_member")
    with pytest.raises(HostVersionError, match=r"cannot be extended on Python 3\.\d+"):
        add_member(Colour, "GREEN")
    assert list(Colour) == ["RED", "BLUE"]


def test_seam_with_other_parameters() -> None:
    with pytest.raises(HostVersionError, match=r"peft\.utils:register_peft_method does not take colour"):
        find_seam("peft.utils:register_peft_method", parameters=("name", "colour"))
