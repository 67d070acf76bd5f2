"""The methods that compare inner states or reward tokens, on a pair with the flagship's tokenizers."""

import math

import pytest
import torch
from conftest import make_model
from flagship_pair import llama_model, llama_tokenizer, qwen_model, qwen_tokenizer
from tiny_setting import PROMPTS, check, logged, make_form, make_setting, train
from two_tokenizers import permuted

from medistill_trl import methods
from medistill_trl.coverage import span_counts
from medistill_trl.errors import UserError
from medistill_trl.prompt_spans import prompt_spans
from medistill_trl.prompts import IGNORED, PromptFormat
from medistill_trl.rewards import TeacherReward
from medistill_trl.rollouts import Sample, encode_sample
from medistill_trl.span_pairs import encode_span_pair
from medistill_trl.spans import TokenizerPair
from medistill_trl.teacher import Completion, completion_log_probs

TEXTS = [
    "Give 5 µg of naïve β-blocker; see the nephrologist.",
    " Urate crystals irritate the joint, at ≥ 37.8 °C 😷",
    "No.",
]
STUDENT = PromptFormat(qwen_tokenizer())
TEACHER = PromptFormat(llama_tokenizer())
TEACHER.tokenizer.pad_token = "<unk>"
PAIR = TokenizerPair.of(STUDENT.tokenizer, TEACHER.tokenizer)


def across(folder, method, **changes):
    """A setting of the pair; rewards of on-policy methods are of few, short samples."""
    if method in ("on_policy", "ppo"):
        changes = {"max_completion_length": 6, "data": {"max_prompt_tokens": 200}, **changes}
    if method == "on_policy":
        changes = {"num_generations": 2, **changes}
    if method == "attention":
        changes = {"match_all_heads": False, **changes}
    return make_setting(
        folder,
        method,
        form=STUDENT,
        teacher_form=TEACHER,
        student=changes.pop("student", None) or qwen_model(),
        teacher_model=changes.pop("teacher_model", None) or llama_model(),
        **changes,
    )


def written(text, finished=True):
    """A completion of the teacher."""
    tokenizer = TEACHER.tokenizer
    ids = tokenizer("\n" + text, add_special_tokens=False)["input_ids"][2:]
    return Completion(text, ids, finished, tokenizer.eos_token_id if finished else None)


def batch_of(trainer, texts=TEXTS, finished=True):
    writer = trainer.writer
    pairs = zip(PROMPTS, texts, strict=False)
    return trainer.data_collator(
        [writer.encode(p.question, written(t, finished)) for p, t in pairs]
    )


def columns(batch):
    """Per sequence, the real tokens' span numbers of both sides."""
    for row in range(len(batch["span_of"])):
        yield [
            batch[f"{side}span_of"][row][batch[f"{side}attention_mask"][row].bool()].tolist()
            for side in ("", "teacher_")
        ]


# --- FitNets


def layer_states(model, ids, layer):
    """Of one sequence, before the final norm for all but the last layer."""
    return model(ids[None], output_hidden_states=True).hidden_states[layer][0]


def test_fitnets_is_the_plain_formula_over_spans(tmp_path):
    setting = across(
        tmp_path, "fitnets", feature_loss="mse", alpha=1.0, layer_mapping={1: 2},
        projection_init="orthogonal",
    )  # fmt: skip
    trainer = methods.load("fitnets").build(setting)
    batch, total, count = batch_of(trainer), 0.0, 0
    for prompt, text in zip(PROMPTS, TEXTS, strict=False):
        example = trainer.writer.encode(prompt.question, written(text))
        ids = torch.tensor(example["input_ids"]), torch.tensor(example["teacher_input_ids"])
        states = (
            layer_states(setting.student, ids[0], 1),
            layer_states(setting.teacher.model, ids[1], 2).detach(),
        )
        before = len(STUDENT.encode(STUDENT.render(prompt.question))) - 1
        before_theirs = len(TEACHER.encode(TEACHER.render(prompt.question))) - 1
        assert len(example["spans"]) > 1
        for a, b, c, d in example["spans"]:
            g = states[0][before + a : before + b].mean(0)  # those that predict the span
            h = states[1][before_theirs + c : before_theirs + d].mean(0)
            total = total + (trainer.projections[0](g) - h).square().mean()
            count += 1
    loss = trainer.compute_loss(trainer.model, batch)
    assert len(batch["spans"]) == count
    assert loss.item() == pytest.approx((total / count).item(), rel=1e-5)
    later = batch["spans"][:-1] + torch.tensor([0, 0, 1, 1])  # one teacher token too late
    shifted = batch | {"spans": torch.cat([later, batch["spans"][-1:]])}
    other = trainer.compute_loss(trainer.model, shifted).item()
    assert other != pytest.approx(loss.item(), rel=1e-3)
    trainer.args.span_pooling = "first"
    assert trainer.compute_loss(trainer.model, batch).item() != pytest.approx(loss.item(), rel=1e-3)


