"""BOND's anchor: a moving average of the student, kept in checkpoints, brought back by a resumed run."""

import pytest
import torch
from test_bond import JEFFREYS, RANK, make_setting, trained
from tiny_setting import logged, weights

from medistill_trl import methods


def test_the_anchor_is_a_moving_average_of_the_student(tmp_path):
    setting = make_setting(tmp_path, max_steps=2, anchor_ema=0.25, **JEFFREYS)
    trainer = methods.load("bond").build(setting)
    steps = []
    for policy, anchor in trainer.anchor._pairs:
        assert torch.equal(policy, anchor)
        assert not anchor.requires_grad
    expected = [anchor.detach().clone() for _, anchor in trainer.anchor._pairs]
    follow = trainer.anchor.follow

    def followed():
        steps.append([policy.detach().clone() for policy, _ in trainer.anchor._pairs])
        follow()

    trainer.anchor.follow = followed
    trainer.train()
    assert len(steps) == 2
    for step in steps:
        expected = [0.75 * old + 0.25 * new for old, new in zip(expected, step, strict=True)]
    moved = False
    for (policy, anchor), by_hand in zip(trainer.anchor._pairs, expected, strict=True):
        torch.testing.assert_close(anchor.data, by_hand)
        moved |= not torch.equal(policy, anchor)
        assert policy.requires_grad
        assert not anchor.requires_grad
    assert moved
    assert logged(trainer, "kl_to_anchor_nats")[1] != 0


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_at_its_ends_the_anchor_stays_or_is_the_student(tmp_path, rate):
    setting = make_setting(tmp_path, anchor_ema=rate, **JEFFREYS)
    trainer = methods.load("bond").build(setting)
    start = [anchor.detach().clone() for _, anchor in trainer.anchor._pairs]
    trainer.train()
    for (policy, anchor), before in zip(trainer.anchor._pairs, start, strict=True):
        assert torch.equal(anchor, policy if rate else before)


def test_a_small_step_of_a_bfloat16_policy_is_not_rounded_away(tmp_path):
    setting = make_setting(tmp_path, **JEFFREYS)
    for parameter in setting.student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    anchor = methods.load("bond").build(setting).anchor
    anchor.rate = 0.001
    policy, average = anchor._pairs[0]
    policy.data.fill_(1.0078125)  # the next number of bfloat16 above 1
    average.data.fill_(1.0)
    anchor.follow()
    assert average[0, 0].item() == pytest.approx(1.0000078, abs=1e-7)


def test_the_anchor_is_in_checkpoints_and_not_in_the_final_model(tmp_path):
    _, trainer, _ = trained(
        tmp_path, save_strategy="steps", save_steps=1, learning_rate=1.0, **JEFFREYS
    )
    trainer.save_model(str(tmp_path / "final"))
    checkpoint = tmp_path / "checkpoints/checkpoint-2"
    assert (checkpoint / "anchor/adapter_model.safetensors").is_file()
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert (tmp_path / "final/adapter_model.safetensors").is_file()
    assert not (tmp_path / "final/anchor").exists()


@pytest.mark.parametrize(
    "options",
    [RANK | {"anchor_kl_coef": 0.1}, JEFFREYS],
    ids=["rank", "jeffreys"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, options):
    options = {
        "max_steps": 5, "optim": "adamw_torch", "learning_rate": 1e-3, "lora": True,
        "save_strategy": "steps", "save_steps": 3, "anchor_ema": 0.3, **options,
    }  # fmt: skip
    straight, whole, _ = trained(tmp_path / "a", **options)
    checkpoint = tmp_path / "a/checkpoints/checkpoint-3"
    resumed, rest, _ = trained(tmp_path / "b", resume=checkpoint, **options)
    assert torch.equal(weights(straight), weights(resumed))  # the anchor's among them
    assert any("anchor" in name for name, _ in resumed.student.named_parameters())
    for name in ("reward_mean", "best_reward_mean", "kl_to_start_nats"):
        assert logged(whole, name) == logged(rest, name)
