"""BOND: each objective's first loss against the formula, the anchor, windows, resuming, refusals."""

import copy
import math

import pytest
import tiny_setting
import torch
from planted_task import PATTERN, assert_reward_rises, planted_teacher
from tiny_setting import check, logged, make_form, train, weights

from medistill_trl import methods
from medistill_trl.errors import UserError
from medistill_trl.losses.best_of_n import backward_weights, log_quantile
from medistill_trl.methods.bond.trainer import FreshSample, fresh_samples
from medistill_trl.prompts import IGNORED
from medistill_trl.rollouts import Sample, encode_sample
from medistill_trl.teacher import Completion, completion_log_probs

TINY = {
    "data": {"max_prompt_tokens": 100},
    "num_samples": 4,
    "gradient_accumulation_steps": 4,
    "max_completion_length": 6,
}
SFT = {"objective": "best_of_n_sft"}
RANK = {"objective": "rank_policy_gradient"}
JEFFREYS = {"objective": "jeffreys", "lora": True}


def make_setting(folder, **changes):
    return tiny_setting.make_setting(folder, "bond", **TINY | changes)


def trained(folder, resume=None, **changes):
    return train(make_setting(folder, **changes), resume)


def recorded(folder, **changes):
    """One step, and what was written for it: lists of samples, in the order of their writing."""
    setting = make_setting(folder, max_steps=1, **changes)
    trainer = methods.load("bond").build(setting)
    written, write = [], trainer._write
    trainer._write = lambda *given: written.append(write(*given)) or written[-1]
    before = copy.deepcopy(setting.student)
    trainer.train()
    return setting, trainer, before, written


def rows_of(window):
    """The window's trained rows: their completions' tokens, and the weights of these."""
    for batch in window:
        for ids, values in zip(batch["labels"].tolist(), batch["values"].tolist(), strict=True):
            places = [n for n, label in enumerate(ids) if label != IGNORED]
            if places:
                yield [ids[n] for n in places], [values[n] for n in places]


def scores(setting, samples):
    """Mean log p_T, sample by sample."""
    examples = [encode_sample(setting.teacher.form, sample) for sample in samples]
    found = [completion_log_probs(setting.teacher.model, [example])[0] for example in examples]
    return [log_probs.mean().item() for log_probs in found]


def groups(values, size=4):
    return [values[n : n + size] for n in range(0, len(values), size)]


def plain_loss(student, form, weighted):
    """−Σ w log π(y) with whole logits, over the samples' tokens."""
    total, tokens = torch.zeros(()), 0
    for sample, weight in weighted:
        example = encode_sample(form, sample)
        first = len(example["input_ids"]) - len(sample.token_ids)
        logits = student(torch.tensor([example["input_ids"]])).logits[0, first - 1 : -1]
        log_p = logits.log_softmax(-1)[range(len(sample.token_ids)), sample.token_ids]
        total, tokens = total - weight * log_p.sum(), tokens + len(sample.token_ids)
    return (total / tokens).item()


# --- the objectives --------------------------------------------------------------------------------


def test_best_of_n_sft_is_cross_entropy_on_the_teachers_pick_alone(tmp_path):
    setting, trainer, before, [samples] = recorded(tmp_path, **SFT)
    assert len(samples) == 8
    judged = scores(setting, samples)
    best = [
        max(group, key=judged.__getitem__) for group in groups(list(range(len(samples))))
    ]  # one of each prompt's four
    expected = [(samples[n].token_ids, [1.0] * len(samples[n].token_ids)) for n in best]
    assert list(rows_of(trainer._window)) == expected
    loss = plain_loss(before, setting.form, [(samples[n], 1.0) for n in best])
    assert logged(trainer) == pytest.approx([loss], rel=1e-4)
    assert logged(trainer, "best_reward_mean") == pytest.approx(
        [sum(judged[n] for n in best) / 2], rel=1e-4
    )
    assert logged(trainer, "reward_mean") == pytest.approx([sum(judged) / 8], rel=1e-4)
    assert setting.totals.trained == sum(len(samples[n].token_ids) for n in best)
    assert setting.totals.generated_student == sum(len(one.token_ids) for one in samples)
    # Nothing is paid for the others: two rows and one blank token each for what is left of the window.
    assert [next(iter(batch["input_ids"].shape)) for batch in trainer._window] == [2, 1, 1, 1]
    assert [batch["input_ids"].shape[1] for batch in trainer._window[1:]] == [1, 1, 1]


