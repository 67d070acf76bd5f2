"""SFT on what the teacher writes: the estimator, the accumulation, the movement."""

import copy
from functools import partial

import pytest
import tiny_setting
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from tiny_setting import PROMPTS, logged, make_form, train, weights

from medistill_trl import methods
from medistill_trl.errors import RunFailed
from medistill_trl.guards import FiniteGuard
from medistill_trl.pipeline import build_trainer
from medistill_trl.run_record import teacher_use
from medistill_trl.teacher import DRAWS_PER_STEP, draw_seed

make_setting = partial(tiny_setting.make_setting, method="sft")


def trained(folder, **changes):
    return train(make_setting(folder, **changes))


def test_the_loss_falls_the_student_moves_and_the_teacher_does_not(tmp_path):
    setting = make_setting(tmp_path, max_steps=20, learning_rate=0.5)
    teacher_before = copy.deepcopy(setting.teacher.model.state_dict())
    before = weights(setting).clone()
    trainer = methods.load("sft").build(setting)
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0] - 0.5
    assert not torch.equal(weights(setting), before)
    for name, value in setting.teacher.model.state_dict().items():
        assert torch.equal(value, teacher_before[name]), name
    assert all(p.grad is None for p in setting.teacher.model.parameters())


def test_the_first_loss_is_the_cross_entropy_of_the_teachers_tokens(tmp_path):
    """By the plain formula, over the window's completion tokens and their EOS."""
    setting, trainer, before = trained(
        tmp_path, max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=1
    )
    student = make_model(len(setting.form.tokenizer), layers=2)
    student.load_state_dict(before)
    total, tokens = 0.0, 0
    for prompt in PROMPTS:
        text = setting.form.render(prompt.question)
        completion = setting.teacher.complete([text], setting.sampling)[0]
        ids = setting.form.encode(text)
        # The student's own tokens of the teacher's text.
        target = setting.form.tokenizer(completion.text, add_special_tokens=False)["input_ids"]
        target += [setting.form.tokenizer.eos_token_id] * completion.finished
        logits = student(torch.tensor([ids + target])).logits[0].log_softmax(-1)
        for t, token in enumerate(target):
            total -= logits[len(ids) + t - 1, token].item()
            tokens += 1
    assert logged(trainer)[0] == pytest.approx(total / tokens, rel=1e-3)
    assert setting.totals.trained == tokens


