"""A run ends by tokens or time at a step's boundary, and what earlier launches used counts."""

import pytest
from tiny_setting import make_setting

from medistill_trl import methods, pipeline
from medistill_trl.arguments import RunArguments
from medistill_trl.budget import ended_by, used_up
from medistill_trl.checkpoints import Totals

LONG = {"max_steps": 12, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}


def build(folder, method="sft", totals=None, **run):
    setting = make_setting(
        folder, method, run=run, teacher={"teacher_completions": "stored"}, **LONG
    )
    setting.totals.add(totals or Totals())
    return setting, pipeline.build_trainer(methods.load(method), setting)


@pytest.mark.parametrize(
    ("limits", "totals", "expected"),
    [
        ({}, {"trained": 10**9, "seconds": 1e9}, None),
        ({"max_completion_tokens": 100}, {"trained": 99}, None),
        ({"max_completion_tokens": 100}, {"trained": 100}, "max_completion_tokens"),
        ({"max_seconds": 10}, {"seconds": 9.5}, None),
        ({"max_seconds": 10}, {"seconds": 12, "seconds_drawing": 3}, None),
        ({"max_seconds": 10}, {"seconds": 13, "seconds_drawing": 3}, "max_seconds"),
    ],
)
def test_what_is_used_up(limits, totals, expected):
    assert used_up(RunArguments(method="sft", **limits), Totals(**totals)) == expected


@pytest.mark.parametrize("method", ["sft", "on_policy", "spin"])
def test_a_run_ends_at_the_step_that_reaches_its_tokens(tmp_path, method):
    setting, trainer = build(tmp_path / "long", method)
    tokens = []
    trainer.add_callback(type("Count", (type(trainer.callback_handler.callbacks[0]),), {
        "on_step_end": lambda self, *args, **kwargs: tokens.append(setting.totals.trained),
    }))  # fmt: skip
    trainer.train()
    assert ended_by(trainer.state.log_history) == "schedule"
    assert len(tokens) > 5
    limit = tokens[3] + 1  # not reached by four steps, and by five
    setting, trainer = build(tmp_path / "short", method, max_completion_tokens=limit)
    trainer.train()
    assert trainer.state.global_step == 5 == trainer.state.max_steps
    assert setting.totals.trained == tokens[4]
    assert ended_by(trainer.state.log_history) == "max_completion_tokens"
    assert (tmp_path / "short/checkpoints/checkpoint-5/manifest.json").exists()


def test_a_limit_that_is_reached_at_the_very_last_step_is_named(tmp_path):
    setting, trainer = build(tmp_path / "long", max_completion_tokens=10**9)
    trainer.train()
    assert ended_by(trainer.state.log_history) == "schedule"
    setting, trainer = build(tmp_path / "full", max_completion_tokens=setting.totals.trained)
    trainer.train()
    assert trainer.state.global_step == LONG["max_steps"]
    assert ended_by(trainer.state.log_history) == "max_completion_tokens"


def test_the_learning_rate_follows_max_steps(tmp_path):
    _, trainer = build(tmp_path, max_completion_tokens=1)
    trainer.args.lr_scheduler_type = "linear"
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-2 * 11 / 12)


def test_earlier_launches_count(tmp_path):
    setting, trainer = build(tmp_path, totals=Totals(trained=999), max_completion_tokens=1000)
    trainer.train()
    assert trainer.state.global_step == 1
    assert setting.totals.trained > 1000


def test_time_ends_a_run(tmp_path):
    setting, trainer = build(tmp_path, max_seconds=1e-6)
    assert setting.totals.seconds_drawing > 0
    trainer.train()
    assert trainer.state.global_step == 1
    assert ended_by(trainer.state.log_history) == "max_seconds"
