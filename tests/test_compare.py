"""`python -m eval.compare`, on run directories made of numbers."""

import json
import shutil
import subprocess
import sys

import pytest
from comparisons import KL, content_of, refused
from conftest import ROOT
from run_folders import DIGEST, edit, write_items, write_json, write_run
from scipy import stats
from sealed import read, seal

from eval.comparison.cost import pareto_front
from eval.comparison.result import build
from eval.comparison.runs import find
from eval.comparison.tables import document
from eval.plots.ablation import ablation_plot
from medistill_trl.errors import UserError


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three methods of three seeds, one much better than the others."""
    folder = tmp_path_factory.mktemp("three")
    return [
        write_run(folder / f"{method}-{seed}", method, seed, skill, seconds=seconds)
        for method, skill, seconds in (("sft", 0.4, 100), ("cot", 0.4, 400), ("logit_kd", 0.9, 150))
        for seed in (42, 43, 44)
    ]


@pytest.fixture(scope="module")
def compared(three, tmp_path_factory):
    """What the command leaves, as a user types it, in a process that must not load torch."""
    out = tmp_path_factory.mktemp("out")
    program = (
        "import sys; from eval.compare import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    words = [sys.executable, "-c", program, *three, "--out", out]
    result = subprocess.run(
        [str(word) for word in words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return out, read(out / "comparison.json"), result.stdout


@pytest.fixture
def pair(tmp_path):
    return write_run(tmp_path / "a", "sft"), write_run(tmp_path / "b", "logit_kd", skill=0.8)


# --- what is compared


def test_the_command_writes_json_page_and_pictures(compared):
    out, content, printed = compared
    assert content["schema_version"] == 1
    pictures = {path.name for path in out.glob("*.png")}
    assert pictures == {
        "pareto.png",
        "benchmark_comparison.png",
        "fidelity_metrics.png",
        "fidelitybench_radar.png",
        "training_curves.png",
    }
    page = (out / "comparison.md").read_text()
    report = (out / "report.html").read_text()
    assert "logit_kd comes first" in report
    assert report.count("data:image/png") == len(pictures)
    assert all(f"({picture})" in page for picture in pictures)
    assert content["verdict"][0] in printed
    assert any(line.startswith("| logit_kd | ") for line in printed.splitlines())
    assert content["verdict"][0] in page


def test_runs_that_differ_in_their_seed_are_one_configuration(compared):
    _, content, _ = compared
    assert [c["name"] for c in content["configurations"]] == ["sft", "cot", "logit_kd"]
    assert all(c["seeds"] == [42, 43, 44] for c in content["configurations"])
    value = content["measures"]["heldout.kl_nats"]["values"]["sft"]
    assert value["value"] == pytest.approx(sum(value["by_seed"]) / 3)
    assert value["sd_over_seeds"] == pytest.approx(stats.tstd(value["by_seed"]))


def test_configurations_of_one_method_are_named_by_what_tells_them_apart(tmp_path):
    runs = [
        write_run(tmp_path / f"r{rank}", seed=1, lora_r=rank, lora_alpha=2 * rank, evaluated=False)
        for rank in (16, 2, 8)
    ]
    content = content_of(*runs)
    names = ["sft (lora_r 2)", "sft (lora_r 8)", "sft (lora_r 16)"]
    assert [c["name"] for c in content["configurations"]] == names
    series = content["ablation"]["series"]["sft"]
    assert content["ablation"]["key"] == "lora_r"
    assert [(point["x"], point["configuration"]) for point in series] == [
        *zip((2, 8, 16), names, strict=True)
    ]
    with pytest.raises(UserError, match=r"--x: 'max_steps'.*what varies: lora_r"):
        content_of(*runs, x="max_steps")


def test_each_setting_of_the_other_keys_has_a_line_and_what_lacks_the_key_none(tmp_path):
    runs = [
        write_run(tmp_path / f"k{t}-{a}", "logit_kd", 1, kd_temperature=t, alpha=a, evaluated=False)
        for t in (1.0, 2.0)
        for a in (0.3, 0.7)
    ]
    content = content_of(*runs, write_run(tmp_path / "s", seed=1, evaluated=False), x="alpha")
    assert {
        line: [point["x"] for point in points]
        for line, points in content["ablation"]["series"].items()
    } == {"logit_kd (kd_temperature 1.0)": [0.3, 0.7], "logit_kd (kd_temperature 2.0)": [0.3, 0.7]}
    assert ablation_plot(content).axes[0].get_legend() is not None


def test_values_are_those_of_the_evaluations(pair):
    content = content_of(*pair)
    own = json.loads((pair[0] / "results/comprehensive_evaluation.json").read_text())["results"]
    for key, estimate in {
        KL: own["fidelity"]["prefixes"]["teacher"]["micro"]["kl_teacher_student_nats"],
        "fidelity.gold.bits_per_byte": own["fidelity"]["prefixes"]["gold"]["student_bits_per_byte"],
        "text.rouge_l": own["fidelity"]["text"]["rouge_l"],
        "text.bleu": own["fidelity"]["text"]["bleu"],
        "benchmarks.medqa.accuracy": own["benchmarks"]["medqa"]["student"]["accuracy"],
        "retention.medqa": own["retention"]["benchmarks"]["medqa"]["retention"],
        "generative.medqa.accuracy": own["generative"]["medqa"]["student"]["accuracy"],
        "perplexity.perplexity": own["perplexity"]["student"]["perplexity"],
        "perplexity.nats_per_token": own["perplexity"]["student"]["nats_per_token"],
        "faithfulness.hallucination": own["faithfulness"]["student"]["claims"]["hallucination"],
    }.items():
        value = content["measures"][key]["values"]["sft"]
        assert value["value"] == pytest.approx(estimate["value"]), key
        assert value["interval_95"] == pytest.approx(estimate["interval_95"]), key
    teacher = own["benchmarks"]["medqa"]["teacher"]["accuracy"]
    assert content["measures"]["benchmarks.medqa.accuracy"]["teacher"] == teacher
    assert content["measures"][KL]["teacher"] is None
    assert content["floors"]["medqa"]["majority_accuracy"] == 0.3
    macro = content["measures"]["macro_f1.medqa"]["values"]["sft"]
    assert (macro["value"], macro["interval_95"]) == (
        own["benchmarks"]["medqa"]["student"]["macro_f1"],
        None,
    )


def test_a_difference_is_of_the_same_items(pair):
    content = content_of(*pair)
    test = next(
        t
        for t in content["differences"]["benchmarks"]
        if t["measure"] == "benchmarks.medqa.accuracy"
    )
    rows = [
        [
            json.loads(line)
            for line in (run / "results/items/benchmarks.jsonl").read_text().splitlines()
        ]
        for run in pair
    ]
    sft, kd = (
        [r["right"] for r in own if (r["benchmark"], r["subject"]) == ("medqa", "student")]
        for own in rows
    )
    alone = [
        sum(k and not s for s, k in zip(sft, kd, strict=True)),
        sum(s and not k for s, k in zip(sft, kd, strict=True)),
    ]
    assert (test["configuration"], test["minus"], test["n"]) == ("logit_kd", "sft", 40)
    assert [test["only_first_right"], test["only_second_right"]] == alone
    assert test["p"] == pytest.approx(stats.binomtest(alone[0], sum(alone)).pvalue)
    assert test["value"] == pytest.approx((sum(kd) - sum(sft)) / 40)


def test_p_values_are_adjusted_over_configurations_and_over_benchmarks(compared):
    _, content, _ = compared
    tests = content["differences"]["fidelity_teacher"]
    of_kl = sorted((t["p"], t["p_holm"]) for t in tests if t["measure"] == KL)
    assert of_kl[0][1] == pytest.approx(2 * of_kl[0][0])
    benchmarks = sorted((t["p"], t["p_holm"]) for t in content["differences"]["benchmarks"])
    assert len(benchmarks) == 4
    assert benchmarks[0][1] == pytest.approx(min(1, 4 * benchmarks[0][0]))
    assert {t["configuration"]: t["p_holm"] for t in content["primary"]} == {
        t["configuration"]: t["p_holm"] for t in tests if t["measure"] == KL
    }


def test_students_that_wrote_nothing_are_compared_on_what_the_others_wrote_too(pair):
    path = pair[1] / "results/items/fidelity.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    gone = next(row for row in rows if row.get("prefixes") == "student")
    write_items(pair[1], "fidelity", [row for row in rows if row is not gone])
    # Its evaluation then says something else of this set; here it says nothing.
    edit(pair[1], "comprehensive_evaluation.json", results__fidelity__prefixes__student={})
    content = content_of(*pair)
    assert {t["n"] for t in content["differences"]["fidelity_student"]} == {39}
    assert {t["n"] for t in content["differences"]["fidelity_teacher"]} == {40}


# --- the answer


def test_the_best_and_whom_it_cannot_be_told_apart_from(compared):
    _, content, printed = compared
    assert content["quality"] == KL
    assert content["ranking"]["order"][0] == "logit_kd"
    assert "logit_kd comes first of 3" in printed
    assert "It can be told apart from all others (Holm over all 3 pairs)." in printed
    assert "Against the baseline sft, better: logit_kd" in printed
    assert "not told apart: cot" in printed


def test_equal_runs_cannot_be_told_apart(tmp_path):
    runs = [write_run(tmp_path / m, m, skill=0.5) for m in ("sft", "spin")]
    words = " ".join(content_of(*runs)["verdict"])
    assert "This student cannot be told apart" in words
    assert "comes first of these 2 single students" in words
    assert "another seed may turn the order around" in words


def test_the_front_has_what_none_beats():
    points = {"a": (1, 3.0), "b": (2, 2.0), "c": (3, 2.5), "d": (2, 2.0), "e": (4, 1.0)}
    points |= {"as cheap, worse": (1, 3.5), "as good, dearer": (5, 1.0)}
    assert pareto_front(points, "lower") == ["a", "b", "d", "e"]
    assert pareto_front(points, "higher") == ["as cheap, worse"]


def test_cost_is_of_training_and_of_what_the_teacher_wrote_for_it(compared, pair):
    _, content, _ = compared
    assert content["pareto"]["front"] == ["sft", "logit_kd"]
    assert content["cost"]["cot"]["training_seconds"] == 400
    assert content["cost"]["cot"]["student_weights_gb"] == 0.5
    assert content["notes"] == []
    used = {"tokens": 3800, "stored_seconds": 40.0}  # drawn by the one, used by both
    edit(pair[0], "run.json", seconds_drawing=40.0, teacher_use=used)
    edit(pair[1], "run.json", teacher_use=used, tokens__generated_teacher=0)
    found = content_of(*pair)
    sft, kd = (found["cost"][name] for name in ("sft", "logit_kd"))
    assert (sft["training_seconds"], sft["teacher_seconds"], sft["total_seconds"]) == (60, 40, 100)
    assert (kd["training_seconds"], kd["teacher_seconds"], kd["total_seconds"]) == (100, 40, 140)
    assert sft["teacher_tokens"] == kd["teacher_tokens"] == 3800
    assert sft["trained_tokens_per_second"] == pytest.approx(11000 / 60)
    edit(pair[1], "run.json", device="GPU")
    other = content_of(*pair)
    assert other["pareto"]["front"] is None
    assert any(note.startswith("trained with: device: CPU") for note in other["notes"])


def older(folder, method, seed=42, drawn=(0.0, 0), skill=0.5, **settings):
    """A run of before a record said what it used of the teacher's answers."""
    settings = {"teacher_completions": "stored", "teacher_temperature": 1.0, **settings}
    run = write_run(folder / f"{method}-{seed}", method, seed, skill, evaluated=False, **settings)
    seconds, tokens = drawn
    content = read(run / "results/run.json")
    del content["teacher_use"]
    content |= {"seconds": 100.0 + seconds, "seconds_drawing": seconds}
    content["tokens"]["generated_teacher"] = tokens
    write_json(run / "results/run.json", content)
    seal(run)
    return run


