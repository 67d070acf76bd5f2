"""The commands of the README, as a user types them, on a tiny pair and on the embedded one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import planted_tokens
import pytest
import torch
from conftest import ROOT, launch, launch_words, run_command, write_tiny_overlay
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SFT = "recipes/sft.yaml"
EMBEDDED = "recipes/overlays/embedded.yaml"


def weights(run: Path) -> bytes:
    return (run / "final_model/adapter_model.safetensors").read_bytes()


def record(run: Path) -> dict:
    return json.loads((run / "results/run.json").read_text())


def assert_complete(run: Path) -> None:
    for name in (
        "recipe.yaml",
        "final_model/adapter_model.safetensors",
        "final_model/tokenizer.json",
        "final_model/README.md",
        "results/run.json",
        "results/training_curves.png",
        "results/report.html",
        "COMPLETE",
    ):
        assert (run / name).is_file(), name
    assert not (run / "final_model/training_args.bin").exists()


# One finished run, looked at by several tests.
@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher_folder, model_cache):
    folder = tmp_path_factory.mktemp("finished")
    overlay = write_tiny_overlay(folder, teacher_folder)
    result = launch(SFT, overlay, "--max_steps", 2, env=planted_tokens.environment())
    assert result.returncode == 0, result.stderr[-4000:]
    return folder / "run", overlay, result


def test_no_token_of_the_user_is_in_what_a_run_writes(finished):
    _run, overlay, result = finished
    assert (overlay.parent / "completions.sqlite").is_file()
    assert planted_tokens.holders(overlay.parent, result.stdout, result.stderr) == []


def test_a_run_leaves_the_whole_run_directory(finished):
    run, _, result = finished
    assert_complete(run)
    assert "held out, after training" in result.stderr
    assert f"report:   {run}/results/report.html" in result.stdout
    assert "Traceback" not in result.stderr


def test_the_record_says_what_was_run_and_what_came_out(finished):
    content = record(finished[0])
    for key in (
        "schema_version", "method", "recipe", "versions", "git_commit", "seed", "device",
        "num_processes", "seconds", "peak_memory_gb", "tokens", "heldout", "log_history",
    ):  # fmt: skip
        assert key in content, key
    assert content["tokens"]["trained"] > 0
    assert content["tokens"]["generated_teacher"] == content["teacher_use"]["tokens"] > 0
    assert content["recipe"]["method"] == "sft"
    for when in ("before", "after"):
        measured = content["heldout"][when]
        assert measured["kl_nats"] > 0
        assert 0 <= measured["top1"] <= 1
        assert measured["prompts"] == 4
    assert content["heldout"]["before"]["kl_nats"] != content["heldout"]["after"]["kl_nats"]
    lines = (finished[0] / "results/items/heldout.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    for when in ("before", "after"):
        rows = [item for item in items if item["stage"] == when]
        assert len(rows) == content["heldout"][when]["prompts"]
        kl = sum(row["kl_nats"] for row in rows) / sum(row["tokens"] for row in rows)
        assert kl == pytest.approx(content["heldout"][when]["kl_nats"])
    assert "(change " in (finished[0] / "results/report.html").read_text()
    assert content["data"]["files"][0]["kept"] == 16


def test_the_final_adapter_loads_with_plain_peft(finished):
    run = finished[0]
    model = AutoPeftModelForCausalLM.from_pretrained(run / "final_model")
    tokenizer = AutoTokenizer.from_pretrained(run / "final_model")
    assert model.config.num_hidden_layers == 2
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_saved_recipe_reproduces_the_run(finished, tmp_path):
    run = finished[0]
    result = launch(run / "recipe.yaml", "--output_dir", tmp_path / "again")
    assert result.returncode == 0, result.stderr[-4000:]
    assert weights(tmp_path / "again") == weights(run)


def test_a_finished_run_is_not_trained_further(finished):
    _, overlay, _ = finished
    for extra in ([], ["--resume"]):
        result = launch(SFT, overlay, "--max_steps", 2, *extra)
        assert result.returncode != 0
        assert "this run is complete and is not trained further" in result.stderr
        assert "Traceback" not in result.stderr


def test_a_dry_run_checks_and_shows_everything_and_writes_nothing(tiny_overlay, tmp_path):
    result = launch(SFT, tiny_overlay, "--dry_run")
    assert result.returncode == 0, result.stderr[-4000:]
    for shown in ("teacher_max_new_tokens: 12", "teacher weights", "peak", "<|im_start|>assistant"):
        assert shown in result.stdout
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "completions.sqlite").exists()


def test_two_processes_train_and_are_those_asked_for(tiny_overlay, tmp_path):
    # Plain SGD: unlike Adam it does not hide a loss that is off by a factor.
    flags = ["--max_steps", 2, "--optim", "sgd", "--learning_rate", 1, "--max_grad_norm", 0]
    flags += ["--lora_dropout", 0]  # each process draws masks of its own
    result = launch(SFT, tiny_overlay, *flags, config="cpu_ddp.yaml")
    assert result.returncode == 0, result.stderr[-4000:]
    assert_complete(tmp_path / "run")
    two = record(tmp_path / "run")
    assert two["num_processes"] == 2
    # One process with twice the rows per device takes the same steps.
    rows = ["--per_device_train_batch_size", 4]
    result = launch(SFT, tiny_overlay, *flags, *rows, "--output_dir", tmp_path / "one")
    assert result.returncode == 0, result.stderr[-4000:]
    one = record(tmp_path / "one")
    adapter = "final_model/adapter_model.safetensors"
    trained, expected = load_file(tmp_path / "run" / adapter), load_file(tmp_path / "one" / adapter)
    for name in expected:
        torch.testing.assert_close(trained[name], expected[name], rtol=1e-3, atol=1e-5)
    for key in ("trained", "generated_teacher"):
        assert two["tokens"][key] == one["tokens"][key]
    for key in ("kl_nats", "ce_nats"):
        assert two["heldout"]["before"][key] == pytest.approx(
            one["heldout"]["before"][key], rel=1e-4
        )
        assert two["heldout"]["after"][key] == pytest.approx(one["heldout"]["after"][key], rel=1e-4)


def test_fewer_processes_than_asked_for_is_an_error(tiny_overlay, tmp_path):
    config = tmp_path / "wrong.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\n"
        "num_machines: 1\nnum_processes: 2\nmixed_precision: 'no'\n"
    )
    result = launch(SFT, tiny_overlay, config=config)
    assert result.returncode != 0
    assert "was asked for 2 processes and started 1" in result.stderr
    assert "cpu_ddp.yaml" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unreachable_hub_is_an_error_within_30_seconds_that_names_a_way_out(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    start = time.monotonic()
    accelerate = Path(sys.executable).parent / "accelerate"
    result = run_command(accelerate, "launch", "recipes/run.py", SFT, env=environment)
    seconds = time.monotonic() - start
    assert result.returncode != 0
    assert "epfl-llm/meditron-7b" in result.stderr
    assert "recipes/overlays/embedded.yaml" in result.stderr
    assert "Traceback" not in result.stderr
    assert seconds < 30


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"id": "a", "source"', "line 1: not JSON"),
        ("", "is empty"),
        ('{"id": "a", "source": "s", "reference": "r"}', "line 1: missing column question"),
        ('{"id": "a", "source": "s", "reference": "r", "question": 5}', "must be a text, got int"),
        (
            json.dumps({"id": "a", "source": "s", "reference": "r", "question": "long " * 900}),
            "more than max_prompt_tokens: 400",
        ),
    ],
)
def test_bad_input_is_named_and_nothing_is_started(tiny_overlay, tmp_path, content, expected):
    data = tmp_path / "bad.jsonl"
    data.write_text(content + "\n" if content else "")
    result = run_command(sys.executable, "recipes/run.py", SFT, tiny_overlay, "--train_file", data)
    assert result.returncode == 2
    assert "bad.jsonl" in result.stderr
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_skipped_rows_are_counted_in_the_record(tiny_overlay, tmp_path):
    data = tmp_path / "mixed.jsonl"
    good = (ROOT / "data_prep/sample/processed/train.jsonl").read_text().splitlines()[:6]
    data.write_text("\n".join([*good[:3], "{broken", *good[3:]]) + "\n")
    flags = ["--train_file", data, "--on_bad_row", "skip", "--max_steps", 1]
    result = run_command(sys.executable, "recipes/run.py", SFT, tiny_overlay, *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    report = record(tmp_path / "run")["data"]["files"][0]
    assert (report["read"], report["kept"]) == (7, 6)
    assert report["skipped"][0].startswith("line 4: not JSON")
    assert "line 4: not JSON" in result.stderr


def test_the_settings_of_a_gpu_run_4bit_bf16_checkpointing(tiny_overlay, tmp_path):
    """Those the recipes have by default, on the tiny pair and the CPU, with evaluations in between."""
    flags = ["--max_steps", 3, "--eval_strategy", "steps", "--eval_steps", 1]
    for role in ("teacher", "student"):
        flags += [f"--{role}_load_in_4bit", "true", f"--{role}_dtype", "bfloat16"]
    flags += ["--bf16", "true", "--gradient_checkpointing", "true", "--optim", "paged_adamw_8bit"]
    result = run_command(sys.executable, "recipes/run.py", SFT, tiny_overlay, *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    history = record(tmp_path / "run")["log_history"]
    norms = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
    assert len(norms) == 3
    assert all(norm > 0 for norm in norms)  # also after the first evaluation


def test_a_pair_with_different_tokenizers_trains_and_says_what_is_not_defined(
    tiny_overlay, tmp_path, other_teacher_folder
):
    flags = ["--teacher_model", other_teacher_folder, "--max_steps", 2]
    result = run_command(sys.executable, "recipes/run.py", SFT, tiny_overlay, *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    after = record(tmp_path / "run")["heldout"]["after"]
    assert after["kl_nats"] is None
    assert "different tokenizers" in after["note"]
    assert after["bits_per_byte"] > 0
    assert "bits per byte" in (tmp_path / "run/results/report.html").read_text()


def test_full_weights_train_and_are_saved(tiny_overlay, tmp_path):
    flags = ["--use_lora", "false", "--max_steps", 2]
    result = run_command(sys.executable, "recipes/run.py", SFT, tiny_overlay, *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/final_model")
    assert model.config.num_hidden_layers == 2


def test_a_teacher_that_is_its_own_student_completes(tiny_overlay, tmp_path):
    flags = ["--student_keep_layers", "null", "--max_steps", 1]
    result = run_command(sys.executable, "recipes/run.py", SFT, tiny_overlay, *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    assert record(tmp_path / "run")["heldout"]["before"]["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert_complete(tmp_path / "run")


# --- kill and resume -------------------------------------------------------------------------------


def kill_after(words: list[str], steps: int) -> bool:
    """Start a run and kill it, launcher and all, once it has logged `steps` steps; False if it ended
    before that."""
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    seen = 0
    for line in process.stdout:
        seen += "'loss'" in line
        if seen >= steps:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
    process.wait()
    return False


STRESS = [
    "--lora_dropout", "0.1", "--teacher_temperature", "1.0", "--max_steps", "12", "--save_steps", "3",
    "--eval_strategy", "steps", "--eval_steps", "4",
]  # fmt: skip


@pytest.fixture(
    params=[
        pytest.param(("online", "cpu.yaml"), marks=pytest.mark.slow),
        ("stored", "cpu.yaml"),
        ("online", "cpu_ddp.yaml"),
    ],
    ids=["online", "stored", "online-2-processes"],
)
def straight_and_killed(request, tiny_overlay, tmp_path):
    """The same run twice: uninterrupted, and killed -9 at a random step past the second checkpoint."""
    mode, config = request.param
    flags = [SFT, tiny_overlay, *STRESS, "--teacher_completions", mode]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    result = launch(*flags, "--output_dir", straight, config=config)
    assert result.returncode == 0, result.stderr[-4000:]
    step = random.randint(8, 11)
    words = [*flags, "--output_dir", killed]
    assert kill_after(launch_words(*words, config=config), step), f"it ended before step {step}"
    return straight, killed, words, step, config


def test_killed_and_resumed_is_the_same_run_bit_for_bit(straight_and_killed):
    straight, killed, words, step, config = straight_and_killed
    assert not (killed / "COMPLETE").exists()
    refused = run_command(sys.executable, "recipes/run.py", *words)
    assert refused.returncode == 2
    assert "continue it with --resume" in refused.stderr
    other = ["--learning_rate", "0.5", "--resume"]
    refused = run_command(sys.executable, "recipes/run.py", *words, *other)
    assert refused.returncode == 2
    assert "learning_rate: 0.01 when started, 0.5 now" in refused.stderr
    if config == "cpu_ddp.yaml":  # one process would see other batches than two
        refused = run_command(sys.executable, "recipes/run.py", *words, "--resume")
        assert refused.returncode == 2
        assert "num_processes: 2 when started, 1 now" in refused.stderr
    newest = max((killed / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    (newest / "optimizer.pt").unlink(
        missing_ok=True
    )  # a damaged checkpoint is passed over for the one before it
    resumed = launch(*words, "--resume", config=config)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert f"{newest}: not used: " in resumed.stderr
    assert f"resuming from {killed}/checkpoints" in resumed.stderr
    assert "its manifest lacks" not in resumed.stderr
    assert weights(killed) == weights(straight), f"killed at step {step}"
    one, two = record(straight), record(killed)
    assert one["heldout"] == two["heldout"]
    if "online" in words:  # stored completions were drawn by the first of the two runs
        assert one["tokens"] == two["tokens"]
    assert one["tokens"]["trained"] == two["tokens"]["trained"]
    assert_complete(killed)


def test_killed_after_the_last_step_only_the_results_are_made(tiny_overlay, tmp_path):
    flags = [SFT, tiny_overlay, "--max_steps", 2, "--save_steps", 1]
    run = tmp_path / "run"
    result = run_command(sys.executable, "recipes/run.py", *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    before, first = weights(run), record(run)
    for path in (
        run / "COMPLETE",
        run / "results/run.json",
        run / "final_model/adapter_model.safetensors",
    ):
        path.unlink()
    result = run_command(sys.executable, "recipes/run.py", *flags, "--resume")
    assert result.returncode == 0, result.stderr[-4000:]
    assert weights(run) == before
    assert record(run)["heldout"] == first["heldout"]
    assert record(run)["tokens"] == first["tokens"]
    assert_complete(run)


def test_a_prompt_file_that_changed_is_not_resumed(tiny_overlay, tmp_path):
    data = tmp_path / "data.jsonl"
    lines = (ROOT / "data_prep/sample/processed/train.jsonl").read_text().splitlines()[:8]
    data.write_text("\n".join(lines) + "\n")
    flags = [SFT, tiny_overlay, "--train_file", data, *STRESS]
    assert kill_after([sys.executable, "recipes/run.py", *map(str, flags)], 5)
    data.write_text("\n".join(lines[::-1]) + "\n")
    result = run_command(sys.executable, "recipes/run.py", *flags, "--resume")
    assert result.returncode == 2
    assert f"sha256 of {data}" in result.stderr


def test_nothing_to_resume_is_an_error(tiny_overlay):
    result = run_command(sys.executable, "recipes/run.py", SFT, tiny_overlay, "--resume")
    assert result.returncode == 2
    assert "nothing to resume" in result.stderr


# --- the embedded pair -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", ["cpu.yaml", pytest.param("cpu_ddp.yaml", marks=pytest.mark.slow)]
)
def test_the_embedded_pair_trains(tmp_path, model_cache, config):
    flags = ["--max_steps", 4, "--output_dir", tmp_path / "x", "--teacher_max_new_tokens", 24]
    store = ["--completion_store", tmp_path / "c.sqlite"]
    result = launch(SFT, EMBEDDED, *flags, *store, config=config)
    assert result.returncode == 0, result.stderr[-4000:]
    assert_complete(tmp_path / "x")
    heldout = record(tmp_path / "x")["heldout"]
    assert heldout["after"]["kl_nats"] < heldout["before"]["kl_nats"]