@pytest.mark.parametrize("kind", ["winner", "rank"])
def test_rank_rewards_weight_every_sample(tmp_path, kind):
    setting, trainer, before, [samples] = recorded(tmp_path, rank_reward=kind, **RANK)
    weighted = []
    for group, judged in zip(groups(samples), groups(scores(setting, samples)), strict=True):
        places = [sorted(judged).index(score) for score in judged]  # no ties here
        assert len(set(places)) == 4
        for sample, place in zip(group, places, strict=True):
            weighted.append((sample, (place == 3) - 0.25 if kind == "winner" else place / 3 - 0.5))
    found = list(rows_of(trainer._window))
    for (ids, values), (sample, weight) in zip(found, weighted, strict=True):
        assert ids == sample.token_ids
        assert values == pytest.approx([weight] * len(ids))
    loss = plain_loss(before, setting.form, weighted)
    assert logged(trainer) == pytest.approx([loss], rel=1e-3, abs=1e-5)


def test_jeffreys_is_the_best_of_the_anchors_and_a_fresh_sample_of_each_prompt(tmp_path):
    """One process and two prompts: four samples of the anchor each, and one of the student."""
    setting, trainer, before, [drawn, fresh] = recorded(tmp_path, jeffreys_beta=0.25, **JEFFREYS)
    assert [len(drawn), len(fresh)] == [8, 2]
    assert [one.question for one in fresh] == [drawn[0].question, drawn[4].question]
    anchor_scores = torch.tensor(groups(scores(setting, drawn)))
    quantiles = log_quantile(torch.tensor(scores(setting, fresh)), anchor_scores)
    credits = backward_weights(quantiles, torch.zeros(2), 4, 0.25)  # anchor and student are one yet
    best = [drawn[4 * n + int(row.argmax())] for n, row in enumerate(anchor_scores)]
    weighted = [(one, 0.75) for one in best]
    weighted += [
        (one, credit) for one, credit in zip(fresh, credits.tolist(), strict=True) if credit
    ]
    found = list(rows_of(trainer._window))
    for (ids, values), (sample, weight) in zip(found, weighted, strict=True):
        assert ids == sample.token_ids
        assert values == pytest.approx([weight] * len(ids), abs=1e-5)
    loss = plain_loss(before, setting.form, weighted)
    assert logged(trainer) == pytest.approx([loss], rel=1e-3, abs=1e-5)
    assert logged(trainer, "kl_to_anchor_nats") == pytest.approx([0], abs=1e-5)
    assert logged(trainer, "log_quantile_nats") == pytest.approx([quantiles.mean().item()])
    assert logged(trainer, "anchor_reward_mean") == pytest.approx(
        [anchor_scores.mean().item()], rel=1e-4
    )
    written = sum(len(one.token_ids) for one in drawn + fresh)
    assert setting.totals.generated_student == written


def test_a_log_ratio_to_the_anchor_is_charged(tmp_path):
    """The anchor is moved away by hand before the step."""
    for options in (JEFFREYS, RANK | {"lora": True}):
        setting = make_setting(
            tmp_path / options["objective"], max_steps=1, anchor_kl_coef=0.5, **options
        )
        trainer = methods.load("bond").build(setting)
        generator = torch.Generator().manual_seed(0)
        for _, anchor in trainer.anchor._pairs:
            anchor.data += 0.1 * torch.randn(anchor.shape, generator=generator)
        kept = {}
        score = trainer._score
        trainer._score = lambda *given, kept=kept, score=score: kept.setdefault("s", score(*given))
        written, write = [], trainer._write
        trainer._write = lambda *given, written=written, write=write: (
            written.append(write(*given)) or written[-1]
        )
        trainer.train()
        ratios = torch.stack([r.sum() for r in kept["s"][2]["kl_to_anchor"]])
        assert ratios.abs().min() > 1e-3
        found = [values[0] for _, values in rows_of(trainer._window)]
        if options is JEFFREYS:
            judged = torch.tensor(groups(scores(setting, written[0])))
            quantiles = log_quantile(torch.tensor(scores(setting, written[1])), judged)
            earned = 0.5 * 3 * quantiles - (0.5 + 0.5) * ratios
            expected = [0.5, 0.5, *(earned - earned.flip(0)).tolist()]
        else:
            judged, expected = scores(setting, written[0]), []
            for own, group in zip(groups(ratios), groups(judged), strict=True):
                for n in range(4):
                    others = (own.sum() - own[n]) / 3
                    won = (group[n] == max(group)) - 0.25
                    expected.append(won - 0.5 * (own[n] - others).item())
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_the_anchor_writes_what_the_winner_is_taken_of(tmp_path):
    """Moved away by hand and fixed, it writes the same again; the student would not have."""
    setting = make_setting(tmp_path, max_steps=1, anchor_ema=0.0, learning_rate=1e-12, **JEFFREYS)
    trainer = methods.load("bond").build(setting)
    generator = torch.Generator().manual_seed(0)
    for _, anchor in trainer.anchor._pairs:
        anchor.data += 0.3 * torch.randn(anchor.shape, generator=generator)
    written, write = [], trainer._write
    trainer._write = lambda *given: written.append((given, write(*given))) or written[-1][1]
    trainer.train()
    (given, drawn), (fresh_given, fresh) = written
    with trainer.anchor.in_place():
        assert write(*given) == drawn
        assert write(*fresh_given) != fresh
    assert write(*given) != drawn
    assert write(*fresh_given) == fresh


