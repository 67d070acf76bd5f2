"""Chain of thought: the loss with a weight for the rationale and another for the answer."""

import pytest
import torch
from conftest import make_model
from crafted_rationales import PROMPTS, build, make_setting, trained
from tiny_setting import TRAINING, logged, weights

from medistill_trl.methods.sft import SFTDistillConfig, SFTDistillTrainer
from medistill_trl.prompts import IGNORED

ONE_STEP = {
    "max_steps": 1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1.0,
    "max_grad_norm": 0.0,
}
WEIGHTS = {"rationale_weight": 0.25, "answer_weight": 2.0}


def plain(setting, dataset, state, rationale_weight, answer_weight):
    """The formula with whole logits, row by row, with its gradient."""
    student = make_model(len(setting.form.tokenizer), layers=2)
    student.load_state_dict(state)
    total, weight = 0.0, 0.0
    for example in dataset:
        logits = student(torch.tensor([example["input_ids"]])).logits[0].log_softmax(-1)
        for place, (token, mask) in enumerate(
            zip(example["labels"], example["rationale_mask"], strict=True)
        ):
            if token != IGNORED:
                w = rationale_weight if mask else answer_weight
                total, weight = total - w * logits[place - 1, token], weight + w
    loss = total / weight
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters()])


@pytest.mark.parametrize("changes", [{}, WEIGHTS, {"rationale_weight": 0.0, "answer_weight": 3.0}])
def test_value_and_gradient_are_those_of_the_plain_formula(tmp_path, changes):
    texts = {"p3": ["?"] * 3}  # one plain completion among them
    setting, trainer, before = trained(tmp_path, texts=texts, **ONE_STEP, **changes)
    expected = {"rationale_weight": 1.0, "answer_weight": 1.0} | changes
    loss, gradient = plain(setting, trainer.train_dataset, before, **expected)
    assert logged(trainer)[0] == pytest.approx(loss, rel=1e-5)
    start = torch.cat([v.flatten() for v in before.values()])
    torch.testing.assert_close(start - weights(setting), gradient, rtol=1e-3, atol=2e-6)


def test_another_loss_of_trl_is_trls_and_knows_no_weights(tmp_path):
    """DFT weighs each token by its probability, so its loss is another one."""
    first = {}
    for kind in ("chunked_nll", "nll", "dft"):
        _, trainer, _ = trained(tmp_path / kind, **ONE_STEP, loss_type=kind)
        first[kind] = logged(trainer)[0]
    assert first["nll"] == pytest.approx(first["chunked_nll"], rel=1e-5)
    assert first["dft"] < first["nll"] / 2
    with pytest.raises(ValueError, match="loss_type: dft knows no weights"):
        make_setting(tmp_path, **ONE_STEP, **WEIGHTS, loss_type="dft")


def test_by_hand(tmp_path):
    """A student that finds all tokens alike: every CE is log V, whatever the weights."""
    setting = make_setting(tmp_path, **ONE_STEP, **WEIGHTS)
    with torch.no_grad():
        setting.student.lm_head.weight.zero_()
    trainer = build(setting)
    trainer.train()
    vocabulary = torch.tensor(float(len(setting.form.tokenizer)))
    assert logged(trainer)[0] == pytest.approx(vocabulary.log().item(), rel=1e-6)
    entry = next(e for e in trainer.state.log_history if "rationale_ce_nats" in e)
    assert entry["rationale_ce_nats"] == pytest.approx(vocabulary.log().item(), rel=1e-6)
    assert entry["answer_ce_nats"] == pytest.approx(vocabulary.log().item(), rel=1e-6)


def test_weights_of_one_are_sft_on_the_same_texts(tmp_path):
    """By the normal path, and to 1e-6 by the weighted one too."""
    setting, trainer, _ = trained(tmp_path / "cot")
    reference = make_setting(tmp_path / "sft")
    config = TRAINING
    sft = SFTDistillTrainer(
        model=reference.student,
        args=SFTDistillConfig(output_dir=str(tmp_path / "sft/checkpoints"), **config),
        train_dataset=trainer.train_dataset.remove_columns("rationale_mask"),
        form=reference.form,
        sampling=reference.sampling,
        totals=reference.totals,
    )
    sft.train()
    assert logged(trainer) == logged(sft)
    assert torch.equal(weights(setting), weights(reference))
    assert setting.totals.trained == reference.totals.trained > 0
    weighted = make_setting(tmp_path / "weighted")
    trainer = build(weighted)
    trainer.uniform = False
    trainer.train()
    assert logged(trainer) == pytest.approx(logged(sft), abs=1e-6)
    torch.testing.assert_close(weights(weighted), weights(reference), rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, WEIGHTS])
def test_accumulating_one_by_eight_is_eight_by_one(tmp_path, changes):
    after = {}
    for size, steps in ((1, 8), (8, 1)):
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        setting, trainer, _ = trained(
            tmp_path / f"{size}", texts={"p3": ["?"] * 3}, **{**ONE_STEP, **shape, **changes}
        )
        after[size] = weights(setting), logged(trainer)[0]
    torch.testing.assert_close(after[1][0], after[8][0], rtol=1e-4, atol=1e-6)
    assert after[1][1] == pytest.approx(after[8][1], rel=1e-5)


def test_only_the_weighted_part_is_learnt(tmp_path):
    runs = {}
    for part in ("rationale", "answer"):
        changes = {"rationale_weight": 0.0, "answer_weight": 0.0, f"{part}_weight": 1.0}
        _, trainer, _ = trained(
            tmp_path / part, **ONE_STEP | {"max_steps": 15, "learning_rate": 0.5}, **changes
        )
        log = [e for e in trainer.state.log_history if "answer_ce_nats" in e]
        runs[part] = {
            name: log[0][f"{name}_ce_nats"] - log[-1][f"{name}_ce_nats"]
            for name in ("rationale", "answer")
        }
    assert runs["answer"]["answer"] > 2 * runs["rationale"]["answer"]
    assert runs["rationale"]["rationale"] > 2 * runs["answer"]["rationale"]


def test_a_window_without_weight_changes_nothing(tmp_path):
    texts = {p.id: ["?"] * 3 for p in PROMPTS}  # plain completions only
    changes = {"rationale_weight": 1.0, "answer_weight": 0.0}
    setting, trainer, before = trained(tmp_path, texts=texts, **ONE_STEP, **changes)
    assert logged(trainer) == [0.0]
    assert torch.equal(weights(setting), torch.cat([v.flatten() for v in before.values()]))


@pytest.mark.parametrize("changes", [{}, WEIGHTS])
def test_evaluation_is_the_plain_cross_entropy_of_the_heldout_completions(tmp_path, changes):
    setting, trainer, _ = trained(tmp_path, eval_strategy="steps", eval_steps=2, **changes)
    found = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert not any(any(example["rationale_mask"]) for example in trainer.eval_dataset)
    expected, _ = plain(setting, trainer.eval_dataset, setting.student.state_dict(), 1.0, 1.0)
    assert found == pytest.approx([expected], rel=1e-5)
    means = [e["eval_ce_nats"] for e in trainer.state.log_history if "eval_ce_nats" in e]
    assert means == pytest.approx([expected], rel=1e-5)
