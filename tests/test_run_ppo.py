"""PPO through the real entry point: recipe, processes, quantisation, kill and resume."""

import json
import sys

import pytest
import torch
from conftest import launch, launch_words, run_command, write_tiny_overlay
from peft import PeftModel
from safetensors.torch import load_file
from test_run import kill_after
from transformers import AutoModelForCausalLM

RECIPE = "recipes/ppo.yaml"
ADAPTER = "final_model/adapter_model.safetensors"
# Rollouts of two minibatches, gone through twice: the checkpoints at 3, 6 and 9 lie amid one.
TWICE = ["--num_ppo_epochs", 2, "--num_mini_batches", 2, "--max_steps", 10, "--save_steps", 3]
REWARDS = ("reward_mean", "explained_variance", "kl_to_teacher_nats", "kl_to_start_nats")


def record(run):
    return json.loads((run / "results/run.json").read_text())


def logged(run, name):
    return [entry[name] for entry in record(run)["log_history"] if name in entry]


def pruned(folder):
    """The student of the tiny pair: the teacher's layers 0 and 3."""
    student = AutoModelForCausalLM.from_pretrained(folder)
    student.model.layers = torch.nn.ModuleList([student.model.layers[n] for n in (0, 3)])
    for number, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = number
    student.config.num_hidden_layers = 2
    return student


@pytest.fixture(scope="module")
def straight(tmp_path_factory, teacher_folder, model_cache):
    """A run from beginning to end, in one process."""
    folder = tmp_path_factory.mktemp("straight")
    overlay = write_tiny_overlay(folder, teacher_folder)
    result = launch(RECIPE, overlay, *TWICE)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder / "run"


def test_the_recipe_runs_and_logs(straight):
    assert (straight / "COMPLETE").is_file()
    rollouts = 3  # before steps 1, 5 and 9
    for name in (
        *REWARDS, "reward_std", "truncation_rate", "completion_tokens_mean",
        "generated_tokens_per_second",
    ):  # fmt: skip
        assert len(logged(straight, name)) == rollouts, name
    for name in (
        "loss", "grad_norm", "entropy_nats", "clip_fraction", "approx_kl_nats", "value_loss",
        "value_clip_fraction",
    ):  # fmt: skip
        assert len(logged(straight, name)) == 10, name
    assert len(logged(straight, "eval_reward_mean")) >= 1
    tokens = record(straight)["tokens"]
    assert tokens["trained"] > tokens["generated_student"] > 0
    assert tokens["generated_teacher"] == 0


def test_the_final_model_is_an_adapter_for_a_plain_base(straight, teacher_folder):
    assert not any("value" in name for name in load_file(straight / ADAPTER))
    assert not list((straight / "final_model").glob("*value*"))
    model = PeftModel.from_pretrained(pruned(teacher_folder), straight / "final_model")
    loaded = {n: w for n, w in model.state_dict().items() if "lora_B" in n}
    assert loaded
    assert all(weight.abs().max() > 0 for weight in loaded.values())
    kept = sorted(path.name for path in (straight / "checkpoints/checkpoint-9").glob("*.pt"))
    assert kept == ["optimizer.pt", "rollout_0.pt", "scheduler.pt", "value_head.pt"]


