"""The exactly counted parts of the plan equal the real models."""

import pytest
import torch
from conftest import make_model, make_tokenizer

from medistill_trl import memory_plan, model_source
from medistill_trl.arguments import DataArguments, RunArguments, StudentArguments, TeacherArguments
from medistill_trl.methods.attention import AttentionConfig
from medistill_trl.methods.fitnets import FitNetsConfig
from medistill_trl.methods.logit_kd import LogitKDConfig
from medistill_trl.methods.sft import SFTDistillConfig
from medistill_trl.methods.spin import SpinConfig
from medistill_trl.models import load_student, load_tokenizer
from medistill_trl.setting import Arguments


def parts_of(
    folder, tmp_path, student=None, teacher=None, config_class=SFTDistillConfig, **training
):
    config = config_class(output_dir=str(tmp_path), bf16=False, use_cpu=True, **training)
    arguments = Arguments(
        RunArguments(method="sft"),
        StudentArguments(student_model=str(folder), student_dtype="float32", **(student or {})),
        TeacherArguments(teacher_model=str(folder), teacher_dtype="bfloat16", **(teacher or {})),
        DataArguments(train_file="t", validation_file="v"),
        config,
    )
    source = model_source.resolve(str(folder))
    return memory_plan.plan(arguments, source, source), arguments, source


def gb(parts, start):
    return next(part.gb for part in parts if part.name.startswith(start))


def test_weights_and_adapter_are_counted_exactly(teacher_folder, tmp_path):
    parts, arguments, source = parts_of(teacher_folder, tmp_path, optim="adamw_torch")
    student = load_student(source, load_tokenizer(source), arguments.student, torch.device("cpu"))
    adapter = sum(p.numel() for p in student.parameters() if p.requires_grad)
    base = sum(p.numel() for p in student.parameters() if not p.requires_grad)
    assert gb(parts, "student weights") == pytest.approx(base * 4 / 1e9)
    assert gb(parts, "teacher weights") == pytest.approx(base * 2 / 1e9)
    assert gb(parts, "LoRA adapter") == pytest.approx(adapter * 4 / 1e9)
    assert gb(parts, "optimizer state") == pytest.approx(adapter * 8 / 1e9)


def test_the_kv_cache_is_that_of_a_generation(teacher_folder, tmp_path):
    parts, arguments, _ = parts_of(
        teacher_folder, tmp_path, teacher={"teacher_max_new_tokens": 8, "teacher_batch_size": 3}
    )
    length = arguments.data.max_prompt_tokens + 8
    model = make_model(len(make_tokenizer())).bfloat16()
    cache = model(torch.ones(3, length, dtype=torch.long), use_cache=True).past_key_values
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert gb(parts, "teacher KV cache") == pytest.approx(measured / 1e9)


def test_quantisation_and_checkpointing_lower_the_plan(teacher_folder, tmp_path):
    plain, *_ = parts_of(teacher_folder, tmp_path, gradient_checkpointing=False)
    four, *_ = parts_of(teacher_folder, tmp_path, student={"student_load_in_4bit": True})
    eight, *_ = parts_of(teacher_folder, tmp_path, student={"student_load_in_8bit": True})
    weights = [gb(parts, "student weights") for parts in (four, eight, plain)]
    assert weights == sorted(weights)
    assert len(set(weights)) == 3
    assert gb(four, "student activations") < gb(plain, "student activations")


def test_distillation_holds_chunks_of_both_models_logits(teacher_folder, tmp_path):
    given = {"config_class": LogitKDConfig, "student": {"use_lora": False}}
    _, arguments, source = parts_of(teacher_folder, tmp_path, loss_chunk_size=64, **given)
    parts = memory_plan.distillation_memory(arguments, source.config, source.config)
    vocabulary = source.config.vocab_size
    # A vocabulary this small is worked on in one block, so ten buffers beside the two models' logits.
    assert gb(parts, "loss, 64") == pytest.approx(4 * 64 * vocabulary * (2 + 10) / 1e9)
    assert gb(parts, "gradient of the output head") == pytest.approx(
        4 * vocabulary * source.config.hidden_size / 1e9
    )
    _, arguments, _ = parts_of(teacher_folder, tmp_path, loss_chunk_size=128, **given)
    twice = memory_plan.distillation_memory(arguments, source.config, source.config)
    assert gb(twice, "loss, 128") == pytest.approx(2 * gb(parts, "loss, 64"))


def test_preferences_hold_two_completions_a_pair_and_a_full_students_reference(
    teacher_folder, tmp_path
):
    given = {"config_class": SpinConfig, "per_device_train_batch_size": 3}
    plain, arguments, source = parts_of(teacher_folder, tmp_path, **given)
    parts = memory_plan.preference_memory(arguments, source.config, source.config)
    rejected = gb(parts, "activations of the rejected")
    assert rejected == pytest.approx(gb(plain, "student activations"))
    length = memory_plan.longest(arguments)
    logits = 2 * 3 * length * source.config.vocab_size
    assert gb(parts, "loss, 2 × 3") == pytest.approx(4 * 3 * logits / 1e9)
    assert len(parts) == 2
    full, arguments, _ = parts_of(teacher_folder, tmp_path, student={"use_lora": False}, **given)
    parts = memory_plan.preference_memory(arguments, source.config, source.config)
    assert gb(parts, "reference weights") == gb(full, "student weights")


