"""Logit-KD from stored teacher logits through the real entry point: one teacher pass, then none."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, launch, launch_words, run_command

RECIPE = "recipes/logit_kd.yaml"
ADAPTER = "final_model/adapter_model.safetensors"
STORED = ["--teacher_completions", "stored", "--teacher_logits", "stored"]
NEEDED, SPARED = "the teacher is let go of", "the teacher was not needed"


def record(run):
    return json.loads((run / "results/run.json").read_text())


def logged(run, name):
    return [entry[name] for entry in record(run)["log_history"] if name in entry]


def run(*words):
    return run_command(sys.executable, "recipes/run.py", RECIPE, *words)


@pytest.mark.slow
def test_a_second_run_over_the_same_prompts_never_loads_the_teacher(tiny_overlay, tmp_path):
    flags = [*STORED, "--max_steps", 2, "--max_train_samples", 8]
    first = run(tiny_overlay, *flags)
    assert first.returncode == 0, first.stderr[-4000:]
    assert NEEDED in first.stderr
    assert first.stderr.count("loading teacher") == 1
    # Another student of the same teacher.
    other = ["--student_keep_layers", "[0, 1, 3]", "--output_dir", tmp_path / "other"]
    second = run(tiny_overlay, *flags, *other)
    assert second.returncode == 0, second.stderr[-4000:]
    assert SPARED in second.stderr
    assert "loading teacher" not in second.stderr
    tokens = [record(tmp_path / name)["tokens"] for name in ("run", "other")]
    assert tokens[0]["generated_teacher"] > 0 == tokens[1]["generated_teacher"]
    assert tokens[0]["trained"] == tokens[1]["trained"]
    for name in ("run", "other"):
        assert record(tmp_path / name)["heldout"]["after"]["kl_nats"] > 0
        assert len(logged(tmp_path / name, "teacher_tail_mass")) == 2
        assert (tmp_path / name / "COMPLETE").is_file()


@pytest.mark.slow
def test_it_trains_as_online_in_one_process_and_in_two(tiny_overlay, tmp_path):
    plain = ["--optim", "sgd", "--max_grad_norm", 0, "--lora_dropout", 0, "--learning_rate", 1]
    completions, logits = STORED[:2], STORED[2:]
    flags = [*completions, *plain, "--max_steps", 3, "--teacher_logits_top_k", 600]
    runs = {
        "online": ("cpu.yaml", 4, ["--teacher_logits", "online"]),
        "one": ("cpu.yaml", 4, logits),
        "two": ("cpu_ddp.yaml", 2, [*logits, "--completion_store", tmp_path / "two.sqlite"]),
    }
    for name, (config, rows, more) in runs.items():
        words = ["--per_device_train_batch_size", rows, "--output_dir", tmp_path / name, *more]
        result = launch(RECIPE, tiny_overlay, *flags, *words, config=config)
        assert result.returncode == 0, result.stderr[-4000:]
    for name in ("loss", "kl_nats", "ce_nats", "top1"):
        expected = logged(tmp_path / "online", name)
        assert logged(tmp_path / "one", name) == pytest.approx(expected, rel=1e-3), name
        assert logged(tmp_path / "two", name) == pytest.approx(expected, rel=1e-3), name
    heldout = [record(tmp_path / name)["heldout"] for name in runs]
    for other in heldout[1:]:
        assert other["before"]["kl_nats"] == pytest.approx(
            heldout[0]["before"]["kl_nats"], rel=1e-6
        )


@pytest.mark.slow
def test_killed_while_the_teacher_reads_it_goes_on_to_the_same_weights(tiny_overlay, tmp_path):
    flags = [*STORED, "--max_steps", 4, "--save_steps", 2, "--teacher_batch_size", 1]
    assert run(tiny_overlay, *flags).returncode == 0
    again = ["--output_dir", tmp_path / "killed", "--completion_store", tmp_path / "k/c.sqlite"]
    words = launch_words(RECIPE, tiny_overlay, *flags, *again)
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "k/c.logits").glob("*/kept.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / ADAPTER).exists()
    result = run(tiny_overlay, *flags, *again, "--resume")
    assert result.returncode == 0, result.stderr[-4000:]
    assert (tmp_path / "killed" / ADAPTER).read_bytes() == (tmp_path / "run" / ADAPTER).read_bytes()
