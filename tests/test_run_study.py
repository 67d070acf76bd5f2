"""Studies through the real command, each run through accelerate launch, on the tiny pair."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from conftest import ROOT, run_command, write_tiny_overlay
from evaluations import evaluate

ADAPTER = "final_model/adapter_model.safetensors"
SFT, KD, COT = "sft-seed_1", "logit_kd-seed_1", "cot-seed_1"
STUDY = {
    "name": "tiny",
    "shared": {"save_steps": 2, "eval_strategy": "no", "max_train_samples": 8},
    "grid": [{"method": ["cot", "sft"]}],
    "seeds": [1],
    "methods": {
        # Refused by its config, which only the run itself builds.
        "cot": {"rationale_instruction": "Think first."},
    },
    "budget": {"optimizer_steps": 4},
}


PAIR = STUDY | {"grid": [{"method": ["sft", "logit_kd"]}], "methods": {}}


def write(folder, content):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def words(folder, overlay, *more):
    start = [sys.executable, "-m", "medistill_trl.study", folder / "study.yaml", overlay]
    start += ["--out", folder / "out", "--config_file", "accelerate_configs/cpu.yaml", *more]
    return [str(word) for word in start]


def states(out):
    return {entry["name"]: entry["state"] for entry in record(out)["runs"]}


def record(out):
    return json.loads((out / "study.json").read_text())


def comparison(out):
    return json.loads((out / "comparison/comparison.json").read_text())


def entry(out, name):
    return next(run for run in record(out)["runs"] if run["name"] == name)


def drawn_in(out):
    """Whose completions of which prompts the store holds."""
    with sqlite3.connect(out / "completions.sqlite") as database:
        return database.execute("SELECT teacher, prompt FROM completions").fetchall()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher_folder, model_cache):
    """Two runs, the first of which fails; looked at by several tests."""
    folder = tmp_path_factory.mktemp("study")
    write(folder, STUDY)
    overlay = write_tiny_overlay(folder, teacher_folder)
    return folder, overlay, run_command(*words(folder, overlay, "--jobs", 2))


def test_a_failed_run_is_reported_and_the_rest_go_on(finished):
    folder, _, result = finished
    out = folder / "out"
    assert result.returncode == 1, result.stderr
    assert states(out) == {COT: "failed", SFT: "finished"}
    assert "cot-seed_1: FAILED" in result.stdout
    assert "rationale_instruction must hold {separator}" in result.stdout
    assert "1 of 2 runs finished" in result.stdout
    assert "Traceback" not in result.stderr
    assert (out / SFT / "COMPLETE").is_file()
    assert "accelerate launch" in (out / f"logs/{SFT}.log").read_text()


def test_the_record_says_what_was_run_and_what_came_out(finished):
    content = record(finished[0] / "out")
    assert content["budget"] == {"kind": "optimizer_steps", "amount": 4, "max_steps": 4}
    run = content["runs"][1]
    assert (run["method"], run["settings"]) == ("sft", {"method": "sft", "seed": 1})
    assert (run["steps"], run["ended_by"], run["exit_code"]) == (4, "schedule", 0)
    assert run["wall_seconds"] > run["training_seconds"] > 0
    assert run["heldout"]["after"]["kl_nats"] != run["heldout"]["before"]["kl_nats"]


def test_the_runs_that_finished_are_compared(finished):
    folder, _, result = finished
    out = folder / "out"
    assert f"comparing: python -m eval.compare {out} --allow_partial" in result.stdout
    compared = comparison(out)
    assert [entry["name"] for entry in compared["configurations"]] == ["sft"]
    assert list(compared["left_out"]) == [str(out / COT)]
    assert "<html" in (out / "comparison/report.html").read_text()


def test_given_again_only_what_is_missing_is_done(finished):
    folder, overlay, _ = finished
    complete = folder / "out" / SFT / "COMPLETE"
    before = complete.stat().st_mtime_ns
    seconds = entry(folder / "out", SFT)["wall_seconds"]
    printed = run_command(*words(folder, overlay, "--commands")).stdout.splitlines()
    assert len(printed) == 3  # the last two: how to compare
    assert "recipes/cot.yaml" in printed[0]
    result = run_command(*words(folder, overlay, "--set", "grid=[{method: [sft]}]"))
    assert result.returncode == 0, result.stderr
    assert "sft-seed_1: finished already" in result.stdout
    assert complete.stat().st_mtime_ns == before
    assert entry(folder / "out", SFT)["wall_seconds"] == seconds


def test_another_recipe_in_the_same_folder_is_refused(finished):
    folder, overlay, _ = finished
    result = run_command(*words(folder, overlay, "--set", "budget.optimizer_steps=5"))
    assert result.returncode == 2
    assert "max_steps: 4.0 then, 5.0 now" in result.stderr
    assert "Give the study another --out" in result.stderr


@pytest.mark.slow
def test_an_evaluation_made_by_hand_counts_where_it_is_what_the_study_would_make(
    finished, sample_build
):
    folder, overlay, _ = finished
    run, (data, *_) = folder / "out" / SFT, sample_build
    asked = ["--data", data, "--tasks", "benchmarks", "--benchmarks", "pubmedqa", "--limit", "2"]
    assert evaluate(run, *asked) == 0

    def left(limit):
        flags = {"data": str(data), "tasks": ["benchmarks"], "benchmarks": ["pubmedqa"]}
        given = f"evaluate={json.dumps(flags | {'limit': limit})}"
        changes = ["--set", "grid=[{method: [sft]}]", given]
        return run_command(*words(folder, overlay, "--commands", *changes)).stdout.splitlines()

    (line, *_) = left(limit=3)
    assert line.startswith(f"python -m eval.run {run} ")
    assert left(limit=2)[0] == "# when all of them have ended:"
    assert entry(folder / "out", SFT)["evaluated"][-1] == "2"


@pytest.mark.slow
def test_the_plan_shows_memory_time_and_the_store(finished):
    folder, overlay, _ = finished
    grid = 'grid=[{"method": ["sft", "on_policy", "cot"]}]'
    result = run_command(*words(folder, overlay, "--dry_run", "--set", grid))
    assert result.returncode == 1  # a run would be refused
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    sft, on_policy, cot = (lines[f"{method}-seed_1"] for method in ("sft", "on_policy", "cot"))
    assert " finished " in sft
    assert "training and held out" in sft
    assert " new " in on_policy
    assert "training" not in on_policy
    assert sft.endswith(" s")
    assert on_policy.endswith("unknown")
    assert " GB " in on_policy
    assert "unknown" in cot
    assert "rationale_instruction must hold {separator}" in result.stdout
    assert not (folder / "out/on_policy-seed_1").exists()


# --- interruptions


def start(command):
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until, "it never came"
        time.sleep(0.05)


def descendants(process):
    return psutil.Process(process.pid).children(recursive=True)


def left_alive(processes, seconds=0):
    """Those still at work; what has ended may wait for a reaper that is not ours."""
    until = time.monotonic() + seconds
    while alive := [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    return alive


def steps_logged(log):
    return log.read_text().count("'loss'") if log.exists() else 0


@pytest.mark.slow
def test_stopped_it_leaves_no_process_and_can_go_on(tmp_path, teacher_folder, model_cache):
    write(tmp_path, PAIR | {"budget": {"seconds": 2.0, "max_steps": 5000}})
    overlay = write_tiny_overlay(tmp_path, teacher_folder)
    process = start(words(tmp_path, overlay))
    log = tmp_path / "out/logs/sft-seed_1.log"
    wait_for(lambda: steps_logged(log) >= 3, process)
    children = descendants(process)
    assert len(children) >= 2  # the launcher and the run
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; the same command goes on from here" in output
    assert not left_alive(children)
    assert states(tmp_path / "out") == {SFT: "stopped", KD: "waiting"}
    result = run_command(*words(tmp_path, overlay, "--set", "grid=[{method: [sft]}]"))
    assert result.returncode == 0, result.stdout
    assert "sft-seed_1: resumed" in result.stdout
    run = entry(tmp_path / "out", "sft-seed_1")
    assert run["ended_by"] == "max_seconds"
    assert 0 < run["steps"] < 5000
    assert run["training_seconds"] >= 2.0


@pytest.mark.slow
def test_killed_and_given_again_it_ends_as_the_same_study(tmp_path, teacher_folder, model_cache):
    """kill -9 of the study alone, in its second run: its runs die with it, and no run is done twice."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed):
        folder.mkdir()
        write(folder, PAIR | {"budget": {"optimizer_steps": 8}})
    overlay = write_tiny_overlay(tmp_path, teacher_folder)
    result = run_command(*words(straight, overlay, "--jobs", 2))
    assert result.returncode == 0, result.stdout
    out, expected = killed / "out", straight / "out"
    process = start(words(killed, overlay))
    wait_for(lambda: steps_logged(out / f"logs/{KD}.log") >= 3, process)
    children = descendants(process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not left_alive(children, seconds=10)
    assert (out / SFT / "COMPLETE").is_file()
    assert not (out / KD / "COMPLETE").exists()
    first = (out / SFT / "COMPLETE").stat().st_mtime_ns
    result = run_command(*words(killed, overlay))
    assert result.returncode == 0, result.stdout
    assert f"{SFT}: finished already" in result.stdout
    assert f"{KD}: resumed" in result.stdout
    assert (out / SFT / "COMPLETE").stat().st_mtime_ns == first
    for name in (SFT, KD):
        assert (out / name / ADAPTER).read_bytes() == (expected / name / ADAPTER).read_bytes()
        assert entry(out, name)["heldout"] == entry(expected, name)["heldout"]
    assert sorted(drawn_in(out)) == sorted(drawn_in(expected))
    for key in ("measures", "primary", "ranking", "curves"):
        assert comparison(out)[key] == comparison(expected)[key], key


@pytest.mark.slow
def test_every_teacher_completion_is_drawn_once(tmp_path, teacher_folder, model_cache):
    write(tmp_path, PAIR)
    overlay = write_tiny_overlay(tmp_path, teacher_folder)
    result = run_command(*words(tmp_path, overlay))
    assert result.returncode == 0, result.stdout
    out = tmp_path / "out"
    drawn = drawn_in(out)
    # To train on, held out, and what the student answers to the latter before training.
    assert len(drawn) == len(set(drawn)) == 8 + 4 + 4
    assert entry(out, SFT)["tokens"]["generated_teacher"] > 0
    assert entry(out, KD)["tokens"]["generated_teacher"] == 0


@pytest.mark.slow
def test_a_second_study_over_the_same_prompts_asks_the_teacher_nothing(
    tmp_path, teacher_folder, model_cache
):
    """Neither to write nor, from stored logits, to read: of Logit-KD it is not even loaded."""
    shared = PAIR["shared"] | {"completion_store": str(tmp_path / "completions.sqlite")}
    stored = {"logit_kd": {"teacher_logits": "stored"}}
    drawn = []
    for folder, seed in ((tmp_path / "first", 1), (tmp_path / "second", 2)):
        folder.mkdir()
        write(folder, PAIR | {"shared": shared, "methods": stored, "seeds": [seed]})
        overlay = write_tiny_overlay(folder, teacher_folder)
        result = run_command(*words(folder, overlay))
        assert result.returncode == 0, result.stdout
        drawn.append(sorted(drawn_in(tmp_path)))
    assert drawn[0] == drawn[1]
    out = tmp_path / "second/out"
    for name in ("sft-seed_2", "logit_kd-seed_2"):
        assert entry(out, name)["tokens"]["generated_teacher"] == 0
    log = (out / "logs/logit_kd-seed_2.log").read_text()
    assert "the teacher was not needed" in log
    assert "loading teacher" not in log


@pytest.mark.slow
def test_tokens_end_the_runs_of_two_processes_alike(tmp_path, teacher_folder, model_cache):
    write(tmp_path, PAIR | {"budget": {"completion_tokens": 150, "max_steps": 50}})
    overlay = write_tiny_overlay(tmp_path, teacher_folder)
    command = [
        word.replace("configs/cpu.yaml", "configs/cpu_ddp.yaml")
        for word in words(tmp_path, overlay)
    ]
    result = run_command(*command)
    assert result.returncode == 0, result.stdout
    runs = record(tmp_path / "out")["runs"]
    assert [run["ended_by"] for run in runs] == ["max_completion_tokens"] * 2
    assert all(150 <= run["tokens"]["trained"] < 300 for run in runs)
    assert runs[0]["steps"] == runs[1]["steps"]


@pytest.mark.slow
def test_an_evaluation_that_fails_fails_its_run_and_is_tried_again(finished, tmp_path):
    _, overlay, _ = finished
    content = STUDY | {"grid": [{"method": ["sft"]}], "methods": {}}
    content["evaluate"] = {"no_such_flag": 1}
    write(tmp_path, content)
    for how in ("started", "started"):
        result = run_command(*words(tmp_path, overlay))
        assert result.returncode == 1
        assert f"sft-seed_1: {how}" in result.stdout
        assert "-m eval.run" in entry(tmp_path / "out", "sft-seed_1")["problem"]
        assert (tmp_path / "out/sft-seed_1/COMPLETE").is_file()
    log = (tmp_path / "out/logs/sft-seed_1.log").read_text()
    assert log.count("accelerate launch") == 1
    assert log.count("-m eval.run") >= 2
