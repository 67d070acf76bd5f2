"""FitNets: the objective by the plain formula, its normalisation, what moves."""

import copy

import pytest
import torch
from conftest import make_model
from fitnets_runs import PAIRS, built, fitnets, make_narrow, own
from tiny_setting import ONE_STEP, PROMPTS, logged, make_form, train, weights
from torch import nn

from medistill_trl.prompts import IGNORED

PLAIN = {"max_grad_norm": 0.0, "learning_rate": 1.0, "layer_mapping": PAIRS}


# --- the plain formula


def layer_states(model, ids):
    """hidden_states of every layer with the last before the final norm, and logits: two whole forwards."""
    logits = model(ids, output_hidden_states=True).logits[0]  # installs what collects them
    bare = copy.copy(model.model)
    bare._modules = {**model.model._modules, "norm": nn.Identity()}
    return bare(ids, output_hidden_states=True).hidden_states, logits


def plain_loss(setting, student, projections, kind, reduction="mean", tokens="completion"):
    """Prompt by prompt with all hidden states of both whole models."""
    parts, total, count = 0.0, 0.0, 0
    compared = 0
    for prompt in PROMPTS:
        text = setting.form.render(prompt.question)
        completion = setting.teacher.complete([text], setting.sampling)[0]
        ids = completion.token_ids + ([completion.end_id] if completion.end_id is not None else [])
        start = setting.form.encode(text)
        row = torch.tensor([start + ids])
        ours, logits = layer_states(student, row)
        with torch.no_grad():
            theirs, _ = layer_states(setting.teacher.model, row)
        picked = slice(len(start) - 1, -1) if tokens == "completion" else slice(None)
        for n, (layer, teacher_layer) in enumerate(PAIRS.items()):
            s, h = ours[layer][0, picked], theirs[teacher_layer][0, picked]
            s = projections[n](s) if projections is not None else s
            if kind == "mse":
                error = (s - h).square().sum()
                parts = parts + (error if reduction == "sum" else error / h.shape[1])
            elif kind == "normalised_mse":
                parts = parts + ((s - h).square().sum(-1) / h.square().sum(-1)).sum()
            else:
                parts = parts + (1 - nn.functional.cosine_similarity(s, h, dim=-1)).sum()
        compared += len(s)
        logs = logits[len(start) - 1 : -1].log_softmax(-1)
        total = total - logs[range(len(ids)), ids].sum()
        count += len(ids)
    return total / count, parts if reduction == "sum" else parts / compared, count


@pytest.mark.parametrize(
    ("changes", "narrow"),
    [
        ({}, False),
        ({"alpha": 0.3, "feature_reduction": "sum"}, True),
        ({"feature_tokens": "all"}, True),
        ({"feature_loss": "normalised_mse", "alpha": 1.0}, False),
        ({"feature_loss": "cosine", "use_projections": False}, False),
    ],
)
def test_loss_and_gradients_are_those_of_the_plain_formula(tmp_path, changes, narrow):
    """One SGD step at rate 1: the weights move by the gradient, the projections by theirs."""
    student = make_narrow() if narrow else None
    # Least squares would start the projections where they have no gradient.
    changes = {"projection_init": "orthogonal", "projection_lr": 1.0, **changes}
    setting = fitnets(tmp_path, student=student, **ONE_STEP, **PLAIN, **changes)
    reference = copy.deepcopy(setting.student)
    trainer = built(setting)
    projections = copy.deepcopy(trainer.projections)
    given = {"kind": changes.get("feature_loss", "mse")}
    given |= {"reduction": changes.get("feature_reduction", "mean")}
    given |= {"tokens": changes.get("feature_tokens", "completion")}
    ce, features, tokens = plain_loss(setting, reference, projections, **given)
    alpha = changes.get("alpha", 0.5)
    loss = (1 - alpha) * ce + alpha * features
    loss.backward()
    before = {n: p.detach().clone() for n, p in own(trainer).items()}
    before_projections = copy.deepcopy(projections)
    trainer.train()
    assert logged(trainer) == pytest.approx([loss.item()], rel=1e-4)  # the log rounds
    assert setting.totals.trained == tokens
    if alpha < 1:
        assert logged(trainer, "ce_nats") == pytest.approx([ce.item()], rel=1e-4)
    else:
        assert logged(trainer, "ce_nats") == []
    gradients = {n: p.grad for n, p in reference.named_parameters()}
    scale = max(g.abs().max() for g in gradients.values() if g is not None)
    for name, parameter in own(trainer).items():
        gradient = gradients[name]
        expected = before[name] - (0 if gradient is None else gradient)
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-5 * scale.item() + 1e-6)
    if trainer.projections is not None:
        pairs = zip(trainer.projections.parameters(), before_projections.parameters(), strict=True)
        grads = [p.grad for p in projections.parameters()]
        for (parameter, start), gradient in zip(pairs, grads, strict=True):
            tolerance = 1e-5 * gradient.abs().max().item() + 1e-6
            torch.testing.assert_close(parameter, start - gradient, rtol=1e-5, atol=tolerance)
            assert not torch.equal(parameter, start)


# --- layers


@pytest.mark.parametrize("kind", ["mse", "cka"])
def test_a_copy_of_the_teacher_costs_nothing_unless_shifted_by_a_layer(tmp_path, kind):
    losses = {}
    for name, mapping in (("same", {1: 1, 3: 3, 4: 4}), ("shifted", {1: 2, 3: 4})):
        teacher = make_model(len(make_form().tokenizer), seed=1)
        setting = fitnets(
            tmp_path / name,
            teacher_model=teacher,
            student=copy.deepcopy(teacher),
            layer_mapping=mapping,
            feature_loss=kind,
            use_projections=False,
            alpha=1.0,
            **ONE_STEP,
        )
        losses[name] = logged(train(setting)[1])[0]
    assert losses["same"] == pytest.approx(0, abs=1e-5)
    assert losses["shifted"] > 0.01


