"""`python -m eval.compare` on runs that lack something the others have, and on studies."""

import json

import pytest
from comparisons import KL, compare, content_of, refused
from run_folders import edit, write_json, write_run
from sealed import seal

from eval.comparison.runs import find
from eval.comparison.tables import document
from eval.comparison.verdict import left_out
from eval.report import write_report
from eval.report.comparison_page import verdict
from medistill_trl.errors import UserError
from medistill_trl.run_directory import RunDirectory


def test_runs_without_an_evaluation_compare_by_the_held_out_check(tmp_path, capsys):
    runs = [
        write_run(tmp_path / m, m, evaluated=False, skill=s)
        for m, s in (("sft", 0.3), ("ppo", 0.6))
    ]
    assert compare(*runs, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert f"python -m eval.run {runs[0]}" in printed
    assert "Which is better cannot be said" in printed
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "pareto.png",
        "training_curves.png",
    }
    content = json.loads((tmp_path / "out/comparison.json").read_text())
    assert content["quality"] == "heldout.kl_nats"
    assert content["ranking"]["order"] == ["ppo", "sft"]
    assert content["primary"][0]["p"] is None


def test_the_held_out_check_is_compared_prompt_by_prompt_where_its_records_are(tmp_path):
    runs = [
        write_run(tmp_path / m, m, evaluated=False, skill=s, prompts=20)
        for m, s in (("sft", 0.3), ("logit_kd", 0.6))
    ]
    content = content_of(*runs)
    after = json.loads((runs[1] / "results/run.json").read_text())["heldout"]["after"]
    for key in ("kl_nats", "ce_nats", "top1", "bits_per_byte"):
        value = content["measures"][f"heldout.{key}"]["values"]["logit_kd"]
        assert (value["value"], value["n"]) == (pytest.approx(after[key]), 20)
    test = content["primary"][0]
    assert (test["n"], test["p_seeds"], test["significant"]) == (20, None, True)
    assert "This student can be told apart from sft" in content["verdict"][1]
    # With one seed that is said of students, and no method is better for it.
    assert test["told_apart"] is False
    assert "**-" not in document(content)
    # A run that kept only totals still compares, without a test.
    (runs[0] / "results/items/heldout.jsonl").unlink()
    assert content_of(*runs)["primary"][0]["p"] is None
    edit(runs[1], "run.json", heldout__after__kl_nats=9.0)
    with pytest.raises(UserError, match=r"heldout.kl_nats is 9 in its result and .*train again"):
        content_of(*runs)


def test_the_teacher_is_of_the_first_run_that_was_evaluated(tmp_path):
    runs = [write_run(tmp_path / m, m, evaluated=m != "sft") for m in ("sft", "ppo", "spin")]
    assert content_of(*runs)["measures"]["benchmarks.medqa.accuracy"]["teacher"]["n"] == 40


def test_the_seeds_that_have_a_measure_are_taken_where_that_is_asked_for(tmp_path):
    runs = [
        write_run(tmp_path / f"{method}-{seed}", method, seed, evaluated=(method, seed) != ("sft", 3))
        for method in ("sft", "ppo")
        for seed in (1, 2, 3)
    ]  # fmt: skip
    whole = content_of(*runs)
    assert set(whole["measures"][KL]["values"]) == {"ppo"}
    assert "benchmarks" not in whole["differences"]
    (note,) = [note for note in whole["notes"] if "seed 3 was not measured in" in note]
    assert note.startswith("sft: ")
    assert "--allow_partial takes its other seeds" in note
    content = content_of(*runs, allow_partial=True)
    values = content["measures"][KL]["values"]
    assert (values["sft"]["seeds"], values["sft"]["without_seeds"]) == (2, [3])
    assert values["sft"]["by_seed"] == whole_of(runs[:2])
    assert (values["ppo"]["seeds"], "without_seeds" in values["ppo"]) == (3, False)
    assert {tuple(test["seeds"]) for test in content["differences"]["benchmarks"]} == {(3, 2)}
    assert any(
        "seed 3 was not measured in" in note and "taken" in note for note in content["notes"]
    )
    # What every run has is still what the ranking is by, unless something else is asked for.
    assert content["quality"] == "heldout.kl_nats"
    assert content_of(*runs, allow_partial=True, quality="kl")["quality"] == KL
    assert compare(*runs, "--allow_partial", "--out", tmp_path / "out") == 0
    assert " without seed 3 |" in (tmp_path / "out/comparison.md").read_text()
    assert "without seed 3<" in (tmp_path / "out/report.html").read_text()


def whole_of(runs):
    return content_of(*runs)["measures"][KL]["values"]["sft"]["by_seed"]


