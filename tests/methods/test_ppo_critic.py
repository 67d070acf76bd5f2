"""PPO's critic, and a planted task that both of its parts solve together."""

import copy

import pytest
import torch
from planted_task import PATTERN, assert_reward_rises, planted_teacher
from ppo_runs import build, make_setting, trained
from tiny_setting import PROMPTS, logged

from medistill_trl import methods
from medistill_trl.losses.advantages import Moments
from medistill_trl.methods.ppo import value_head

# --- the critic ------------------------------------------------------------------------------------


def test_the_value_head_learns_a_constant_reward(tmp_path):
    """Every completion is cut and charged 3 nats: V goes from 0 to −3 at each token, while the student stays where
    it is."""
    setting = make_setting(
        tmp_path, reward="sequence", likelihood_weight=0.0, truncation_penalty=3.0, max_steps=48,
        max_completion_length=2, learning_rate=1e-12, value_learning_rate=0.5, value_clip=None,
        value_coef=1.0, gradient_accumulation_steps=1, max_grad_norm=0.0, lam=1.0,
    )  # fmt: skip
    trainer = methods.load("ppo").build(setting)
    before = copy.deepcopy(setting.student.state_dict())
    trainer.value_head.scale.fill_(3.0)  # else the first returns would tell it
    trainer.train()
    assert logged(trainer, "reward_mean") == [-3.0] * 12
    assert logged(trainer, "truncation_rate") == [1.0] * 12
    values = torch.cat([sample["values"] for sample in trainer._rollout])
    values = trainer.value_head.in_nats(values)
    assert values.tolist() == pytest.approx([-3.0] * len(values), abs=0.3)
    losses = logged(trainer, "value_loss")
    assert losses[0] == pytest.approx(0.5)  # ½ (−3 / 3)²
    assert losses[-1] < 0.005
    for name, value in setting.student.state_dict().items():
        if "value_head" not in name:
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


def test_units_are_set_once_and_never_vanish():
    head = value_head.ValueHead(4)
    head.set_units(Moments.of(torch.tensor([-8.0, -12.0])))
    assert (head.mean, head.scale) == (-10, 2)
    head.set_units(Moments.of(torch.ones(2)))
    assert (head.mean, head.scale) == (-10, 2)
    assert head(torch.randn(3, 4)).tolist() == [0.0] * 3
    assert head.in_nats(torch.ones(1)) == -8
    assert head.in_units(torch.tensor(-8.0)) == 1
    alike, nothing = value_head.ValueHead(4), value_head.ValueHead(4)
    alike.set_units(Moments.of(torch.full((3,), -5.0)))
    nothing.set_units(Moments.of(torch.zeros(3)))
    assert (alike.scale, nothing.scale) == (0.5, 1)


@pytest.mark.parametrize("to_trunk", [False, True])
def test_the_value_loss_reaches_the_trunk_only_if_asked_to(tmp_path, to_trunk):
    trainer = build(tmp_path, value_gradient_to_trunk=to_trunk)
    trainer._rollout = trainer._roll_out(
        [{"question": p.question, "answer": None} for p in PROMPTS]
    )
    torch.nn.init.ones_(trainer.value_head.linear.weight)
    batch = trainer._micro_batch(trainer._rollout[:2])
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1)).backward()
    assert trainer.value_head.linear.weight.grad.norm() > 0
    trunk = sum(p.grad.norm() for p in trainer.model.model.parameters() if p.grad is not None)
    assert (trunk > 0) == to_trunk


def test_the_value_head_has_its_own_learning_rate(tmp_path):
    _, trainer, _ = trained(tmp_path, value_learning_rate=0.5, max_steps=1)
    groups = trainer.optimizer.param_groups
    assert [group["lr"] for group in groups] == [0.01, 0.01, 0.5]
    assert {id(p) for p in groups[2]["params"]} == {id(p) for p in trainer.value_head.parameters()}
    everything = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in everything}) == len(everything)
    assert len(everything) == len(list(trainer.model.parameters()))


# --- a planted task --------------------------------------------------------------------------------


def planted_run(folder, seed, steps, **options):
    return build(
        folder, teacher_model=planted_teacher(), seed=seed, max_steps=steps, num_mini_batches=1,
        per_device_train_batch_size=32, gradient_accumulation_steps=1,
        max_completion_length=len(PATTERN), optim="adamw_torch",
        prompts=[prompt for prompt in PROMPTS for _ in range(4)],
        learning_rate=1e-3, value_learning_rate=3e-2, **options,
    )  # fmt: skip


def test_the_planted_reward_rises(tmp_path):
    assert_reward_rises(planted_run(tmp_path, 2, 50, reward="teacher_logprob"), "ppo")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("reward", ["token_kl", "teacher_logprob"])
def test_the_planted_reward_rises_for_every_seed(tmp_path, seed, reward):
    trainer = planted_run(tmp_path, seed, 100, reward=reward)
    assert_reward_rises(trainer, f"ppo, {reward}, seed {seed}")
    explained = logged(trainer, "explained_variance")
    print(f"explained variance {explained[0]:.2f} → {explained[-1]:.2f}")
