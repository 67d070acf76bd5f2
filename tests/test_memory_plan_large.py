"""The memory plan of large models, and what the command says of it."""

import re
import sys

import pytest
from conftest import run_command
from planned_models import SHAPES, arguments, llama, phase, planner

from benchmarks.scale import REPORT, SMALL, planned
from medistill_trl import methods
from medistill_trl.memory.plan import PHASES, teacher_resident, usable

TWELVE_GIB = 12 * 2**30 / 1e9


def test_the_reports_recipe_takes_less_than_twelve_gib_in_every_phase():
    found = planned(REPORT)
    phases = found.plan().phases
    assert [phase.name for phase in phases] == list(PHASES)
    assert all(phase.gb < TWELVE_GIB for phase in phases)
    with_it, without = (found.train(4, checkpointing) for checkpointing in (True, False))
    assert with_it.gb == phases[2].gb
    assert 12 < without.gb < 20
    # 6.5 billion weights at half a byte and a scale, and the embeddings in bfloat16.
    assert with_it.parts["teacher weights"] == pytest.approx(3.87, abs=0.02)
    # Of every layer the input, and one layer computed again.
    assert with_it.parts["student activations"] > 22 * 4 * 1024 * 2048 * 2 / 1e9
    # Twelve answers of 1024 tokens, keys and values of 32 layers, 2 bytes each.
    assert phases[0].parts["KV cache"] == pytest.approx(12 * 1024 * 32 * 2 * 4096 * 2 / 1e9)


@pytest.mark.parametrize("method", ["sft", "logit_kd"])
def test_the_recipes_as_they_are_take_less_than_twelve_gib_in_every_phase(method):
    """By 16 answers of 768 tokens at a time."""
    found = planned(f"recipes/{method}.yaml {SMALL}")
    assert all(phase.gb < TWELVE_GIB for phase in found.plan().phases)
    assert found.plan().phases[0].parts["KV cache"] > 6


def test_a_student_that_writes_beside_the_teacher_answers_as_many():
    def rows(**teacher):
        given = arguments(
            "logit_kd", teacher=teacher, lmbda=0.5, per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
        )  # fmt: skip
        return methods.load("logit_kd").memory.student_rows(given)

    assert rows() == 8
    assert rows(teacher_batch_size=3) == 3
    assert rows(teacher_batch_size=9) == 8


@pytest.fixture(scope="module")
def shown():
    """What `medistill plan` prints; only two files named config.json exist of the models."""
    words = ["recipes/logit_kd.yaml", "--max_prompt_tokens", "768", "--vram", "32"]
    for role, name in (("teacher", "meditron_7b"), ("student", "tinyllama_1.1b")):
        words += [f"--{role}_model", SHAPES / name]
    result = run_command(sys.executable, "-m", "medistill_trl.memory", *words)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_the_command_shows_parts_phases_and_micro_batches(shown):
    assert "4 examples of 768 + 256 tokens, with gradient checkpointing" in shown
    rows = re.findall(r"^  (\S.*?)  +(\d+\.\d\d(?: +\d+\.\d\d)*)$", shown, re.M)
    table = {name: [float(cell) for cell in cells.split()] for name, cells in rows}
    one, four, eight = table["with gradient checkpointing"]
    assert one < four == table["together"][2] < eight
    assert four == pytest.approx(planned(REPORT).train(4, True).gb, abs=0.05)
    assert table["KV cache"] == [pytest.approx(16 * 1024 * 32 * 2 * 4096 * 2 / 1e9, abs=0.01)]
    assert table["without gradient checkpointing"][1] > 2 * four


@pytest.mark.slow
def test_the_command_names_the_largest_micro_batches(shown):
    most = [int(n) for n in re.findall(r"^  (\d+) with(?:out)? gradient", shown, re.M)]
    assert len(most) == 2
    assert most[0] > 4 * most[1] > 4


def test_micro_batches_go_on_in_a_line():
    given = arguments("logit_kd", per_device_train_batch_size=4)
    found = planner(given, llama(3), llama(3), "cuda")
    room = found.train(11, False).gb
    assert found.largest_micro_batch(room * 1.001, False) == 11
    assert found.largest_micro_batch(room * 0.999, False) == 10
    assert found.largest_micro_batch(1e-6, False) == 0
    eleven = arguments("logit_kd", per_device_train_batch_size=11)
    assert planner(eleven, llama(3), llama(3), "cuda").train(11, False).gb == pytest.approx(
        room, rel=0.01
    )


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_deep_student_is_planned_from_shallow_ones(checkpointing):
    given = arguments("logit_kd", student={"use_lora": False})
    shallow = planner(given, llama(9), llama(4))
    deep = planner(given, llama(9), llama(4))
    deep._depths = [9]  # the whole student at once
    found = [one.train(8, checkpointing) for one in (shallow, deep)]
    assert found[0].gb == pytest.approx(found[1].gb, rel=1e-3)
    assert found[0].parts.keys() == found[1].parts.keys()


def test_checkpointing_and_bits_lower_what_is_planned():
    def train(checkpointing=False, **student):
        given = arguments("logit_kd", student, per_device_train_batch_size=8)
        return planner(given, llama(3), llama(3)).train(8, checkpointing).gb

    assert train(checkpointing=True) < 0.6 * train()
    assert train(student_load_in_4bit=True) < train(student_load_in_8bit=True)


def test_models_of_other_vocabularies_are_planned_as_of_other_tokenizers():
    """The student's gradient over all of its tokens, and the outcomes that both have."""

    def loss(vocab_size):
        given = arguments("logit_kd", per_device_train_batch_size=4, loss_chunk_size=64)
        student = llama(3, vocab_size=vocab_size)
        peaks = planner(given, student, llama(3)).training_peaks(4, False)
        return peaks["forward"]["loss"]

    few_more, many_more = loss(610), loss(6100)
    assert many_more > few_more + 4 * 64 * (6100 - 610)


@pytest.mark.parametrize("own", [1, 2])
def test_micro_batches_of_one_row_have_no_padding_and_no_part_in_the_line(own):
    given = arguments("sft", per_device_train_batch_size=own)
    found = planner(given, llama(3), llama(3))
    one, two, four, six = (found.train(rows, False) for rows in (1, 2, 4, 6))
    part = "student activations"
    assert 2 * one.parts[part] < 0.97 * two.parts[part]
    assert six.gb - four.gb == pytest.approx(four.gb - two.gb, rel=1e-6)


def test_a_device_keeps_room_for_what_is_not_planned():
    assert usable(32) == pytest.approx(31 / 1.1)
    assert all(teacher_resident(arguments(), name) for name in PHASES)


def test_a_served_teacher_takes_nothing_here():
    given = arguments(teacher={"teacher_backend": "server"})
    for found in planner(given, llama(3), llama(3)).plan().phases:
        assert not any(part.startswith("teacher") for part in found.parts)
    assert "KV cache" not in phase(planner(given, llama(3), llama(3)).plan(), "generate").parts


def test_a_teacher_whose_logits_are_stored_is_let_go_of_before_training():
    logits = {name: {"teacher_logits": name} for name in ("online", "stored")}
    found = {
        name: planner(arguments("logit_kd", **given), llama(3), llama(5)).plan()
        for name, given in logits.items()
    }
    for name in PHASES:
        weights = [phase(found[each], name).parts.get("teacher weights") for each in logits]
        assert weights[0] > 0
        assert weights[1] == (None if name == "train" else weights[0])
    assert "teacher activations" not in phase(found["stored"], "train").parts
