"""On-policy distillation: the loss against the formula, windows, resuming, refusals, a planted task."""

import math

import pytest
import tiny_setting
import torch
from conftest import make_model
from planted_task import PATTERN, assert_reward_rises, planted_teacher
from tiny_setting import check, logged, make_form, train, weights

from medistill_trl import methods
from medistill_trl.errors import UserError
from medistill_trl.prompts import IGNORED

TINY = {
    "data": {"max_prompt_tokens": 100},
    "num_generations": 2,
    "max_completion_length": 6,
}


def make_setting(folder, **changes):
    return tiny_setting.make_setting(folder, "on_policy", **TINY | changes)


def trained(folder, resume=None, **changes):
    return train(make_setting(folder, **changes), resume)


def plain_log_probs(model, prompt, ids):
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1), logits.log_softmax(-1)[range(len(ids)), ids]


def plain_loss(setting, state, window, gamma, entropy_coef):
    """Leave-one-out REINFORCE with whole logits, on what was drawn, row by row."""
    student = make_model(len(setting.form.tokenizer), layers=2)
    student.load_state_dict(state)
    returns, log_probs, entropies = [], [], []
    for batch in window:
        for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            first = next(n for n, label in enumerate(labels) if label != IGNORED)
            prompt, ids = row[:first], [label for label in labels if label != IGNORED]
            log_p, chosen = plain_log_probs(student, prompt, ids)
            rewards = (plain_log_probs(setting.teacher.model, prompt, ids)[1] - chosen).tolist()
            returns.append(
                [sum(r * gamma**n for n, r in enumerate(rewards[t:])) for t in range(len(rewards))]
            )
            log_probs.append(chosen)
            entropies.append(-(log_p.exp() * log_p).sum(-1))
    total = torch.zeros(())
    for n, (own, log_prob, entropy) in enumerate(zip(returns, log_probs, entropies, strict=True)):
        other = returns[n ^ 1]  # two samples of each prompt, side by side
        for t in range(len(own)):
            baseline = other[t] if t < len(other) else 0.0
            total = total - (own[t] - baseline) * log_prob[t] - entropy_coef * entropy[t]
    return (total / sum(map(len, returns))).item(), torch.cat(entropies).mean().item()


@pytest.mark.parametrize(("gamma", "entropy_coef"), [(1.0, 0.0), (0.5, 0.3)])
def test_the_first_loss_is_the_formula(tmp_path, gamma, entropy_coef):
    setting, trainer, before = trained(
        tmp_path, max_steps=1, gamma=gamma, entropy_coef=entropy_coef
    )
    expected, entropy = plain_loss(setting, before, trainer._window, gamma, entropy_coef)
    assert logged(trainer) == pytest.approx([expected], rel=1e-4, abs=1e-5)
    assert logged(trainer, "entropy_nats") == pytest.approx([entropy], rel=1e-4)
    tokens = sum((batch["labels"] != IGNORED).sum().item() for batch in trainer._window)
    assert setting.totals.trained == setting.totals.generated_student == tokens
    assert setting.totals.generated_teacher == 0
    assert logged(trainer, "completion_tokens_mean") == pytest.approx([tokens / 4])


def test_accumulating_one_by_eight_is_eight_by_one(tmp_path):
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
        )
        after[rows] = weights(setting), logged(trainer)[0], logged(trainer, "reward_mean")[0]
    torch.testing.assert_close(after[1][0], after[8][0], rtol=1e-4, atol=1e-5)
    assert after[1][1:] == pytest.approx(after[8][1:], rel=1e-3, abs=1e-5)


def test_reused_samples_begin_at_a_ratio_of_one_and_leave_it(tmp_path):
    """No step size, no movement: all passes over a window are alike. With one, ratios are bounded."""
    _, still, _ = trained(tmp_path / "a", max_steps=3, num_iterations=3, learning_rate=1e-12)
    assert logged(still)[0] == pytest.approx(logged(still)[2], rel=1e-4)
    assert logged(still, "clip_fraction") == [0, 0, 0]
    setting, moving, _ = trained(tmp_path / "b", max_steps=4, num_iterations=2, learning_rate=3.0)
    first, second, third, _ = logged(moving, "clip_fraction")
    assert first == third == 0 < second
    assert len(logged(moving, "reward_mean")) == 2  # one generation for two steps
    assert setting.totals.trained == 2 * setting.totals.generated_student


def test_no_logits_but_of_one_position_a_row(tmp_path):
    setting = make_setting(tmp_path, max_steps=1)
    trainer = methods.load("on_policy").build(setting)
    positions = []
    for model in (setting.student, setting.teacher.model):
        model.lm_head.register_forward_hook(
            lambda module, inputs, output: positions.append(output.shape[1])
        )
    trainer.train()
    assert set(positions) == {1}


def test_truncated_completions_can_be_left_out_of_the_loss(tmp_path):
    setting, trainer, before = trained(
        tmp_path, mask_truncated_completions=True, max_completion_length=1, learning_rate=1.0
    )
    assert logged(trainer, "truncation_rate") == [1, 1]
    assert setting.totals.trained == 0 < setting.totals.generated_student
    assert all(
        torch.equal(value, before[name]) for name, value in setting.student.state_dict().items()
    )


