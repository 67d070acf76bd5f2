"""A SPIN run that was stopped anywhere and resumed is the run that was not."""

import shutil

import pytest
import torch
from spin_runs import answers, policy, records, same, trained
from tiny_setting import PROMPTS, logged

from medistill_trl.errors import RunFailed
from medistill_trl.methods.spin import trainer as spin_trainer

SAVING = {"save_strategy": "steps", "save_steps": 1, "epochs_per_iteration": 2, "num_iterations": 3}


KINDS = [
    {},
    {"lora": False},
    {"reference": "none", "keep_rounds": 2},
    {"dtype": torch.bfloat16, "num_iterations": 2},
]


def assert_resumed_is_straight(tmp_path, kind, steps):
    """Of 4 steps an iteration, 8 where two rounds are kept."""
    kind = SAVING | kind
    straight = trained(tmp_path / "straight", **kind)
    for step in steps or range(1, straight.schedule.num_steps):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "straight/rounds", folder / "rounds")
        shutil.copytree(tmp_path / "straight/results", folder / "results")
        # What a kill right after this step leaves: no later round.
        last = straight.schedule.iteration_at(step - 1)
        for number in range(last + 1, kind["num_iterations"]):
            (folder / f"rounds/round-{number}.jsonl").unlink()
        checkpoint = tmp_path / f"straight/checkpoints/checkpoint-{step}"
        resumed = trained(folder, checkpoint, **kind)
        assert same(policy(resumed), policy(straight)), step
        assert records(folder) == records(tmp_path / "straight"), step
        assert logged(resumed) == logged(straight), step


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_resumed_within_an_iteration_it_is_the_same_run_bit_for_bit(tmp_path, kind):
    assert_resumed_is_straight(tmp_path, kind | {"num_iterations": 2, "save_steps": 6}, (6,))


def test_resumed_between_iterations_it_is_the_same_run_bit_for_bit(tmp_path):
    assert_resumed_is_straight(tmp_path, {"num_iterations": 2, "save_steps": 4}, (4,))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_resumed_after_every_step_it_is_the_same_run_bit_for_bit(tmp_path, kind):
    assert_resumed_is_straight(tmp_path, kind, None)


class Killed(Exception):
    """Stands for the kill."""


def kill_after(monkeypatch, calls):
    original, count = spin_trainer.complete, iter(range(calls))

    def complete(*args):
        if next(count, None) is None:
            raise Killed
        return original(*args)

    monkeypatch.setattr(spin_trainer, "complete", complete)


@pytest.mark.parametrize("calls", [1, 4])
def test_killed_while_the_student_writes_no_answer_is_written_twice(tmp_path, monkeypatch, calls):
    """Batches of 3, 3 and 2 prompts a round: killed in the first round, and in the second."""
    settings = SAVING | {"num_iterations": 2, "save_steps": 4}
    straight = trained(tmp_path / "straight", **settings)
    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        kill_after(patch, calls)
        with pytest.raises(Killed):
            trained(folder, **settings)
    partial = (folder / f"rounds/round-{calls // 3}.jsonl").read_text()
    assert len(partial.splitlines()) == 1 + 3 * (calls % 3)
    asked = []
    original = spin_trainer.complete
    monkeypatch.setattr(spin_trainer, "complete", lambda *a: asked.append(1) or original(*a))
    checkpoint = folder / "checkpoints/checkpoint-4" if calls > 3 else None
    resumed = trained(folder, checkpoint, **settings)
    assert len(asked) == 6 - calls
    assert (folder / f"rounds/round-{calls // 3}.jsonl").read_text().startswith(partial)
    assert same(policy(resumed), policy(straight))
    assert answers(folder, 1) == answers(tmp_path / "straight", 1)
    assert records(folder) == records(tmp_path / "straight")


def test_answers_of_other_weights_are_written_anew(tmp_path):
    trained(tmp_path, num_iterations=1)
    kept = answers(tmp_path, 0)
    file = tmp_path / "rounds/round-0.jsonl"
    file.write_text(file.read_text().replace('"weights": "', '"weights": "0'))
    spoiled = file.read_text().replace(f'"id": "{PROMPTS[0].id}"', '"id": "spoiled"')
    file.write_text(spoiled)
    trained(tmp_path, num_iterations=1)
    assert answers(tmp_path, 0) == kept


def test_in_the_middle_of_an_iteration_its_round_must_be_there(tmp_path):
    trained(tmp_path, **SAVING | {"save_steps": 6, "max_steps": 6})
    checkpoint = tmp_path / "checkpoints/checkpoint-6"
    file = tmp_path / "rounds/round-1.jsonl"
    file.write_text(file.read_text().replace('"weights": "', '"weights": "0'))
    with pytest.raises(RunFailed, match=r"round-1\.jsonl: iteration 1 trains on 8 pairs"):
        trained(tmp_path, checkpoint, **SAVING)


@pytest.mark.parametrize(
    ("old", "new"), [('"rejected": "', '"rejected": "x'), ('{"prompt": ', '{"prompt" ')]
)
def test_a_round_that_was_changed_or_damaged_is_not_trained_on(tmp_path, old, new):
    trained(tmp_path, **SAVING | {"save_steps": 2, "max_steps": 2})
    file = tmp_path / "rounds/round-0.jsonl"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(
        RunFailed, match=r"round-0\.jsonl: (has changed since|iteration 0 trains on 8)"
    ):
        trained(tmp_path, tmp_path / "checkpoints/checkpoint-2", **SAVING)
