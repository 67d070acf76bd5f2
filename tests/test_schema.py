"""The schema read from source equals what importing the classes shows."""

import dataclasses

import pytest
from trl import GRPOConfig, SFTConfig
from trl.experimental.gkd import GKDConfig

from medistill_trl import schema
from medistill_trl.arguments import TeacherArguments


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


def test_every_declared_limit_names_a_field():
    from medistill_trl.arguments import SHARED
    from medistill_trl.methods.sft import SFTDistillConfig

    for cls in (*SHARED, SFTDistillConfig):
        names = {f.name for f in dataclasses.fields(cls)}
        assert set(getattr(cls, "LIMITS", {})) <= names, cls


def test_unknown_class_is_named():
    with pytest.raises(LookupError, match="NoSuchConfig"):
        schema.read_fields("trl", "NoSuchConfig")
