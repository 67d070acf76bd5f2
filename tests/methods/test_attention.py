"""Attention transfer: what is captured, the objective, its normalisation, its cost, the movement."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from peft import LoraConfig, get_peft_model
from tiny_setting import ONE_STEP, logged, make_setting, train, weights
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from medistill_trl import methods, model_source, models
from medistill_trl.arguments import StudentArguments, TeacherArguments
from medistill_trl.errors import UserError
from medistill_trl.layers import decoder_layers
from medistill_trl.methods.attention.capture import captured_attention, check_attention
from medistill_trl.prompts import IGNORED

SIZES = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(0))
RIGHT = torch.ones_like(IDS)
RIGHT[1, 7:] = 0
LEFT = torch.ones_like(IDS)
LEFT[0, :4] = 0


def make_qwen2():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, initializer_range=0.3))


def maps(inputs, mask):
    """Of a layer's `AttentionInputs`, (B, H, T, T)."""
    groups = inputs.queries_BHTD.shape[1] // inputs.keys_BKTD.shape[1]
    keys = inputs.keys_BKTD.repeat_interleave(groups, 1)
    seen = torch.ones(mask.shape[1], mask.shape[1]).tril().bool() & mask.bool()[:, None, None, :]
    scores = inputs.queries_BHTD @ keys.mT * inputs.scaling
    return scores.masked_fill(~seen, -1e30).softmax(-1)


# --- capture


@pytest.mark.parametrize("make", [lambda: make_model(60), make_qwen2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
def test_what_is_captured_under_sdpa_gives_the_models_own_eager_maps(make, mask):
    """Grouped query heads in both; Qwen2's projections have a bias."""
    model = make().eval()
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        with captured_attention(model, [1, 3]) as captured:
            model(IDS, attention_mask=mask)
        model.set_attn_implementation("eager")
        eager = model(IDS, attention_mask=mask, output_attentions=True).attentions
    for layer in (1, 3):
        found = maps(captured[layer].inputs(), mask)
        rows = mask.bool()[:, None, :, None]
        torch.testing.assert_close(
            torch.where(rows, found, 0), torch.where(rows, eager[layer - 1], 0), rtol=0, atol=1e-5
        )
    other = maps(captured[1].inputs(), mask)[:, :, -1]
    assert not torch.allclose(other, eager[1][:, :, -1], atol=1e-3)  # the next layer's are others


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_the_same_with_checkpointing(lora):
    def gradients(checkpointing):
        model = make_model(60)
        if lora:
            torch.manual_seed(0)
            model = get_peft_model(
                model, LoraConfig("CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
            )
            model.enable_input_require_grads()  # as SFTTrainer does
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with captured_attention(model, [2, 3]) as captured:
            model(input_ids=IDS, attention_mask=RIGHT, use_cache=False)
        loss = sum(maps(captured[layer].inputs(), RIGHT).square().sum() for layer in (2, 3))
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert any("q_proj" in name and grad.any() for name, grad in plain.items())
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad)


def test_models_whose_attention_is_another_are_refused():
    check_attention(make_model(60).train(), [1, 4])
    check_attention(make_qwen2(), [3])
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, initializer_range=0.3))
    gemma2 = Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=16, initializer_range=0.3, attn_logit_softcapping=0.5)
    )
    for model in (qwen3, gemma2):
        with pytest.raises(UserError, match="does something else to its queries and keys"):
            check_attention(model, [2])
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(UserError, match=r"'gpt2': its blocks have no self_attn,.* as in Llama"):
        check_attention(gpt2, [1])


# --- the objective


def completion_batch(trainer):
    """The first window's micro-batch, as training makes it, without its divisor."""
    rows = list(trainer.train_dataset)
    return trainer.data_collator(trainer.writer.examples(rows, 0))