# --- attention


def eager_map(model, ids, layer):
    model.set_attn_implementation("eager")
    return model(ids[None], output_attentions=True).attentions[layer - 1][0]


def plain_map(attention_HTT, column):
    members = [[n for n, span in enumerate(column) if span == s] for s in range(max(column) + 1)]
    return torch.stack(
        [
            torch.stack([attention_HTT[:, rows][:, :, keys].sum(2).mean(1) for keys in members], -1)
            for rows in members
        ],
        1,
    )


def test_attention_is_the_plain_formula_over_spans(tmp_path):
    setting = across(tmp_path, "attention", alpha=1.0, layer_mapping={2: 3})
    trainer = methods.load("attention").build(setting)
    batch, total, count = batch_of(trainer), 0.0, 0
    found = trainer.compute_loss(trainer.model, batch)
    for row, (own, theirs) in enumerate(columns(batch)):
        ids = batch["input_ids"][row][: len(own)], batch["teacher_input_ids"][row][: len(theirs)]
        p_s = plain_map(eager_map(setting.student, ids[0], 2), own).mean(0)
        p_t = plain_map(eager_map(setting.teacher.model, ids[1], 3), theirs).mean(0)
        torch.testing.assert_close(p_t.sum(-1), torch.ones(len(p_t)))
        labels = batch["labels"][row][: len(own)]
        rows = sorted(
            {s for s, label in zip(own, labels.tolist(), strict=True) if label != IGNORED}
        )
        assert len(p_s) > len(rows) + 3  # the question's spans are keys
        total = total + (p_s - p_t)[rows].square().sum()
        count += len(rows)
    assert found.item() == pytest.approx((total / count).item(), rel=1e-4)
    found.backward()
    assert all(p.grad is not None for p in setting.student.parameters())


def encoded(max_length=None):
    completion = written(TEXTS[0])
    return encode_span_pair(
        PAIR, STUDENT, TEACHER, "Why?", completion, max_length, with_columns=True
    )


def test_what_max_length_cuts_takes_its_spans_with_it():
    """Every token up to the last whole span has one; a prompt that fills the row is all there is."""
    whole = encoded()
    assert IGNORED not in whole["span_of"] + whole["teacher_span_of"]
    length = len(whole["input_ids"]) - 3
    cut = encoded(length)
    assert len(cut["span_of"]) == len(cut["row_counts"]) == length
    assert 0 < max(cut["span_of"]) == max(cut["teacher_span_of"]) < max(whole["span_of"])
    for name in ("span_of", "teacher_span_of"):
        last = max(cut[name])
        assert [n for n in cut[name] if n != IGNORED] == [n for n in whole[name] if n <= last]
    prompt = len(STUDENT.encode(STUDENT.render("Why?")))
    assert cut["row_counts"] == [
        int(t >= prompt and number != IGNORED) for t, number in enumerate(cut["span_of"])
    ]
    nothing = encoded(5)
    assert len(nothing["span_of"]) == prompt
    assert not any(nothing["row_counts"])


def test_the_question_is_aligned_inside_both_templates():
    question = "What is the naïve µ of 5 β?"
    sides = []
    for form, side in ((STUDENT, PAIR.student), (TEACHER, PAIR.teacher)):
        prompt = form.render(question)
        ids = form.encode(prompt)
        sides.append((ids, side.pieces(ids, prompt)))
    (own_ids, own), (their_ids, theirs) = sides
    spans = prompt_spans(own, theirs, question)
    assert (spans[0].student_start, spans[0].teacher_start) == (0, 0)
    assert (spans[-1].student_end, spans[-1].teacher_end) == (len(own_ids), len(their_ids))
    texts = [
        [b"".join(pieces[start:end]) for start, end in ends]
        for pieces, ends in (
            (own, [span[:2] for span in spans]),
            (theirs, [span[2:4] for span in spans]),
        )
    ]
    assert texts[0][1:-1] == texts[1][1:-1]
    assert b"".join(texts[0][1:-1]) in question.encode()
    assert len(b"".join(texts[0][1:-1])) > len(question.encode()) - 4
    assert [span.exact for span in spans] == [False, *[True] * (len(spans) - 2), False]
    whole = prompt_spans(own, theirs, "another question")
    assert [span[:4] for span in whole] == [(0, len(own_ids), 0, len(their_ids))]
    same = prompt_spans(own, [b"", *own], question)  # a BOS, and the same text
    assert [span[:2] for span in same] == [(n, n + 1) for n in range(len(own))]
    assert same[0][2:4] == (0, 2)