@pytest.mark.parametrize("baseline", ["none", "group_mean"])
@pytest.mark.parametrize("reward", ["teacher_logprob", "sequence", "token_kl"])
def test_every_reward_trains_an_adapter_with_every_baseline(tmp_path, reward, baseline):
    setting, trainer, before = trained(
        tmp_path,
        lora=True,
        reward=reward,
        baseline=baseline,
        truncation_penalty=0.5,
        correctness_weight=1.0,
    )
    assert logged(trainer, "kl_to_start_nats")[0] == pytest.approx(0, abs=1e-5)
    assert logged(trainer, "kl_to_start_nats")[1] != 0
    assert len(logged(trainer, "kl_to_teacher_nats")) == 2
    assert len(logged(trainer, "reward_correct")) == (2 if reward == "sequence" else 0)
    assert len(logged(trainer, "reward_likelihood")) == (0 if reward == "token_kl" else 2)
    moved = {
        name for name, value in setting.student.state_dict().items()
        if not torch.equal(value, before[name])
    }  # fmt: skip
    assert moved
    assert all("lora" in name for name in moved)
    assert all(p.grad is None for p in setting.teacher.model.parameters())


def test_another_tokenizer_serves_scores_of_the_whole_text(tmp_path):
    other = make_form(vocab_size=450, chat=False)
    _, trainer, _ = trained(tmp_path, teacher_form=other, reward="teacher_logprob")
    assert all(math.isfinite(value) for value in logged(trainer, "reward_mean"))
    assert logged(trainer, "kl_to_teacher_nats") == []


def test_an_evaluation_reports_the_same_rewards_for_the_same_weights(tmp_path):
    _, trainer, _ = trained(
        tmp_path, eval_strategy="steps", eval_steps=1, learning_rate=1e-12, max_steps=2
    )
    first, second = (
        entry["eval_reward_mean"]
        for entry in trainer.state.log_history
        if "eval_reward_mean" in entry
    )
    assert first == pytest.approx(second, rel=1e-4)
    assert logged(trainer, "eval_loss") == []


# --- resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [4, 13])  # amid a window's three uses; in the second epoch
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stop):
    options = {
        "num_iterations": 3, "max_steps": 16, "optim": "adamw_torch", "learning_rate": 1e-3,
        "lora": True, "save_strategy": "steps", "save_steps": stop,
    }  # fmt: skip
    straight, whole, _ = trained(tmp_path / "a", **options)
    checkpoint = str(tmp_path / "a/checkpoints" / f"checkpoint-{stop}")
    resumed, rest, _ = trained(tmp_path / "b", resume=checkpoint, **options)
    assert torch.equal(weights(straight), weights(resumed))
    rewards = [
        [entry["reward_mean"] for entry in trainer.state.log_history if "reward_mean" in entry]
        for trainer in (whole, rest)
    ]
    assert rewards[0] == rewards[1]


def test_epochs_are_shuffled_differently(tmp_path):
    trainer = methods.load("on_policy").build(make_setting(tmp_path))
    sampler = trainer._get_train_sampler()
    first = list(sampler)
    assert list(sampler) == first
    assert sorted(set(first)) == list(range(8))
    assert len(first) == 8 * 2 * 2  # two samples, and once for each micro-batch of a window
    trainer.state.global_step = 4
    assert list(sampler) != first


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss_type": "grpo"}, "loss_type does nothing in on_policy"),
        ({"beta": 0.1}, "beta does nothing"),
        ({"temperature": 0.7}, "temperature does nothing"),
        ({"steps_per_generation": 4}, "one set for each accumulation window"),
        (
            {"truncation_penalty": 1.0, "mask_truncated_completions": True},
            "truncation_penalty must be 0",
        ),
        ({"num_generations": 3}, "divisible by num_generations"),
    ],
)
def test_keys_that_would_change_nothing_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_setting(tmp_path, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gradient_accumulation_steps": 16}, "takes 16 prompts .* there are 8"),
        ({"max_length": 105}, "is 106, more than max_length: 105"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        check(make_setting(tmp_path, **wrong))


# --- a planted task --------------------------------------------------------------------------------


def planted_run(folder, seed, steps, **options):
    setting = make_setting(
        folder, teacher_model=planted_teacher(), seed=seed, max_steps=steps,
        per_device_train_batch_size=16, num_generations=8, gradient_accumulation_steps=1,
        max_completion_length=len(PATTERN), optim="adamw_torch", learning_rate=3e-3, **options,
    )  # fmt: skip
    return methods.load("on_policy").build(setting)


def test_the_planted_reward_rises(tmp_path):
    assert_reward_rises(planted_run(tmp_path, 2, 40), "on_policy")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("reward", ["token_kl", "teacher_logprob"])
def test_the_planted_reward_rises_for_every_seed(tmp_path, seed, reward):
    trainer = planted_run(tmp_path, seed, 100, reward=reward, num_iterations=2)
    assert_reward_rises(trainer, f"on_policy, {reward}, seed {seed}")