def attended(model, batch, layer):
    """Eager map and Q, K, V of a layer, from the model's own outputs and weights."""
    model.set_attn_implementation("eager")
    mask = batch["attention_mask"]
    output = model(
        batch["input_ids"], attention_mask=mask, output_attentions=True, output_hidden_states=True
    )
    block, states = decoder_layers(model)[layer - 1], output.hidden_states[layer - 1]
    normed = block.input_layernorm(states)
    projections = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
    q, k, v = (project(normed).unflatten(2, (-1, 16)).transpose(1, 2) for project in projections)
    position = torch.arange(states.shape[1])[None]
    q, k = apply_rotary_pos_emb(q, k, *model.get_decoder().rotary_emb(states, position))
    return output, output.attentions[layer - 1], (q, k, v)


def relation(states, heads, mask):
    joined = states.transpose(1, 2).flatten(2)
    parts = torch.stack(joined.chunk(heads, -1), 1)
    return maps(
        SimpleNamespace(queries_BHTD=parts, keys_BKTD=parts, scaling=parts.shape[-1] ** -0.5), mask
    )


def divergence(teacher, student):
    ratio = torch.where(teacher > 0, (teacher.clamp_min(1e-30) / student.clamp_min(1e-30)).log(), 0)
    return (teacher * ratio).sum(-1)


def plain_parts(student, teacher, batch, pairs, kind, mean_heads=False, rows=None):
    """CE and the attention loss, from whole logits and all eager maps."""
    rows = batch["compared"].bool() if rows is None else rows
    mask, total = batch["attention_mask"], 0.0
    for s, t in pairs:
        output, a_s, own = attended(student, batch, s)
        with torch.no_grad():
            _, a_t, its = attended(teacher, batch, t)
        if kind == "relations":
            both = [
                (relation(x, 4, mask), relation(y, 4, mask)) for x, y in zip(own, its, strict=True)
            ]
            total = total + sum(divergence(r_t, r_s).mean(1)[rows].sum() for r_s, r_t in both)
            continue
        if mean_heads:
            a_s, a_t = a_s.mean(1, keepdim=True), a_t.mean(1, keepdim=True)
        per_row = (
            (a_s - a_t).square().sum((1, 3)) if kind == "map_mse" else divergence(a_t, a_s).mean(1)
        )
        total = total + per_row[rows].sum()
    logits = output.logits[:, :-1].flatten(0, 1)
    ce = F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
    return ce, total / rows.sum()


FORMULAS = [
    {"attention_loss": "map_mse"},
    {"attention_loss": "row_kl"},
    {"attention_loss": "relations"},
    {"attention_loss": "map_mse", "match_all_heads": False},
    {"attention_loss": "row_kl", "match_all_heads": False},
    {"attention_loss": "map_mse", "attention_rows": "all", "layer_mapping": {"1": 3}},
]


@pytest.mark.parametrize("options", FORMULAS, ids=lambda o: "-".join(map(str, o.values())))
def test_loss_and_gradients_are_those_of_all_eager_maps(tmp_path, options):
    setting = make_setting(tmp_path, "attention", alpha=0.25, attention_chunk_size=7, **options)
    trainer = methods.load("attention").build(setting)
    batch, student = completion_batch(trainer), setting.student
    found = trainer.compute_loss(student, batch)
    found.backward()
    gradients = torch.cat([p.grad.flatten() for p in student.parameters()])
    student.zero_grad()
    pairs = [(1, 3)] if "layer_mapping" in options else [(1, 2), (2, 4)]
    assert pairs == trainer.pairs
    rows = batch["attention_mask"].bool() if "attention_rows" in options else None
    ce, attention = plain_parts(
        student, setting.teacher.model, batch, pairs, options["attention_loss"],
        not options.get("match_all_heads", True), rows,
    )  # fmt: skip
    expected = 0.75 * ce + 0.25 * attention
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert (gradients - wanted).norm() < 1e-5 * wanted.norm()


def attention_alone(tmp_path, mapping, kind, model=None):
    """The loss of a student that is its teacher."""
    model = model or make_model(600, seed=1)
    setting = make_setting(
        tmp_path, "attention", student=model, teacher_model=copy.deepcopy(model),
        alpha=1.0, layer_mapping=mapping, attention_loss=kind,
    )  # fmt: skip
    trainer = methods.load("attention").build(setting)
    return trainer.compute_loss(setting.student, completion_batch(trainer)).item()


