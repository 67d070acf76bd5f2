"""Chain of thought through the real entry point: processes, records, kill and resume."""

import json
import sqlite3
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, launch, launch_words, run_command, write_tiny_overlay
from crafted_rationales import store_completions
from safetensors.torch import load_file

from medistill_trl import methods, model_source
from medistill_trl.completion_store import CompletionStore
from medistill_trl.data import read_prompts
from medistill_trl.models import load_tokenizer
from medistill_trl.prompts import PromptFormat
from medistill_trl.teacher import Sampling

COT = "recipes/cot.yaml"
EMBEDDED = "recipes/overlays/embedded.yaml"
ADAPTER = "final_model/adapter_model.safetensors"
TRAIN_FILE = ROOT / "data_prep/sample/processed/train.jsonl"
# Plain SGD: unlike Adam it does not hide a loss that is off by a factor.
PLAIN = ["--optim", "sgd", "--learning_rate", 1, "--max_grad_norm", 0, "--lora_dropout", 0]
SHORT = ["--rationale_max_new_tokens", 24, "--num_rationales", 3]


def record(run):
    return json.loads((run / "results/run.json").read_text())


def logged(run, name):
    return [entry[name] for entry in record(run)["log_history"] if name in entry]


def rationales(run):
    return [
        json.loads(line) for line in (run / "results/rationales.jsonl").read_text().splitlines()
    ]


def craft_for(folder, teacher_folder, skip=(), loaded_as="float32"):
    """Rationales for the first 16 prompts of the sample, as a run with `SHORT` will look for them.

    Args:
        skip: Numbers of prompts whose rationales have no separator.
        loaded_as: The teacher's dtype and quantisation, as a run names them.
    """
    source = model_source.resolve(str(teacher_folder))
    form = PromptFormat(load_tokenizer(source))
    config = methods.load("cot").config(output_dir=str(folder), bf16=False, use_cpu=True)
    prompts, _ = read_prompts(str(TRAIN_FILE), "fail", 16)
    texts = {}
    for number, prompt in enumerate(prompts):
        answers = (prompt.answer, "something else", prompt.answer)
        mark = "I say" if number in skip else "Final answer:"
        texts[config.rationale_format().ask(prompt.question)] = [
            f"Reason {n}: {prompt.reference[:80]}\n\n{mark} {answer}"
            for n, answer in enumerate(answers)
        ]
    store = CompletionStore(folder / "completions.sqlite")
    store_completions(store, f"{source.fingerprint} {loaded_as}", form, Sampling(24, 0.7), texts)


# One run in one process and the same in two, looked at by several tests.
@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory, teacher_folder, model_cache):
    folder = tmp_path_factory.mktemp("cot")
    overlay = write_tiny_overlay(folder, teacher_folder)
    craft_for(folder, teacher_folder, skip=(3, 7))
    flags = [*PLAIN, *SHORT, "--max_steps", 2, "--rationale_weight", 0.5, "--answer_weight", 2]
    flags += ["--keep", "all"]
    outputs = []
    for config, rows in (("cpu.yaml", 4), ("cpu_ddp.yaml", 2)):
        words = ["--per_device_train_batch_size", rows, "--output_dir", folder / config]
        result = launch(COT, overlay, *flags, *words, config=config)
        assert result.returncode == 0, result.stderr[-4000:]
        outputs.append(result.stderr)
    return folder / "cpu.yaml", folder / "cpu_ddp.yaml", outputs


def test_a_run_leaves_its_rationales_their_account_and_the_usual_record(one_and_two):
    run, _, outputs = one_and_two
    assert (run / "COMPLETE").is_file()
    content = record(run)
    assert content["method"] == "cot"
    for when in ("before", "after"):
        assert content["heldout"][when]["kl_nats"] > 0
    assert content["heldout"]["before"] != content["heldout"]["after"]
    account = json.loads((run / "results/rationales_summary.json").read_text())
    counts = {fate: count for fate, count in account["by_fate"].items() if count}
    assert counts == {"kept": 28, "wrong_answer": 14, "no_separator": 6}
    assert account["prompts"] == {"total": 16, "with_rationale": 14, "fallback": 2, "dropped": 0}
    assert account["drawn"] == len(rationales(run)) == 48
    assert "rationales: 28 of 48 kept (wrong_answer 14, no_separator 6)" in outputs[0]
    assert "14 of 16 have a rationale, 2 fall back to a plain answer" in outputs[0]
    assert ">wrong_answer<" in (run / "results/report.html").read_text()
    assert len(logged(run, "rationale_ce_nats")) == len(logged(run, "answer_ce_nats")) == 2


def test_two_processes_select_alike_and_take_the_steps_of_one(one_and_two):
    one, two, outputs = one_and_two
    assert record(two)["num_processes"] == 2
    assert outputs[1].count("rationales: 28 of 48 kept") == 1  # one process speaks
    for mine, theirs in zip(rationales(one), rationales(two), strict=True):
        assert mine.pop("score") == pytest.approx(theirs.pop("score"), abs=2e-4)
        assert mine == theirs
    for name in ("loss", "rationale_ce_nats", "answer_ce_nats"):
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-4)
    trained, expected = load_file(two / ADAPTER), load_file(one / ADAPTER)
    for name in expected:
        torch.testing.assert_close(trained[name], expected[name], rtol=1e-3, atol=1e-5)
    assert record(two)["tokens"]["trained"] == record(one)["tokens"]["trained"]