def test_of_older_records_all_that_asked_alike_pay_for_what_one_drew(tmp_path):
    rationales = {"num_rationales": 4, "rationale_max_new_tokens": 256}
    runs = [
        older(tmp_path, "sft", drawn=(59.5, 3591), skill=0.5),
        older(tmp_path, "logit_kd", skill=0.6, teacher_batch_size=4),
        older(tmp_path, "cot", 42, (853.1, 19336), skill=0.55, **rationales),
        older(tmp_path, "cot", 43, skill=0.55, **rationales),  # found in the store
        older(tmp_path, "ppo", skill=0.4),
    ]
    content = content_of(*runs)
    seconds = {name: cost["total_seconds"] for name, cost in content["cost"].items()}
    assert seconds == {"sft": 159.5, "logit_kd": 159.5, "cot": 953.1, "ppo": 100.0}
    tokens = {name: cost["teacher_tokens"] for name, cost in content["cost"].items()}
    assert tokens == {"sft": 3591, "logit_kd": 3591, "cot": 19336, "ppo": 0}
    assert content["pareto"]["front"] == ["ppo", "logit_kd"]
    assert any("records of an earlier version" in note for note in content["notes"])
    # The run that drew is not among them: what its answers took is not known, and never nothing.
    alone = content_of(runs[1], runs[4])
    assert alone["cost"]["logit_kd"]["total_seconds"] is None
    assert alone["pareto"]["front"] is None
    assert "not recorded for logit_kd" in document(alone)


