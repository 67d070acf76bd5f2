"""Every method, the data build, the evaluation and a study, killed at random and resumed: bit for bit the same.

    make torture [KILLS=4] [SEED=0]

The seeds of the kills are printed; `SEED` repeats them.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
import yaml
from conftest import ROOT, write_tiny_overlay
from processes import Command, Kills, preload
from test_run_cot import SHORT, craft_for

from medistill_trl import recipe
from medistill_trl.checkpoints import newest_valid

KILLS = int(os.environ.get("KILLS", "4"))
SEED = int(os.environ.get("SEED", "0"))
STEPS = ["--save_steps", "2", "--heldout_prompts", "2", "--eval_strategy", "no"]
# What makes a resumed run of a method hard: side files, several uses of a sample, dropout, sampling.
HARD = {
    "sft": ["--teacher_temperature", "1.0", "--lora_dropout", "0.1"],
    "logit_kd": ["--lmbda", "0.5", "--lora_dropout", "0.1"],
    "adakd": ["--temperature_rule", "difficulty"],
    "cot": [str(word) for word in SHORT],
    "on_policy": ["--num_iterations", "2"],
    "ppo": ["--num_ppo_epochs", "2", "--num_mini_batches", "2", "--value_learning_rate", "0.01"],
    "bond": ["--objective", "jeffreys", "--num_samples", "2", "--anchor_ema", "0.2"],
    "spin": ["--num_iterations", "2", "--generation_batch_size", "3"],
}


@pytest.fixture(scope="module")
def commands():
    return preload()


def digest(folder, *patterns):
    """Name → sha256 of the files of a folder."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    assert found, f"{folder}: nothing there"
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in found
        if p.is_file()
    }


# In a checkpoint: clocks, paths, digests of these, and names of modules in the order of a set.
NOT_COMPARED = {
    "manifest.json", "totals.json", "trainer_state.json", "training_args.bin", "adapter_config.json",
}  # fmt: skip


def outcome(run):
    """What two runs of the same recipe have in common, whatever interrupted them."""
    record = json.loads((run / "results/run.json").read_text())
    assert (run / "COMPLETE").is_file()
    return {
        "weights": digest(run, "final_model/*.safetensors"),
        "heldout": record["heldout"],
        "steps": record["steps"],
        "trained": record["tokens"]["trained"],
        "losses": [
            (e["step"], e["loss"], e["grad_norm"]) for e in record["log_history"] if "loss" in e
        ],
        "state": last_state(run),
    }


def last_state(run):
    """All that a further step would start from: name → digest of each file of the last checkpoint."""
    checkpoint, passed_over = newest_valid(run / "checkpoints")
    assert passed_over == {}
    found = {"checkpoint": checkpoint.name}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name not in NOT_COMPARED:
            content = path.read_bytes()
            if path.suffix in (".pt", ".pth"):  # equal values are pickled in more than one way
                content = plain(torch.load(path, weights_only=False)).encode()
            found[str(path.relative_to(checkpoint))] = hashlib.sha256(content).hexdigest()
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= found.keys()
    return found


def plain(value):
    """A text that is the same for equal values alone, of what torch saves."""
    match value:
        case torch.Tensor():
            array = value.contiguous().view(torch.uint8) if value.dim() else value
            return f"{value.dtype}{list(value.shape)}{array.tolist()}"
        case np.ndarray():
            return f"{value.dtype}{value.tolist()}"
        case dict():
            return f"{{{', '.join(f'{key!r}: {plain(item)}' for key, item in value.items())}}}"
        case list() | tuple():
            return f"[{', '.join(map(plain, value))}]"
        case _:
            return repr(value)


def straight(command):
    """Run it undisturbed; returns its seconds."""
    start = time.monotonic()
    assert command.finish() == 0, command.tail()
    return time.monotonic() - start


def torture(name, seed, command, compare, resume=lambda folder: []):
    """Kill a command `KILLS` times, in as many folders as that takes, and compare each with one that was left alone.

    Args:
        command: Name of a folder → the command that fills it.
        compare: Asserts that two folders, by name, hold the same.
        resume: What to add to a command that was killed.
    """
    seconds = straight(command("straight"))
    kills = Kills(SEED + seed, KILLS)
    for number in itertools.count():
        folder = f"killed_{number}"
        kills.until_finished(command(folder), seconds, lambda folder=folder: resume(folder))
        compare(folder, "straight")
        if len(kills.done) == KILLS:
            break
    print(f"\n{name}: undisturbed {seconds:.1f} s, {number + 1} runs, {kills}")


