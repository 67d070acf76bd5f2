"""PPO: the first loss against the formula, ratios, minibatches, rewards, resuming, refusals."""

import math

import pytest
import torch
from conftest import make_model
from ppo_runs import build, make_setting, plain_log_probs, trained
from tiny_setting import check, logged, make_form, weights
from transformers import AutoModelForCausalLM

from medistill_trl import methods
from medistill_trl.errors import UserError
from medistill_trl.methods.ppo import value_head
from medistill_trl.methods.ppo.rollout import order


def watch(trainer):
    """Keeps (step, what the loss was made of) of each micro-batch that is trained on."""
    seen, inner = [], trainer._policy_loss

    def policy_loss(states_NH, tokens_N, advantages_N, old_log_probs_N=None):
        loss, terms = inner(states_NH, tokens_N, advantages_N, old_log_probs_N)
        if old_log_probs_N is not None:
            seen.append((trainer.state.global_step, terms))
        return loss, terms

    trainer._policy_loss = policy_loss
    return seen


# --- the loss --------------------------------------------------------------------------------------


def test_the_first_loss_is_the_formula(tmp_path):
    """With whole logits, row by row: rewards, GAE of a critic that expects the mean, whitening, entropy."""
    beta, c, gamma, lam = 0.3, 0.5, 0.9, 0.8
    setting, trainer, before = trained(
        tmp_path, max_steps=1, num_mini_batches=1, entropy_coef=beta, value_coef=c, gamma=gamma,
        lam=lam, value_clip=None,
    )  # fmt: skip
    student = make_model(len(setting.form.tokenizer), layers=2)
    student.load_state_dict({n: w for n, w in before.items() if "value_head" not in n})
    rewards, log_probs, entropies = [], [], []
    for sample in trainer._rollout:
        with torch.no_grad():
            log_p, chosen = plain_log_probs(student, sample)
            rewards.append((plain_log_probs(setting.teacher.model, sample)[1] - chosen).tolist())
        log_probs.append(chosen)
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    earned = torch.tensor(
        [
            sum(gamma**n * r for n, r in enumerate(row[t:]))
            for row in rewards
            for t in range(len(row))
        ]
    )
    mean, scale = earned.mean().item(), earned.std(correction=0).item()
    advantages = []
    for row in rewards:
        errors = [r + (gamma * mean if t < len(row) - 1 else 0) - mean for t, r in enumerate(row)]
        for t in range(len(row)):
            advantages.append(sum((gamma * lam) ** n * d for n, d in enumerate(errors[t:])))
    advantages = torch.tensor(advantages)
    kept = {name: torch.cat([s[name] for s in trainer._rollout]) for name in trainer._rollout[0]}
    torch.testing.assert_close(kept["log_probs"], torch.cat(log_probs), rtol=1e-4, atol=1e-5)
    targets = advantages / scale  # V is the mean, so R − mean = A
    torch.testing.assert_close(kept["returns"], targets, rtol=1e-3, atol=1e-4)
    assert (kept["values"] == 0).all()
    white = (advantages - advantages.mean()) / advantages.std(correction=0)
    value = 0.5 * targets.square().mean()
    entropy = torch.cat(entropies).mean()
    expected = -(white * torch.cat(log_probs)).mean() + c * value - beta * entropy
    assert logged(trainer) == pytest.approx([expected.item()], rel=1e-4)
    assert logged(trainer, "value_loss") == pytest.approx([value.item()], rel=1e-4)
    assert logged(trainer, "entropy_nats") == pytest.approx([entropy.item()], rel=1e-4)
    assert setting.totals.trained == setting.totals.generated_student == len(white)


