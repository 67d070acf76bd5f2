"""SPIN's training: reference, pairs, loss and iterations."""

import copy
import itertools
import json
import math

import pytest
import torch
from conftest import make_model
from peft import PeftModel
from spin_runs import (
    FORM,
    ONE_STEP,
    answers,
    make_setting,
    make_trainer,
    policy,
    records,
    same,
    trained,
)
from tiny_setting import PROMPTS, logged, make_form
from transformers import TrainerCallback

from medistill_trl import methods
from medistill_trl.methods.spin import trainer as spin_trainer
from medistill_trl.pipeline import build_trainer


class Watch(TrainerCallback):
    """Reference at the start of each step, policy at its end."""

    def __init__(self, trainer):
        self.trainer, self.references, self.policies = trainer, [], [policy(trainer)]

    def on_step_begin(self, *args, **kwargs):
        self.references.append([w.clone() for w in self.trainer.previous.weights()])

    def on_step_end(self, *args, **kwargs):
        self.policies.append(policy(self.trainer))


# --- reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False])
def test_the_reference_is_bitwise_the_policy_the_iteration_began_with(tmp_path, lora):
    trainer = make_trainer(tmp_path, lora=lora)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    spans = trainer.schedule.spans
    assert [len(span) for span in spans] == [2, 2, 2]
    for span in spans:
        for step in span:
            assert same(watch.references[step], watch.policies[span.start]), step
    starts = [watch.policies[span.start] for span in spans] + [watch.policies[-1]]
    assert not any(same(a, b) for a, b in itertools.pairwise(starts))
    assert not any(w.requires_grad for w in trainer.previous.weights())
    # Seen through the loss: log 2 where an iteration begins, and only there.
    margins = logged(trainer, "rewards/margins")
    assert [margin == 0 for margin in margins] == [True, False] * 3
    assert logged(trainer)[::2] == pytest.approx([math.log(2)] * 3)


def test_the_base_weights_stay_and_the_adapter_in_use_is_the_students(tmp_path):
    setting = make_setting(tmp_path)
    before = copy.deepcopy(setting.student.state_dict())
    build_trainer(methods.load("spin"), setting).train()
    after = setting.student.state_dict()
    for name, value in before.items():
        assert torch.equal(value, after[name]) != (".lora_" in name), name
    assert setting.student.active_adapters == ["default"]
    assert {p for n, p in setting.student.named_parameters() if p.requires_grad} == {
        p for n, p in setting.student.named_parameters() if ".default." in n
    }


def test_checkpoints_hold_the_reference_and_the_final_model_does_not(tmp_path):
    trainer = trained(tmp_path, save_strategy="steps", save_steps=2)
    assert (tmp_path / "checkpoints/checkpoint-2/ref/adapter_model.safetensors").is_file()
    trainer.save_model(str(tmp_path / "final_model"))
    assert not (tmp_path / "final_model/ref").exists()
    base = make_model(len(FORM.tokenizer), layers=2, seed=2)
    loaded = PeftModel.from_pretrained(base, tmp_path / "final_model")
    weights = [p for n, p in loaded.named_parameters() if ".lora_" in n]
    assert same([w.data for w in weights], policy(trainer))


# --- the loss --------------------------------------------------------------------------------------


def plain_log_prob(model, prompt_ids, completion_ids):
    logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0].log_softmax(-1)
    start = len(prompt_ids) - 1
    return sum(logits[start + t, token].item() for t, token in enumerate(completion_ids))


@pytest.mark.parametrize("lora", [True, False])
def test_without_a_reference_the_first_loss_is_the_reports_formula(tmp_path, lora):
    trainer = make_trainer(tmp_path, lora=lora, reference="none", **ONE_STEP)
    start = copy.deepcopy(trainer.model).eval()
    trainer.train()
    assert not any(".ref." in name for name, _ in trainer.model.named_parameters())
    total = 0.0
    for pair in trainer._pairs[0]:
        margin = plain_log_prob(start, pair.prompt_ids, pair.chosen_ids)
        margin -= plain_log_prob(start, pair.prompt_ids, pair.rejected_ids)
        total += math.log1p(math.exp(-0.1 * margin))
    assert logged(trainer) == pytest.approx([total / len(PROMPTS)], rel=1e-4)