@pytest.mark.parametrize("asked", ["logit_kd", "logit_kd-43"])
def test_another_baseline_and_quality(three, asked):
    content = content_of(*three, baseline=asked, quality="retention")
    assert content["baseline"] == "logit_kd"
    assert content["quality"] == "retention.all"
    assert {t["minus"] for t in content["primary"]} == {"logit_kd"}
    assert content["primary"][0]["test"] == "exact sign-flip"
    with pytest.raises(UserError, match=r"--baseline: 'ppo' is none of .* sft, cot, logit_kd"):
        content_of(*three, baseline="ppo")
    with pytest.raises(UserError, match="--quality: 'beauty' is no measure; one of kl, retention"):
        content_of(*three, quality="beauty")


def test_the_same_again_and_in_any_order(compared, three):
    content = compared[1]
    assert build(find(three)) == content | {"pictures": []}
    turned = build(find(three[::-1]))
    for key, measure in content["measures"].items():
        assert turned["measures"][key]["values"] == measure["values"]
    for family, tests in content["differences"].items():
        p_values = {(t["configuration"], t["measure"]): t["p_holm"] for t in tests}
        assert p_values == pytest.approx(
            {(t["configuration"], t["measure"]): t["p_holm"] for t in turned["differences"][family]}
        )


# --- refusals