# --- rewards


def samples(finished=True):
    tokenizer = STUDENT.tokenizer
    end_id = tokenizer.eos_token_id if finished else None
    return [
        Sample(prompt.question, Completion(text, tokenizer(text)["input_ids"], finished, end_id))
        for prompt, text in zip(PROMPTS, TEXTS, strict=False)
    ]


@pytest.mark.parametrize("finished", [True, False])
def test_rewards_of_spans_sum_to_the_log_ratio_of_both_models_own_tokens(tmp_path, finished):
    setting = across(tmp_path, "on_policy")
    reward = TeacherReward.of(setting)
    drawn = samples(finished)
    examples = [encode_sample(STUDENT, sample) for sample in drawn]
    own = completion_log_probs(setting.student, examples)
    found = reward(drawn, own)
    assert found.per_token
    for row, sample in enumerate(drawn):
        prompt = TEACHER.render(sample.question)
        start = TEACHER.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        joint = TEACHER.tokenizer(prompt + sample.completion.text, add_special_tokens=False)
        ids = joint["input_ids"][len(start) :] + [TEACHER.tokenizer.eos_token_id] * finished
        prompt_ids = TEACHER.encode(prompt)
        logits = setting.teacher.model(torch.tensor([prompt_ids + ids])).logits[0].log_softmax(-1)
        theirs = logits[len(prompt_ids) - 1 : -1][range(len(ids)), ids].detach()
        rewards = found.rewards_BT[row]
        assert found.scores_B[row].item() == pytest.approx(
            (theirs.sum() - own[row].sum()).item(), rel=1e-4
        )
        earned = rewards.nonzero().flatten().tolist()
        spans = PAIR.spans(sample.token_ids, ids, sample.completion.text, finished)
        assert earned == [span.student_end - 1 for span in spans]
        for span, place in zip(spans, earned, strict=True):
            ratio = theirs[span.teacher_start : span.teacher_end].sum()
            ratio = ratio - own[row][span.student_start : span.student_end].sum()
            assert rewards[place].item() == pytest.approx(ratio.item(), rel=1e-4, abs=1e-5)
        torch.testing.assert_close(
            found.teacher_log_probs[row] - own[row], rewards[: len(own[row])]
        )


def test_a_sample_cut_amid_a_character_earns_for_what_is_whole(tmp_path):
    tokenizer, text = STUDENT.tokenizer, "Give 5 µ"
    ids = tokenizer(text)["input_ids"][:-1]
    cut = tokenizer.decode(ids)
    assert cut.endswith("�")
    setting = across(tmp_path, "on_policy")
    one = Sample("Why?", Completion(cut, ids, finished=False))
    nothing = Sample("Why?", Completion("", [], finished=False))
    pair = [encode_sample(STUDENT, sample) for sample in (one, nothing)]
    own = completion_log_probs(setting.student, pair)
    found = TeacherReward.of(setting)([one, nothing], own)
    assert found.tokens_in_spans == [len(ids) - 1, 0]
    rewards, none = found.rewards_BT
    assert not none.any()
    assert rewards[-1] == 0
    assert rewards[:-1].count_nonzero() > 1


def test_a_stop_string_earns_nothing(tmp_path):
    setting = across(tmp_path, "on_policy")
    ids = STUDENT.tokenizer("Gout.")["input_ids"]
    stopped = Sample("Why?", Completion("Gout.", ids, finished=True))
    cut = Sample("Why?", Completion("Gout.", ids, finished=False))
    own = completion_log_probs(setting.student, [encode_sample(STUDENT, s) for s in (stopped, cut)])
    found = TeacherReward.of(setting)([stopped, cut], own).rewards_BT
    torch.testing.assert_close(found[0], found[1])


# --- all of them


def test_the_share_in_spans_is_of_the_students_tokens(tmp_path):
    """An accent that Qwen2's tokenizer composes is in no span; what max_length cuts of the teacher's is in none."""
    trainer = methods.load("fitnets").build(across(tmp_path, "fitnets", alpha=1.0))
    text = "Give nai\u0308ve cells"
    batch = batch_of(trainer, [text])
    spans = batch["spans"].tolist()
    tokens = len(STUDENT.tokenizer(text)["input_ids"]) + 1
    inside = sum(end - start for start, end, *_ in spans)
    assert 0 < inside < tokens
    assert span_counts(batch) == {"tokens": tokens, "in_spans": inside}
    trainer.compute_loss(trainer.model, batch)
    assert trainer._means["train"]["spans"].take(trainer.accelerator) == {
        "span_share": pytest.approx(inside / tokens)
    }