def test_strategies_reach_the_trainer(tmp_path):
    setting = fitnets(tmp_path, layer_mapping="last", num_layer_pairs=2)
    assert built(setting).pairs == [(1, 3), (2, 4)]


# --- normalisation and numerics


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulating_one_by_eight_is_eight_by_one(tmp_path, reduction):
    after = {}
    for rows, steps in ((1, 8), (8, 1)):
        setting = fitnets(
            tmp_path / str(rows),
            student=make_narrow(),
            max_steps=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            feature_reduction=reduction,
            projection_init="orthogonal",
            **{**PLAIN, "learning_rate": 0.01},
        )
        trainer = train(setting)[1]
        after[rows] = weights(setting), logged(trainer)
    torch.testing.assert_close(after[1][0], after[8][0], rtol=1e-4, atol=1e-6)
    assert after[1][1] == pytest.approx(after[8][1], rel=1e-4)


def test_padding_sides_agree(tmp_path):
    trainer = built(fitnets(tmp_path, student=make_narrow(), feature_tokens="completion"))
    rows = [{"question": prompt.question, "example": None} for prompt in PROMPTS[:3]]
    right = trainer.data_collator(trainer.writer.examples(rows, 0))
    left = {}
    for name, column in right.items():
        side = "teacher_" if name.startswith("teacher_") else ""
        if column.dim() == 2:
            shifts = (right[f"{side}attention_mask"] == 0).sum(1).tolist()
            rolled = [row.roll(shift) for row, shift in zip(column, shifts, strict=True)]
            column = torch.stack(rolled)
        left[name] = column
    assert not torch.equal(left["attention_mask"], right["attention_mask"])
    losses = [trainer.compute_loss(trainer.model, batch).item() for batch in (right, left)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    trainer.args.feature_tokens = "all"
    losses = [trainer.compute_loss(trainer.model, batch).item() for batch in (right, left)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_checkpointing_changes_nothing(tmp_path):
    runs = {}
    for on in (False, True):
        setting = fitnets(tmp_path / str(on), lora=True, gradient_checkpointing=on)
        runs[on] = train(setting)[1]
    assert logged(runs[True]) == pytest.approx(logged(runs[False]), rel=1e-6)
    for a, b in zip(runs[True].model.parameters(), runs[False].model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_without_completion_tokens_has_a_loss_of_zero_with_gradients(tmp_path):
    trainer = built(fitnets(tmp_path))
    rows = [{"question": prompt.question, "example": None} for prompt in PROMPTS[:2]]
    batch = trainer.data_collator(trainer.writer.examples(rows, 0))
    for name in ("labels", "teacher_labels"):
        batch[name] = torch.full_like(batch[name], IGNORED)
    batch["compared"] = torch.zeros_like(batch["compared"])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


def test_at_alpha_1_everything_gets_a_gradient_and_the_layers_behind_get_zero(tmp_path):
    """DDP waits for all of them."""
    setting = fitnets(tmp_path, alpha=1.0, layer_mapping={1: 2}, **ONE_STEP)
    trainer = built(setting)
    before = {name: p.detach().clone() for name, p in own(trainer).items()}
    seen = {}
    trainer.create_optimizer()
    step = trainer.optimizer.step
    grads = trainer.model.named_parameters

    def spy(*args, **kwargs):
        seen.update({name: p.grad for name, p in grads()})
        return step(*args, **kwargs)

    trainer.optimizer.step = spy
    trainer.train()
    assert all(gradient is not None for gradient in seen.values())
    moved = {name for name, p in own(trainer).items() if not torch.equal(p, before[name])}
    assert any(name.startswith("model.layers.0.") for name in moved)
    assert not any(name.startswith(("model.layers.1.", "model.norm")) for name in moved)


def test_what_only_the_student_learns_is_not_compared(tmp_path):
    """A base teacher stops at its stop string; the end token that closes it for the student is not its own."""
    setting = fitnets(tmp_path, teacher_form=make_form(chat=False), **ONE_STEP)
    trainer = built(setting)
    row = {"question": "q", "example": None}
    example = trainer.writer.examples([row], 0)[0]
    example["compared"][-1] = 0  # as encode_pair marks it
    batch = trainer.data_collator([example])
    teacher = trainer._teacher_states(batch)
    labels = sum(label != IGNORED for label in example["labels"])
    assert [len(states) for states in teacher] == [labels - 1] * 2
    batch["teacher_input_ids"][0, -1] += 1
    for a, b in zip(trainer._teacher_states(batch), teacher, strict=True):
        assert torch.equal(a, b)


# --- training


def test_the_loss_falls_and_the_teacher_stays(tmp_path):
    setting = fitnets(tmp_path, max_steps=20, optim="adamw_torch")
    teacher = copy.deepcopy(setting.teacher.model.state_dict())
    trainer = train(setting)[1]
    assert logged(trainer)[-1] < logged(trainer)[0] - 0.2
    for name, value in setting.teacher.model.state_dict().items():
        assert torch.equal(value, teacher[name]), name
    assert all(p.grad is None for p in setting.teacher.model.parameters())


def test_evaluation_reports_a_loss_and_its_parts(tmp_path):
    setting = fitnets(tmp_path, eval_strategy="steps", eval_steps=1)
    log = train(setting)[1].state.log_history
    entries = [entry for entry in log if "eval_loss" in entry]
    assert len(entries) == 2
    for name in ("eval_mse_1_2", "eval_mse_2_4", "eval_ce_nats"):
        assert all(entry[name] > 0 for entry in entries)
