"""Logit-KD and AdaKD between two tokenizers: the objective, its normalisation, the completions, the log."""

import functools
import logging
import random

import pytest
import tiny_setting
import torch
from conftest import CORPUS, make_model
from tiny_setting import ONE_STEP, PROMPTS, check, logged, make_form, train, weights
from two_tokenizers import llama_like, permuted

from medistill_trl import methods
from medistill_trl.pair_writer import PairWriter
from medistill_trl.prompts import IGNORED, PromptFormat
from medistill_trl.span_pairs import encode_span_pair
from medistill_trl.spans import TokenizerPair
from medistill_trl.teacher import Completion


@functools.cache
def sentence_piece():
    return PromptFormat(llama_like())


@functools.cache
def tokenizers():
    return TokenizerPair.of(make_form().tokenizer, sentence_piece().tokenizer)


def make_setting(folder, method="logit_kd", completions="online", **training):
    """A SentencePiece base model teaches a byte-level chat model."""
    form = sentence_piece()
    return tiny_setting.make_setting(
        folder,
        method,
        teacher_form=form,
        teacher_model=make_model(len(form.tokenizer), seed=1),
        teacher={"teacher_completions": completions},
        **{"max_new_tokens": 9, **training},
    )


def trained(folder, method="logit_kd", **changes):
    return train(make_setting(folder, method, **changes))


def plain(setting, state, temperature):
    """(1−α)·CE + α·T²·D at α = ½ with whole logits, example by example; means over the student's tokens."""
    student = make_model(len(setting.form.tokenizer), layers=2)
    student.load_state_dict(state)
    overlap = tokenizers().overlap
    total, tokens = 0.0, 0
    for prompt in PROMPTS:
        asked = setting.teacher.form.render(prompt.question)
        completion = setting.teacher.complete([asked], setting.sampling)[0]
        row = encode_span_pair(
            tokenizers(), setting.form, setting.teacher.form, prompt.question, completion, None
        )
        sides = []
        for model, side in ((student, ""), (setting.teacher.model, "teacher_")):
            ids, labels = row[f"{side}input_ids"], row[f"{side}labels"]
            before = labels.count(IGNORED)
            logits = model(torch.tensor([ids])).logits[0, before - 1 : -1].detach()
            sides.append((logits.log_softmax(-1), ids[before:]))
        (ours, own_ids), (theirs, their_ids) = sides
        ce = -ours[range(len(own_ids)), own_ids].sum()
        kd = 0.0
        for (a, b, c, d), paired in zip(row["spans"], row["one_to_one"], strict=True):
            if paired:
                pair = [
                    folded(p.exp(), outcomes, overlap.num_outcomes)
                    for p, outcomes in (
                        (ours[a], overlap.student_outcomes),
                        (theirs[c], overlap.teacher_outcomes),
                    )
                ]
            else:
                s = ours[range(a, b), own_ids[a:b]].sum(), theirs[range(c, d), their_ids[c:d]].sum()
                pair = [torch.stack([x, torch.log1p(-x.exp())]) for x in s]
            q, p = ((z / temperature).log_softmax(-1) for z in pair)
            kd += temperature**2 * (p.exp() * (p - q)).sum()
        total += (0.5 * ce + 0.5 * kd).item()
        tokens += len(own_ids)
    return total / tokens, tokens


def folded(probs, outcomes, size):
    ids = torch.tensor(list(outcomes))
    where = torch.tensor(list(outcomes.values()))
    return torch.zeros(size).index_add_(0, where, probs[ids]).log()


def test_the_first_loss_is_the_formula(tmp_path):
    setting, trainer, before = trained(tmp_path, **ONE_STEP)
    loss, tokens = plain(setting, before, 2.0)
    assert setting.totals.trained == tokens
    assert logged(trainer) == pytest.approx([loss], rel=1e-4)
    log = {name: logged(trainer, name)[0] for name in ("one_to_one_share", "merged_share", "top1")}
    assert 0 < log["one_to_one_share"] < 1
    assert 0 < log["one_to_one_share"] + log["merged_share"] <= 1
    assert 0 < logged(trainer, "teacher_shared_mass")[0] <= 1
    assert logged(trainer, "kl_nats")[0] > 0


