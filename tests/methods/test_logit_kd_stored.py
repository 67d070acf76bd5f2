"""Logit-KD from stored teacher logits: the same training as online, without the teacher."""

import copy
import weakref

import pytest
import tiny_setting
import torch
from conftest import make_model
from tiny_setting import ONE_STEP, logged, make_form, train, weights

from medistill_trl import methods, recipe
from medistill_trl.errors import UserError
from medistill_trl.on_demand_teacher import OnDemandTeacher
from medistill_trl.recipe import RecipeError

STORED = {"teacher_completions": "stored"}
EMBEDDED = ["recipes/overlays/embedded.yaml", "--teacher_completions", "stored"]
NAMES = ("loss", "kl_nats", "ce_nats", "divergence_nats", "top1", "teacher_entropy_nats")


def make_setting(folder, teacher_logits="stored", extra_rows=0, teacher_chat=True, **training):
    """A teacher whose head may have more rows than the student's, as Meditron's has."""
    teacher_form = make_form(chat=teacher_chat)
    return tiny_setting.make_setting(
        folder,
        "logit_kd",
        teacher_form=teacher_form,
        teacher_model=make_model(len(teacher_form.tokenizer) + extra_rows, seed=1),
        teacher=STORED,
        teacher_logits=teacher_logits,
        **training,
    )


def trained(folder, *args, **changes):
    return train(make_setting(folder, *args, **changes))


def no_forward(*_):
    raise AssertionError("the teacher was asked")


@pytest.mark.parametrize(
    ("pair", "temperature"), [({}, 1.0), ({"extra_rows": 7}, 2.0), ({"teacher_chat": False}, 2.0)]
)
def test_with_the_whole_vocabulary_kept_it_trains_as_online(tmp_path, pair, temperature):
    """Also with rows only the teacher has, and where stop strings close completions for the student."""
    options = {**pair, "kd_temperature": temperature, "max_steps": 4}
    setting, trainer, _ = trained(tmp_path / "s", teacher_logits_top_k=10**6, **options)
    online, expected, _ = trained(tmp_path / "o", "online", **options)
    for name in NAMES:
        # What is kept is rounded, see teacher_logits.
        assert logged(trainer, name) == pytest.approx(logged(expected, name), rel=1e-4), name
    torch.testing.assert_close(weights(setting), weights(online), rtol=1e-3, atol=1e-5)
    assert setting.totals.trained == online.totals.trained


def test_with_few_tokens_kept_the_divergence_is_a_little_less(tmp_path):
    """Random models of 600 tokens: of the divergence 64 tokens and their tail keep a stated part."""
    expected = logged(trained(tmp_path / "o", "online", **ONE_STEP)[1], "divergence_nats")[0]
    found = {}
    for top_k in (8, 64, 300):
        trainer = trained(tmp_path / f"{top_k}", teacher_logits_top_k=top_k, **ONE_STEP)[1]
        found[top_k] = logged(trainer, "divergence_nats")[0] / expected
        assert 0 < logged(trainer, "teacher_tail_mass")[0] < 1
    assert 0 < found[8] < found[64] < found[300] <= 1
    assert found[300] > 0.7


def test_the_second_run_and_the_second_epoch_need_no_teacher(tmp_path):
    first, _, _ = trained(tmp_path, max_steps=6)  # three epochs of two steps
    setting = make_setting(tmp_path, max_steps=6)
    setting.teacher.model.get_decoder().register_forward_pre_hook(no_forward)
    train(setting)
    assert torch.equal(weights(first), weights(setting))
    assert setting.totals.generated_teacher == 0
    # Another temperature is another tail: now it is asked.
    again = make_setting(tmp_path, kd_temperature=3.0)
    again.teacher.model.get_decoder().register_forward_pre_hook(no_forward)
    with pytest.raises(AssertionError, match="the teacher was asked"):
        train(again)


def test_accumulating_one_by_eight_is_eight_by_one(tmp_path):
    after = {}
    for rows, steps in ((1, 8), (8, 1)):
        setting, trainer, _ = trained(
            tmp_path,
            teacher_logits_top_k=16,
            max_steps=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
            learning_rate=1.0,
        )
        after[rows] = weights(setting), logged(trainer)[0], logged(trainer, "kl_nats")[0]
    torch.testing.assert_close(after[1][0], after[8][0], rtol=1e-4, atol=1e-6)
    assert after[1][1:] == pytest.approx(after[8][1:], rel=1e-4)


