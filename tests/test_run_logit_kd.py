"""Logit-KD and AdaKD through the real entry point: recipes, processes, quantisation, refusals, resume."""

import json
import re
import sys

import pytest
import torch
from conftest import launch, run_command
from safetensors.torch import load_file

RECIPES = {method: f"recipes/{method}.yaml" for method in ("logit_kd", "adakd")}
EMBEDDED = "recipes/overlays/embedded.yaml"
ADAPTER = "final_model/adapter_model.safetensors"
# Plain SGD: unlike Adam it does not hide a loss that is off by a factor.
PLAIN = ["--optim", "sgd", "--max_grad_norm", 0, "--lora_dropout", 0, "--learning_rate"]


def record(run):
    return json.loads((run / "results/run.json").read_text())


def logged(run, name):
    return [entry[name] for entry in record(run)["log_history"] if name in entry]


def run(method, *words):
    return run_command(sys.executable, "recipes/run.py", RECIPES[method], *words)


@pytest.mark.parametrize("method", RECIPES)
def test_two_steps_of_each_recipe(tiny_overlay, tmp_path, method):
    result = run(method, tiny_overlay, "--max_steps", 2)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "TRLExperimentalWarning" not in result.stderr
    out = tmp_path / "run"
    assert (out / "COMPLETE").is_file()
    assert record(out)["method"] == method
    for name in ("loss", "ce_nats", "kl_nats", "student_entropy_nats", "teacher_entropy_nats"):
        assert len(logged(out, name)) == 2, name
    temperatures = ("temperature_mean", "clipped_low_share", "clipped_high_share")
    assert all(len(logged(out, name)) == (2 if method == "adakd" else 0) for name in temperatures)
    assert record(out)["heldout"]["after"]["kl_nats"] >= 0


def test_two_processes_take_the_steps_of_one(tiny_overlay, tmp_path):
    flags = [*PLAIN, 1, "--max_steps", 2, "--lmbda", 0]
    result = launch(RECIPES["logit_kd"], tiny_overlay, *flags, config="cpu_ddp.yaml")
    assert result.returncode == 0, result.stderr[-4000:]
    rows = ["--per_device_train_batch_size", 4, "--output_dir", tmp_path / "one"]
    result = launch(RECIPES["logit_kd"], tiny_overlay, *flags, *rows)
    assert result.returncode == 0, result.stderr[-4000:]
    two, one = tmp_path / "run", tmp_path / "one"
    assert record(two)["num_processes"] == 2
    for name in ("loss", "ce_nats", "kl_nats"):
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-4)
    trained, expected = load_file(two / ADAPTER), load_file(one / ADAPTER)
    for name in expected:
        torch.testing.assert_close(trained[name], expected[name], rtol=1e-3, atol=1e-5)
    assert record(two)["tokens"]["trained"] == record(one)["tokens"]["trained"]


def test_4bit_teacher_and_student_with_gradients_after_an_evaluation(tiny_overlay, tmp_path):
    flags = ["--max_steps", 3, "--eval_strategy", "steps", "--eval_steps", 1]
    for role in ("teacher", "student"):
        flags += [f"--{role}_load_in_4bit", "true", f"--{role}_dtype", "bfloat16"]
    flags += ["--bf16", "true", "--gradient_checkpointing", "true", "--lmbda", "0.5"]
    result = run("logit_kd", tiny_overlay, *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    norms = logged(tmp_path / "run", "grad_norm")
    assert len(norms) == 3
    assert all(norm > 0 for norm in norms)


def test_killed_between_checkpoints_it_goes_on_as_if_it_had_not_been(tiny_overlay, tmp_path):
    flags = ["--max_steps", 4, "--save_steps", 2, "--lmbda", 0.5, "--teacher_temperature", 1]
    assert run("logit_kd", tiny_overlay, *flags).returncode == 0
    stopped = ["--output_dir", tmp_path / "stopped"]
    result = run("logit_kd", tiny_overlay, *flags, *stopped)
    assert result.returncode == 0, result.stderr[-4000:]
    # As after a kill: only the first checkpoint is there.
    folder = tmp_path / "stopped"
    for path in sorted((folder / "checkpoints/checkpoint-4").iterdir()):
        path.unlink()
    (folder / "checkpoints/checkpoint-4").rmdir()
    (folder / "COMPLETE").unlink()
    result = run("logit_kd", tiny_overlay, *flags, *stopped, "--resume")
    assert result.returncode == 0, result.stderr[-4000:]
    assert (folder / ADAPTER).read_bytes() == (tmp_path / "run" / ADAPTER).read_bytes()


def test_a_pair_with_different_tokenizers_is_refused_and_told_what_works(
    tiny_overlay, tmp_path, other_teacher_folder
):
    flags = ["--teacher_model", other_teacher_folder, "--cross_tokenizer", "refuse"]
    result = run("logit_kd", tiny_overlay, *flags)
    assert result.returncode == 2
    assert "their tokenizers differ: " in result.stderr
    assert re.search(r"a method that passes text: .*\bsft\b", result.stderr)
    assert "Traceback" not in result.stderr
    assert "cross_tokenizer: auto" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", RECIPES)
def test_a_pair_with_different_tokenizers_in_one_process_and_in_two(
    tiny_overlay, tmp_path, method, other_teacher_folder
):
    flags = [*PLAIN, 1, "--max_steps", 2, "--lmbda", 0, "--teacher_model", other_teacher_folder]
    for config, rows in (("cpu.yaml", 4), ("cpu_ddp.yaml", 2)):
        words = ["--per_device_train_batch_size", rows, "--output_dir", tmp_path / config]
        result = launch(RECIPES[method], tiny_overlay, *flags, *words, config=config)
        assert result.returncode == 0, result.stderr[-4000:]
        assert "compared over spans" in result.stderr
    one, two = tmp_path / "cpu.yaml", tmp_path / "cpu_ddp.yaml"
    for name in ("loss", "ce_nats", "kl_nats", "one_to_one_share", "teacher_shared_mass", "top1"):
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-4), name
    trained, expected = load_file(two / ADAPTER), load_file(one / ADAPTER)
    for name in expected:
        torch.testing.assert_close(trained[name], expected[name], rtol=1e-3, atol=1e-5)
    assert record(one)["heldout"]["after"]["teacher_bits_per_byte"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", RECIPES)
def test_the_embedded_pair_in_one_process_and_in_two(tmp_path, model_cache, method):
    flags = [*PLAIN, 0.05, "--max_steps", 4, "--teacher_max_new_tokens", 24]
    flags += ["--teacher_temperature", 0, "--completion_store", tmp_path / "c.sqlite"]
    for config, rows in (("cpu.yaml", 4), ("cpu_ddp.yaml", 2)):
        words = ["--per_device_train_batch_size", rows, "--output_dir", tmp_path / config]
        result = launch(RECIPES[method], EMBEDDED, *flags, *words, config=config)
        assert result.returncode == 0, result.stderr[-4000:]
    one, two = tmp_path / "cpu.yaml", tmp_path / "cpu_ddp.yaml"
    for name in ("loss", "kl_nats"):
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-3)
    heldout = record(two)["heldout"]
    assert heldout["after"]["kl_nats"] < heldout["before"]["kl_nats"]
