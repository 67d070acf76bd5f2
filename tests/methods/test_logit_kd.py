"""Logit-KD and AdaKD: the objective, its normalisation, the completions, the movement."""

import copy

import pytest
import tiny_setting
import torch
from conftest import make_model
from tiny_setting import ONE_STEP, PROMPTS, logged, make_form, train, weights

from medistill_trl import methods
from medistill_trl.methods.adakd import AdaKDConfig, TokenFocus, difficulty_temperatures, hardest
from medistill_trl.pairs import encode_completion_pair
from medistill_trl.prompts import IGNORED
from medistill_trl.teacher import Completion


def make_setting(
    folder, method="logit_kd", extra_rows=0, teacher_chat=True, completions="online", **training
):
    """A teacher whose head and embedding may have more rows than the student's, as Meditron's has."""
    teacher_form = make_form(chat=teacher_chat)
    return tiny_setting.make_setting(
        folder,
        method,
        teacher_form=teacher_form,
        teacher_model=make_model(len(teacher_form.tokenizer) + extra_rows, seed=1),
        teacher={"teacher_completions": completions},
        **{"max_new_tokens": 9, **training},
    )


def trained(folder, method="logit_kd", **changes):
    return train(make_setting(folder, method, **changes))


def plain(setting, state, temperature_of, weight_of_ce=0.5, weight_of_kd=0.5):
    """The formula with whole logits, row by row: loss, CE and KL at T = 1, means over tokens."""
    student = make_model(len(setting.form.tokenizer), layers=2)
    student.load_state_dict(state)
    totals, tokens = torch.zeros(3), 0
    for prompt in PROMPTS:
        asked = setting.teacher.form.render(prompt.question)
        completion = setting.teacher.complete([asked], setting.sampling)[0]
        ids = completion.token_ids + ([completion.end_id] if completion.end_id is not None else [])
        own = setting.form.encode(setting.form.render(prompt.question))
        theirs = setting.teacher.form.encode(asked)
        z_s = student(torch.tensor([own + ids])).logits[0, len(own) - 1 : -1]
        z_t = setting.teacher.model(torch.tensor([theirs + ids])).logits[0, len(theirs) - 1 : -1]
        z_t = z_t[:, : z_s.shape[1]]
        ce = -z_s.log_softmax(-1)[range(len(ids)), ids]
        one = (z_t.softmax(-1) * (z_t.log_softmax(-1) - z_s.log_softmax(-1))).sum(-1)
        t = temperature_of(z_s)[:, None]
        p, q = (z_t / t).log_softmax(-1), (z_s / t).log_softmax(-1)
        kd = t[:, 0] ** 2 * (p.exp() * (p - q)).sum(-1)
        parts = (weight_of_ce * ce + weight_of_kd * kd, ce, one)
        totals += torch.stack([part.sum().detach() for part in parts])
        tokens += len(ids)
    return (totals / tokens).tolist(), tokens


@pytest.mark.parametrize("setup", [{}, {"extra_rows": 7}, {"teacher_chat": False}])
def test_the_first_loss_is_the_formula(tmp_path, setup):
    """Also with rows only the teacher has, and with prompts of different length on the two sides."""
    setting, trainer, before = trained(tmp_path, **ONE_STEP, **setup)
    (loss, ce, kl), tokens = plain(setting, before, lambda z: torch.full((len(z),), 2.0))
    if setup == {"teacher_chat": False}:  # stop strings close some completions for the student
        assert setting.totals.trained >= tokens
    else:
        assert setting.totals.trained == tokens
        assert logged(trainer) == pytest.approx([loss], rel=1e-4)
        assert logged(trainer, "ce_nats") == pytest.approx([ce], rel=1e-4)
        assert logged(trainer, "kl_nats") == pytest.approx([kl], rel=1e-4)


def test_adakd_follows_the_students_confidence(tmp_path):
    bounds = {"base_temperature": 0.02, "min_temperature": 2.0, "max_temperature": 6.0}
    setting, trainer, before = trained(tmp_path, "adakd", **ONE_STEP, **bounds)

    def temperature(z):
        return (0.02 / (z.softmax(-1).amax(-1) + 1e-6)).clamp(2.0, 6.0)

    (loss, _, _), _ = plain(setting, before, temperature)
    assert logged(trainer) == pytest.approx([loss], rel=1e-4)
    low, high = logged(trainer, "temperature_min")[0], logged(trainer, "temperature_max")[0]
    assert 2.0 <= low < logged(trainer, "temperature_mean")[0] < high <= 6.0
    assert 0 <= logged(trainer, "clipped_low_share")[0] <= 1