@pytest.mark.slow
def test_two_processes_take_one_step_on_what_both_drew(tiny_overlay, tmp_path, teacher_folder):
    """Kept amid its uses, the rollout tells what was drawn; whitening and step are done again from it."""
    flags = ["--use_lora", "false", "--kl_coef", 0, "--optim", "sgd", "--learning_rate", 1]
    flags += ["--lr_scheduler_type", "constant", "--max_grad_norm", 0, "--entropy_coef", 0.1]
    flags += ["--gradient_accumulation_steps", 1, "--save_steps", 1, "--max_steps", 2]
    result = launch(RECIPE, tiny_overlay, *flags, config="cpu_ddp.yaml")
    assert result.returncode == 0, result.stderr[-4000:]
    folder = tmp_path / "run/checkpoints/checkpoint-1"
    drawn = [torch.load(folder / f"rollout_{n}.pt", weights_only=True) for n in range(2)]
    assert drawn[0][0]["input_ids"].tolist() != drawn[1][0]["input_ids"].tolist()
    samples = drawn[0] + drawn[1]
    assert len(samples) == 4
    white = torch.cat([sample["advantages"] for sample in samples])
    raw = torch.cat([sample["returns"] - sample["values"] for sample in samples])  # in equal units
    torch.testing.assert_close(white, (raw - raw.mean()) / raw.std(correction=0))
    student, loss = pruned(teacher_folder), 0
    for sample in samples:
        labels = sample["labels"]
        first = int((labels >= 0).nonzero()[0])
        log_p = student(sample["input_ids"][None]).logits[0, first - 1 : -1].log_softmax(-1)
        chosen = log_p[range(len(log_p)), labels[first:]]
        torch.testing.assert_close(chosen, sample["log_probs"], rtol=1e-4, atol=1e-4)
        loss = loss - sample["advantages"] @ chosen + 0.1 * (log_p.exp() * log_p).sum()
    (loss / len(white)).backward()
    after = AutoModelForCausalLM.from_pretrained(folder)
    for (name, before), stepped in zip(student.named_parameters(), after.parameters(), strict=True):
        expected = before.detach() - before.grad
        torch.testing.assert_close(stepped, expected, rtol=1e-3, atol=1e-4, msg=name)
    scale = torch.load(folder / "value_head.pt", weights_only=True)["scale"]
    assert scale > 0


@pytest.mark.slow
def test_4bit_teacher_and_student_with_gradients_after_an_evaluation(tiny_overlay, tmp_path):
    flags = ["--max_steps", 4, "--eval_strategy", "steps", "--eval_steps", 1]
    for role in ("teacher", "student"):
        flags += [f"--{role}_load_in_4bit", "true", f"--{role}_dtype", "bfloat16"]
    flags += ["--bf16", "true", "--gradient_checkpointing", "true", "--optim", "paged_adamw_8bit"]
    result = run_command(sys.executable, "recipes/run.py", RECIPE, tiny_overlay, *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    norms = logged(tmp_path / "run", "grad_norm")
    assert len(norms) == 4
    assert all(norm > 0 for norm in norms)
    adapter = load_file(tmp_path / "run" / ADAPTER)
    assert {weight.dtype for weight in adapter.values()} == {torch.bfloat16}
    assert any(weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu.yaml", "cpu_ddp.yaml"])
def test_killed_and_resumed_it_earns_the_same_rewards(
    tiny_overlay, tmp_path, straight, config, teacher_folder
):
    if config == "cpu_ddp.yaml":
        other = tmp_path / "straight"
        result = launch(RECIPE, tiny_overlay, *TWICE, "--output_dir", other, config=config)
        assert result.returncode == 0, result.stderr[-4000:]
        straight = other
    words = [RECIPE, tiny_overlay, *TWICE, "--output_dir", tmp_path / "killed"]
    killed = tmp_path / "killed"
    assert kill_after(launch_words(*words, config=config), 7), "it ended before step 7"
    assert not (killed / "COMPLETE").exists()
    result = launch(*words, "--resume", config=config)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "resuming from" in result.stderr
    assert (killed / ADAPTER).read_bytes() == (straight / ADAPTER).read_bytes()
    for name in (*REWARDS, "value_loss", "clip_fraction"):
        assert logged(killed, name) == logged(straight, name), name
    assert record(killed)["tokens"] == record(straight)["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu.yaml", "cpu_ddp.yaml"])
def test_the_embedded_pair(tmp_path, model_cache, config):
    """Two rollouts of a sample or two each, in one process and in two."""
    flags = ["--per_device_train_batch_size", 1, "--num_ppo_epochs", 2, "--max_steps", 3]
    flags += [
        "--teacher_max_new_tokens",
        16,
        "--heldout_prompts",
        2,
        "--output_dir",
        tmp_path / "e",
    ]
    result = launch(RECIPE, "recipes/overlays/embedded.yaml", *flags, config=config, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(logged(tmp_path / "e", "reward_mean")) == 2
    assert all(norm > 0 for norm in logged(tmp_path / "e", "grad_norm"))
    assert logged(tmp_path / "e", "clip_fraction")[0] == 0
