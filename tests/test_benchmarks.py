"""What the benchmarks compute, by hand; and that they run, on tiny models."""

import math
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, make_model, make_tokenizer

from benchmarks import kd_step, reproduce
from benchmarks.fidelity import (
    Answer,
    measure_student,
    token_match,
    token_sums,
)
from benchmarks.kd_variants import VARIANTS, floor, gkd, ours, plain, prepare, trunks
from benchmarks.reproduction_table import BEGIN, END, QUANTITIES, insert, spread, table, verdict
from benchmarks.training_step import checks, ratio_with_spread
from medistill_trl import recipe
from medistill_trl.errors import UserError
from medistill_trl.models import set_generation
from medistill_trl.prompts import PromptFormat
from medistill_trl.run_directory import RunDirectory
from medistill_trl.teacher import Sampling, complete, completion_logits

# --- text


def test_token_match_counts_positions_and_missing_ones_as_wrong():
    assert token_match([1, 2, 3, 4], [1, 9, 3]) == 2 / 4
    assert token_match([1, 2], [1, 2]) == 1
    assert token_match([2, 1], [1, 2]) == 0


# --- distributions


def test_two_tokens_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2), so m = (5/8, 3/8); the teacher wrote token 0."""
    teacher = torch.tensor([[math.log(3.0), 0.0, -1e4, -1e4, -1e4]])
    student = torch.tensor([[0.0, 0.0, -1e4, -1e4, -1e4]])
    sums = token_sums(student, teacher, torch.tensor([0]))
    assert sums["tokens"] == 1
    assert sums["ce"] == pytest.approx(math.log(2))
    assert sums["kl"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)
    of_teacher = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
    of_student = 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    assert sums["js"] == pytest.approx((of_teacher + of_student) / 2, rel=1e-5)


def test_js_is_symmetric_and_at_most_ln_2():
    torch.manual_seed(0)
    targets = torch.zeros(20, dtype=torch.long)
    for scale in (0.1, 3.0, 1e4):
        one, other = torch.randn(20, 9) * scale, torch.randn(20, 9) * scale
        there, back = (token_sums(*pair, targets)["js"] for pair in ((one, other), (other, one)))
        assert there == pytest.approx(back, rel=1e-4)
        assert 0 < there / 20 <= math.log(2) + 1e-6
    apart = torch.eye(6) * 1e4
    assert token_sums(apart[:1], apart[1:2], targets[:1])["js"] == pytest.approx(math.log(2))


def test_chunks_add_up(monkeypatch):
    torch.manual_seed(0)
    batch = torch.randn(9, 8), torch.randn(9, 8), torch.randint(8, (9,))
    whole = token_sums(*batch)
    monkeypatch.setattr("benchmarks.fidelity.ROWS_PER_CHUNK", 2)
    assert token_sums(*batch) == pytest.approx(whole, rel=1e-5)


# --- the comparison


@pytest.mark.parametrize(
    ("differences", "kd_sign", "said"),
    [
        ([0.1, 0.2, 0.3], +1, "reproduced"),
        ([-0.1, -0.2, -0.3], -1, "reproduced"),
        ([-0.1, -0.2, -0.3], +1, "not reproduced (opposite)"),
        ([0.1, -0.2, 0.3], +1, "not reproduced (mixed)"),
        ([0.1, 0.0, 0.3], +1, "not reproduced (mixed)"),
        ([0.0, 0.0, 0.0], -1, "tie"),
        ([0.1, 0.2, 0.3], 0, "–"),
    ],
)
def test_verdicts(differences, kd_sign, said):
    assert verdict(differences, kd_sign) == said


def test_the_stated_directions():
    """SFT: lower loss, more similar text; Logit-KD: lower KL and JS, higher exact match."""
    signs = {q.name: q.kd_sign for q in QUANTITIES if q.kd_sign}
    assert {name for name, sign in signs.items() if sign < 0} == {"kl", "js", "rouge_l"}
    rising = {"train_ce", "heldout_ce", "exact_match", "token_match"}
    assert {name for name, sign in signs.items() if sign > 0} == rising


def test_the_table_has_a_row_a_quantity():
    measurements = {
        method: {seed: {q.name: value + seed for q in QUANTITIES} for seed in (1, 2)}
        for method, value in (("sft", 1.0), ("logit_kd", 0.5))
    }
    lines = table(measurements).splitlines()
    assert len(lines) == 2 + len(QUANTITIES)
    assert "seeds 1, 2" in lines[0]
    assert {line.count("|") for line in lines} == {7}
    row = next(line for line in lines if line.startswith("| KL"))
    assert "| 2.500 ± 0.707 | 2.000 ± 0.707 | -0.500, -0.500 |" in row
    assert row.endswith("| Logit-KD lower | reproduced |")
    assert spread([0.25]) == "0.250"


def test_results_replace_what_stands_between_the_markers():
    document = f"before\n{BEGIN}\nRESULTS\n{END}\nafter\n"
    once = insert(document, "first")
    assert once == f"before\n{BEGIN}\nfirst\n{END}\nafter\n"
    assert insert(once, "second") == once.replace("first", "second")
    with pytest.raises(ValueError, match="needs the lines"):
        insert("nothing", "first")
    assert insert(reproduce.DOCUMENT.read_text(), "x") != "x"


def test_every_run_is_a_valid_recipe_of_the_reports_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for method in reproduce.METHODS:
        words = reproduce.run_words(method, 43, tmp_path, None)
        values = recipe.load(words).values
        assert values["seed"] == 43
        assert values["teacher_completions"] == "stored"
        assert values["per_device_train_batch_size"] == 4
        assert values["completion_store"] == str(tmp_path / "completions.sqlite")
    assert (values["alpha"], values["kd_temperature"]) == (0.5, 2.0)


def test_a_finished_trial_does_not_pass_for_the_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    trial = recipe.load(reproduce.run_words("sft", 42, tmp_path, max_steps=2))
    directory = RunDirectory(trial.output_dir)
    directory.start(trial, {})
    directory.mark_complete()
    assert reproduce.train("sft", 42, tmp_path, max_steps=2).path == directory.path
    with pytest.raises(UserError, match="other values of max_steps"):
        reproduce.train("sft", 42, tmp_path, max_steps=None)


# --- measuring students


@pytest.fixture(scope="module")
def tiny():
    """A teacher, its format and its greedy answers to two prompts."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<|endoftext|>"
    form = PromptFormat(tokenizer)
    teacher = make_model(len(tokenizer), seed=1).eval()
    set_generation(teacher, tokenizer)
    prompts = [form.render(f"What causes condition {n}?") for n in range(2)]
    answers = []
    for prompt, written in zip(prompts, complete(teacher, form, prompts, Sampling(8)), strict=True):
        ids = written.token_ids + ([] if written.end_id is None else [written.end_id])
        logits = completion_logits(teacher, form.encode(prompt), ids)
        answers.append(Answer(prompt, written.text, ids, logits))
    return teacher, form, answers