def test_a_permuted_vocabulary_trains_as_the_same_one(tmp_path):
    """The same teacher with other ids: loss and gradients as on the same-tokenizer path."""
    form = make_form()
    order = list(range(len(form.tokenizer)))
    random.Random(1).shuffle(order)
    other = PromptFormat(permuted(form.tokenizer, order))
    model, moved = (make_model(len(order), seed=1) for _ in range(2))
    for target, source in (
        (moved.get_input_embeddings(), model.get_input_embeddings()),
        (moved.get_output_embeddings(), model.get_output_embeddings()),
    ):
        target.weight.data[order] = source.weight.data
    found = []
    for folder, teacher_form, teacher in (("one", form, model), ("two", other, moved)):
        setting = tiny_setting.make_setting(
            tmp_path / folder, "logit_kd", teacher_form=teacher_form, teacher_model=teacher
        )
        trainer = methods.load("logit_kd").build(setting)
        assert (trainer.fold is None) == (folder == "one")
        rows = []
        for text in CORPUS[:3]:
            answer = text[:150]
            ids = teacher_form.tokenizer.encode(answer, add_special_tokens=False)
            completion = Completion(answer, ids, True, teacher_form.tokenizer.eos_token_id)
            rows.append(trainer.writer.encode("Why?", completion))
        loss = trainer.compute_loss(setting.student, trainer.data_collator(rows))
        loss.backward()
        found.append((loss.item(), [p.grad for p in setting.student.parameters()]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for got, want in zip(found[1][1], found[0][1], strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm().clamp_min(1e-6)


@pytest.mark.parametrize(("mode", "lmbda"), [("stored", 0), ("online", 0.5)])
def test_accumulating_one_by_eight_is_eight_by_one(tmp_path, mode, lmbda):
    after = {}
    for rows, steps in ((1, 8), (8, 1)):
        setting, trainer, _ = trained(
            tmp_path / f"{rows}",
            completions=mode,
            lmbda=lmbda,
            max_steps=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
        )
        names = ("loss", "kl_nats", "top1", "one_to_one_share", "teacher_shared_mass")
        after[rows] = weights(setting), [logged(trainer, name)[0] for name in names]
    torch.testing.assert_close(after[1][0], after[8][0], rtol=1e-4, atol=1e-6)
    assert after[1][1] == pytest.approx(after[8][1], rel=1e-4)


def test_its_own_completions_carry_the_divergence_alone(tmp_path):
    setting, trainer, _ = trained(tmp_path, lmbda=1.0, alpha=0.25, kd_temperature=1.0, **ONE_STEP)
    assert setting.totals.generated_teacher == 0
    assert setting.totals.generated_student > 0
    assert logged(trainer)[0] == pytest.approx(0.25 * logged(trainer, "kl_nats")[0], rel=1e-5)


def test_it_comes_closer_and_reports_both_models_bits(tmp_path):
    rates = {"max_steps": 20, "learning_rate": 0.5, "alpha": 1.0}
    setting = make_setting(tmp_path, completions="stored", **rates)
    before = setting.heldout.measure(setting.student)
    trainer = methods.load("logit_kd").build(setting)
    trainer.train()
    after = setting.heldout.measure(setting.student)
    assert logged(trainer, "kl_nats")[-1] < 0.9 * logged(trainer, "kl_nats")[0]
    assert after["bits_per_byte"] < before["bits_per_byte"]
    assert before["kl_nats"] is None
    assert after["teacher_bits_per_byte"] == before["teacher_bits_per_byte"] > 0


@pytest.mark.parametrize("rule", ["inverse_confidence", "difficulty"])
def test_adakd_sets_a_temperature_for_each_span(tmp_path, rule):
    changes = {"temperature_rule": rule, "token_share": 0.5, "base_temperature": 2.0}
    _, trainer, _ = trained(tmp_path, "adakd", eval_strategy="steps", eval_steps=1, **changes)
    low, high = logged(trainer, "temperature_min")[0], logged(trainer, "temperature_max")[0]
    assert 1.0 <= low <= logged(trainer, "temperature_mean")[0] <= high <= 4.0
    assert low < high
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert {"eval_kl_nats", "eval_one_to_one_share", "eval_top1"} <= set(evaluated[0])


def test_little_in_common_is_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "medistill_trl"):
        trained(tmp_path, max_steps=3, min_coverage=1.0)
    said = [r.getMessage() for r in caplog.records if "little in common" in r.getMessage()]
    assert len(said) == 1
    assert "one_to_one_share 0." in said[0]
    assert "min_coverage 1" in said[0]


def test_a_span_pair_has_what_both_sides_read():
    chat, base = make_form(), sentence_piece()
    text = "the dose is 5 µg"
    ids = base.tokenizer.encode(text, add_special_tokens=False)
    done = Completion(text, ids, True, base.tokenizer.eos_token_id)
    encode = functools.partial(encode_span_pair, tokenizers(), chat, base, "Why?")
    row = encode(done, None)
    own = chat.tokenizer.encode(text, add_special_tokens=False)
    assert [t for t in row["labels"] if t != IGNORED] == [*own, chat.tokenizer.eos_token_id]
    assert [t for t in row["teacher_labels"] if t != IGNORED] == [*ids, base.tokenizer.eos_token_id]
    assert row["spans"][-1] == [len(own), len(own) + 1, len(ids), len(ids) + 1]
    assert row["one_to_one"][-1] == 1
    assert row["spans"][0][0] == row["spans"][0][2] == 0
    stopped = encode(Completion(text, ids, True), None)
    assert stopped["labels"][-1] == chat.tokenizer.eos_token_id
    assert stopped["spans"] == row["spans"][:-1]
    cut = encode(Completion(text, ids, False), None)
    assert cut["labels"][-1] == own[-1]
    limit = len(row["teacher_input_ids"]) - 3
    short = encode(done, limit)
    assert len(short["teacher_input_ids"]) == limit
    assert (
        short["spans"] == [s for s in row["spans"] if s[3] <= len(ids) - 2][: len(short["spans"])]
    )
    mine = encode(Completion(text, own, True, chat.tokenizer.eos_token_id), None, by_student=True)
    assert (mine["input_ids"], mine["labels"]) == (row["input_ids"], row["labels"])
    # The teacher reads it after its prompt, where no space is put before it.
    read = [t for t in mine["teacher_labels"] if t != IGNORED]
    assert base.tokenizer.decode(read[:-1]) == text
    assert read[-1] == base.tokenizer.eos_token_id
    assert read != [*ids, base.tokenizer.eos_token_id]
    assert mine["spans"][-1] == [len(own), len(own) + 1, len(read) - 1, len(read)]


def test_a_batch_counts_rows_over_all_examples(tmp_path):
    setting = make_setting(tmp_path)
    writer = PairWriter.of(setting)
    completions = [setting.heldout.completions[0], setting.heldout.completions[1]]
    rows = [writer.encode("Why?", c) for c in completions]
    batch = writer.collator()(rows)
    counts = [sum(t != IGNORED for t in rows[0][f"{side}labels"]) for side in ("", "teacher_")]
    moved = torch.tensor(rows[1]["spans"]) + torch.tensor([counts[0]] * 2 + [counts[1]] * 2)
    assert batch["spans"].tolist() == rows[0]["spans"] + moved.tolist()
    assert batch["spans"].shape[0] == batch["one_to_one"].shape[0]


@pytest.mark.parametrize("method", ["logit_kd", "adakd"])
def test_a_pair_of_two_tokenizers_is_not_refused(tmp_path, method):
    setting = make_setting(tmp_path, method)
    assert setting.heldout.shared is None  # they do differ
    assert methods.load(method).across_tokenizers  # which `pipeline` asks before
    check(setting)  # refuses what it does not take