def test_the_second_loss_is_the_formula_with_the_reference(tmp_path):
    settings = ONE_STEP | {
        "epochs_per_iteration": 2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
    }
    trainer = make_trainer(tmp_path, lora=False, learning_rate=0.1, **settings)
    start = copy.deepcopy(trainer.model).eval()
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    middle = copy.deepcopy(start)
    for parameter, value in zip(middle.parameters(), watch.policies[1], strict=True):
        parameter.data = value
    total = 0.0
    for pair in trainer._pairs[0]:
        margin = 0.0
        for sign, ids in ((1, pair.chosen_ids), (-1, pair.rejected_ids)):
            margin += sign * plain_log_prob(middle, pair.prompt_ids, ids)
            margin -= sign * plain_log_prob(start, pair.prompt_ids, ids)
        total += math.log1p(math.exp(-0.1 * margin))
    assert total / len(PROMPTS) < math.log(2)
    assert logged(trainer)[1] == pytest.approx(total / len(PROMPTS), rel=1e-4)


def test_accumulating_one_by_eight_is_eight_by_one(tmp_path):
    after = {}
    for rows, steps in ((1, 8), (2, 4), (8, 1)):
        changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        trainer = trained(
            tmp_path / f"{rows}",
            lora=False,
            reference="none",
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            **ONE_STEP | changes,
        )
        after[rows] = torch.cat([w.flatten() for w in policy(trainer)]), logged(trainer)
    for rows in (1, 2):
        torch.testing.assert_close(after[rows][0], after[8][0], rtol=1e-4, atol=1e-6)
        assert after[rows][1] == pytest.approx(after[8][1], rel=1e-4)


def test_equal_pairs_are_counted_and_left_out_of_loss_and_mean(tmp_path, monkeypatch):
    """Three of eight pairs made equal: the loss is the mean over the other five."""
    original = spin_trainer.complete
    trainer = make_trainer(tmp_path, reference="none", **ONE_STEP)
    teacher = {
        trainer.form.render(p.question): c for p, c in zip(PROMPTS, trainer.chosen, strict=True)
    }
    copied = [trainer.form.render(PROMPTS[n].question) for n in (1, 4, 6)]

    def sometimes_the_teachers(model, form, prompts, sampling, seed):
        own = original(model, form, prompts, sampling, seed)
        return [teacher[p] if p in copied else c for p, c in zip(prompts, own, strict=True)]

    monkeypatch.setattr(spin_trainer, "complete", sometimes_the_teachers)
    start = copy.deepcopy(trainer.model).eval()
    trainer.train()
    total = 0.0
    for pair in (trainer._pairs[0][n] for n in (0, 2, 3, 5, 7)):
        margin = plain_log_prob(start, pair.prompt_ids, pair.chosen_ids)
        margin -= plain_log_prob(start, pair.prompt_ids, pair.rejected_ids)
        total += math.log1p(math.exp(-0.1 * margin))
    assert logged(trainer) == pytest.approx([total / 5], rel=1e-4)
    (record,) = records(tmp_path)
    assert (record["pairs"], record["pairs_with_loss"], record["equal"]) == (8, 5, 3)
    assert record["measured_pairs"] == 5
    counted = sum(trainer._pairs[0][n].num_tokens for n in (0, 2, 3, 5, 7))
    assert trainer.totals.trained == counted


def test_a_student_that_writes_what_the_teacher_writes_has_nothing_to_learn(tmp_path):
    """Teacher and student the same model, greedy: the run ends without moving it."""
    twin = make_model(len(FORM.tokenizer), layers=2, seed=2)
    trainer = make_trainer(
        tmp_path, teacher_model=twin, generation_temperature=0.0, weight_decay=0.0
    )
    before = policy(trainer)
    trainer.train()
    assert same(policy(trainer), before)
    assert [r["equal"] for r in records(tmp_path)] == [8, 8, 8]
    assert records(tmp_path)[0]["margin"] is None
    assert trainer.totals.trained == 0


