"""FitNets: its projections, what is saved of them, and the pairs it refuses."""

import copy
import logging

import pytest
import torch
from conftest import make_model
from fitnets_runs import PAIRS, built, fitnets, make_narrow, own
from safetensors.torch import load_file
from tiny_setting import ONE_STEP, PROMPTS, logged, make_form, train
from transformers import AutoModelForCausalLM

from medistill_trl import methods
from medistill_trl.errors import UserError
from medistill_trl.inputs import Loaded
from medistill_trl.methods.fitnets.trainer import MODULE, PROJECTIONS
from medistill_trl.model_source import ModelSource
from medistill_trl.pipeline import build_trainer


def first_features(tmp_path, **changes):
    setting = fitnets(tmp_path, student=make_narrow(), **ONE_STEP, layer_mapping=PAIRS, **changes)
    trainer = train(setting)[1]
    return sum(logged(trainer, f"mse_{s}_{t}")[0] for s, t in PAIRS.items())


def test_least_squares_starts_below_the_other_inits(tmp_path):
    start = {
        init: first_features(tmp_path / init, projection_init=init)
        for init in ("least_squares", "heads", "orthogonal")
    }
    assert start["least_squares"] < 0.5 * min(start["heads"], start["orthogonal"])


def test_least_squares_is_exact_where_the_student_is_a_linear_image(tmp_path):
    teacher = make_model(len(make_form().tokenizer), seed=1)
    setting = fitnets(
        tmp_path,
        teacher_model=teacher,
        student=copy.deepcopy(teacher),
        layer_mapping={2: 2},
        teacher={"teacher_max_new_tokens": 60},
        **ONE_STEP,
    )
    assert logged(train(setting)[1], "mse_2_2")[0] < 1e-4


def test_fitting_the_projections_does_not_shift_what_follows(tmp_path):
    """The same student dropout, data order and completions, whatever the projections started from."""
    orders = []
    for init in ("least_squares", "orthogonal"):
        setting = fitnets(tmp_path / init, projection_init=init, max_steps=4)
        trainer = built(setting)
        seen = []
        examples = trainer.writer.examples
        object.__setattr__(
            trainer.writer,
            "examples",
            lambda rows, seed, seen=seen, examples=examples: (
                seen.append([row["question"] for row in rows]) or examples(rows, seed)
            ),
        )
        trainer.train()
        orders.append((seen, torch.rand(3).tolist()))
    assert orders[0] == orders[1]


def test_projections_train_in_a_group_of_their_own(tmp_path):
    setting = fitnets(
        tmp_path, lora=True, optim="adamw_torch", projection_lr=0.03, weight_decay=0.1
    )
    trainer = built(setting)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    group = trainer.optimizer.param_groups[-1]
    assert group["lr"] == 0.03
    assert group["weight_decay"] == 0
    assert {id(p) for p in group["params"]} == {id(p) for p in trainer.projections.parameters()}
    every = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(every) == len(set(every))
    for name, parameter in trainer.model.named_parameters():
        trained = "lora_" in name or MODULE in name
        assert parameter.requires_grad == trained
        assert torch.equal(parameter, before[name]) != trained, name


def test_cka_trains_without_projections_across_widths(tmp_path):
    setting = fitnets(tmp_path, student=make_narrow(), feature_loss="cka", **ONE_STEP)
    trainer = train(setting)[1]
    assert trainer.projections is None
    assert 0 < logged(trainer, "cka_1_2")[0] < 1


# --- what is saved


@pytest.mark.parametrize("lora", [True, False])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, lora):
    def run(folder, checkpoint=None):
        changes = {
            "save_strategy": "steps",
            "save_steps": 2,
            "optim": "adamw_torch",
            "max_steps": 4,
        }
        setting = fitnets(folder, lora=lora, **changes)
        trainer = build_trainer(methods.load("fitnets"), setting)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    straight = run(tmp_path / "a")
    checkpoint = tmp_path / "a/checkpoints/checkpoint-2"
    assert PROJECTIONS in (checkpoint / "manifest.json").read_text()
    resumed = run(tmp_path / "b", str(checkpoint))
    names = dict(straight.model.named_parameters())
    assert any(MODULE in name for name in names)
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, names[name]), name


def test_the_saved_model_has_no_projections_and_the_training_one_keeps_them(tmp_path):
    setting = fitnets(tmp_path)
    trainer = train(setting)[1]
    trainer.save_model(str(tmp_path / "final"))
    saved = load_file(tmp_path / "final/model.safetensors")
    assert not [name for name in saved if MODULE in name]
    assert not (tmp_path / "final" / PROJECTIONS).exists()
    assert trainer.model.get_submodule(MODULE) is trainer.projections
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "final", output_loading_info=True
    )
    assert not report["unexpected_keys"]
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, own(trainer)[name]), name


# --- refusals


def check(setting, student_config=None, **forms):
    def source(config):
        return ModelSource("m", "m", None, config, "f")

    loaded = Loaded(
        student=source(student_config or setting.student.config),
        teacher=source(setting.teacher.model.config),
        student_form=forms.get("student_form", setting.form),
        teacher_form=forms.get("teacher_form", setting.teacher.form),
        train_prompts=PROMPTS,
        validation_prompts=PROMPTS,
        reports=[],
    )
    methods.load("fitnets").check(setting.arguments, loaded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_mapping": {1: 5}}, "there is no teacher layer 5; the teacher's layers are 1 to 4"),
        ({"layer_mapping": {3: 4}}, "there is no student layer 3; the student's layers are 1 to 2"),
        ({"num_layer_pairs": 3}, "must lie between 1 and 2"),
        ({"use_projections": False}, "the student's are 32 wide, the teacher's 64"),
    ],
)
def test_what_the_pair_does_not_have_is_refused(tmp_path, changes, message):
    setting = fitnets(tmp_path, student=make_narrow(), **changes)
    with pytest.raises(UserError, match=message):
        check(setting)


def test_what_the_pair_has_is_not_refused(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "medistill_trl"):
        check(fitnets(tmp_path, use_projections=False, feature_tokens="all"))
        check(fitnets(tmp_path, student=make_narrow(), use_projections=False, feature_loss="cka"))
    said = [record.getMessage() for record in caplog.records if "hidden states" in record.msg]
    assert len(said) == 2
    assert all("layer 1 ← teacher layer 2, student layer 2 ← teacher layer 4" in s for s in said)


def test_all_tokens_need_the_same_prompts(tmp_path):
    setting = fitnets(tmp_path, feature_tokens="all")
    with pytest.raises(UserError, match="asked in different formats"):
        check(setting, teacher_form=make_form(chat=False))