def test_the_loss_is_trls_own_in_value_gradient_and_log(tmp_path):
    """With chunks of a few tokens, so that there are several."""
    runs = {}
    for own in (True, False):
        changes = {"max_steps": 3, "learning_rate": 0.5, "loss_chunk_size": 5}
        trainer = methods.load("sft").build(make_setting(tmp_path / f"{own}", **changes))
        assert trainer.own_loss
        trainer.own_loss = own
        trainer.train()
        runs[own] = trainer
    ours, trls = ([e for e in t.state.log_history if "loss" in e] for t in runs.values())
    for mine, other in zip(ours, trls, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert mine["ce_nats"] == pytest.approx(other["loss"], rel=1e-4)
    # TRL's are means of the micro-batches' means: alike where one step has one micro-batch.
    one = {"max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    for own in (True, False):
        trainer = methods.load("sft").build(make_setting(tmp_path / f"one_{own}", **one))
        trainer.own_loss = own
        trainer.train()
        runs[own] = next(e for e in trainer.state.log_history if "loss" in e)
    assert runs[True]["mean_token_accuracy"] == pytest.approx(runs[False]["mean_token_accuracy"])
    assert runs[True]["student_entropy_nats"] == pytest.approx(runs[False]["entropy"], rel=1e-4)


def test_the_evaluation_is_trls_own_too(tmp_path):
    found = {}
    for own in (True, False):
        trainer = methods.load("sft").build(make_setting(tmp_path / f"{own}", loss_chunk_size=5))
        trainer.own_loss = own
        found[own] = trainer.evaluate()
    mine, trls = found[True], found[False]
    for name, theirs in {
        "loss": "loss",
        "ce_nats": "loss",
        "student_entropy_nats": "entropy",
    }.items():
        assert mine[f"eval_{name}"] == pytest.approx(trls[f"eval_{theirs}"], rel=1e-4)
    assert mine["eval_mean_token_accuracy"] == pytest.approx(trls["eval_mean_token_accuracy"])
    assert "eval_num_tokens" not in mine  # TRL counts what its own loss sees in training: nothing


def test_another_loss_of_trl_is_trls(tmp_path):
    """DFT weighs each token by its probability, so its loss is another one."""
    first = {}
    for kind in ("chunked_nll", "nll", "dft"):
        _, trainer, _ = trained(tmp_path / kind, max_steps=1, loss_type=kind)
        first[kind] = logged(trainer)[0]
    assert first["nll"] == pytest.approx(first["chunked_nll"], rel=1e-5)
    assert first["dft"] < first["nll"] / 2


@pytest.mark.parametrize("mode", ["online", "stored"])
def test_accumulating_one_by_eight_is_eight_by_one(tmp_path, mode):
    """Same gradients: after one SGD step the weights agree to float tolerance."""
    after = {}
    for rows, steps in ((1, 8), (2, 4), (8, 1)):
        setting, trainer, _ = trained(
            tmp_path / f"{rows}",
            max_steps=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
            learning_rate=1.0,
            teacher={"teacher_completions": mode},
        )
        after[rows] = weights(setting), logged(trainer)[0]
    for rows in (1, 2):
        torch.testing.assert_close(after[rows][0], after[8][0], rtol=1e-4, atol=1e-6)
        assert after[rows][1] == pytest.approx(after[8][1], rel=1e-4)


def test_online_and_stored_train_alike_when_greedy(tmp_path):
    runs = {
        mode: trained(tmp_path / mode, max_steps=4, teacher={"teacher_completions": mode})
        for mode in ("online", "stored")
    }
    torch.testing.assert_close(weights(runs["online"][0]), weights(runs["stored"][0]))
    assert logged(runs["online"][1]) == pytest.approx(logged(runs["stored"][1]), rel=1e-5)


def test_online_answers_a_whole_window_in_one_batch(tmp_path, monkeypatch):
    setting = make_setting(tmp_path, max_steps=2)
    sizes = []
    original = setting.teacher.complete

    def spy(prompts, sampling, seed=0):
        sizes.append(len(prompts))
        return original(prompts, sampling, seed)

    monkeypatch.setattr(setting.teacher, "complete", spy)
    methods.load("sft").build(setting).train()
    assert sizes == [4, 4]


def test_stored_asks_the_teacher_nothing_the_second_time(tmp_path):
    stored = {"teacher_completions": "stored"}
    first, _, _ = trained(tmp_path, teacher=stored)
    assert first.totals.generated_teacher > 0
    second, _, _ = trained(tmp_path, teacher=stored)
    assert second.totals.generated_teacher == second.teacher.generated_tokens == 0
    assert torch.equal(weights(first), weights(second))
    # Both have used the same, and it took someone some time.
    used = [teacher_use(run.totals, run.used.values()) for run in (first, second)]
    assert used[0] == used[1]
    assert used[0]["tokens"] >= first.totals.generated_teacher  # two prompts are held out too
    assert used[0]["stored_seconds"] > 0
    online, _, _ = trained(tmp_path, teacher={"teacher_completions": "online"})
    assert teacher_use(online.totals, online.used.values()) == {
        "tokens": online.totals.generated_teacher,
        "stored_seconds": 0,
    }


def test_no_two_draws_share_a_seed():
    """Over steps, parts of a window and processes."""
    seeds = {
        draw_seed(7, step, rank, 2) + start
        for rank in range(2)
        for step in range(3)
        for start in (0, 4, DRAWS_PER_STEP - 1)
    }
    assert len(seeds) == 2 * 3 * 3


def test_another_run_seed_is_another_draw():
    """Also for torch's CPU generator, which sees the low 32 bits only."""
    draws = set()
    for seed in (42, 43, 44):
        torch.manual_seed(draw_seed(seed, 0, 0, 1))
        draws.add(torch.rand(()).item())
    assert len(draws) == 3


def test_a_bfloat16_adapter_is_resumed_in_bfloat16_bit_for_bit(tmp_path):
    """As TRL trains the adapter of a quantised student; PEFT would load it as float32."""

    def run(folder, checkpoint=None):
        changes = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
        setting = make_setting(folder, max_steps=4, learning_rate=0.05, **changes)
        adapter = LoraConfig("CAUSAL_LM", r=4, target_modules="all-linear")
        setting.student = get_peft_model(setting.student, adapter)
        for parameter in setting.student.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        trainer = build_trainer(methods.load("sft"), setting)
        trainer.train(resume_from_checkpoint=checkpoint)
        return [p for p in setting.student.parameters() if p.requires_grad]

    straight = run(tmp_path / "a")
    resumed = run(tmp_path / "b", str(tmp_path / "a/checkpoints/checkpoint-2"))
    assert {p.dtype for p in resumed} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_teacher_batch_size_splits_a_window_and_changes_nothing(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole", max_steps=1)[0]
    setting = make_setting(tmp_path / "split", max_steps=1, teacher={"teacher_batch_size": 3})
    sizes = []
    original = setting.teacher.complete
    monkeypatch.setattr(
        setting.teacher, "complete", lambda p, *a: sizes.append(len(p)) or original(p, *a)
    )
    methods.load("sft").build(setting).train()
    assert sizes == [3, 1]
    torch.testing.assert_close(weights(setting), weights(whole))


def test_sampled_online_completions_change_from_step_to_step(tmp_path):
    setting = make_setting(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        teacher={"teacher_temperature": 1.0},
    )
    trainer = methods.load("sft").build(setting)
    windows = []
    original = trainer._write_completions
    trainer._write_completions = lambda batches: windows.append(original(batches)) or windows[-1]
    trainer.train()
    assert {tuple(r.tolist()) for r in windows[0][0]["labels"]} != {
        tuple(r.tolist()) for r in windows[1][0]["labels"]
    }


def test_several_samples_per_prompt_are_all_trained_on(tmp_path):
    setting = make_setting(
        tmp_path,
        num_completions=3,
        teacher={"teacher_completions": "stored", "teacher_temperature": 1.0},
    )
    assert len(methods.load("sft").build(setting).train_dataset) == 3 * len(PROMPTS)


def test_the_two_tokenizers_may_differ(tmp_path):
    """A base teacher with its own tokenizer and no chat template; the student learns its text."""
    setting, trainer, _ = trained(tmp_path, teacher_form=make_form(vocab_size=450, chat=False))
    assert all(loss > 0 for loss in logged(trainer))
    batch = trainer._write_completions([[trainer.train_dataset[0]]])[0]
    labels = [token for token in batch["labels"][0].tolist() if token >= 0]
    prompt = trainer.train_dataset[0]["teacher_prompt"]
    completion = setting.teacher.complete([prompt], setting.sampling)[0]
    decoded = setting.form.tokenizer.decode(labels, skip_special_tokens=True)
    assert decoded == completion.text


def test_evaluation_reports_a_loss(tmp_path):
    _, trainer, _ = trained(tmp_path, eval_strategy="steps", eval_steps=1)
    assert all("eval_loss" in e for e in trainer.state.log_history if "eval_runtime" in e)
    assert sum("eval_loss" in e for e in trainer.state.log_history) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(tmp_path, value):
    setting = make_setting(tmp_path, max_steps=3)
    trainer = methods.load("sft").build(setting)
    trainer.add_callback(FiniteGuard(trainer))
    original = trainer.compute_loss

    def broken(model, inputs, **kwargs):
        loss = original(model, inputs, **kwargs)
        bad = trainer.state.global_step == 1
        factor = torch.tensor(value if bad else 1.0)
        return (loss[0] * factor, loss[1]) if isinstance(loss, tuple) else loss * factor

    trainer.compute_loss = broken
    steps = []
    optimizer_step = torch.optim.SGD.step
    torch.optim.SGD.step = lambda self, *a, **k: steps.append(1) or optimizer_step(self, *a, **k)
    try:
        with pytest.raises(RunFailed, match="step 2: the loss is"):
            trainer.train()
    finally:
        torch.optim.SGD.step = optimizer_step
    assert len(steps) == 1
    assert torch.isfinite(weights(setting)).all()
