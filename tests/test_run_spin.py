"""SPIN through the real entry point: recipe, processes, quantisation, kill and resume, refusals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, launch, launch_words, run_command, write_tiny_overlay
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch.testing import assert_close

from medistill_trl import recipe
from medistill_trl.recipe import RecipeError

SPIN = "recipes/spin.yaml"
EMBEDDED = "recipes/overlays/embedded.yaml"
ADAPTER = "final_model/adapter_model.safetensors"
# Plain SGD: unlike Adam it does not hide a loss that is off by a factor. 16 prompts, 4 a step: 3 × 4 steps.
PLAIN = ["--optim", "sgd", "--max_grad_norm", 0, "--save_steps", 3]
PLAIN += ["--keep_rounds", 1, "--epochs_per_iteration", 1, "--generation_batch_size", 3]


def record(run):
    return json.loads((run / "results/run.json").read_text())


def iterations(run):
    return json.loads((run / "results/spin_iterations.json").read_text())["iterations"]


def answers(run, number):
    lines = (run / f"rounds/round-{number}.jsonl").read_text().splitlines()
    return [json.loads(line)["rejected"] for line in lines[1:]]


def logged(run, name):
    return [entry[name] for entry in record(run)["log_history"] if name in entry]


# One finished run in one process, looked at by several tests.
@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher_folder, model_cache):
    folder = tmp_path_factory.mktemp("finished")
    overlay = write_tiny_overlay(folder, teacher_folder)
    rows = ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1]
    rows += ["--learning_rate", 0.05]
    result = launch(SPIN, overlay, *PLAIN, *rows)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder / "run", overlay, rows, result


def test_a_run_leaves_its_rounds_its_records_and_a_plain_adapter(finished):
    run, _, _, result = finished
    assert (run / "COMPLETE").is_file()
    assert "Traceback" not in result.stderr
    assert "student's answers, round-2" in result.stderr
    assert not (run / "final_model/ref").exists()
    assert (
        AutoPeftModelForCausalLM.from_pretrained(run / "final_model").config.num_hidden_layers == 2
    )
    assert [r["steps"] for r in iterations(run)] == [4, 4, 4]
    assert len({tuple(answers(run, number)) for number in range(3)}) == 3
    content = record(run)
    assert content["method"] == "spin"
    heldout = content["heldout"]
    assert heldout["before"]["kl_nats"] > 0
    assert heldout["after"]["kl_nats"] != heldout["before"]["kl_nats"]
    assert len(logged(run, "heldout_kl_nats")) == 3
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert len(logged(run, name)) == 12, name
    assert all(value > 0 for value in content["tokens"].values())


def test_two_processes_take_the_steps_of_one(finished, tmp_path):
    one, overlay, _, _ = finished
    two = tmp_path / "two"
    rows = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1]
    rows += ["--learning_rate", 0.05]
    result = launch(SPIN, overlay, *PLAIN, *rows, "--output_dir", two, config="cpu_ddp.yaml")
    assert result.returncode == 0, result.stderr[-4000:]
    assert record(two)["num_processes"] == 2
    assert [answers(two, n) for n in range(3)] == [answers(one, n) for n in range(3)]
    for name in ("loss", "rewards/margins", "logps/chosen", "heldout_kl_nats", "spin_margin"):
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-3, abs=1e-5), name
    trained, expected = load_file(two / ADAPTER), load_file(one / ADAPTER)
    for name in expected:
        assert_close(trained[name], expected[name], rtol=1e-3, atol=1e-5)
    counts = [record(run)["tokens"] for run in (one, two)]
    for key in ("trained", "generated_student"):
        assert counts[0][key] == counts[1][key]


def killed_at(words, round_file, lines):
    """Start a run and kill it, launcher and all, once the file has so many lines."""
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None:
        if round_file.exists() and round_file.read_bytes().count(b"\n") >= lines:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    return False


@pytest.mark.slow
def test_killed_while_the_student_writes_and_resumed_it_is_the_same_run(finished, tmp_path):
    straight, overlay, rows, _ = finished
    killed = tmp_path / "killed"
    words = [SPIN, overlay, *PLAIN, *rows, "--output_dir", killed]
    file = killed / "rounds/round-1.jsonl"
    assert killed_at(launch_words(*words), file, lines=5), "it ended before"
    partial = file.read_bytes()
    result = launch(*words, "--resume")
    assert result.returncode == 0, result.stderr[-4000:]
    assert (killed / ADAPTER).read_bytes() == (straight / ADAPTER).read_bytes()
    assert file.read_bytes().startswith(partial[: partial.rindex(b"\n")][:500])
    assert iterations(killed) == iterations(straight)
    one, two = record(straight), record(killed)
    assert one["heldout"] == two["heldout"]
    for key in ("trained", "generated_student"):
        assert one["tokens"][key] == two["tokens"][key]


def test_the_settings_of_a_gpu_run_4bit_bf16_checkpointing(tiny_overlay, tmp_path):
    """Those the recipe has by default, on the tiny pair and the CPU, with evaluations in between."""
    flags = ["--eval_strategy", "steps", "--eval_steps", 1, "--warmup_steps", 0]
    flags += ["--keep_rounds", 1, "--epochs_per_iteration", 1, "--num_iterations", 2]
    for role in ("teacher", "student"):
        flags += [f"--{role}_load_in_4bit", "true", f"--{role}_dtype", "bfloat16"]
    flags += ["--bf16", "true", "--gradient_checkpointing", "true", "--optim", "paged_adamw_8bit"]
    result = run_command(sys.executable, "recipes/run.py", SPIN, tiny_overlay, *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    run = tmp_path / "run"
    margins = logged(run, "rewards/margins")
    assert [margin == 0 for margin in margins] == [True, False, False, False] * 2
    assert all(norm > 0 for norm in logged(run, "grad_norm"))


def test_a_beta_of_zero_is_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(RecipeError, match="beta: must be above 0"):
        recipe.load([SPIN, "--beta", "0"])


@pytest.mark.slow
def test_full_weights_in_two_processes_resume_after_a_kill(tiny_overlay, tmp_path):
    flags = [SPIN, tiny_overlay, *PLAIN, "--use_lora", "false", "--learning_rate", 0.01]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    result = launch(*flags, "--output_dir", straight, config="cpu_ddp.yaml")
    assert result.returncode == 0, result.stderr[-4000:]
    words = [*flags, "--output_dir", killed]
    file = killed / "rounds/round-2.jsonl"
    assert killed_at(launch_words(*words, config="cpu_ddp.yaml"), file, lines=4), "it ended before"
    result = launch(*words, "--resume", config="cpu_ddp.yaml")
    assert result.returncode == 0, result.stderr[-4000:]
    weights = "final_model/model.safetensors"
    assert (killed / weights).read_bytes() == (straight / weights).read_bytes()


@pytest.mark.slow
def test_the_embedded_pair_in_one_process_and_in_two(tmp_path, model_cache):
    flags = [*PLAIN, "--learning_rate", "1e-3", "--num_iterations", 2, "--max_train_samples", 8]
    flags += ["--teacher_max_new_tokens", 16, "--generation_temperature", 0]
    flags += ["--completion_store", tmp_path / "c.sqlite"]
    for config, rows in (("cpu.yaml", 4), ("cpu_ddp.yaml", 2)):
        words = ["--per_device_train_batch_size", rows, "--output_dir", tmp_path / config]
        result = launch(SPIN, EMBEDDED, *flags, *words, config=config)
        assert result.returncode == 0, result.stderr[-4000:]
    one, two = tmp_path / "cpu.yaml", tmp_path / "cpu_ddp.yaml"
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), rel=1e-3)
    for when in ("before", "after"):
        found, expected = (record(run)["heldout"][when] for run in (two, one))
        assert found["kl_nats"] == pytest.approx(expected["kl_nats"], rel=1e-3)
    assert record(one)["heldout"]["after"]["kl_nats"] != record(one)["heldout"]["before"]["kl_nats"]