def test_the_student_comes_closer_and_is_evaluated(tmp_path):
    changes = {"max_steps": 30, "learning_rate": 0.5, "alpha": 1.0, "divergence": "reverse_kl"}
    setting, trainer, _ = trained(tmp_path, eval_strategy="steps", eval_steps=15, **changes)
    assert logged(trainer, "kl_nats")[-1] < 0.8 * logged(trainer, "kl_nats")[0]
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) == 2
    assert {"eval_kl_nats", "eval_top1", "eval_teacher_tail_mass"} <= set(found[0])
    assert all(p.grad is None for p in setting.teacher.model.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_the_heldout_check_says_the_same_without_the_teacher(tmp_path, autocast):
    online = make_setting(tmp_path, extra_rows=7, teacher_chat=False).heldout
    online.autocast = autocast
    student = make_model(len(online.student_form.tokenizer), layers=2, seed=4)
    expected = online.records(online.compare(student))
    for loads in (1, 0):
        setting = make_setting(tmp_path, extra_rows=7, teacher_chat=False)
        check, loaded = setting.heldout, []

        def load(loaded=loaded, model=setting.teacher.model):
            loaded.append(model)
            return model

        form = setting.teacher.form
        check.teacher = OnDemandTeacher(load, form.tokenizer, form, setting.teacher.identity)
        check.autocast = autocast
        check.keep_states(tmp_path / "heldout", torch.device("cpu"))
        check.teacher.release()
        found = check.records(check.compare(student))
        assert len(loaded) == loads
        assert [row["agreed"] for row in found] == [row["agreed"] for row in expected]
        for got, want in zip(found, expected, strict=True):
            assert got["kl_nats"] == pytest.approx(want["kl_nats"], rel=1e-5)
            assert got["kl_nats"] > 0
    kept = next((tmp_path / "heldout").glob("*.safetensors"))
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(UserError, match="remove it, and the teacher reads the held-out"):
        check.keep_states(tmp_path / "heldout", torch.device("cpu"))


def test_a_teacher_on_demand_is_loaded_once_and_let_go_of(tmp_path):
    setting = make_setting(tmp_path)
    model, form, count = setting.teacher.model, setting.teacher.form, []
    teacher = OnDemandTeacher(
        lambda: count.append(1) or copy.deepcopy(model), form.tokenizer, form, "t"
    )
    setting.teacher = setting.heldout.teacher = teacher
    held = weakref.ref(teacher.model)
    trainer = methods.load("logit_kd").build(setting)
    assert len(count) == 1
    assert held() is not None
    teacher.release()
    assert held() is None
    trainer.train()
    assert len(count) == 1


# --- what makes no sense


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("logit_kd", ["--teacher_completions", "online"], "needs teacher_completions: stored"),
        ("logit_kd", ["--lmbda", "0.5"], "lmbda: must be 0 with teacher_logits: stored"),
        (
            "logit_kd",
            ["--teacher_sharding", "sharded"],
            "teacher_sharding: must be replicated with teacher_logits: stored",
        ),
        (
            "logit_kd",
            ["--teacher_logits_top_k", "0"],
            "teacher_logits_top_k: must be at least 1, got 0",
        ),
        ("adakd", [], "teacher_logits: must be online with this method: each token has a temp"),
        ("sft", [], "teacher_logits: a key of logit_kd; leave"),
        ("fitnets", [], "teacher_logits: a key of logit_kd; leave"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(method, flags, message):
    with pytest.raises(RecipeError) as refused:
        recipe.load([f"recipes/{method}.yaml", *EMBEDDED, *flags, "--teacher_logits", "stored"])
    assert message in str(refused.value)


def test_different_tokenizers_are_refused(tmp_path):
    setting = tiny_setting.make_setting(
        tmp_path,
        "logit_kd",
        teacher_form=make_form(vocab_size=450),
        teacher=STORED,
        teacher_logits="stored",
    )
    with pytest.raises(UserError, match="set teacher_logits: online, which compares spans"):
        tiny_setting.check(setting)