def test_hidden_states_are_held_of_the_mapped_layers_and_projections_in_full(
    teacher_folder, tmp_path
):
    given = {
        "config_class": FitNetsConfig,
        "per_device_train_batch_size": 3,
        "optim": "adamw_torch",
    }

    def planned(**training):
        _, arguments, source = parts_of(teacher_folder, tmp_path, **given, **training)
        return memory_plan.feature_memory(arguments, source.config, source.config), arguments

    two, arguments = planned(num_layer_pairs=2)
    # Weight, gradient and Adam's two values, in float32.
    assert gb(two, "2 projections") == pytest.approx(2 * 4 * 4 * (64 + 1) * 64 / 1e9)
    tokens = 3 * memory_plan.longest(arguments)
    states = 2 * tokens * (2 * 64 + 4 * 4 * 64)
    assert gb(two, "states of 2 layer pairs") == pytest.approx(states / 1e9)
    one, _ = planned(layer_mapping={2: 3})
    assert gb(one, "states of 1 layer pairs") == pytest.approx(states / 2 / 1e9)
    bare, _ = planned(feature_loss="cka", alpha=1.0)
    names = " ".join(part.name for part in bare)
    assert "projections" not in names
    assert "logits" not in names
    assert "logits" in " ".join(part.name for part in two)


def test_the_peak_is_the_larger_phase():
    part = memory_plan.Part
    parts = [part("w", 2, "always"), part("kv", 3, "generate"), part("act", 1, "train")]
    assert memory_plan.peak(parts) == (5, "generate")
    assert "5.00 GB  in phase generate" in memory_plan.to_text(parts)


def test_a_student_that_writes_needs_a_cache_for_its_window(teacher_folder, tmp_path):
    from medistill_trl.methods.on_policy import METHOD

    _, arguments, source = parts_of(
        teacher_folder, tmp_path, config_class=METHOD.config,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    parts = METHOD.loss_memory(arguments, source.config, source.config)
    length = memory_plan.longest(arguments)
    config = source.config
    head_dim = config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * 8 * length * config.num_key_value_heads * head_dim * 4
    assert gb(parts, "student KV cache, 8 ×") == pytest.approx(size / 1e9)
    assert gb(parts, "teacher forward") > 0


def test_an_anchor_is_a_second_adapter_in_float32(teacher_folder, tmp_path):
    from medistill_trl.methods.bond import METHOD

    def parts_with(**training):
        plain, arguments, source = parts_of(
            teacher_folder, tmp_path, config_class=METHOD.config, num_samples=2, **training
        )
        return plain, METHOD.loss_memory(arguments, source.config, source.config)

    plain, anchored = parts_with(objective="jeffreys")
    assert gb(anchored, "anchor adapter") == pytest.approx(gb(plain, "LoRA adapter"))
    _, without = parts_with(objective="best_of_n_sft")
    assert len(without) == len(anchored) - 1


def test_a_rollout_is_drawn_at_once(teacher_folder, tmp_path):
    from medistill_trl.methods.ppo import METHOD

    _, arguments, source = parts_of(
        teacher_folder, tmp_path, config_class=METHOD.config, num_mini_batches=3,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    parts = METHOD.loss_memory(arguments, source.config, source.config)
    window = memory_plan.policy_memory(arguments, source.config, source.config)
    rollout = gb(parts, "student KV cache, 24 ×")
    assert rollout == pytest.approx(3 * gb(window, "student KV cache, 8 ×"))
    assert gb(parts, "value head") == pytest.approx(16 * (source.config.hidden_size + 1) / 1e9)


def test_attention_holds_a_chunk_of_scores_and_what_the_mapped_layers_attend_with(
    teacher_folder, tmp_path
):
    given = {"config_class": AttentionConfig, "per_device_train_batch_size": 2}
    _, arguments, source = parts_of(teacher_folder, tmp_path, attention_chunk_size=32, **given)
    config, length = source.config, memory_plan.longest(arguments)
    parts = memory_plan.attention_memory(arguments, config, config)
    heads = config.num_attention_heads
    scores = 4 * 6 * 2 * heads * 32 * length  # six float32 buffers
    assert gb(parts, f"loss, 32 × {length} scores of {heads} heads") == pytest.approx(scores / 1e9)
    width = (heads + 2 * config.num_key_value_heads) * config.hidden_size // heads
    kept = 4 * 2 * 2 * length * 5 * width  # two pairs, two rows; three times the student's
    assert gb(parts, "queries, keys and values of 2") == pytest.approx(kept / 1e9)
    assert gb(parts, "teacher forward") > 0