@pytest.mark.parametrize("kind", ["map_mse", "row_kl", "relations"])
def test_a_copy_of_the_teacher_has_no_loss_unless_its_layers_are_mapped_off_by_one(tmp_path, kind):
    same = {1: 1, 2: 2, 4: 4}
    assert attention_alone(tmp_path / "same", same, kind) == pytest.approx(0, abs=1e-6)
    assert attention_alone(tmp_path / "up", {1: 2, 2: 3}, kind) > 0.01
    assert attention_alone(tmp_path / "down", {2: 1, 3: 2}, kind) > 0.01


def test_the_sides_of_the_padding_agree(tmp_path):
    setting = make_setting(tmp_path, "attention", alpha=1.0)
    trainer = methods.load("attention").build(setting)
    right = completion_batch(trainer)
    left = {}
    for name, rows in right.items():
        if rows.dim() == 2:
            lengths = right["attention_mask"].sum(1).tolist()
            rolled = [row.roll(len(row) - n) for row, n in zip(rows, lengths, strict=True)]
            left[name] = torch.stack(rolled)
    assert left["attention_mask"][0, 0] == 0
    losses = [trainer.compute_loss(setting.student, batch).item() for batch in (right, left)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- normalisation and training


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_reduction": "sum", "alpha": 0.1},
        {"attention_rows": "all", "attention_loss": "relations"},
    ],
)
def test_accumulating_one_by_eight_is_eight_by_one(tmp_path, options):
    after = {}
    for rows, steps in ((1, 8), (8, 1)):
        changes = {
            "max_steps": 1, "per_device_train_batch_size": rows, "gradient_accumulation_steps": steps,
            "max_grad_norm": 0.0, "learning_rate": 0.1,
        }  # fmt: skip
        setting, trainer, _ = train(
            make_setting(tmp_path / f"{rows}", "attention", **changes, **options)
        )
        kind = {"relations": "relation_kl_nats"}.get(options.get("attention_loss"), "map_mse")
        after[rows] = weights(setting), [logged(trainer, n)[0] for n in ("loss", "ce_nats", kind)]
    torch.testing.assert_close(after[1][0], after[8][0], rtol=1e-4, atol=1e-6)
    assert after[1][1] == pytest.approx(after[8][1], rel=1e-4)


def test_the_log_says_what_is_trained_and_its_parts(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "medistill_trl"):
        _, trainer, _ = train(
            make_setting(tmp_path, "attention", eval_strategy="steps", **ONE_STEP)
        )
    assert (
        "attention loss map_mse, teacher layer → student layer 2 → 1, 4 → 2: summed over pairs, summed over "
        "heads, averaged over completion rows" in caplog.text
    )
    parts = 0.5 * logged(trainer, "ce_nats")[0] + 0.5 * logged(trainer, "map_mse")[0]
    assert logged(trainer) == pytest.approx([parts], rel=1e-4)
    assert logged(trainer, "map_mse")[0] > 0
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert {"eval_map_mse", "eval_ce_nats"} <= set(evaluated[0])
    summed = train(make_setting(tmp_path, "attention", attention_reduction="sum", **ONE_STEP))[1]
    rows = summed.writer.totals.trained
    parts = 0.5 * logged(summed, "ce_nats")[0] + 0.5 * rows * logged(summed, "map_mse")[0]
    assert logged(summed) == pytest.approx([parts], rel=1e-4)


@pytest.mark.parametrize("kind", ["map_mse", "row_kl", "relations"])
def test_the_student_learns_where_to_look_and_nothing_else_moves(tmp_path, kind):
    """α = 1 and the first layer mapped: only its queries and keys, and what is before them, learn."""
    setting = make_setting(
        tmp_path, "attention", alpha=1.0, layer_mapping={1: 2}, attention_loss=kind, max_steps=8,
        learning_rate=0.5,
    )  # fmt: skip
    teacher = {name: p.clone() for name, p in setting.teacher.model.named_parameters()}
    _, trainer, before = train(setting)
    losses = logged(trainer)
    assert losses[-1] < 0.8 * losses[0]
    assert "ce_nats" not in trainer.state.log_history[0]
    moved = {
        name
        for name, value in setting.student.state_dict().items()
        if not torch.equal(value, before[name])
    }
    learnt = {"q_proj", "k_proj"} | ({"v_proj"} if kind == "relations" else set())
    start = "model.layers.0."
    assert moved == {
        "model.embed_tokens.weight", f"{start}input_layernorm.weight",
        *(f"{start}self_attn.{name}.weight" for name in learnt),
    }  # fmt: skip
    for name, value in setting.teacher.model.named_parameters():
        assert torch.equal(value, teacher[name]), name
        assert value.grad is None


