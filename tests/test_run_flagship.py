"""The ten recipes on the flagship's overlay, with its tokenizer families, through the real entry point."""

import json
import math

import pytest
import torch
import yaml
from conftest import ROOT, launch, write_tiny_overlay
from flagship_pair import llama_model, llama_tokenizer, qwen_model, qwen_tokenizer
from safetensors.torch import load_file

FLAGSHIP = ROOT / "recipes/overlays/meditron70b_qwen2.yaml"
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.yaml"))
# What shows that the two models were compared span by span.
COMPARED = {
    "fitnets": "normalised_mse_2_4",
    "attention": "map_mse",
    "on_policy": "kl_to_teacher_nats",
    "ppo": "kl_to_teacher_nats",
}
# Plain SGD: unlike Adam it does not hide a loss that is off by a factor.
PLAIN = ["--optim", "sgd", "--max_grad_norm", 0, "--lora_dropout", 0, "--learning_rate", 0.1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of the two models."""
    folder = tmp_path_factory.mktemp("flagship")
    for name, model, tokenizer in (
        ("teacher", llama_model(), llama_tokenizer()),
        ("student", qwen_model(), qwen_tokenizer()),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def overlay(pair, tmp_path, model_cache):
    path = write_tiny_overlay(tmp_path, pair / "teacher")
    changes = {"student_model": str(pair / "student"), "student_keep_layers": None}
    changes |= {"completion_store": str(pair / "completions.sqlite")}
    changes |= {"cot": {"rationale_max_new_tokens": 24, "num_rationales": 2}}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps_of_every_recipe(overlay, tmp_path, recipe):
    flags = ["--max_steps", 2, "--heldout_prompts", 4]
    result = launch(f"recipes/{recipe}", FLAGSHIP, overlay, *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    assert (tmp_path / "run/COMPLETE").is_file()
    record = json.loads((tmp_path / "run/results/run.json").read_text())
    losses = logged(record, "loss")
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    before, after = record["heldout"]["before"], record["heldout"]["after"]
    assert before["bits_per_byte"] != after["bits_per_byte"] > 0
    name = COMPARED.get(recipe.removesuffix(".yaml"))
    if name:
        compared = logged(record, name)
        assert compared
        assert all(value != 0 and math.isfinite(value) for value in compared)
        assert all(0.3 < share <= 1 for share in logged(record, "span_share"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "compared"),
    [("fitnets", ["normalised_mse_1_2", "normalised_mse_2_4"]), ("attention", ["map_mse"])],
)
def test_two_processes_take_the_steps_of_one(overlay, tmp_path, method, compared):
    steps = ["--max_steps", 2, "--teacher_completions", "stored", "--teacher_temperature", 1]
    words = [f"recipes/{method}.yaml", FLAGSHIP, overlay, *PLAIN, *steps, "--heldout_prompts", 4]
    records, adapters = [], []
    for config, rows in (("cpu.yaml", 4), ("cpu_ddp.yaml", 2)):
        out = tmp_path / config
        flags = ["--per_device_train_batch_size", rows, "--output_dir", out]
        result = launch(*words, *flags, config=config)
        assert result.returncode == 0, result.stderr[-4000:]
        records.append(json.loads((out / "results/run.json").read_text()))
        adapters.append(load_file(out / "final_model/adapter_model.safetensors"))
    one, two = records
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert one["tokens"]["trained"] == two["tokens"]["trained"]
    for name in ("loss", "ce_nats", "span_share", *compared):
        assert len(logged(one, name)) == 2
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-3), name
    for key, expected in adapters[0].items():
        torch.testing.assert_close(adapters[1][key], expected, rtol=1e-3, atol=1e-5)


def logged(record, name):
    return [entry[name] for entry in record["log_history"] if name in entry]