@pytest.mark.parametrize(
    ("file", "place", "value", "named"),
    [
        ("run.json", "models__teacher", "sha256:other", "teacher (weights, dtype, quantisation): sha256:t float32 (a) and sha256:other (b)"),
        ("run.json", "models__student", "sha256:other", "base student: sha256:s (a) and sha256:other (b)"),
        ("run.json", "data__files__0__sha256", "1" * 64, f"training data, sha256: {DIGEST} (a) and {'1' * 64} (b)"),
        ("run.json", "data__files__1__sha256", "1" * 64, "validation data, sha256"),
        ("run.json", "heldout__after__prompts", 3, "held-out prompts: 4 (a) and 3 (b)"),
        ("run.json", "schema_version", 2, "its schema_version is 2, and this reads 1"),
        ("comprehensive_evaluation.json", "schema_version", 9, "its schema_version is 9"),
        ("comprehensive_evaluation.json", "options__limit", 20, "option --limit: 40 (a) and 20 (b)"),
        ("comprehensive_evaluation.json", "options__few_shot", 3, "option --few_shot: 0 (a) and 3 (b)"),
        ("comprehensive_evaluation.json", "data__sha256__benchmarks/medqa.jsonl", "x", "benchmarks/medqa.jsonl, sha256"),
        ("comprehensive_evaluation.json", "subjects__teacher__fingerprint", "x", "teacher of the evaluation: sha256:t float32 (a) and x (b)"),
        ("comprehensive_evaluation.json", "results__faithfulness__verifier__fingerprint", "x", "faithfulness, verifier"),
        ("comprehensive_evaluation.json", "recipe__lora_r", 4, "its evaluation is of another recipe than its run"),
        ("comprehensive_evaluation.json", "recipe__seed", 7, "its evaluation is of another recipe than its run"),
        ("comprehensive_evaluation.json", "results__benchmarks__medqa__student__accuracy__value", 0.99, "benchmarks.medqa.accuracy is 0.99 in its result and"),
    ],
)  # fmt: skip
def test_what_is_not_comparable_is_refused_by_name(pair, capsys, file, place, value, named):
    edit(pair[1], file, **{place: value})
    assert named in refused(capsys, *pair)