def test_a_comparison_says_when_its_runs_have_changed_since(tmp_path):
    runs, out = [write_run(tmp_path / m, m) for m in ("sft", "ppo")], tmp_path / "out"
    assert compare(*runs, "--out", out) == 0
    assert "again since this comparison" not in (out / "report.html").read_text()
    content = json.loads((out / "comparison.json").read_text())
    assert [c["results"] for c in content["configurations"]] == [
        [RunDirectory(run).digests()] for run in runs
    ]
    edit(runs[1], "run.json", seconds=3.0)
    page = write_report(out).read_text()
    assert f"again since this comparison, which does not show it: {runs[1]}; compare" in page


@pytest.mark.parametrize(("fallback", "noted"), [(61, True), (3, False)])
def test_a_run_that_hardly_had_rationales_is_no_test_of_them(tmp_path, fallback, noted):
    runs = [write_run(tmp_path / m, m, evaluated=False) for m in ("sft", "cot")]
    prompts = {"total": 64, "with_rationale": 64 - fallback, "fallback": fallback, "dropped": 0}
    write_json(runs[1] / "results/rationales_summary.json", {"prompts": prompts})
    notes = [note for note in content_of(*runs)["notes"] if note.startswith("cot: ")]
    assert notes == noted * [
        "cot: 61 of 64 prompts had no rationale that was kept, and were trained on with the teacher's plain completion"
    ]


def test_runs_that_are_left_out_for_one_reason_share_a_line():
    reasons = {f"s/r{n}": "the study has it as waiting" for n in range(7)} | {
        "s/x": "exit status 1"
    }
    assert left_out({"left_out": reasons}) == [
        "left out: s/r0, s/r1, s/r2, s/r3 and 3 others: the study has it as waiting",
        "left out: s/x: exit status 1",
    ]