@pytest.mark.parametrize("method", ["fitnets", "attention", "on_policy", "ppo"])
def test_two_steps_move_the_student_and_nothing_else(tmp_path, method, caplog):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "min_coverage": 1.0}
    setting = across(tmp_path, method, lora=True, **changes)
    teacher = {name: p.clone() for name, p in setting.teacher.model.named_parameters()}
    _, trainer, before = train(setting)
    assert all(math.isfinite(loss) for loss in logged(trainer))
    state = setting.student.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(state[name], value)}
    assert moved
    trained = ("lora", "value_head", "projections")
    assert all(any(part in name for part in trained) for name in moved)
    for name, value in setting.teacher.model.named_parameters():
        assert torch.equal(value, teacher[name]), name
    if method in ("on_policy", "ppo"):
        assert len(logged(trainer, "kl_to_teacher_nats")) > 0
    assert len(logged(trainer, "span_share")) == (1 if method == "ppo" else 2)
    names = "span_share", "eval_span_share"
    shares = [entry[n] for entry in trainer.state.log_history for n in names if n in entry]
    assert len(shares) > len(logged(trainer, "span_share"))
    assert all(0 < share <= 1 for share in shares)
    assert (
        min(shares) < 1
    )  # a tiny model's text has characters that Qwen2's tokenizer composes, or is cut amid one
    said = [r.getMessage() for r in caplog.records if "little in common" in r.getMessage()]
    assert len(said) == 1
    assert "span_share 0." in said[0]


@pytest.mark.parametrize("method", ["on_policy", "ppo"])
def test_refuse_refuses_rewards_of_spans(tmp_path, method):
    check(across(tmp_path / "a", method, lora=True))
    changes = {"teacher": {"cross_tokenizer": "refuse"}, "lora": True}
    with pytest.raises(UserError, match="set cross_tokenizer: auto, which compares spans"):
        check(across(tmp_path, method, **changes))
    check(across(tmp_path / "b", method, reward="teacher_logprob", **changes))


@pytest.mark.parametrize("method", ["fitnets", "attention"])
def test_padding_sides_agree(tmp_path, method):
    trainer = methods.load(method).build(across(tmp_path, method, alpha=1.0))
    right, left = batch_of(trainer), {}
    for name, rows in right.items():
        mask = right["teacher_attention_mask" if name.startswith("teacher_") else "attention_mask"]
        if rows.dim() == 2 and name != "spans":
            shifts = (mask == 0).sum(1).tolist()
            rows = torch.stack([row.roll(n) for row, n in zip(rows, shifts, strict=True)])
        left[name] = rows
    assert left["attention_mask"][2, 0] == left["teacher_attention_mask"][2, 0] == 0
    losses = [trainer.compute_loss(trainer.model, batch).item() for batch in (right, left)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("method", ["fitnets", "attention"])
def test_spans_of_one_token_give_what_a_shared_tokenizer_does(tmp_path, method):
    """The same tokenizer with other ids, and a teacher whose embeddings are in that order."""
    form, losses = make_form(), {}
    changes = {"projection_init": "orthogonal"} if method == "fitnets" else {}
    order = torch.randperm(len(form.tokenizer), generator=torch.Generator().manual_seed(0))
    for name in ("shared", "permuted"):
        model, tokenizer = make_model(len(order), seed=1), form.tokenizer
        if name == "permuted":
            tokenizer = permuted(tokenizer, order.tolist())
            embedding = model.get_input_embeddings().weight
            embedding.data = embedding[order.argsort()]
        setting = make_setting(
            tmp_path / name, method, teacher_form=PromptFormat(tokenizer), teacher_model=model,
            **changes,
        )  # fmt: skip
        trainer = methods.load(method).build(setting)
        examples = []
        for prompt, text in zip(PROMPTS, TEXTS, strict=False):
            ids = tokenizer(text)["input_ids"]
            completion = Completion(text, ids, True, tokenizer.eos_token_id)
            examples.append(trainer.writer.encode(prompt.question, completion))
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in setting.student.parameters()])
        losses[name] = loss.item(), gradients, setting.heldout.shared
    assert (losses["shared"][2], losses["permuted"][2]) == (len(order), None)
    assert losses["permuted"][0] == pytest.approx(losses["shared"][0], rel=1e-6)
    torch.testing.assert_close(losses["permuted"][1], losses["shared"][1], rtol=1e-4, atol=1e-7)
