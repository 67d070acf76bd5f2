"""The plan of a recipe's memory beside real models, real caches and real training steps."""

import pytest
import torch
from planned_models import arguments, llama, phase, planner
from real_meter import RealMeter
from tiny_setting import make_form, make_setting
from transformers import LlamaForCausalLM, TrainerCallback

from medistill_trl import methods
from medistill_trl.data import Prompt
from medistill_trl.memory.plan import longest
from medistill_trl.memory.step import FORWARD, GRADIENTS, UPDATE, Lengths
from medistill_trl.model_source import resolve
from medistill_trl.models import load_student, load_tokenizer

# --- what is held


@pytest.mark.parametrize("lora", [True, False])
def test_weights_adapter_and_optimizer_are_counted_exactly(teacher_folder, lora):
    given = arguments(
        student={"use_lora": lora, "student_model": str(teacher_folder)}, optim="adamw_torch"
    )
    source = resolve(str(teacher_folder))
    parts = {
        name: size / 1e9 for name, size in planner(given, source.config, source.config).held.items()
    }
    student = load_student(source, load_tokenizer(source), given.student, torch.device("cpu"))
    trained = sum(p.nbytes for p in student.parameters() if p.requires_grad)
    buffers = sum(b.nbytes for b in student.buffers())
    frozen = sum(p.nbytes for p in student.parameters() if not p.requires_grad) + buffers
    assert parts["optimizer (adamw_torch)"] == pytest.approx(2 * trained / 1e9)
    if lora:
        assert parts["LoRA adapter"] == pytest.approx(trained / 1e9)
        assert parts["student weights"] == pytest.approx(frozen / 1e9)
    else:
        assert parts["student weights"] == pytest.approx((trained + buffers) / 1e9)


def test_embeddings_that_serve_as_the_head_count_once():
    tied = llama(4, tie_word_embeddings=True)
    found = planner(arguments(student={"use_lora": False}), tied, llama(4))
    real = LlamaForCausalLM(tied)
    size = sum(t.nbytes for t in (*real.parameters(), *real.buffers()))
    assert found.held["student weights"] == pytest.approx(size)


def test_quantised_weights_take_the_bits_that_bitsandbytes_keeps():
    def weights(**student):
        return planner(arguments(student=student), llama(6), llama(6)).held["student weights"]

    linears = 6 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    full = weights()
    blocks = linears / 64
    nf4 = full - 4 * linears + linears / 2
    plain = {"student_load_in_4bit": True, "bnb_4bit_use_double_quant": False}
    assert weights(**plain) == pytest.approx(nf4 + 4 * blocks)
    # An 8-bit scale per block, and a float32 for each 256 of them, at least one a layer.
    assert weights(student_load_in_4bit=True) == pytest.approx(nf4 + blocks + 4 * 6 * 7, rel=1e-3)
    rows = 6 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
    assert weights(student_load_in_8bit=True) == pytest.approx(full - 3 * linears + 4 * rows)


def test_the_kv_cache_is_that_of_a_generation():
    new = {"teacher_max_new_tokens": 100, "teacher_batch_size": 3}
    given = arguments(teacher=new, prompt=20)
    parts = phase(planner(given, llama(2), llama(5)).plan(), "generate").parts
    model = LlamaForCausalLM(llama(5))
    cache = model(torch.ones(3, 120, dtype=torch.long), use_cache=True).past_key_values
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert parts["KV cache"] == pytest.approx(measured / 1e9)


def test_optimizers_keep_what_they_keep_of_every_weight():
    def state(optim):
        found = planner(arguments(student={"use_lora": False}, optim=optim), llama(2), llama(2))
        return found.held[f"optimizer ({optim})"]

    sizes = [p.numel() for p in LlamaForCausalLM(llama(2)).parameters()]
    small = sum(size for size in sizes if size < 4096)
    assert 0 < small < sum(sizes)
    assert state("adamw_torch") == pytest.approx(2 * 4 * sum(sizes))
    assert state("lion_32bit") == pytest.approx(4 * sum(sizes))
    assert state("sgd") == 0
    assert state("adamw_8bit") == pytest.approx(2 * (sum(sizes) - small) + 2 * 4 * small)


