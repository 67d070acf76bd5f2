"""Attention transfer: the pairs it refuses, and what it reads off one that it takes."""

from types import SimpleNamespace

import pytest
from conftest import make_model
from tiny_setting import make_form, make_setting

from medistill_trl import methods
from medistill_trl.data import Prompt
from medistill_trl.errors import UserError
from medistill_trl.layers import pairs_of
from medistill_trl.methods.attention import check, relation_heads_of


def loaded(student, teacher, form=None):
    """What `check` looks at."""
    form = form or make_form()
    sides = {"student": SimpleNamespace(config=student), "teacher": SimpleNamespace(config=teacher)}
    prompts = [Prompt("p1", "s", "Why?", "r", None)]
    return SimpleNamespace(
        **sides,
        student_form=form,
        teacher_form=make_form(),
        train_prompts=prompts,
        validation_prompts=[],
    )


def refused(tmp_path, changes, **options):
    teacher = make_model(60).config
    student = make_model(60).config
    for name, value in changes.items():
        setattr(student, name, value)
    arguments = make_setting(tmp_path, "attention", **options).arguments
    return arguments, loaded(student, teacher)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"num_attention_heads": 8}, {}, "match_all_heads: the student has 8 attention heads and the teacher 4; set match_all_heads: false .* or attention_loss: relations"),
        ({}, {"attention_loss": "relations", "num_relation_heads": 5}, "num_relation_heads: must divide .* 32, 64; got 5, 4 would do"),
        ({}, {"layer_mapping": {1: 5}}, "there is no teacher layer 5; the teacher's layers are 1 to 4"),
        ({}, {"num_layer_pairs": 5}, "num_layer_pairs: must lie between 1 and 4"),
        ({"sliding_window": 8}, {}, "max_length: is 1024, and the student .* the last 8 tokens"),
    ],
)  # fmt: skip
def test_a_pair_that_cannot_be_is_refused_before_anything_loads(
    tmp_path, changes, options, message
):
    arguments, pair = refused(tmp_path, changes, **{"max_length": 1024, **options})
    with pytest.raises(UserError, match=message):
        check(arguments, pair)


def test_what_works_is_not_refused(tmp_path):
    for changes, options in (
        ({}, {}),
        ({"num_attention_heads": 8}, {"match_all_heads": False}),
        ({"num_attention_heads": 8}, {"attention_loss": "relations"}),
        ({"sliding_window": 2048}, {}),
    ):
        arguments, pair = refused(tmp_path, changes, **{"max_length": 1024, **options})
        check(arguments, pair)
    assert pairs_of(arguments.training, pair.student.config, pair.teacher.config) == [
        (2, 2),
        (4, 4),
    ]


def test_relation_heads_left_out_are_the_most_that_divide_the_widths(tmp_path):
    arguments, pair = refused(tmp_path, {}, attention_loss="relations")
    assert relation_heads_of(arguments.training, pair.student.config, pair.teacher.config) == 4


def test_a_prompt_with_a_token_the_teacher_lacks_is_refused(tmp_path):
    arguments, pair = refused(tmp_path, {})
    form = make_form()
    form.tokenizer.add_tokens(["Why"])
    pair.student_form = form
    with pytest.raises(UserError, match=r"prompt p1: .* 'Why', which the teacher does not know"):
        check(arguments, pair)


def test_reentrant_checkpointing_is_refused(tmp_path):
    options = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    with pytest.raises(ValueError, match="use_reentrant must be false"):
        methods.load("attention").build(make_setting(tmp_path, "attention", **options))