def test_the_margin_grows_on_the_pairs_trained_on(tmp_path):
    trained(tmp_path, num_iterations=1, epochs_per_iteration=10, learning_rate=1e-2)
    (record,) = records(tmp_path)
    assert record["accuracy"] == 1.0
    assert record["margin"] > 0.5
    assert record["kl_to_start_nats"] > 0.01


# --- iterations ------------------------------------------------------------------------------------


def test_the_student_answers_anew_in_each_iteration(tmp_path):
    """Greedy, so that only the weights can make a difference."""
    trainer = trained(tmp_path, generation_temperature=0.0, learning_rate=2e-2)
    found = [answers(tmp_path, number) for number in range(3)]
    assert all(len(found[n]) == len(PROMPTS) for n in range(3))
    assert found[0] != found[1] != found[2]
    student = trainer.model
    first = make_trainer(tmp_path / "again").model  # the start policy
    for model, number in ((first, 0), (student, None)):
        prompts = [trainer.form.render(p.question) for p in PROMPTS[:3]]
        written = spin_trainer.complete(model, trainer.form, prompts, trainer.sampling)
        expected = [found[number][p.id] for p in PROMPTS[:3]] if number is not None else None
        assert expected is None or [c.text for c in written] == expected


def test_sampled_answers_follow_the_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trained(tmp_path / name, seed=seed, **ONE_STEP)
    assert answers(tmp_path / "a", 0) == answers(tmp_path / "b", 0) != answers(tmp_path / "c", 0)


def test_optimizer_and_learning_rate_start_afresh_in_each_iteration(tmp_path):
    trainer = make_trainer(tmp_path, epochs_per_iteration=2, keep_rounds=2, warmup_steps=1)
    steps = []

    class Count(TrainerCallback):
        def on_optimizer_step(self, *args, optimizer=None, **kwargs):
            states = optimizer.optimizer.state.values()
            steps.append({int(state["step"]) for state in states})

    trainer.add_callback(Count())
    trainer.train()
    assert [len(span) for span in trainer.schedule.spans] == [4, 8, 8]
    assert steps == [{n + 1} for length in (4, 8, 8) for n in range(length)]
    rates = [rate / 3e-3 for rate in logged(trainer, "learning_rate")]
    for start, length in ((0, 4), (4, 8), (12, 8)):
        expected = [0] + [1 - n / (length - 1) for n in range(length - 1)]
        assert rates[start : start + length] == pytest.approx(expected)


def test_with_two_rounds_kept_the_pairs_of_both_are_trained_on(tmp_path):
    trainer = make_trainer(tmp_path, keep_rounds=2)
    seen = []
    original = trainer._collated
    trainer._collated = lambda pairs: seen.append(pairs) or original(pairs)
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            kept.update(trainer._pairs)

    trainer.add_callback(Keep())
    trainer.train()
    third = [pair for batch in seen[4 + 8 :] for pair in batch]  # of 2 pairs each
    assert len(third) == 16
    assert {id(pair) for pair in third} == {id(pair) for n in (1, 2) for pair in kept[n]}


def test_an_iteration_that_ends_below_stop_margin_completes_the_run(tmp_path):
    trainer = trained(
        tmp_path, stop_margin=50.0, save_strategy="steps", save_steps=100, eval_strategy="epoch"
    )
    assert trainer.state.global_step == trainer.state.max_steps == 2
    assert len(records(tmp_path)) == 1
    saved = json.loads((tmp_path / "checkpoints/checkpoint-2/trainer_state.json").read_text())
    assert saved["global_step"] == saved["max_steps"] == 2
    assert [e["step"] for e in trainer.state.log_history if "heldout_ce_nats" in e] == [2]
    assert trained(tmp_path / "not", stop_margin=-50.0).state.global_step == 6


def test_the_held_out_check_runs_at_the_end_of_each_iteration(tmp_path):
    trainer = trained(tmp_path, eval_strategy="epoch", save_strategy="epoch")
    steps = [e["step"] for e in trainer.state.log_history if "heldout_kl_nats" in e]
    assert steps == [2, 4, 6]
    assert {p.name for p in (tmp_path / "checkpoints").glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in steps
    }