def test_difficulty_lowers_the_temperature_of_hard_tokens():
    scores = torch.tensor([0.1, 0.2, 0.4])
    found = difficulty_temperatures(scores, base=2.0, strength=0.5, minimum=0.1, maximum=9.0)
    # tanh(log 2) = 0.6: 2·exp(0.3), 2, 2·exp(−0.3)
    assert found.tolist() == pytest.approx([2.6997, 2.0, 1.4816], rel=1e-4)
    assert difficulty_temperatures(scores, 2.0, 0.5, 1.9, 2.1).tolist() == pytest.approx(
        [2.1, 2, 1.9]
    )
    assert torch.isfinite(difficulty_temperatures(torch.zeros(3), 2.0, 0.5, 0.1, 9.0)).all()
    assert hardest(scores, 0.34).tolist() == [0, 0, 1]
    assert hardest(scores, 1.0).tolist() == [1, 1, 1]


def test_difficulty_trains_and_logs_its_temperatures(tmp_path):
    changes = {"temperature_rule": "difficulty", "token_share": 0.5, "base_temperature": 2.0}
    setting, trainer, before = trained(tmp_path, "adakd", **ONE_STEP, **changes)
    low, high = logged(trainer, "temperature_min")[0], logged(trainer, "temperature_max")[0]
    assert 1.0 <= low < 2.0 < high <= 4.0
    (_, ce, _), _ = plain(setting, before, lambda z: torch.ones(len(z)))
    assert logged(trainer)[0] > 0.5 * ce  # the divergence of half of the tokens comes on top
    full = trained(tmp_path / "full", "adakd", **ONE_STEP, **changes | {"token_share": 1.0})[1]
    assert logged(full)[0] > logged(trainer)[0]


def test_the_share_of_tokens_follows_the_loss(tmp_path):
    """Average without memory, ε 10 %, σ ½: down to the bound while the loss falls, up while it rises."""
    args = AdaKDConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        loss_average_decay=0.0,
        token_share_tolerance=0.1,
        token_share_step=0.5,
        min_token_share=0.2,
    )
    focus = TokenFocus(1.0)
    focus.observe(9.0, args, warmed_up=False)
    assert (focus.share, focus.reference) == (1.0, None)
    shares = []
    for loss in (4.0, 3.8, 3.5, 3.0, 2.0, 2.1, 3.0, 4.0, 9.0, 20.0, 40.0):
        focus.observe(loss, args, warmed_up=True)
        shares.append(focus.share)
    # 4 is the first reference; 3.8 is within 10 % of it, 3.5 is not.
    expected = [1, 1, 0.5, 0.25, 0.2, 0.2, 0.3, 0.45, 0.675, 1, 1]
    assert shares == pytest.approx(expected)
    smooth = TokenFocus(1.0, average=4.0, reference=4.0)
    args.loss_average_decay = 0.75
    smooth.observe(2.0, args, warmed_up=True)
    assert (smooth.average, smooth.share) == (3.5, 0.5)


@pytest.mark.parametrize("rule", ["inverse_confidence", "difficulty"])
def test_without_a_divergence_adakd_is_plain_cross_entropy(tmp_path, rule):
    setting, trainer, before = trained(
        tmp_path, "adakd", **ONE_STEP, alpha=0.0, temperature_rule=rule
    )
    (loss, ce, _), _ = plain(setting, before, lambda z: torch.ones(len(z)), 1.0, 0.0)
    assert logged(trainer) == pytest.approx([loss], rel=1e-4)
    assert loss == pytest.approx(ce)
    assert logged(trainer, "ce_nats") == pytest.approx([ce], rel=1e-4)


