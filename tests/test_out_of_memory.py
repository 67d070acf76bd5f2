"""Out of memory: smaller micro-batches, the same steps, and the run goes on by itself."""

import json
import os
import sys

import pytest
import torch
import yaml
from conftest import ROOT, launch_words, run_command
from safetensors.torch import load_file
from tiny_setting import make_setting

from medistill_trl.errors import StartAgain
from medistill_trl.out_of_memory import Changes, OutOfMemoryWriting, recorded, smaller
from medistill_trl.prompts import IGNORED
from medistill_trl.rollouts import split_batch
from medistill_trl.run_directory import RunDirectory

SFT = "recipes/sft.yaml"
ADAPTER = "final_model/adapter_model.safetensors"
PLAIN = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "teacher_batch_size": None,
}


@pytest.mark.parametrize(
    ("size", "accumulation", "expected"),
    [(8, 2, (4, 4)), (2, 4, (1, 8)), (6, 1, (3, 2)), (3, 2, (1, 6)), (15, 1, (5, 3)), (1, 8, None)],
)
def test_a_step_keeps_its_rows(size, accumulation, expected):
    now = PLAIN | {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    changed = smaller(torch.OutOfMemoryError(), now)
    if expected is None:
        assert changed == {}
    else:
        assert tuple(changed.values()) == expected
        assert expected[0] * expected[1] == size * accumulation


@pytest.mark.parametrize(
    ("prompts", "allowed", "expected"), [(16, None, 8), (3, 3, 1), (1, None, None), (16, 8, None)]
)
def test_a_model_that_writes_answers_fewer_prompts_at_a_time(prompts, allowed, expected):
    changed = smaller(OutOfMemoryWriting("", prompts), PLAIN | {"teacher_batch_size": allowed})
    assert changed == ({} if expected is None else {"teacher_batch_size": expected})


def test_a_kept_window_is_split_with_the_numbers_of_its_tokens():
    labels = torch.tensor(
        [[IGNORED, 1, 2], [IGNORED, 3, IGNORED], [IGNORED, IGNORED, IGNORED], [IGNORED, 4, 5]]
    )
    batch = {
        "input_ids": torch.arange(12).view(4, 3),
        "labels": labels,
        "old_log_probs_N": torch.arange(5.0),
    }
    first, second = split_batch(batch, 2)
    assert first["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [part["old_log_probs_N"].tolist() for part in (first, second)] == [[0, 1, 2], [3, 4]]
    assert torch.equal(split_batch(batch, 1)[0]["labels"], labels)


def test_what_several_processes_say_one_after_the_other_is_one_change(tmp_path):
    setting, directory = make_setting(tmp_path, "sft"), RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.recipe.write_text("")
    for _ in range(2):
        with pytest.raises(StartAgain), recorded(directory, setting.arguments):
            raise torch.OutOfMemoryError
    changes = Changes.of(directory)
    assert changes.values == {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert len(changes.history) == 1


def record(run):
    return json.loads((run / "results/run.json").read_text())


def words(overlay, *more):
    flags = ["--max_steps", "4", "--save_steps", "1", "--heldout_prompts", "2", *more]
    # Unlike Adam plain SGD makes no step of the last bits of a gradient near zero.
    flags += [
        "--optim",
        "sgd",
        "--learning_rate",
        "1",
        "--max_grad_norm",
        "0",
        "--lora_dropout",
        "0",
    ]
    return ["tests/small_memory.py", SFT, str(overlay), *flags]


def test_a_run_goes_on_by_itself(tiny_overlay, tmp_path):
    """Memory runs out in the third step; the recipe that is kept is the one it was started with."""
    environment = os.environ | {"ROWS": "1", "STEP": "2"}
    result = run_command(sys.executable, *words(tiny_overlay), env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "per_device_train_batch_size: 2 → 1, gradient_accumulation_steps: 2 → 4" in result.stderr
    assert "resuming from" in result.stderr
    assert "checkpoint-2" in result.stderr
    assert "Traceback" not in result.stderr
    run = tmp_path / "run"
    assert (run / "COMPLETE").is_file()
    assert yaml.safe_load((run / "recipe.yaml").read_text())["per_device_train_batch_size"] == 2
    assert record(run)["recipe"]["gradient_accumulation_steps"] == 2
    assert record(run)["out_of_memory"] == [
        {"per_device_train_batch_size": [2, 1], "gradient_accumulation_steps": [2, 4]}
    ]
    assert record(run)["steps"] == 4


@pytest.mark.slow
def test_it_comes_to_what_more_memory_would_have(tiny_overlay, tmp_path):
    """Memory runs out while the teacher writes, and then in the third step."""
    environment = os.environ | {"ROWS": "1", "STEP": "2", "PROMPTS": "3"}
    result = run_command(sys.executable, *words(tiny_overlay), env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "teacher_batch_size: None → 2" in result.stderr
    run, roomy = tmp_path / "run", tmp_path / "roomy"
    assert len(record(run)["out_of_memory"]) == 2
    environment = os.environ | {"ROWS": "1000"}
    result = run_command(
        sys.executable, *words(tiny_overlay, "--output_dir", str(roomy)), env=environment
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert record(roomy)["out_of_memory"] == []
    one, other = load_file(run / ADAPTER), load_file(roomy / ADAPTER)
    for name in other:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)
    assert record(run)["tokens"]["trained"] == record(roomy)["tokens"]["trained"]
    heldout = [record(path)["heldout"]["after"]["kl_nats"] for path in (run, roomy)]
    assert heldout[0] == pytest.approx(heldout[1], rel=1e-4)


@pytest.mark.slow
def test_with_nothing_left_to_make_smaller_it_says_what_to_lower(tiny_overlay):
    result = run_command(sys.executable, *words(tiny_overlay), env=os.environ | {"ROWS": "0"})
    assert result.returncode == 1
    assert "2 → 1" in result.stderr
    assert "nothing left that could be made smaller" in result.stderr
    assert "gradient_checkpointing: true" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 2])
def test_two_processes_are_started_again_together(tiny_overlay, tmp_path, restarts):
    command = launch_words(*words(tiny_overlay)[1:], config="cpu_ddp.yaml")
    script = command.index("recipes/run.py")
    command[script] = str(ROOT / "tests/small_memory.py")
    if restarts:
        command[script:script] = ["--max_restarts", str(restarts)]
    result = run_command(*command, env=os.environ | {"ROWS": "1", "STEP": "2"})
    run = tmp_path / "run"
    if restarts:
        assert result.returncode == 0, result.stderr[-4000:]
    else:
        assert result.returncode != 0
        assert "--max_restarts" in result.stderr
        assert not (run / "COMPLETE").exists()
        resumed = run_command(*command, "--resume", env=os.environ | {"ROWS": "1", "STEP": "2"})
        assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert (run / "COMPLETE").is_file()
    assert len(record(run)["out_of_memory"]) == 1