def test_a_student_that_is_its_teacher(tiny):
    teacher, form, answers = tiny
    measured = measure_student(teacher, form, answers, answers, 8)
    assert measured["kl"] == pytest.approx(0, abs=1e-6)
    assert measured["js"] == pytest.approx(0, abs=1e-6)
    assert measured["train_ce"] == pytest.approx(measured["heldout_ce"], rel=1e-6)
    for name in ("top_k", "top_1", "token_match", "exact_match"):
        assert measured[name] == 1


def test_another_student_against_the_plain_formula(tiny):
    teacher, form, answers = tiny
    student = make_model(len(form.tokenizer), layers=2, seed=5).eval()
    set_generation(student, form.tokenizer)
    measured = measure_student(student, form, answers[:1], answers, 8)
    kl = tokens = 0
    for answer in answers:
        start = form.encode(answer.prompt)
        with torch.no_grad():
            p, q = (
                model(torch.tensor([start + answer.token_ids])).logits[0, len(start) - 1 : -1]
                for model in (teacher, student)
            )
        p, q = p.softmax(-1), q.softmax(-1)
        kl += (p * (p / q).log()).sum().item()
        tokens += len(answer.token_ids)
    assert measured["kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert measured["exact_match"] == 0
    assert {q.name for q in QUANTITIES} - set(measured) == {"own_loss"}


# --- the training step


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_variants_take_the_same_step(mode, tmp_path):
    """Ours has the plain formula's gradient; what the others leave out, and what they do not."""
    torch.manual_seed(0)
    bench = prepare(mode, batch=2, tokens=24, tiny=True, folder=str(tmp_path))
    gradients = {}
    for variant in (plain, ours, gkd, floor, trunks):
        bench.student.zero_grad(set_to_none=True)
        variant(bench)
        trained = [p for p in bench.student.parameters() if p.requires_grad]
        gradients[variant] = [p.grad for p in trained if p.grad is not None]
        assert all(g.isfinite().all() for g in gradients[variant])
        assert len(gradients[variant]) == len(trained) - (variant is trunks and mode == "full")
        assert all(p.grad is None for p in bench.teacher.parameters())
    for got, want in zip(gradients[ours], gradients[plain], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_the_benchmark_reports(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    sizes = iter(range(1, 100))
    asked = []

    def peak(module, variant, given):  # a fresh process each would take a minute
        asked.append((module, variant, given.mode, given.batch, given.tokens, given.tiny))
        return 10**6 * next(sizes)

    monkeypatch.setattr(kd_step, "peak", peak)
    words = "kd_step --tiny --batch 2 --tokens 16 --repetitions 3 --sizes 32 64"
    monkeypatch.setattr(sys, "argv", words.split())
    kd_step.main()
    out = capsys.readouterr().out
    assert out.count("holds") + out.count("does not hold") == 6
    for name in VARIANTS:
        assert out.count(f"\n| {name} |") == 2
    assert ("benchmarks.kd_step", "ours", "lora", 2, 32, True) in asked
    assert "| LoRA r=16 | 64 |" in out


def test_a_process_measures_its_own_peak(monkeypatch):
    monkeypatch.chdir(ROOT)
    given = Namespace(peak_of="ours", mode="lora", batch=2, tokens=16, tiny=True)
    assert kd_step.own_peak(given) > 10**8


def test_checks_say_what_does_not_hold():
    seconds = {"gkd": [10.0], "ours": [5.0], "floor": [4.0]}
    text = checks(kd_step.ratios(seconds, {"gkd": 1000, "ours": 150}), kd_step.LIMITS)
    assert "step time ours/GKD 0.500, required ≤ 0.6: holds" in text
    assert "loss memory ours/GKD 0.150, required ≤ 0.15: holds" in text
    assert "step time ours/floor 1.250, required ≤ 1.15: does not hold" in text
    assert ratio_with_spread([2.0, 3.0, 4.0], [2.0, 2.0, 1.0]) == "1.50 (1.00–4.00)"