def test_at_beta_0_the_fresh_samples_are_only_looked_at(tmp_path):
    _, trainer, _, [drawn, _] = recorded(tmp_path, jeffreys_beta=0.0, **JEFFREYS)
    found = list(rows_of(trainer._window))
    assert [values[0] for _, values in found] == [1.0, 1.0]
    assert all(ids in [one.token_ids for one in drawn] for ids, _ in found)
    assert len(logged(trainer, "reward_mean")) == 1


@pytest.mark.parametrize("options", [SFT, JEFFREYS])
def test_accumulating_one_by_eight_is_eight_by_one(tmp_path, options):
    after = {}
    for rows, steps in ((1, 8), (8, 1)):
        setting, trainer, _ = trained(
            tmp_path / f"{rows}",
            max_steps=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
            learning_rate=1.0,
            entropy_coef=0.1,
            **options,
        )
        after[rows] = weights(setting), logged(trainer)[0], logged(trainer, "reward_mean")[0]
    torch.testing.assert_close(after[1][0], after[8][0], rtol=1e-4, atol=1e-5)
    assert after[1][1:] == pytest.approx(after[8][1:], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("options", [RANK, JEFFREYS | {"reward": "sequence"}])
def test_another_tokenizer_will_do(tmp_path, options):
    other = make_form(vocab_size=450, chat=False)
    _, trainer, _ = trained(tmp_path, teacher_form=other, correctness_weight=0.0, **options)
    assert all(math.isfinite(value) for value in logged(trainer, "reward_mean"))
    assert len(logged(trainer, "kl_to_teacher_nats")) == 0
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))


def test_no_logits_but_of_one_position_a_row(tmp_path):
    setting = make_setting(tmp_path, max_steps=1, **JEFFREYS)
    trainer = methods.load("bond").build(setting)
    positions = []
    for model in (setting.student.get_base_model(), setting.teacher.model):
        model.lm_head.register_forward_hook(
            lambda module, inputs, output: positions.append(output.shape[1])
        )
    trainer.train()
    assert set(positions) == {1}


def test_what_the_teacher_cannot_read_never_wins(tmp_path):
    """Its score is 0, more than any log-probability."""
    trainer = methods.load("bond").build(make_setting(tmp_path))

    def sample(text, ids, finished, end_id=None):
        return Sample("Why?", Completion(text, ids, finished, end_id))

    one = [sample("", [], False), sample("a", [70], False), sample("", [], True, 2)]
    rewards = trainer.reward(one)
    assert rewards.scores_B[0] == 0 > rewards.scores_B[1]
    found = trainer._comparable(one, rewards)
    assert found[0] == -torch.inf
    assert torch.equal(found[1:], rewards.scores_B[1:])
    other = make_form(vocab_size=450, chat=False)
    trainer = methods.load("bond").build(make_setting(tmp_path / "b", teacher_form=other))
    special = [sample("", [0], False), sample("a", [70], False), sample("", [], True, 2)]
    rewards = trainer.reward(special)
    assert rewards.scores_B[0] == 0
    assert trainer._comparable(special, rewards).isfinite().tolist() == [False, True, True]