def test_the_record_of_each_iteration(tmp_path):
    trainer = trained(tmp_path)
    found = records(tmp_path)
    assert [r["iteration"] for r in found] == [0, 1, 2]
    assert [r["first_step"] for r in found] == [0, 2, 4]
    for r in found:
        assert r["pairs"] == r["measured_pairs"] == 8
        assert 0 < r["rejected_tokens_mean"] <= 10
        assert 0 <= r["accuracy"] <= 1
        assert r["kl_to_start_nats"] > 0
    assert found[2]["kl_to_start_nats"] > found[0]["kl_to_start_nats"]
    history = [e for e in trainer.state.log_history if "spin_margin" in e]
    assert [e["spin_margin"] for e in history] == [r["margin"] for r in found]
    full = trained(tmp_path / "full", lora=False)
    assert [r["kl_to_start_nats"] for r in records(tmp_path / "full")] == [None] * 3
    lines = [
        json.loads(line)
        for number in range(3)
        for line in (tmp_path / f"full/rounds/round-{number}.jsonl").read_text().splitlines()[1:]
    ]
    written = sum(len(line["token_ids"]) + (line["end_id"] is not None) for line in lines)
    assert full.totals.generated_student == written > 0


def test_the_measured_margin_and_kl_are_the_plain_formulas(tmp_path):
    trainer = trained(tmp_path, reference="none", **ONE_STEP)
    (record,) = records(tmp_path)
    model = trainer.model.eval()
    margins, kl, tokens = [], 0.0, 0
    for pair in trainer._pairs[0]:
        margins.append(
            0.1 * plain_log_prob(model, pair.prompt_ids, pair.chosen_ids)
            - 0.1 * plain_log_prob(model, pair.prompt_ids, pair.rejected_ids)
        )
        ids = torch.tensor([pair.prompt_ids + pair.rejected_ids])
        rows = slice(len(pair.prompt_ids) - 1, -1)
        p = model(ids).logits[0, rows].log_softmax(-1)
        with model.disable_adapter():
            q = model(ids).logits[0, rows].log_softmax(-1)
        kl += (p.exp() * (p - q)).sum().item()
        tokens += len(pair.rejected_ids)
    assert record["margin"] == pytest.approx(sum(margins) / 8, rel=1e-4)
    assert record["accuracy"] == sum(m > 0 for m in margins) / 8
    assert record["kl_to_start_nats"] == pytest.approx(kl / tokens, rel=1e-3)


def test_the_two_tokenizers_may_differ(tmp_path):
    trainer = trained(tmp_path, teacher_form=make_form(vocab_size=450, chat=False))
    for pair, completion in zip(trainer._pairs[2], trainer.chosen, strict=True):
        ids = [n for n in pair.chosen_ids if n != trainer.form.tokenizer.eos_token_id]
        assert trainer.form.tokenizer.decode(ids, skip_special_tokens=True) == completion.text
    assert all(math.isfinite(loss) for loss in logged(trainer))


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss_type": ["ipo"]}, "loss_type must be"),
        ({"label_smoothing": 0.1}, "label_smoothing must be 0.0 with spin"),
        ({"disable_dropout": False}, "disable_dropout must be True"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs must be False"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy must be random"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            "follows an evaluation loss",
        ),
    ],
)
def test_options_of_dpo_that_would_be_ignored_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_setting(tmp_path, **wrong)


def test_answers_that_would_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"max_length is 200, less than .* = 150 \+ 51"):
        methods.load("spin").build(make_setting(tmp_path, max_new_tokens=51))


def test_max_steps_ends_the_run_and_too_many_are_the_schedules(tmp_path, caplog):
    assert trained(tmp_path / "short", max_steps=3).state.global_step == 3
    assert [r["steps"] for r in records(tmp_path / "short")] == [2, 1]
    assert trained(tmp_path / "long", max_steps=30).state.global_step == 6
    assert "max_steps: 30: the iterations end after 6 steps" in caplog.text