def test_the_penalty_is_on_the_way_from_the_start(tmp_path):
    """λ = γ = 1: R of the second rollout is what its tokens earned, with the penalty, whatever the critic says."""
    setting, trainer, _ = trained(
        tmp_path, lora=True, kl_coef=0.7, lam=1.0, max_steps=5, learning_rate=0.3,
        value_learning_rate=0.1, whiten_advantages=False,
    )  # fmt: skip
    expected = []
    with torch.no_grad(), setting.student.disable_adapter():
        for sample in trainer._rollout:
            start = plain_log_probs(setting.student, sample)[1]
            judged = plain_log_probs(setting.teacher.model, sample)[1]
            rewards = judged - sample["log_probs"] - 0.7 * (sample["log_probs"] - start)
            expected.append(rewards.flip(0).cumsum(0).flip(0))
    kept = {name: torch.cat([s[name] for s in trainer._rollout]) for name in trainer._rollout[0]}
    returns, values = (trainer.value_head.in_nats(kept[name]) for name in ("returns", "values"))
    assert values.std() > 0
    torch.testing.assert_close(kept["advantages"], returns - values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(returns, torch.cat(expected), rtol=1e-3, atol=1e-3)
    assert logged(trainer, "kl_to_start_nats")[0] == 0
    assert abs(logged(trainer, "kl_to_start_nats")[1]) > 1e-3


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_the_first_ratio_is_one_to_the_bit_and_later_ones_are_not(tmp_path, precision):
    trainer = build(tmp_path, lora=True, max_steps=5, learning_rate=0.3, **precision)
    seen = watch(trainer)
    trainer.train()
    assert len(seen) == 5 * 2
    for step, terms in seen:
        assert (terms["ratio"] == 1).all() == (step in (0, 4)), step
    first, *_, second = logged(trainer, "approx_kl_nats")
    assert first == second == 0
    assert min(logged(trainer, "approx_kl_nats")[1:4]) > 0


def test_ratios_and_values_are_bounded_and_counted(tmp_path):
    trainer = build(
        tmp_path, max_steps=4, learning_rate=3.0, epsilon=0.1, value_learning_rate=1.0,
        value_clip=0.01,
    )  # fmt: skip
    seen = watch(trainer)
    trainer.train()
    shares = [
        torch.cat([terms["clipped"] for at, terms in seen if at == step]).mean().item()
        for step in range(4)
    ]
    assert logged(trainer, "clip_fraction") == pytest.approx(shares)
    assert shares[0] == 0 < shares[3]
    bounded = logged(trainer, "value_clip_fraction")
    assert bounded[0] == 0 < bounded[3] < 1
    for _, terms in seen:
        assert (terms["weight"][terms["clipped"].bool()] == 0).all()


def test_accumulating_one_by_four_is_four_by_one(tmp_path):
    after = {}
    for rows, steps in ((1, 4), (4, 1)):
        setting, trainer, _ = trained(
            tmp_path / f"{rows}", max_steps=2, per_device_train_batch_size=rows, max_grad_norm=0.0,
            gradient_accumulation_steps=steps, entropy_coef=0.1, learning_rate=0.3,
        )  # fmt: skip
        after[rows] = weights(setting), logged(trainer)[1], logged(trainer, "reward_mean")[0]
    torch.testing.assert_close(after[1][0], after[4][0], rtol=1e-4, atol=1e-5)
    assert after[1][1:] == pytest.approx(after[4][1:], rel=1e-3, abs=1e-4)


def test_no_logits_but_of_one_position_a_row(tmp_path):
    setting = make_setting(tmp_path, max_steps=1)
    trainer = methods.load("ppo").build(setting)
    positions = []
    for model in (setting.student, setting.teacher.model):
        model.lm_head.register_forward_hook(
            lambda module, inputs, output: positions.append(output.shape[1])
        )
    trainer.train()
    assert set(positions) == {1}


# --- minibatches -----------------------------------------------------------------------------------


def test_steps_and_what_they_are_taken_on(tmp_path):
    """8 prompts, rollouts of 2 rows × 1 window × 2 minibatches: an epoch is 2 rollouts of 2 × 2 steps."""
    setting = make_setting(
        tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=1
    )
    trainer = methods.load("ppo").build(setting)
    taken, inner = [], trainer.get_batch_samples

    def get_batch_samples(*args):
        batches, tokens = inner(*args)
        taken.append([tuple(row.tolist()) for batch in batches for row in batch["input_ids"]])
        return batches, tokens

    trainer.get_batch_samples = get_batch_samples
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == len(taken) == 16
    assert len(logged(trainer, "reward_mean")) == 4
    assert setting.totals.trained == 2 * setting.totals.generated_student
    strip = [[tuple(t for t in row if t != 0) for row in step] for step in taken]  # 0 pads
    for start in range(0, 16, 4):
        first, second = (sorted(strip[n] + strip[n + 1]) for n in (start, start + 2))
        assert first == second
        assert len(set(first)) == 4
    assert len({row for step in strip for row in step}) == 16  # no two rollouts are alike


def test_epochs_after_the_first_are_shuffled_and_only_by_their_seed():
    assert order(16, 0, 5) == list(range(16))
    orders = [order(16, epoch, seed) for epoch in (1, 2) for seed in (5, 9)]
    assert all(sorted(places) == list(range(16)) for places in orders)
    assert len(set(map(tuple, orders))) == 4
    assert order(16, 1, 5) == orders[0]


# --- rewards and evaluation ------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ["teacher_logprob", "sequence", "token_kl"])
def test_every_reward_trains_adapter_and_value_head(tmp_path, reward):
    setting, trainer, before = trained(
        tmp_path, lora=True, reward=reward, truncation_penalty=0.5, correctness_weight=1.0
    )
    assert len(logged(trainer, "kl_to_teacher_nats")) == 1
    assert len(logged(trainer, "reward_correct")) == (reward == "sequence")
    moved = {
        name for name, value in setting.student.state_dict().items()
        if not torch.equal(value, before[name])
    }  # fmt: skip
    assert {name.split(".")[0] for name in moved} == {"base_model", "value_head"}
    assert all("lora" in name or "value_head" in name for name in moved)
    assert all(p.grad is None for p in setting.teacher.model.parameters())


def test_another_tokenizer_serves_scores_of_the_whole_text(tmp_path):
    other = make_form(vocab_size=450, chat=False)
    _, trainer, _ = trained(tmp_path, teacher_form=other, reward="teacher_logprob")
    assert all(math.isfinite(value) for value in logged(trainer, "reward_mean"))
    assert logged(trainer, "kl_to_teacher_nats") == []


def test_an_evaluation_reports_the_same_rewards_for_the_same_weights(tmp_path):
    _, trainer, _ = trained(tmp_path, eval_strategy="steps", eval_steps=1, learning_rate=1e-12)
    history = trainer.state.log_history
    first, second = [e["eval_reward_mean"] for e in history if "eval_reward_mean" in e]
    assert first == pytest.approx(second, rel=1e-4)
    assert not any("eval_loss" in entry for entry in history)
    assert len(logged(trainer, "reward_mean")) == 1


# --- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [6, 8])  # amid a rollout; between two, after two epochs
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stop):
    options = {
        "max_steps": 10, "optim": "adamw_torch", "learning_rate": 1e-3, "lora": True,
        "value_learning_rate": 1e-2, "save_strategy": "steps", "save_steps": stop,
    }  # fmt: skip
    straight, whole, _ = trained(tmp_path / "a", **options)
    checkpoint = tmp_path / "a/checkpoints" / f"checkpoint-{stop}"
    assert (checkpoint / "rollout_0.pt").exists() == (stop == 6)
    resumed, rest, _ = trained(tmp_path / "b", resume=checkpoint, **options)
    assert torch.equal(weights(straight), weights(resumed))  # the value head's among them
    states = [trainer.optimizer.state_dict()["state"] for trainer in (whole, rest)]
    for name, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(value, states[1][name][key]), (name, key)
    assert whole.value_head.scale == rest.value_head.scale > 0
    for name in ("reward_mean", "explained_variance", "value_loss", "approx_kl_nats"):
        assert logged(whole, name) == logged(rest, name)


def test_what_is_saved_is_the_plain_student(tmp_path):
    setting, trainer, _ = trained(tmp_path, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "checkpoints/checkpoint-2"
    loaded, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values()), info
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, setting.student.state_dict()[name])
    assert setting.student.value_head is trainer.value_head
    state = torch.load(checkpoint / value_head.FILE, weights_only=True)
    assert torch.equal(state["linear.weight"], trainer.value_head.linear.weight)
    assert state["scale"] > 0


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cliprange": 0.1}, "cliprange does nothing in ppo .*got 0.1; use epsilon"),
        ({"vf_coef": 0.5}, "use value_coef"),
        ({"response_length": 9}, "use max_completion_length"),
        ({"temperature": 1.0}, "temperature does nothing"),
        ({"whiten_rewards": True}, "use whiten_advantages"),
    ],
)
def test_keys_that_would_change_nothing_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_setting(tmp_path, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_mini_batches": 4}, "takes 16 prompts .* there are 8"),
        ({"max_length": 105}, "is 106, more than max_length: 105"),
        ({"kl_coef": 0.1}, "kl_coef must be 0 with use_lora: false, got 0.1"),
    ],
)
def test_what_does_not_fit_the_rest_is_refused(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        check(make_setting(tmp_path, **wrong))