def test_resumed_it_is_the_same_run_bit_for_bit(tmp_path):
    changes = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "lora": True,
        "teacher": {"teacher_temperature": 1.0}, "gradient_checkpointing": True,
    }  # fmt: skip
    straight, trainer, _ = train(make_setting(tmp_path / "a", "attention", **changes))
    resumed, again, _ = train(
        make_setting(tmp_path / "b", "attention", **changes),
        tmp_path / "a/checkpoints/checkpoint-2",
    )
    assert torch.equal(weights(straight), weights(resumed))
    assert logged(again) == logged(trainer)


# --- cost


def test_the_teacher_stops_behind_its_last_mapped_layer(tmp_path):
    setting = make_setting(tmp_path, "attention", layer_mapping={1: 2, 2: 3})
    trainer = methods.load("attention").build(setting)
    batch, seen = completion_batch(trainer), []
    teacher = setting.teacher.model
    watched = {**dict(enumerate(decoder_layers(teacher), 1)), "head": teacher.lm_head}
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    trainer.compute_loss(setting.student, batch)
    assert seen == [1, 2, 3]


def test_without_attention_there_is_no_teacher_and_without_cross_entropy_no_head(tmp_path):
    setting = make_setting(tmp_path, "attention", alpha=0.0)
    trainer = methods.load("attention").build(setting)
    batch, calls = completion_batch(trainer), []
    setting.teacher.model.register_forward_hook(lambda *_: calls.append("teacher"))
    setting.teacher.model.model.register_forward_hook(lambda *_: calls.append("teacher"))
    ce, _ = plain_parts(setting.student, setting.teacher.model, batch, [(1, 2)], "map_mse")
    calls.clear()
    found = trainer.compute_loss(setting.student, batch).item()
    assert found == pytest.approx(ce.item(), rel=1e-5)
    assert calls == []
    trainer.args.alpha = 1.0
    rows = []
    setting.student.lm_head.register_forward_hook(lambda *words: rows.append(words[2].shape[:2]))
    trainer.compute_loss(setting.student, batch).backward()
    assert rows == [(len(batch["labels"]), 1)]  # one position, which DDP needs
    assert all(p.grad is not None for p in setting.student.parameters())


def test_a_4bit_pair_has_gradients_after_an_evaluation_and_is_close_to_the_unquantised(
    tmp_path, teacher_folder
):
    source = model_source.resolve(str(teacher_folder))
    folder, four = str(teacher_folder), {"load_in_4bit": True, "dtype": "bfloat16"}
    args = [
        kind(**{f"{role}_{name}": value for name, value in (four | {"model": folder}).items()})
        for role, kind in (("student", StudentArguments), ("teacher", TeacherArguments))
    ]
    tokenizer, cpu = models.load_tokenizer(source), torch.device("cpu")
    setting = make_setting(
        tmp_path, "attention", student=models.load_student(source, tokenizer, args[0], cpu),
        teacher_model=models.load_teacher(source, tokenizer, *args[::-1], cpu), alpha=1.0, max_steps=3,
        layer_mapping={4: 3}, gradient_checkpointing=True, bf16=True, eval_strategy="steps", eval_steps=1,
        num_layer_pairs=1,
    )  # fmt: skip
    _, trainer, _ = train(setting)
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))
    plain = attention_alone(tmp_path / "plain", {4: 3}, "map_mse", make_model(600))
    assert logged(trainer)[0] == pytest.approx(plain, rel=0.2)