def test_the_share_moves_while_training_and_is_resumed(tmp_path):
    changes = {
        "temperature_rule": "difficulty",
        "token_share_step": 0.25,
        "token_share_tolerance": 1e-6,
        "loss_average_decay": 0.0,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    _, trainer, _ = trained(tmp_path, "adakd", **changes)
    shares = logged(trainer, "token_share")
    assert len(shares) == 6
    assert shares[0] == 1.0  # the first step only sets the reference
    assert len(set(shares)) > 3
    setting = make_setting(tmp_path, "adakd", **changes)
    again = methods.load("adakd").build(setting)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoints/checkpoint-3"))
    assert logged(again, "token_share") == shares
    assert logged(again) == logged(trainer)


@pytest.mark.parametrize(("mode", "lmbda"), [("online", 0), ("stored", 0), ("online", 1.0)])
def test_accumulating_one_by_eight_is_eight_by_one(tmp_path, mode, lmbda):
    after = {}
    for rows, steps in ((1, 8), (8, 1)):
        setting, trainer, _ = trained(
            tmp_path / f"{rows}",
            completions=mode,
            lmbda=lmbda,
            max_steps=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
            learning_rate=1.0,
        )
        after[rows] = weights(setting), logged(trainer)[0], logged(trainer, "kl_nats")[0]
    torch.testing.assert_close(after[1][0], after[8][0], rtol=1e-4, atol=1e-6)
    assert after[1][1:] == pytest.approx(after[8][1:], rel=1e-4)


def test_online_and_stored_train_alike_when_greedy(tmp_path):
    runs = {
        mode: trained(tmp_path / mode, completions=mode, max_steps=4)
        for mode in ("online", "stored")
    }
    torch.testing.assert_close(weights(runs["online"][0]), weights(runs["stored"][0]))


def test_the_student_comes_closer_and_the_teacher_does_not_move(tmp_path):
    setting = make_setting(tmp_path, max_steps=30, learning_rate=0.5, alpha=1.0)
    teacher_before = copy.deepcopy(setting.teacher.model.state_dict())
    kl_before = setting.heldout.measure(setting.student)["kl_nats"]
    trainer = methods.load("logit_kd").build(setting)
    trainer.train()
    assert logged(trainer, "kl_nats")[-1] < 0.7 * logged(trainer, "kl_nats")[0]
    assert setting.heldout.measure(setting.student)["kl_nats"] < kl_before
    for name, value in setting.teacher.model.state_dict().items():
        assert torch.equal(value, teacher_before[name]), name
    assert all(p.grad is None for p in setting.teacher.model.parameters())


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"])
def test_every_divergence_trains(tmp_path, divergence):
    setting, trainer, before = trained(tmp_path, divergence=divergence, alpha=1.0)
    assert all(value > 0 for value in logged(trainer))
    assert not torch.equal(weights(setting), torch.cat([v.flatten() for v in before.values()]))


def test_its_own_completions_carry_the_divergence_alone(tmp_path):
    """λ = 1: the teacher writes nothing, and α scales all there is."""
    setting, trainer, _ = trained(tmp_path, lmbda=1.0, alpha=0.25, kd_temperature=1.0, **ONE_STEP)
    assert setting.totals.generated_teacher == 0
    assert setting.totals.generated_student == setting.totals.trained > 0
    assert logged(trainer)[0] == pytest.approx(0.25 * logged(trainer, "kl_nats")[0], rel=1e-5)


def test_a_share_of_completions_is_the_students(tmp_path):
    setting, trainer, _ = trained(tmp_path, lmbda=0.5, **ONE_STEP)
    assert setting.totals.generated_teacher > 0
    assert setting.totals.generated_student > 0
    assert (
        setting.totals.trained
        == setting.totals.generated_teacher + setting.totals.generated_student
    )
    again = trained(tmp_path / "again", lmbda=0.5, **ONE_STEP)[1]
    assert logged(again) == logged(trainer)


def test_evaluation_reports_the_loss_and_its_parts(tmp_path):
    _, trainer, _ = trained(tmp_path, eval_strategy="steps", eval_steps=1)
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) == 2
    for entry in found:
        assert {"eval_kl_nats", "eval_ce_nats", "eval_top1", "eval_teacher_entropy_nats"} <= set(
            entry
        )


def test_a_pair_is_encoded_after_each_models_own_prompt():
    chat, base = make_form(), make_form(chat=False)
    end = chat.tokenizer.eos_token_id
    shared = len(chat.tokenizer)
    row = encode_completion_pair(
        chat, base, shared, "Why?", Completion("", [7, 8], True, end), None
    )
    assert row["labels"][-3:] == row["teacher_labels"][-3:] == [7, 8, end]
    assert [token for token in row["labels"] if token != IGNORED] == [7, 8, end]
    assert len(row["input_ids"]) != len(row["teacher_input_ids"])
    assert sum(row["compared"]) == 3
    assert len(row["compared"]) == len(row["labels"])
    stopped = encode_completion_pair(chat, base, shared, "Why?", Completion("", [7, 8], True), None)
    assert stopped["labels"][-3:] == [7, 8, end]
    assert stopped["compared"][-3:] == [1, 1, 0]
    cut = encode_completion_pair(chat, base, shared, "Why?", Completion("", [7, 8], False), None)
    assert cut["labels"][-2:] == [7, 8]
    assert sum(cut["compared"]) == 2
    foreign = encode_completion_pair(
        chat, base, 8, "Why?", Completion("", [7, 8, 6], True, 2), None
    )
    assert [token for token in foreign["labels"] if token != IGNORED] == [7]
    longest = max(len(row["input_ids"]), len(row["teacher_input_ids"]))
    short = encode_completion_pair(
        chat, base, shared, "Why?", Completion("", [7, 8], True, end), longest - 1
    )
    assert [token for token in short["labels"] if token != IGNORED] == [7, 8]
    assert len(short["teacher_input_ids"]) - len(row["teacher_input_ids"]) == -1


@pytest.mark.parametrize("wrong", [{"min_temperature": 5.0}, {"beta": 1.0, "divergence": "jsd"}])
def test_settings_that_make_no_sense_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"min_temperature|beta"):
        methods.load("adakd").build(make_setting(tmp_path, "adakd", **wrong))
