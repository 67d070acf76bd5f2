"""A model that is not whole is refused before anything is drawn from it."""

import json
import shutil

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from eval import subjects
from eval.options import ModelOptions
from medistill_trl import model_source, models
from medistill_trl.arguments import StudentArguments, TeacherArguments
from medistill_trl.errors import UserError
from medistill_trl.model_checks import reading

CPU = torch.device("cpu")


@pytest.fixture
def folder(teacher_folder, tmp_path):
    return shutil.copytree(teacher_folder, tmp_path / "model")


def load(folder, **changes):
    source = model_source.resolve(str(folder))
    student = StudentArguments(student_model=str(folder), student_dtype="float32", **changes)
    tokenizer = models.load_tokenizer(source)
    models.load_student(source, tokenizer, student, CPU)
    teacher = TeacherArguments(teacher_model=str(folder), teacher_dtype="float32")
    models.load_teacher(source, tokenizer, teacher, student, CPU)


def change_weight(folder, name, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensor = change(tensors.pop(name))
    save_file(tensors | ({} if tensor is None else {name: tensor}), path, metadata={"format": "pt"})


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_value(value):
    def change(tensor):
        tensor.flatten()[7] = value
        return tensor

    return change


NORM = "model.layers.1.input_layernorm.weight"
DAMAGE = {
    "a weight that is missing": (
        lambda f: change_weight(f, NORM, lambda tensor: None),
        "lack 1 of its weights",
    ),
    "NaN": (lambda f: change_weight(f, NORM, with_value(float("nan"))), f"{NORM} holds NaN"),
    "infinity": (lambda f: change_weight(f, NORM, with_value(float("inf"))), f"{NORM} holds NaN"),
    "minus infinity": (
        lambda f: change_weight(f, NORM, with_value(float("-inf"))),
        f"{NORM} holds NaN",
    ),
    "another shape": (lambda f: change_weight(f, NORM, lambda t: t[:32].clone()), "weights cannot be loaded"),
    "a weight that is cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "download them again",
    ),
    "more layers than weights": (lambda f: change_config(f, num_hidden_layers=6), "of its weights"),
    "an unknown activation": (lambda f: change_config(f, hidden_act="nope"), "weights cannot be loaded"),
    "heads that do not divide": (lambda f: change_config(f, num_attention_heads=5), "cannot be loaded"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "config cannot be loaded"),
    "a config of a list": (lambda f: (f / "config.json").write_text("[]"), "config cannot be loaded"),
    "an end that is no token": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [2, "</s>"]}'),
        "which is no token id",
    ),
    "a tokenizer that is no JSON": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        r"tokenizer cannot be loaded",
    ),
    "another model's tokenizer": (
        lambda f: make_tokenizer(700).save_pretrained(f),
        "600 embeddings; tokenizer and weights are not of one model",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_model_is_refused(folder, damage, reason):
    load(folder)
    damage(folder)
    with pytest.raises(UserError, match=reason) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_a_head_that_is_the_embedding_is_not_missing(tmp_path):
    tokenizer = make_tokenizer()
    make_model(len(tokenizer), tie_word_embeddings=True).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load(tmp_path)


def test_a_broken_4bit_model_is_seen_by_what_it_says(folder):
    change_weight(folder, "model.layers.0.mlp.up_proj.weight", with_value(float("nan")))
    with pytest.raises(UserError, match=r"gives NaN or infinity for a token|holds NaN"):
        load(folder, student_load_in_4bit=True)


def test_tokens_added_beyond_the_embeddings_are_told(folder, caplog):
    tokenizer = models.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    load(folder)
    assert "1 added tokens lie beyond its 600 embeddings, such as '<extra>'" in caplog.text


def test_an_adapter_that_lacks_weights_is_refused(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapter = tmp_path / "adapter"
    source = model_source.resolve(str(folder))
    arguments = StudentArguments(student_model=str(folder), student_dtype="float32", use_lora=False)
    plain = models.load_student(source, models.load_tokenizer(source), arguments, CPU)
    get_peft_model(plain, LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({key: tensors[key] for key in tensors if key != name}, path)
    with pytest.raises(UserError, match=f"lacks {name}"):
        _ = subjects.load_models(ModelOptions(model=str(adapter))).student.model
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="must be of a LoRA adapter"):
        subjects.load_models(ModelOptions(model=str(adapter)))


def test_running_out_of_memory_is_no_damage():
    with pytest.raises(torch.OutOfMemoryError), reading("m", "weights", "download it"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(KeyboardInterrupt), reading("m", "weights", "download it"):
        raise KeyboardInterrupt
