"""FitNets through the real entry point: the recipe, processes, kill and resume, quantisation, refusals."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, launch, launch_words, run_command, write_tiny_overlay
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

RECIPE = "recipes/fitnets.yaml"
EMBEDDED = "recipes/overlays/embedded.yaml"
ADAPTER = "final_model/adapter_model.safetensors"
PROJECTIONS = "projections.safetensors"
# Plain SGD: unlike Adam it does not hide a loss that is off by a factor.
PLAIN = ["--optim", "sgd", "--max_grad_norm", 0, "--lora_dropout", 0, "--learning_rate", 0.1]
STEPS = ["--max_steps", 4, "--save_steps", 2, "--projection_lr", 0.1]


def record(run):
    return json.loads((run / "results/run.json").read_text())


def logged(run, name):
    return [entry[name] for entry in record(run)["log_history"] if name in entry]


def run(*words):
    return run_command(sys.executable, "recipes/run.py", RECIPE, *words)


# One finished run, looked at by several tests: four rows a micro-batch in one process.
@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher_folder, model_cache):
    folder = tmp_path_factory.mktemp("fitnets")
    overlay = write_tiny_overlay(folder, teacher_folder)
    words = [RECIPE, overlay, *PLAIN, *STEPS, "--per_device_train_batch_size", 4]
    result = launch(*words)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder / "run", overlay, words, result


def test_the_recipe_runs_and_says_what_it_compares(finished):
    out, _, _, result = finished
    assert (out / "COMPLETE").is_file()
    assert "normalised_mse, mean over tokens" in result.stderr
    assert "student layer 1 ← teacher layer 2, student layer 2 ← teacher layer 4" in result.stderr
    assert "Traceback" not in result.stderr
    for name in (
        "loss",
        "ce_nats",
        "student_entropy_nats",
        "normalised_mse_1_2",
        "normalised_mse_2_4",
    ):
        assert len(logged(out, name)) == 4, name
    heldout = record(out)["heldout"]
    assert heldout["before"]["kl_nats"] != heldout["after"]["kl_nats"]
    assert record(out)["tokens"]["generated_teacher"] > 0


def test_the_final_model_loads_on_a_plain_base_and_projections_lie_beside_checkpoints(finished):
    out = finished[0]
    AutoPeftModelForCausalLM.from_pretrained(out / "final_model")
    assert not [name for name in load_file(out / ADAPTER) if "projection" in name]
    assert not (out / "final_model" / PROJECTIONS).exists()
    for step in (2, 4):
        folder = out / f"checkpoints/checkpoint-{step}"
        saved = load_file(folder / PROJECTIONS)
        assert {tuple(tensor.shape) for tensor in saved.values()} == {(64, 64), (64,)}
        assert PROJECTIONS in (folder / "manifest.json").read_text()


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(finished, tmp_path):
    one, _, words, _ = finished
    changes = ["--per_device_train_batch_size", 2, "--output_dir", tmp_path / "two"]
    result = launch(*words[:-2], *changes, config="cpu_ddp.yaml")
    assert result.returncode == 0, result.stderr[-4000:]
    two = tmp_path / "two"
    assert record(two)["num_processes"] == 2
    for name in ("loss", "ce_nats", "normalised_mse_1_2", "normalised_mse_2_4"):
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-3)
    assert record(two)["tokens"]["trained"] == record(one)["tokens"]["trained"]
    for name in (ADAPTER, f"checkpoints/checkpoint-4/{PROJECTIONS}"):
        trained, expected = load_file(two / name), load_file(one / name)
        for key in expected:
            torch.testing.assert_close(trained[key], expected[key], rtol=1e-3, atol=1e-5)


def kill_after(words, steps):
    """Start a run and kill it, launcher and all, once it has logged `steps` steps."""
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    seen = 0
    for line in process.stdout:
        seen += "'loss'" in line
        if seen == steps:
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.wait()
    return seen == steps


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_same_run_bit_for_bit(finished, tmp_path):
    straight, _, words, _ = finished
    killed = tmp_path / "killed"
    # A store of its own, so that it too draws the completions that the projections are fitted to.
    words = [*words, "--output_dir", killed, "--completion_store", tmp_path / "c.sqlite"]
    assert kill_after(launch_words(*words), 3)
    assert not (killed / "COMPLETE").exists()
    result = launch(*words, "--resume")
    assert result.returncode == 0, result.stderr[-4000:]
    assert "resuming from" in result.stderr
    for name in (ADAPTER, f"checkpoints/checkpoint-4/{PROJECTIONS}"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes(), name
    assert record(killed)["heldout"] == record(straight)["heldout"]
    assert record(killed)["tokens"] == record(straight)["tokens"]


@pytest.mark.slow
def test_a_mapping_the_pair_does_not_have_stops_a_dry_run(finished, tmp_path):
    overlay = finished[1]
    mapping = ["--layer_mapping", "{1: 3, 2: 5}"]
    result = run(overlay, *mapping, "--output_dir", tmp_path / "x", "--dry_run")
    assert result.returncode == 2
    assert "there is no teacher layer 5; the teacher's layers are 1 to 4" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_pair_with_different_tokenizers_is_refused_if_asked_and_told_what_works(
    finished, tmp_path, other_teacher_folder
):
    out = ["--output_dir", tmp_path / "x", "--cross_tokenizer", "refuse"]
    result = run(finished[1], "--teacher_model", other_teacher_folder, *out)
    assert result.returncode == 2
    assert "their tokenizers differ: " in result.stderr
    assert re.search(
        r"a method that passes text: .*\bsft\b.*; or cross_tokenizer: auto, which compares spans",
        result.stderr,
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_dry_run_plans_projections_and_teacher(finished, tmp_path):
    result = run(finished[1], "--output_dir", tmp_path / "x", "--dry_run")
    assert result.returncode == 0, result.stderr[-4000:]
    for shown in ("projections  ", "student activations", "together"):
        assert shown in result.stdout
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.5, 1])
def test_4bit_teacher_and_student_with_gradients_after_an_evaluation(finished, tmp_path, alpha):
    flags = ["--max_steps", 3, "--eval_strategy", "steps", "--eval_steps", 1, "--alpha", alpha]
    for role in ("teacher", "student"):
        flags += [f"--{role}_load_in_4bit", "true", f"--{role}_dtype", "bfloat16"]
    flags += ["--bf16", "true", "--gradient_checkpointing", "true", "--optim", "paged_adamw_8bit"]
    out = tmp_path / "x"
    result = run(finished[1], *flags, "--output_dir", out)
    assert result.returncode == 0, result.stderr[-4000:]
    norms = logged(out, "grad_norm")
    assert len(norms) == 3
    assert all(norm > 0 for norm in norms)
    assert len(logged(out, "eval_loss")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mse", "cka"])
def test_two_processes_train_all_weights_at_alpha_1_with_an_inner_layer_last(
    finished, tmp_path, loss
):
    """The layers behind it, and where weights are untied the head, still get gradients to wait for."""
    flags = ["--use_lora", "false", "--alpha", 1, "--layer_mapping", "{1: 2}"]
    flags += ["--feature_loss", loss, "--max_steps", 2, "--output_dir", tmp_path / "x"]
    result = launch(RECIPE, finished[1], *flags, config="cpu_ddp.yaml")
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(logged(tmp_path / "x", "loss")) == 2


@pytest.mark.slow
def test_the_embedded_pair_in_one_process_and_in_two(tmp_path, model_cache):
    flags = [*PLAIN[:-1], 0.05, "--max_steps", 4, "--teacher_max_new_tokens", 24]
    flags += ["--projection_init_prompts", 8]
    flags += ["--teacher_temperature", 0, "--completion_store", tmp_path / "c.sqlite"]
    for config, rows in (("cpu.yaml", 4), ("cpu_ddp.yaml", 2)):
        words = ["--per_device_train_batch_size", rows, "--output_dir", tmp_path / config]
        result = launch(RECIPE, EMBEDDED, *flags, *words, config=config)
        assert result.returncode == 0, result.stderr[-4000:]
    one, two = tmp_path / "cpu.yaml", tmp_path / "cpu_ddp.yaml"
    for name in ("loss", "normalised_mse_10_15", "normalised_mse_21_30"):
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-3)
    heldout = record(two)["heldout"]
    assert heldout["after"]["ce_nats"] < heldout["before"]["ce_nats"]
