"""Loading: frozen teacher, trainable student, quantisation, pruning, GGUF."""

import pytest
import torch
from conftest import make_model, make_tokenizer

from medistill_trl import model_source, models
from medistill_trl.arguments import StudentArguments, TeacherArguments
from medistill_trl.errors import UserError

CPU = torch.device("cpu")


def load_student(folder, **changes):
    source = model_source.resolve(str(folder))
    args = StudentArguments(student_model=str(folder), student_dtype="float32", **changes)
    return models.load_student(source, models.load_tokenizer(source), args, CPU)


def load_teacher(folder, **changes):
    source = model_source.resolve(str(folder))
    args = TeacherArguments(teacher_model=str(folder), teacher_dtype="float32", **changes)
    student = StudentArguments(student_model=str(folder))
    return models.load_teacher(source, models.load_tokenizer(source), args, student, CPU)


def step(model, ids):
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    return torch.stack([g.norm() for g in gradients])


@pytest.mark.parametrize("bits", [None, "4bit", "8bit"])
def test_the_teacher_is_frozen(teacher_folder, bits):
    changes = {f"teacher_load_in_{bits}": True} if bits else {}
    teacher = load_teacher(teacher_folder, **changes)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher.config.pad_token_id != teacher.config.eos_token_id or (
        teacher.generation_config.pad_token_id not in teacher.generation_config.eos_token_id
    )


@pytest.mark.parametrize("bits", [None, "4bit", "8bit"])
def test_only_the_adapter_of_the_student_is_trained(teacher_folder, bits):
    changes = {f"student_load_in_{bits}": True} if bits else {}
    student = load_student(teacher_folder, **changes)
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    assert (step(student, torch.tensor([[5, 6, 7, 8]])) > 0).all()


def test_full_weights_can_be_trained(teacher_folder):
    student = load_student(teacher_folder, use_lora=False)
    assert all(p.requires_grad for p in student.parameters())


def test_a_4bit_student_still_has_gradients_after_an_evaluation(teacher_folder):
    """On CPUs with AVX512-BF16 bitsandbytes repacks the weights at the first no-grad evaluation
    forward; without `keep_4bit_trainable` all gradients after it are zero, silently."""
    student = load_student(teacher_folder, student_load_in_4bit=True)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    before = step(student, ids)
    student.eval()
    with torch.no_grad():
        student(input_ids=ids)
    after = step(student, ids)
    assert (after > 0).all()
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-6)


def test_unknown_lora_targets_are_named(teacher_folder):
    with pytest.raises(UserError, match=r"lora_target_modules \['nope'\]"):
        load_student(teacher_folder, lora_target_modules=["nope"])


def test_sampling_defaults_of_a_checkpoint_are_dropped_and_its_end_tokens_kept():
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    model.generation_config.update(
        repetition_penalty=1.1, temperature=0.7, do_sample=True, eos_token_id=[2, 0]
    )
    models.set_generation(model, tokenizer)
    assert model.generation_config.eos_token_id == [0, 2]
    assert model.generation_config.repetition_penalty in (None, 1.0)
    assert not model.generation_config.do_sample


def test_pruning_keeps_the_named_layers(teacher_folder, model_cache):
    source = model_source.resolve(str(teacher_folder), keep_layers=[0, 2])
    assert source.config.num_hidden_layers == 2
    pruned = models.AutoModelForCausalLM.from_pretrained(source.location)
    whole = models.AutoModelForCausalLM.from_pretrained(teacher_folder)
    for new, old in ((0, 0), (1, 2)):
        pairs = zip(
            pruned.model.layers[new].parameters(), whole.model.layers[old].parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(pruned.lm_head.weight, whole.lm_head.weight)
    again = model_source.resolve(str(teacher_folder), keep_layers=[0, 2])
    assert again.location == source.location
    assert again.fingerprint == source.fingerprint


def test_keeping_all_layers_changes_nothing(teacher_folder, model_cache):
    source = model_source.resolve(str(teacher_folder), keep_layers=[0, 1, 2, 3])
    ids = torch.tensor([[5, 6, 7]])
    pruned = models.AutoModelForCausalLM.from_pretrained(source.location)
    whole = models.AutoModelForCausalLM.from_pretrained(teacher_folder)
    assert torch.equal(pruned(ids).logits, whole(ids).logits)


def test_a_layer_that_does_not_exist_is_an_error(teacher_folder, model_cache):
    with pytest.raises(UserError, match="has layers 0 to 3, there is no layer 7"):
        model_source.resolve(str(teacher_folder), keep_layers=[0, 7])


def test_the_fingerprint_follows_the_weights(teacher_folder, other_teacher_folder):
    first = model_source.resolve(str(teacher_folder)).fingerprint
    assert first == model_source.resolve(str(teacher_folder)).fingerprint
    assert first != model_source.resolve(str(other_teacher_folder)).fingerprint


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./nowhere", "no such folder"),
        ("package:no_such_package/x.gguf", "is not installed"),
        ("package:json/x.gguf", "no such file"),
        ("nowhere.gguf", "no such file"),
        ("someone/some-model", "recipes/overlays/embedded.yaml"),
    ],
)
def test_a_model_that_is_not_there_is_named_with_what_to_do(name, expected):
    with pytest.raises(UserError, match=expected) as caught:
        model_source.resolve(name)
    assert name in str(caught.value)


def test_a_folder_without_tokenizer_or_safetensors_is_named(tmp_path, teacher_folder, model_cache):
    make_model(600).save_pretrained(tmp_path)
    source = model_source.resolve(str(tmp_path))
    with pytest.raises(UserError, match=r"its tokenizer cannot be loaded.*tokenizer\.json"):
        models.load_tokenizer(source)
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    args = StudentArguments(student_model=str(tmp_path))
    tokenizer = models.load_tokenizer(model_source.resolve(str(teacher_folder)))
    with pytest.raises(UserError, match="Only safetensors are read"):
        models.load_student(source, tokenizer, args, CPU)
    with pytest.raises(UserError, match="Only safetensors are read"):
        model_source.resolve(str(tmp_path), keep_layers=[0])


def test_weights_that_change_in_the_middle_are_other_weights(tmp_path):
    make_model(600, seed=0).save_pretrained(tmp_path)
    first = model_source.resolve(str(tmp_path)).fingerprint
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert model_source.resolve(str(tmp_path)).fingerprint != first


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        model_source.resolve(str(tmp_path))