def test_what_is_missing_of_many_runs_is_folded(tmp_path, capsys):
    runs = [write_run(tmp_path / str(seed), seed=seed, evaluated=False) for seed in range(6)]
    assert compare(*runs, "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("python -m eval.run") == 3
    page = (tmp_path / "out/comparison.md").read_text()
    assert page.count("python -m eval.run") == 3
    assert "- and 3 more" in page


def test_pictures_are_of_this_comparison_and_of_no_earlier_one(tmp_path):
    out = tmp_path / "out"
    for evaluated, count in ((True, 5), (False, 2)):
        runs = [
            write_run(tmp_path / f"{m}-{evaluated}", m, evaluated=evaluated) for m in ("sft", "ppo")
        ]
        assert compare(*runs, "--out", out) == 0
        pictures = json.loads((out / "comparison.json").read_text())["pictures"]
        assert {path.name for path in out.glob("*.png")} == set(pictures)
        assert (out / "report.html").read_text().count("data:image/png") == len(pictures) == count
    (out / "fidelity_metrics.png").write_bytes(b"of someone else")
    write_report(out)
    assert (out / "report.html").read_text().count("data:image/png") == 2


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_with_few_prompts_the_verdict_says_that_nothing_can_be_found(tmp_path, seeds):
    runs = [
        write_run(tmp_path / f"{m}-{seed}", m, seed, skill, evaluated=False, prompts=4)
        for m, skill in (("sft", 0.1), ("logit_kd", 0.5), ("ppo", 0.9))
        for seed in seeds
    ]
    content = content_of(*runs)
    words = " ".join(content["verdict"])
    assert (
        "With 4 held-out prompts no difference can reach 5 % after adjustment for 2 tests" in words
    )
    assert "give a larger validation_file" in words
    assert "told apart" not in words
    lead = verdict(content).lead
    assert (
        lead
        == f"Too few items to tell anything apart; {content['ranking']['order'][0]} comes first"
    )
    last = content["measures"]["heldout.kl_nats"]["values"]["sft"]["value"]
    assert f"The last, sft, has {last:.3f}; before training it was 4.000." in content["verdict"]
    assert {test["minimum_detectable"] for test in content["primary"]} == {None}


def test_other_held_out_prompts_are_refused(tmp_path, capsys):
    runs = [write_run(tmp_path / m, m, evaluated=False, prompts=5) for m in ("sft", "ppo")]
    path = runs[1] / "results/items/heldout.jsonl"
    path.write_text(path.read_text().replace('"v3"', '"other"'))
    assert "heldout.jsonl: damaged, or not written with the result" in refused(capsys, *runs)
    seal(runs[1])
    assert "heldout.kl_nats: item v3" in refused(capsys, *runs)


def test_what_only_some_have_is_compared_among_them(tmp_path):
    runs = [write_run(tmp_path / m, m, evaluated=m != "spin") for m in ("sft", "ppo", "spin")]
    content = content_of(*runs)
    assert content["quality"] == "heldout.kl_nats"
    assert set(content["measures"][KL]["values"]) == {"sft", "ppo"}
    missing = content["missing"]
    assert [entry["run"] for entry in missing] == [str(runs[2])]
    parts = "benchmarks generative retention perplexity fidelity faithfulness speed"
    assert missing[0]["command"] == (
        f"python -m eval.run {runs[2]} --data data --limit 40 --option_shuffles 0 --verifier nli --tasks {parts}"
    )


def test_pairs_with_different_tokenizers_have_bits_per_byte(tmp_path):
    runs = [write_run(tmp_path / m, m, evaluated=False) for m in ("sft", "ppo")]
    for run in runs:
        edit(run, "run.json", heldout__after__kl_nats=None, heldout__after__top1=None)
    content = content_of(*runs)
    assert content["quality"] == "heldout.bits_per_byte"
    assert "heldout.kl_nats" not in content["measures"]
    assert set(content["curves"]["sft"][0]) == {"seed", "steps", "ce_nats"}


def test_a_single_run_has_nothing_to_be_compared_with(tmp_path):
    content = content_of(write_run(tmp_path / "run"))
    assert (content["primary"], content["differences"], content["ranking"]["pairs"]) == ([], {}, [])
    assert "nothing to compare it with" in content["verdict"][0]


# --- studies


@pytest.fixture
def study(tmp_path):
    """A finished study of two temperatures and two seeds."""
    folder = tmp_path / "study"
    entries = []
    for temperature in (1.0, 4.0):
        for seed in (1, 2):
            name = f"logit_kd-kd_temperature_{temperature}-seed_{seed}"
            write_run(
                folder / name,
                "logit_kd",
                seed,
                0.3 + temperature / 10,
                kd_temperature=temperature,
                kd=2 * temperature,
            )
            entries.append({"name": name, "state": "finished"})
    record = {
        "schema_version": 1,
        "name": "temperature",
        "description": "Softer or harder?",
        "budget": {"kind": "optimizer_steps", "amount": 48, "max_steps": 48},
        "grid": [[{"kd_temperature": 1.0}, {"kd_temperature": 4.0}], [{"seed": 1}, {"seed": 2}]],
        "runs": entries,
    }
    write_json(folder / "study.json", record)
    return folder, record


def test_a_study_is_its_runs(study):
    folder, _ = study
    assert compare(folder) == 0
    content = json.loads((folder / "comparison/comparison.json").read_text())
    assert [c["seeds"] for c in content["configurations"]] == [[1, 2], [1, 2]]
    assert content["studies"][0]["budget"]["amount"] == 48
    # As the study names it, though `kd` moves with it and is shorter.
    assert content["ablation"]["key"] == "kd_temperature"
    assert (folder / "comparison/ablation_plot.png").is_file()
    assert (
        "Budget of every run: 48 optimizer steps."
        in (folder / "comparison/comparison.md").read_text()
    )
    assert "Two seeds say little" in content["verdict"][-1]


@pytest.mark.parametrize("state", ["waiting", "running", "stopped"])
def test_a_run_that_is_complete_counts_whatever_the_study_last_knew(study, capsys, state):
    folder, record = study
    record["runs"][0] |= {"state": state}
    write_json(folder / "study.json", record)
    assert [c["seeds"] for c in content_of(folder)["configurations"]] == [[1, 2], [1, 2]]
    (folder / record["runs"][0]["name"] / "COMPLETE").unlink()
    assert f"the study has it as {state}" in refused(capsys, folder)


@pytest.mark.parametrize(
    ("budget", "ended_by", "why"),
    [
        ({"kind": "optimizer_steps", "amount": 60, "max_steps": 60}, "schedule", "ended after 48 steps"),
        ({"kind": "seconds", "amount": 9.0, "max_steps": 48}, "schedule", "raise budget.max_steps"),
        ({"kind": "seconds", "amount": 9.0, "max_steps": 90}, "max_seconds", None),
    ],
)  # fmt: skip
def test_a_run_of_a_scheduler_is_held_to_the_budget_too(study, capsys, budget, ended_by, why):
    folder, record = study
    name = record["runs"][0]["name"]
    record["budget"] = budget
    record["runs"][0]["state"] = "waiting"
    write_json(folder / "study.json", record)
    edit(folder / name, "run.json", ended_by=ended_by)
    if why is None:
        assert len(find([folder]).runs) == 4
        return
    assert why in refused(capsys, folder)
    found = find([folder], allow_partial=True)
    assert [run.name for run in found.runs] == [entry["name"] for entry in record["runs"][1:]]
    assert why in found.left_out[str(folder / name)]


def test_a_study_with_a_failed_run(study, capsys):
    folder, record = study
    record["runs"][0] |= {"state": "failed", "problem": "exit status 1"}
    write_json(folder / "study.json", record)
    assert "exit status 1" in refused(capsys, folder)
    content = content_of(folder, allow_partial=True)
    assert [c["seeds"] for c in content["configurations"]] == [[2], [1, 2]]
    assert "the configurations have different numbers of seeds" in content["notes"]
    assert list(content["left_out"].values()) == ["exit status 1"]
    assert "exit status 1" in document(content)
