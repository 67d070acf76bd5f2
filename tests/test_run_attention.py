"""Attention transfer through the real entry point: its recipe, processes, a kill, refusals."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, launch, launch_words, run_command, write_tiny_overlay
from safetensors.torch import load_file

RECIPE = "recipes/attention.yaml"
EMBEDDED = "recipes/overlays/embedded.yaml"
ADAPTER = "final_model/adapter_model.safetensors"
# Plain SGD: unlike Adam it does not hide a loss that is off by a factor.
PLAIN = ["--optim", "sgd", "--max_grad_norm", 0, "--lora_dropout", 0]


def record(run):
    return json.loads((run / "results/run.json").read_text())


def logged(run, name):
    return [entry[name] for entry in record(run)["log_history"] if name in entry]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher_folder, model_cache):
    """An uninterrupted run in one process, its overlay and its flags."""
    folder = tmp_path_factory.mktemp("attention")
    overlay = write_tiny_overlay(folder, teacher_folder)
    flags = [RECIPE, overlay, *PLAIN, "--learning_rate", 1, "--max_steps", 4, "--save_steps", 2]
    flags += ["--teacher_temperature", 1, "--teacher_completions", "stored"]
    rows = ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1]
    result = run_command(sys.executable, "recipes/run.py", *flags, *rows)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder, flags, rows, result


def test_four_steps_of_the_recipe(whole):
    folder, _, _, result = whole
    run = folder / "run"
    assert (run / "COMPLETE").is_file()
    assert record(run)["method"] == "attention"
    for name in ("loss", "ce_nats", "map_mse"):
        assert len(logged(run, name)) == 4, name
        assert logged(run, f"eval_{name}"), name
    assert "teacher layer → student layer 2 → 1, 4 → 2" in result.stdout + result.stderr
    heldout = record(run)["heldout"]
    assert heldout["after"]["ce_nats"] < heldout["before"]["ce_nats"]


def test_two_processes_take_the_steps_of_one(whole):
    folder, flags, _, _ = whole
    two = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1]
    result = launch(*flags, *two, "--output_dir", folder / "two", config="cpu_ddp.yaml")
    assert result.returncode == 0, result.stderr[-4000:]
    assert record(folder / "two")["num_processes"] == 2
    for name in ("loss", "ce_nats", "map_mse"):
        assert logged(folder / "two", name) == pytest.approx(logged(folder / "run", name), rel=1e-4)
    trained, expected = load_file(folder / "two" / ADAPTER), load_file(folder / "run" / ADAPTER)
    for name in expected:
        torch.testing.assert_close(trained[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_killed_and_resumed_is_the_same_run_bit_for_bit(whole):
    folder, flags, rows, _ = whole
    words = [*flags, *rows, "--output_dir", folder / "killed"]
    process = subprocess.Popen(
        launch_words(*words),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    seen = 0
    for line in process.stdout:
        seen += "'loss'" in line
        if seen == 3:  # past the checkpoint of step 2
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.communicate()
    assert seen == 3
    assert not (folder / "killed/COMPLETE").exists()
    result = launch(*words, "--resume")
    assert result.returncode == 0, result.stderr[-4000:]
    assert "checkpoint-2" in result.stdout + result.stderr
    assert (folder / "killed" / ADAPTER).read_bytes() == (folder / "run" / ADAPTER).read_bytes()


@pytest.mark.slow
def test_refusals_name_what_works(tiny_overlay, tmp_path, other_teacher_folder):
    words = [sys.executable, "recipes/run.py", RECIPE, tiny_overlay, "--dry_run"]
    result = run_command(*words, "--layer_mapping", "{2: 9}")
    assert result.returncode == 2
    assert "there is no teacher layer 9; the teacher's layers are 1 to 4" in result.stderr
    result = run_command(*words, "--teacher_model", other_teacher_folder)
    assert result.returncode == 2
    assert "attention compares the two models token by token" in result.stderr
    assert re.search(r"a method that passes text: .*\bsft\b", result.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_dry_run_plans_the_memory_of_an_explicit_mapping(tiny_overlay):
    words = ["--dry_run", "--layer_mapping", "{1: 2}"]
    result = run_command(sys.executable, "recipes/run.py", RECIPE, tiny_overlay, *words)
    assert result.returncode == 0, result.stderr[-4000:]
    assert re.search(r"peak \d+\.\d\d GB, in phase (generate|score|train)", result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["map_mse", "relations"])
def test_the_embedded_pair_in_one_process_and_in_two(tmp_path, model_cache, kind):
    flags = [*PLAIN, "--learning_rate", 0.05, "--max_steps", 4, "--teacher_max_new_tokens", 24]
    flags += ["--teacher_temperature", 0, "--completion_store", tmp_path / "c.sqlite"]
    flags += ["--attention_loss", kind]
    for config, rows in (("cpu.yaml", 4), ("cpu_ddp.yaml", 2)):
        words = ["--per_device_train_batch_size", rows, "--output_dir", tmp_path / config]
        result = launch(RECIPE, EMBEDDED, *flags, *words, config=config)
        assert result.returncode == 0, result.stderr[-4000:]
    one, two = tmp_path / "cpu.yaml", tmp_path / "cpu_ddp.yaml"
    for name in ("loss", "ce_nats"):
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-3)
    heldout = record(two)["heldout"]
    assert heldout["after"]["ce_nats"] < heldout["before"]["ce_nats"]
