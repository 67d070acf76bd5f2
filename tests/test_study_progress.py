"""What a study finds in its folder, and what it shows and records; nothing here starts a run."""

import json
import re
import sys

import pytest
from conftest import ROOT, run_command
from study_files import PLAIN, expand, write

from medistill_trl.errors import UserError
from medistill_trl.sealed_json import write_record
from medistill_trl.study import definition, execution, grid, progress
from medistill_trl.study.definition import Budget
from medistill_trl.study.record import StudyRecord


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


# --- a folder that is there already


def start(run):
    """What a run leaves when it is started."""
    run.directory.mkdir(parents=True)
    (run.directory / "recipe.yaml").write_text(run.recipe.to_yaml())
    train = run.recipe.values["train_file"]
    inputs = {f"sha256 of {train}": progress._sha256(train)}
    write_record(run.directory / "inputs.json", inputs)


def test_a_started_run_whose_recipe_changed_is_refused(tmp_path):
    runs = expand(tmp_path)
    start(runs[2])
    progress.check_unchanged(runs)
    changed = expand(tmp_path, changes=["shared.max_train_samples=8"])
    with pytest.raises(UserError, match=r"max_train_samples: 16\.0 then, 8\.0 now") as caught:
        progress.check_unchanged(changed)
    assert str(runs[2].directory) in str(caught.value)
    assert str(runs[1].directory) not in str(caught.value)


def test_a_started_run_whose_prompts_changed_is_refused(tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text('{"id": "a", "source": "s", "question": "q", "reference": "r"}\n')
    content = PLAIN | {"shared": {"train_file": str(data)}}
    runs = expand(tmp_path, content)
    start(runs[0])
    progress.check_unchanged(runs)
    data.write_text(data.read_text() * 2)
    with pytest.raises(UserError, match=re.escape(f"{data} has changed since")):
        progress.check_unchanged(runs)


# --- what is shown and recorded


def test_the_record_keeps_what_is_known_of_the_same_run(tmp_path):
    study = definition.read(write(tmp_path, PLAIN), [], [])
    runs = grid.expand(study, tmp_path / "out")
    record = StudyRecord(tmp_path / "study.json", study, runs)
    record.update(runs[0], state="finished", wall_seconds=3.0)
    again = StudyRecord(tmp_path / "study.json", study, runs)
    assert again[runs[0]]["wall_seconds"] == 3.0
    assert again.count("finished") == 1
    content = json.loads((tmp_path / "study.json").read_text())
    assert content["budget"] == {"kind": "optimizer_steps", "amount": 4, "max_steps": 4}
    assert content["runs"][0]["hash"] == runs[0].hash
    other = grid.expand(study, tmp_path / "out")
    other[0].recipe.values["learning_rate"] = 0.125
    changed = StudyRecord(tmp_path / "study.json", study, other)
    assert changed[other[0]]["wall_seconds"] == 0.0


def test_a_run_that_ends_before_its_budget_is_told_from_one_that_uses_it():
    steps = Budget("optimizer_steps", 8, 8)
    assert progress.shortfall(steps, {"steps": 8, "ended_by": "schedule"}) is None
    assert "ended after 5 steps" in progress.shortfall(steps, {"steps": 5, "ended_by": "schedule"})
    tokens = Budget("completion_tokens", 100, 8)
    assert progress.shortfall(tokens, {"steps": 5, "ended_by": "max_completion_tokens"}) is None
    assert "raise budget.max_steps" in progress.shortfall(
        tokens, {"steps": 8, "ended_by": "schedule"}
    )


def test_what_a_log_says_last(tmp_path):
    log = tmp_path / "x.log"
    assert progress.current_step(log) is None
    log.write_text("first\n 1/8 [00:01]\r 2/8 [00:02]\r 3/8 [00:03<00:09]\nlast\n\n")
    assert progress.current_step(log) == "3/8"
    assert progress.tail(log, 2) == [" 3/8 [00:03<00:09]", "last"]
    log.write_text(log.read_text() + "\n== accelerate launch\nbegun\n")
    assert progress.current_step(log) is None
    assert progress.tail(log, 2) == ["accelerate launch", "begun"]


def test_a_failure_is_shown_without_the_launchers_traceback(tmp_path):
    log = tmp_path / "x.log"
    trace = "Traceback (most recent call last):\n  File a\n"
    log.write_text(f"\n== accelerate\n{trace}ValueError: bad\n")
    assert progress.failure(log, 2) == ["  File a", "ValueError: bad"]
    log.write_text(log.read_text() + f"{trace}subprocess.CalledProcessError: Command [...]\n")
    assert progress.failure(log, 2) == ["  File a", "ValueError: bad"]
    log.write_text(f"killed\n{trace}subprocess.CalledProcessError: Command [...]\n")
    assert progress.failure(log, 1) == ["subprocess.CalledProcessError: Command [...]"]


def test_a_machine_is_shared_out(monkeypatch, tmp_path):
    cpu = str(ROOT / "accelerate_configs/cpu.yaml")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    slots = execution.make_slots(2, cpu)
    assert [slot.cores for slot in slots] == [(0, 2), (1, 3)]
    assert [slot.gpus for slot in slots] == [None, None]
    assert [slot.gpus for slot in execution.make_slots(2, None)] == ["4,6", "5"]
    assert execution.make_slots(1, None)[0].gpus is None
    with pytest.raises(UserError, match="there are 3 GPUs"):
        execution.make_slots(4, None)
    assert [slot.cores for slot in execution.make_slots(5, cpu)][4] == (0,)


def test_the_study_itself_loads_no_torch():
    code = "import medistill_trl.study.__main__, sys; sys.exit('torch' in sys.modules)"
    assert run_command(sys.executable, "-c", code).returncode == 0
