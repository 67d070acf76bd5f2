"""NaN and infinity stop a run before the weights, and what they came from is kept; numbers that get worse are noticed."""

import json
import math

import pytest
import tiny_setting
import torch
from tiny_setting import PROMPTS, make_setting

from medistill_trl import methods
from medistill_trl.arguments import RunArguments
from medistill_trl.divergence import DivergenceWatch
from medistill_trl.errors import NonFinite, RunFailed
from medistill_trl.guards import kept_for_a_look
from medistill_trl.heldout import Sums
from medistill_trl.pipeline import build_trainer
from medistill_trl.rewards import TeacherReward
from medistill_trl.rollouts import Sample
from medistill_trl.teacher import Completion, Sampling

STUDENTS = {"max_completion_length": 4, "data": {"max_prompt_tokens": 100}}
OPTIONS = {
    "spin": {
        "teacher": {"teacher_completions": "stored"},
        "data": {"max_prompt_tokens": 100},
        "max_length": 200,
        "max_steps": -1,
    },
    "on_policy": {**STUDENTS, "num_generations": 2, "baseline": "none"},
    "ppo": {**STUDENTS, "kl_coef": 0.0},
    "bond": {**STUDENTS, "num_samples": 2},
}


def break_model(model):
    """NaN in one weight of the last layer."""
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[0, 0] = math.nan


def run(setting, trainer):
    with kept_for_a_look(setting.run_directory.results):
        trainer.train()


def kept(setting):
    return json.loads((setting.run_directory.results / "nonfinite_0.json").read_text())["rows"]


@pytest.mark.parametrize("method", ["sft", "logit_kd", "adakd", "fitnets", "attention", "spin"])
def test_a_student_that_breaks_in_training_is_stopped_whatever_the_method(tmp_path, method):
    setting = make_setting(tmp_path, method, **OPTIONS.get(method, {}))
    trainer = build_trainer(methods.load(method), setting)
    collected = trainer.get_batch_samples

    def break_after_collecting(*args):
        window = collected(*args)
        break_model(setting.student)
        return window

    trainer.get_batch_samples = break_after_collecting
    with pytest.raises(RunFailed, match="step 1: the loss is nan") as caught:
        run(setting, trainer)
    assert (
        "the student's logits on it are not finite, the teacher's logits on it are finite"
        in str(caught.value)
    )
    assert "nonfinite_0.json" in str(caught.value)
    rows = kept(setting)
    assert rows[0]["micro_batch"] == 0
    assert "What causes condition number" in rows[0]["text"]
    decoded = setting.form.tokenizer.decode(rows[0]["input_ids"])
    assert rows[0]["text"] == decoded


@pytest.mark.parametrize("method", ["on_policy", "ppo", "bond"])
def test_rewards_of_a_broken_teacher_stop_the_run(tmp_path, method):
    setting = make_setting(tmp_path, method, **OPTIONS[method])
    trainer = build_trainer(methods.load(method), setting)
    break_model(setting.teacher.model)
    with pytest.raises(RunFailed, match=r"the rewards .* are NaN or infinite"):
        run(setting, trainer)
    assert kept(setting)[0]["reward"] == "nan"
    assert kept(setting)[0]["question"].startswith("What causes")


def test_only_the_micro_batch_that_broke_is_kept(tmp_path):
    setting = make_setting(tmp_path, "sft")
    trainer = build_trainer(methods.load("sft"), setting)
    original, seen = trainer.compute_loss, []

    def broken(model, inputs, **kwargs):
        loss = original(model, inputs, **kwargs)
        seen.append(inputs["input_ids"])
        return loss * (math.inf if len(seen) == 4 else 1.0)

    trainer.compute_loss = broken
    with pytest.raises(RunFailed, match="step 2: the loss is inf") as caught:
        run(setting, trainer)
    assert "the student's logits on it are finite, the teacher's logits on it are finite" in str(
        caught.value
    )
    rows = kept(setting)
    assert [row["micro_batch"] for row in rows] == [1, 1]
    assert rows[0]["input_ids"] == [t for t in seen[3][0].tolist() if t in rows[0]["input_ids"]]
    assert torch.isfinite(tiny_setting.weights(setting)).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_teacher_that_writes_from_nan_is_not_believed(tmp_path, temperature):
    teacher = make_setting(tmp_path, "sft").teacher
    break_model(teacher.model)
    prompts = [teacher.form.render(prompt.question) for prompt in PROMPTS[:2]]
    with pytest.raises(NonFinite, match="on 2 of 2 prompts") as caught:
        teacher.complete(prompts, Sampling(4, temperature))
    assert [row["prompt"] for row in caught.value.rows] == prompts