def test_the_settings_of_a_gpu_run_4bit_bf16_checkpointing(tiny_overlay, tmp_path, teacher_folder):
    """Both models in 4 bits: the teacher's scores, and gradients after an evaluation."""
    craft_for(tmp_path, teacher_folder, loaded_as="bfloat16 4bit nf4 double_quant")
    flags = [*SHORT, "--max_steps", 2, "--eval_strategy", "steps", "--eval_steps", 1]
    for role in ("teacher", "student"):
        flags += [f"--{role}_load_in_4bit", "true", f"--{role}_dtype", "bfloat16"]
    flags += ["--bf16", "true", "--gradient_checkpointing", "true", "--answer_weight", 2]
    words = [sys.executable, "recipes/run.py", COT, tiny_overlay, *flags]
    result = run_command(*words)
    assert result.returncode == 0, result.stderr[-4000:]
    norms = logged(tmp_path / "run", "grad_norm")
    assert len(norms) == 2
    assert all(norm > 0 for norm in norms)
    kept = [row for row in rationales(tmp_path / "run") if row["fate"] == "kept"]
    assert len(kept) == 16
    assert all(row["score"] < 0 for row in kept)


def test_a_dry_run_shows_what_the_teacher_is_asked_and_what_is_learnt(tiny_overlay, tmp_path):
    result = run_command(sys.executable, "recipes/run.py", COT, tiny_overlay, "--dry_run")
    assert result.returncode == 0, result.stderr[-4000:]
    asked, learnt = result.stdout.split("# what the student sees")
    assert 'starts with "Final answer:"' in asked
    assert "Final answer: no<|im_end|>" in learnt
    assert not (tmp_path / "run").exists()


# --- kill and resume -------------------------------------------------------------------------------


def stored(path):
    """Key → (time, tokens) of every completion in the store."""
    if not path.exists():
        return {}
    with sqlite3.connect(path) as database:
        try:
            found = database.execute(
                "SELECT key, created, token_ids, end_id, sampling FROM completions"
            ).fetchall()
        except sqlite3.OperationalError:  # the table is about to be made
            return {}
    return {
        key: (created, len(json.loads(ids)) + (end is not None), json.loads(sampling))
        for key, created, ids, end, sampling in found
    }


def sampled(rows):
    return {key for key, (_, _, sampling) in rows.items() if sampling["temperature"] > 0}


@pytest.mark.parametrize(
    "config", [pytest.param("cpu.yaml", marks=pytest.mark.slow), "cpu_ddp.yaml"]
)
def test_killed_while_the_teacher_writes_nothing_is_written_twice(tiny_overlay, tmp_path, config):
    flags = ["--rationale_max_new_tokens", 60, "--num_rationales", 3, "--max_train_samples", 5]
    flags += ["--teacher_batch_size", 1, "--max_steps", 1]
    store = tmp_path / "completions.sqlite"
    process = subprocess.Popen(
        launch_words(COT, tiny_overlay, *flags, config=config),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(sampled(stored(store))) < 4 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in everyone:
        each.kill()  # -9, launcher and processes alike
    process.wait()
    psutil.wait_procs(everyone[1:], timeout=60)
    kept = stored(store)
    assert 4 <= len(sampled(kept)) < 15
    result = launch(COT, tiny_overlay, *flags, "--resume", config=config)
    assert result.returncode == 0, result.stderr[-4000:]
    after = stored(store)
    assert len(sampled(after)) == 15
    assert {key: after[key] for key in kept} == kept
    written = sum(tokens for key, (_, tokens, _) in after.items() if key not in kept)
    assert record(tmp_path / "run")["tokens"]["generated_teacher"] == written
    assert "no rationale was kept" in result.stderr  # a random teacher reasons like one


@pytest.mark.slow
def test_the_embedded_pair_in_one_process_and_in_two(tmp_path, model_cache):
    flags = ["--optim", "sgd", "--learning_rate", 0.05, "--max_steps", 2, "--max_grad_norm", 0]
    flags += ["--teacher_max_new_tokens", 24]
    flags += ["--max_train_samples", 8, "--num_rationales", 2, "--rationale_max_new_tokens", 64]
    flags += ["--teacher_temperature", 0, "--completion_store", tmp_path / "c.sqlite"]
    for config, rows in (("cpu.yaml", 4), ("cpu_ddp.yaml", 2)):
        words = ["--per_device_train_batch_size", rows, "--output_dir", tmp_path / config]
        result = launch(COT, EMBEDDED, *flags, *words, config=config, timeout=900)
        assert result.returncode == 0, result.stderr[-4000:]
    one, two = tmp_path / "cpu.yaml", tmp_path / "cpu_ddp.yaml"
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), rel=1e-3)
    heldout = record(two)["heldout"]
    assert heldout["after"]["ce_nats"] < heldout["before"]["ce_nats"]
    assert len(rationales(one)) == len(rationales(two)) == 16
