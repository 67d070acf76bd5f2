"""The schema read from source equals what importing the classes shows."""

import dataclasses
import importlib

import pytest
from trl import GRPOConfig, SFTConfig
from trl.experimental.gkd import GKDConfig

from medistill_trl import schema
from medistill_trl.arguments import SHARED, TeacherArguments
from medistill_trl.recipe import methods


@pytest.mark.parametrize(
    ("module", "cls"),
    [
        ("trl", SFTConfig),
        ("trl", GRPOConfig),
        ("trl.experimental.gkd", GKDConfig),
        ("medistill_trl.arguments", TeacherArguments),
    ],
)
def test_fields_are_those_of_the_imported_class(module, cls):
    read = schema.read_fields(module, cls.__name__)
    imported = {f.name: f for f in dataclasses.fields(cls) if f.init}
    assert set(read) == set(imported)
    literal = [
        name for name in read if read[name].default not in (schema.REQUIRED, schema.COMPUTED)
    ]
    assert len(literal) > len(read) / 2
    for name in literal:
        assert read[name].default == imported[name].default, name


def test_types_and_choices():
    fields = schema.read_fields("trl", "SFTConfig")
    assert fields["learning_rate"].types == {"float"}
    assert fields["max_length"].types == {"int", "none"}
    assert fields["report_to"].types == {"str", "list", "none"}
    assert "cosine" in fields["lr_scheduler_type"].choices
    assert fields["eval_strategy"].choices == ("no", "steps", "epoch")
    assert fields["optim"].choices[0] == "adamw_torch"


def test_limits_and_required_fields():
    fields = schema.read_fields("medistill_trl.arguments", "TeacherArguments")
    assert fields["teacher_top_p"].limits == {"above": 0, "max": 1}
    assert fields["teacher_model"].default is schema.REQUIRED


@pytest.mark.parametrize("method", methods())
def test_what_a_config_declares_names_its_fields(method):
    module = f"medistill_trl.methods.{method}"
    config = getattr(importlib.import_module(module), schema.config_class_name(module))
    for cls in (*SHARED, *(c for c in config.__mro__ if c.__module__.startswith("medistill_trl"))):
        names = {f.name for f in dataclasses.fields(cls)}
        assert set(vars(cls).get("LIMITS", {})) <= names, cls
        assert set(vars(cls).get("UNUSED", {})) <= names, cls


def test_own_fields_are_those_this_project_defines_and_the_class_uses():
    own = schema.read_own_fields("medistill_trl.methods.bond", "BondConfig")
    assert {"num_samples", "reward", "truncation_penalty", "entropy_coef"} <= set(own)
    assert not {"gamma", "num_generations"} & set(own)  # one is UNUSED, one is TRL's alone
    unused = schema.read_unused("medistill_trl.methods.bond", "BondConfig")
    assert {"gamma", "num_generations"} <= set(unused)


def test_unknown_class_is_named():
    with pytest.raises(LookupError, match="NoSuchConfig"):
        schema.read_fields("trl", "NoSuchConfig")