def test_no_measurement_that_is_not_finite_is_reported(tmp_path):
    check = make_setting(tmp_path, "sft").heldout
    with pytest.raises(RunFailed, match="held-out check's KL or cross-entropy is nan"):
        check.summary([Sums(kl=1.0, ce=math.nan, tokens=3)])


def test_one_reward_that_is_not_finite_names_its_sample(tmp_path):
    setting = make_setting(tmp_path, "on_policy", **OPTIONS["on_policy"])
    reward = TeacherReward(setting.teacher, setting.heldout.shared, "token_kl")
    samples = [Sample(p.question, Completion("a", [5, 6], True)) for p in PROMPTS[:2]]
    fine, bad = torch.zeros(2), torch.tensor([0.0, math.nan])
    assert reward(samples, [fine, fine]).scores_B.isfinite().all()
    with pytest.raises(NonFinite, match="1 of 2 samples") as caught:
        reward(samples, [fine, bad])
    assert [row["question"] for row in caught.value.rows] == [PROMPTS[1].question]


# --- divergence


class State:
    """As much of a trainer's state as the watch reads."""

    def __init__(self, log):
        self.log_history, self.global_step = log, 0


def watch(entries, loss_counts=True, action="stop", before=0, **run):
    """What the watch says of a log whose first `before` entries are an earlier launch's."""
    given = {"divergence_window": 3, "divergence_factor": 3.0, **run}
    watching = DivergenceWatch(RunArguments("sft", divergence_action=action, **given), loss_counts)
    state = State(list(entries[:before]))
    watching.on_train_begin(None, state, None)
    for entry in entries[before:]:
        state.log_history.append({"step": len(state.log_history) + 1, **entry})
        state.global_step = len(state.log_history)
        watching.on_log(None, state, None)


def log_of(name, values, **more):
    return [{name: value, **more} for value in values]


FALLS_THEN_SOARS = [3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0]


@pytest.mark.parametrize("name", ["loss", "kl_to_teacher_nats"])
def test_a_number_that_soars_stops_the_run_once_its_mean_does(name):
    with pytest.raises(RunFailed, match=rf"step 7: {name} is 3.67, .* was 1 at step 5"):
        watch(log_of(name, FALLS_THEN_SOARS))
    watch(log_of(name, FALLS_THEN_SOARS), divergence_factor=10.0)
    watch(log_of(name, [*FALLS_THEN_SOARS[:6], 5.0]))  # one bad batch is no divergence


def test_a_reward_that_falls_by_more_than_its_spread_stops_the_run():
    rewards = [-3.0, -2.0, -1.0, -1.0, -1.0, -4.0, -4.0, -6.0]
    with pytest.raises(RunFailed, match=r"reward_mean is -4\.67"):
        watch(log_of("reward_mean", rewards, reward_std=1.0))
    watch(log_of("reward_mean", rewards, reward_std=2.0))


def test_each_heldout_check_counts_by_itself():
    with pytest.raises(RunFailed, match="heldout_kl_nats is 7"):
        watch(log_of("heldout_kl_nats", [2.0, 7.0]))


def test_a_loss_that_says_nothing_and_one_below_zero_are_not_judged():
    watch(log_of("loss", FALLS_THEN_SOARS), loss_counts=False)
    watch(log_of("loss", [-1.0, -2.0, -3.0, 5.0, 9.0, 9.0, 9.0]))
    falls = {name: methods.load(name).loss_falls for name in ("sft", "cot", "spin", "ppo", "bond")}
    assert falls == {"sft": True, "cot": True, "spin": False, "ppo": False, "bond": False}


def test_a_warning_comes_once_and_a_resumed_run_remembers(caplog):
    entries = log_of("loss", [*FALLS_THEN_SOARS, 9.0, 9.0])
    watch(entries, action="warn")
    assert len(caplog.records) == 1
    assert "divergence_action: stop ends such a run" in caplog.text
    watch(entries, action="none")
    watch(entries, action="warn", before=8)
    assert len(caplog.records) == 1
    with pytest.raises(RunFailed, match="step 7"):
        watch(entries, before=6)