@pytest.mark.parametrize("method", recipe.methods())
def test_a_run_killed_at_random_ends_as_the_same_run(
    method, commands, tmp_path, teacher_folder, model_cache
):
    overlay = write_tiny_overlay(tmp_path, teacher_folder)
    craft_for(
        tmp_path, teacher_folder
    )  # chain of thought asks for rationales a tiny teacher cannot give
    limit = [] if method == "spin" else ["--max_steps", "6"]  # its iterations end it

    def command(name):
        flags = [*STEPS, *limit, *HARD.get(method, []), "--output_dir", str(tmp_path / name)]
        store = tmp_path / f"{name}.sqlite"
        shutil.copy(tmp_path / "completions.sqlite", store)
        flags += ["--completion_store", str(store)]
        words = [f"recipes/{method}.yaml", str(overlay), *flags]
        return Command(commands["train"], words, tmp_path / f"{name}.log")

    def compare(killed, straight):
        assert outcome(tmp_path / killed) == outcome(tmp_path / straight)

    begun = []  # of the resumed runs, the steps that they found done

    def resume(folder):
        if not (tmp_path / folder / "recipe.yaml").exists():
            return []
        checkpoint = newest_valid(tmp_path / folder / "checkpoints")[0]
        begun.append(checkpoint and int(checkpoint.name.split("-")[1]))
        return ["--resume"]

    torture(method, recipe.methods().index(method), command, compare, resume)
    print(f"{method}: resumed after steps {begun}")


def test_a_data_build_killed_at_random_ends_as_the_same_build(commands, tmp_path):
    def command(name):
        words = ["--out", str(tmp_path / name), "--sample", "--jobs", "1"]
        return Command(commands["build"], words, tmp_path / f"{name}.log")

    def compare(killed, straight):
        patterns = ("*.jsonl", "*/*.jsonl", "*/*/*.jsonl")
        assert digest(tmp_path / killed, *patterns) == digest(tmp_path / straight, *patterns)
        reports = (tmp_path / name / "build_report.json" for name in (killed, straight))
        one, other = (json.loads(path.read_text())["files"] for path in reports)
        assert one == other

    torture("data build", 100, command, compare)


def test_an_evaluation_killed_at_random_ends_as_the_same_evaluation(
    commands, tmp_path, teacher_folder, model_cache, sample_build
):
    def command(name):
        words = ["--model", str(teacher_folder), "--data", str(sample_build[0])]
        words += ["--tasks", "benchmarks", "perplexity", "--limit", "6"]
        words += ["--out", str(tmp_path / name)]
        cache = {"MEDISTILL_CACHE": str(tmp_path / f"{name}_cache")}
        return Command(commands["evaluate"], words, tmp_path / f"{name}.log", cache)

    def compare(killed, straight):
        items = "results/items/*.jsonl"
        assert digest(tmp_path / killed, items) == digest(tmp_path / straight, items)
        files = (f"{name}/results/comprehensive_evaluation.json" for name in (killed, straight))
        one, other = (json.loads((tmp_path / file).read_text())["results"] for file in files)
        assert one == other

    torture("evaluation", 101, command, compare)


STUDY = {
    "name": "tiny",
    "shared": {"save_steps": 2, "eval_strategy": "no", "max_train_samples": 8},
    "grid": [{"method": ["sft"]}],
    "seeds": [1],
    "budget": {"optimizer_steps": 6},
}


def test_a_study_killed_at_random_ends_as_the_same_study(tmp_path, teacher_folder, model_cache):
    """Real commands all the way down: the study alone is killed, and its runs must die with it."""
    overlay = write_tiny_overlay(tmp_path, teacher_folder)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))

    def start(name):
        words = ["-m", "medistill_trl.study", tmp_path / "study.yaml", overlay]
        words += ["--out", tmp_path / name, "--config_file", "accelerate_configs/cpu.yaml"]
        log = (tmp_path / f"{name}.log").open("a")
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    begun = time.monotonic()
    assert start("straight").wait(600) == 0
    seconds = time.monotonic() - begun
    draw = random.Random(SEED + 102)
    for _ in range(max(1, KILLS // 2)):
        study = start("killed")
        after = draw.uniform(0, seconds)
        time.sleep(after)
        children = (
            psutil.Process(study.pid).children(recursive=True) if study.poll() is None else []
        )
        study.kill()
        assert study.wait(10) in (0, -signal.SIGKILL)
        print(f"\nstudy: seed {SEED + 102}, undisturbed {seconds:.1f} s, SIGKILL at {after:.1f} s")
        _, alive = psutil.wait_procs(children, timeout=60)
        assert alive == []
    assert start("killed").wait(600) == 0
    run = "sft-seed_1"
    assert outcome(tmp_path / "killed" / run) == outcome(tmp_path / "straight" / run)