def test_all_differences_are_named_at_once(pair, capsys):
    edit(pair[1], "run.json", models__teacher="x", models__student="y")
    edit(pair[1], "comprehensive_evaluation.json", options__limit=1)
    message = refused(capsys, *pair)
    assert [
        word in message
        for word in ("teacher (", "base student", "--limit", "evaluate all of them alike")
    ] == [True] * 4


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("options__batch_size", 8),
        ("data__folder", "elsewhere"),
        ("options__verifier", "copy/of/it"),
    ],
)
def test_what_changes_no_number_is_not_refused(pair, place, value):
    edit(pair[1], "comprehensive_evaluation.json", **{place: value})
    assert content_of(*pair)["primary"][0]["p"] is not None


def test_other_items_are_refused(pair, capsys):
    path = pair[1] / "results/items/perplexity.jsonl"
    path.write_text(path.read_text().replace('"d7"', '"other"'))
    assert "perplexity.jsonl: damaged, or not written with the result" in refused(capsys, *pair)
    seal(pair[1])
    message = refused(capsys, *pair)
    assert "perplexity.bits_per_byte: item d7" in message
    path.unlink()
    assert "evaluate the run again" in refused(capsys, *pair)


def test_runs_that_are_no_runs(pair, tmp_path, capsys):
    assert "no run and no study is here" in refused(capsys, tmp_path / "nowhere")
    assert "named twice" in refused(capsys, pair[0], pair[0])
    copy = shutil.copytree(pair[0], tmp_path / "copy")
    assert "they are one run twice" in refused(capsys, pair[0], copy)
    assert "--help lists" in refused(capsys, *pair, "--color", "red")
    assert "--help lists" in refused(capsys)


def test_unfinished_runs_are_refused_unless_asked_for(pair, tmp_path, capsys):
    (pair[1] / "COMPLETE").unlink()
    begun = tmp_path / "begun"
    (begun / "results").mkdir(parents=True)
    message = refused(capsys, *pair, begun)
    assert f"{pair[1]}: no COMPLETE" in message
    assert f"{begun}: no results/run.json" in message
    content = content_of(*pair, begun, allow_partial=True)
    assert list(content["left_out"]) == [str(begun)]
    assert any("not finished, compared on request" in note for note in content["notes"])
    assert "nothing to compare" in refused(capsys, begun, "--allow_partial")