def test_as_many_answers_are_planned_as_are_written_at_a_time():
    def rows(completions, size=None):
        writing = {"teacher_completions": completions, "teacher_batch_size": size}
        given = arguments(
            teacher=writing | {"teacher_max_new_tokens": 60}, prompt=4,
            per_device_train_batch_size=4, gradient_accumulation_steps=6,
        )  # fmt: skip
        parts = phase(planner(given, llama(2), llama(2)).plan(), "generate").parts
        return round(parts["KV cache"] * 1e9 / (64 * 2 * 2 * 2 * 16 * 4))

    assert rows("online") == 24
    assert rows("stored") == 16
    assert rows("online", 5) == rows("stored", 5) == 5
    samples = arguments("on_policy", teacher={"teacher_batch_size": 3}, num_generations=2)
    assert methods.load("on_policy").memory.student_rows(samples) == 3


def test_examples_are_cut_at_the_longest_that_is_trained_on():
    assert longest(arguments(prompt=48, max_length=None), 16) == Lengths(48, 16)
    assert longest(arguments(prompt=48, max_length=60), 16) == Lengths(48, 12)
    assert longest(arguments(prompt=48, max_length=40), 16) == Lengths(39, 1)


def test_an_evaluation_counts_where_there_is_one():
    def score(strategy):
        given = arguments(eval_strategy=strategy, per_device_eval_batch_size=64)
        return planner(given, llama(2), llama(2))._score.gb

    assert score("epoch") > 1.5 * score("no")


def test_gradients_of_a_window_and_the_update_are_counted():
    def peaks(steps, device_type="cpu"):
        given = arguments(
            student={"use_lora": False}, gradient_accumulation_steps=steps, optim="adamw_torch"
        )
        return planner(given, llama(2), llama(2), device_type).training_peaks(2, False)

    weights = sum(p.nbytes for p in LlamaForCausalLM(llama(2)).parameters())
    assert peaks(2)[FORWARD][GRADIENTS] == pytest.approx(weights)
    assert peaks(1)[FORWARD][GRADIENTS] == 0
    # On a GPU temporaries of all tensors are alive together, on a CPU those of the largest alone.
    assert peaks(1, "cuda")[UPDATE][UPDATE] >= weights > 1.5 * peaks(1)[UPDATE][UPDATE]


def test_what_methods_hold_besides_is_planned():
    from medistill_trl.methods.bond import METHOD as BOND

    def held(method, student=(), **training):
        return planner(arguments(method, student, **training), llama(4), llama(6)).held

    parts = held("spin")
    assert parts["reference"] == parts["LoRA adapter"]
    parts = held("spin", {"use_lora": False})
    assert parts["reference"] == pytest.approx(parts["student weights"], rel=0.01)
    assert "reference" not in held("spin", reference="none")
    assert BOND.memory.copies(arguments("bond", num_samples=2)) == {}
    anchored = arguments("bond", num_samples=2, objective="jeffreys")
    assert list(BOND.memory.copies(anchored)) == ["anchor"]
    projections = held("fitnets", num_layer_pairs=3)["projections"]
    assert projections == pytest.approx(3 * 4 * 64 * 65)
    assert "projections" not in held("fitnets", feature_loss="cka")
    assert held("ppo")["value head"] == pytest.approx(4 * 65)