def test_a_prompts_samples_on_two_processes_get_a_fresh_sample_on_each():
    assert fresh_samples(0, 8, 4) == [FreshSample(0, 0, 1.0), FreshSample(1, 4, 1.0)]
    assert fresh_samples(1, 8, 4) == [FreshSample(2, 0, 1.0), FreshSample(3, 4, 1.0)]
    assert fresh_samples(0, 2, 4) == fresh_samples(1, 2, 4) == [FreshSample(0, 0, 0.5)]
    # Rows 0 to 5 and 6 to 11, prompts of 4: the second prompt is on both.
    assert fresh_samples(0, 6, 4) == [FreshSample(0, 0, 1.0), FreshSample(1, 4, 0.5)]
    assert fresh_samples(1, 6, 4) == [FreshSample(1, 0, 0.5), FreshSample(2, 2, 1.0)]
    for num_rows, num_samples, processes in ((6, 4, 2), (4, 6, 3), (1, 2, 4), (5, 3, 3)):
        shares = {}
        for process in range(processes):
            for one in fresh_samples(process, num_rows, num_samples):
                assert (process * num_rows + one.row) // num_samples == one.prompt
                shares[one.prompt] = shares.get(one.prompt, 0) + one.share
        assert shares == pytest.approx(
            dict.fromkeys(range(num_rows * processes // num_samples), 1.0)
        )


def test_an_evaluation_reports_the_same_rewards_for_the_same_weights(tmp_path):
    _, trainer, _ = trained(
        tmp_path, eval_strategy="steps", eval_steps=1, learning_rate=1e-12, **JEFFREYS
    )
    found = [e["eval_reward_mean"] for e in trainer.state.log_history if "eval_reward_mean" in e]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert all("eval_loss" not in entry for entry in trainer.state.log_history)


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gamma": 0.5}, "gamma does nothing in bond .* one weight"),
        ({"num_generations": 4}, "num_generations does nothing in bond .* num_samples"),
        ({"num_iterations": 2}, "num_iterations does nothing in bond"),
        ({"baseline": "none"}, "baseline does nothing in bond"),
        ({"loss_type": "grpo"}, "loss_type does nothing in bond"),
        ({"num_samples": 16}, r"num_samples must divide .* = 8, got 16: change"),
        ({"rank_reward": "rank"}, "rank_reward does nothing with objective best_of_n_sft"),
        ({"anchor_kl_coef": 0.1}, "of rank_policy_gradient and jeffreys; got 0.1"),
        ({"jeffreys_beta": 0.1, **RANK}, "jeffreys_beta does nothing with objective rank_policy"),
    ],
)
def test_keys_that_would_change_nothing_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_setting(tmp_path, **wrong)


def test_what_cannot_be_is_refused_before_weights_are_loaded(tmp_path):
    for wrong in ({"objective": "jeffreys"}, {"anchor_kl_coef": 0.1, **RANK}):
        with pytest.raises(UserError, match="second adapter, and use_lora is false"):
            check(make_setting(tmp_path, **wrong))
    check(make_setting(tmp_path, lora=True, **wrong))
    with pytest.raises(UserError, match="may have 2048 samples of the anchor"):
        check(make_setting(tmp_path, gradient_accumulation_steps=2000, **JEFFREYS))
    with pytest.raises(UserError, match="48 samples takes 12 prompts at 4 samples each"):
        check(make_setting(tmp_path, gradient_accumulation_steps=24))


# --- a planted task --------------------------------------------------------------------------------


def planted_run(folder, seed, steps, **options):
    setting = make_setting(
        folder, teacher_model=planted_teacher(), seed=seed, max_steps=steps, num_samples=8,
        gradient_accumulation_steps=1, max_completion_length=len(PATTERN), optim="adamw_torch",
        lora=True, **{"per_device_train_batch_size": 32, "learning_rate": 1e-2, **options},
    )  # fmt: skip
    return methods.load("bond").build(setting)


OBJECTIVES = {
    "best_of_n_sft": SFT,
    "winner": RANK,
    "rank": RANK | {"rank_reward": "rank"},
    "jeffreys": {
        "objective": "jeffreys", "anchor_ema": 0.1, "per_device_train_batch_size": 64, "learning_rate": 3e-2,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_planted_reward_rises_for_every_seed(tmp_path, seed, name):
    trainer = planted_run(tmp_path, seed, 100, **OBJECTIVES[name])
    assert_reward_rises(trainer, f"bond, {name}, seed {seed}")