def test_bond_is_planned_for_the_samples_that_carry_weight():
    def trained(rows, **training):
        given = arguments("bond", per_device_train_batch_size=8, **training)
        return methods.load("bond").memory.trained_rows(given, rows)

    assert trained(8, num_samples=4, gradient_accumulation_steps=1) == 2
    assert trained(8, num_samples=4, gradient_accumulation_steps=2) == 4
    assert trained(8, num_samples=4, gradient_accumulation_steps=8) == 8
    once = {"num_samples": 4, "gradient_accumulation_steps": 1}
    assert trained(8, objective="jeffreys", **once) == 4
    assert trained(8, objective="rank_policy_gradient", **once) == 8
    assert trained(2, **once) == 1


# --- what comes and goes: real training steps

SLOW = pytest.mark.slow
CASES = [
    ("sft", {"gradient_checkpointing": True}),
    ("logit_kd", {"lora": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
    ("fitnets", {"lora": True}),
    ("attention", {"lora": True}),
    ("spin", {"lora": True, "num_iterations": 1, "max_new_tokens": 2, "beta": 0.1}),
    pytest.param("sft", {"lora": True}, marks=SLOW),
    pytest.param("sft", {"lora": True, "bf16": True}, marks=SLOW),
    pytest.param("logit_kd", {"lora": True}, marks=SLOW),
    pytest.param("adakd", {}, marks=SLOW),
    pytest.param("cot", {"lora": True, "rationale_max_new_tokens": 64}, marks=SLOW),
    pytest.param("on_policy", {"lora": True, "num_generations": 2}, marks=SLOW),
    pytest.param("bond", {"num_samples": 4}, marks=SLOW),
    pytest.param("ppo", {"lora": True, "num_ppo_epochs": 1}, marks=SLOW),
]


@pytest.mark.parametrize(
    ("method", "changes"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v)
)
def test_a_plan_is_what_real_training_steps_take(method, changes, tmp_path):
    """The trainer itself on real weights, every tensor counted."""
    form = make_form()
    sizes = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": len(form.tokenizer)}
    teacher, student = (LlamaForCausalLM(llama(6, **sizes)) for _ in range(2))
    dtype = "bfloat16" if changes.get("bf16") else "float32"
    student = student.to(getattr(torch, dtype))
    question = " ".join(["What causes asthma and how is it treated?"] * 4)
    prompts = [Prompt(f"p{n}", "s", question + " Why?" * (n % 3), "r", None) for n in range(8)]
    setting = make_setting(
        tmp_path, method, form=form, prompts=prompts, teacher_model=teacher, student=student,
        teacher={"teacher_completions": "stored", "teacher_max_new_tokens": 24},
        **{"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, "optim": "adamw_torch"} | changes,
    )  # fmt: skip
    trainer = methods.load(method).build(setting)
    meter, seen, step = RealMeter(), [], trainer.training_step
    meter.hold(setting.student, teacher)

    def watched(model, inputs, *args):
        seen.append(_lengths(inputs))
        meter.begin("training")
        loss = step(model, inputs, *args)
        meter.begin("else")
        return loss

    trainer.training_step = watched
    trainer.add_callback(Update(meter))
    with meter:
        trainer.train()
    given = setting.arguments
    given.student.lora_r, given.student.student_dtype = 4, dtype
    given.teacher.teacher_dtype = "float32"
    lengths = max(seen, key=lambda lengths: lengths.total)
    found = planner(given, student.config, teacher.config, lengths=lengths)
    planned = found.train(4, given.training.gradient_checkpointing).gb * 1e9
    assert planned == pytest.approx(meter.peaks["training"].total(), rel=0.02)


class Update(TrainerCallback):
    """The optimizer's step counts too."""

    def __init__(self, meter):
        self.meter = meter

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.meter.begin("training")

    def on_optimizer_step(self, *args, **kwargs):
        self.meter.begin("else")


def _lengths(inputs) -> Lengths:
    if "labels" in inputs:
        counted = (inputs["labels"] != -100).sum(1)
    else:
        counted = inputs["completion_mask"].sum(1)
    total = inputs["input_ids"].shape[1]
    return Lengths(total - int(counted.max()), int(counted.max()))
