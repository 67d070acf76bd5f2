"""How long runs are expected to take, before they start and while they are at work."""

import json

import pytest
from conftest import ROOT
from study_files import PLAIN, write

from medistill_trl.run_directory import RunDirectory
from medistill_trl.study import definition, grid, tables, timing
from medistill_trl.study.execution import Executor, make_slots
from medistill_trl.study.record import StudyRecord
from medistill_trl.study.timing import Expected, Known

STUDY = PLAIN | {
    "name": "s",
    "shared": {},
    "methods": {},
    "grid": [{"method": ["sft", "logit_kd", "cot"]}, {"max_train_samples": [16, 64]}],
    "seeds": [1, 2],
}
STEPS = 4


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def expanded(folder, content=STUDY):
    study = definition.read(write(folder, content), [], [])
    return study, {run.name: run for run in grid.expand(study, folder / study.name)}


def record_of(run, training=8.0, drawing=0.0, stored=0.0):
    """Of a run that trained for so long, drew for so long, and used completions that took `stored` to draw."""
    return {
        "method": run.method,
        "recipe": run.recipe.resolved(),
        "steps": STEPS,
        "ended_by": "schedule",
        "seconds": training + drawing,
        "seconds_drawing": drawing,
        "teacher_use": {"tokens": 9, "stored_seconds": stored},
        "peak_memory_gb": 1.0,
        "tokens": {"trained": 9, "generated_teacher": 9, "generated_student": 0},
        "heldout": {when: {"kl_nats": 1.0, "ce_nats": 1.0, "top1": 0.5} for when in ("before", "after")},
    }  # fmt: skip


def finish(run, **spent):
    directory = RunDirectory(run.directory)
    directory.write_result("run.json", record_of(run, **spent))
    directory.mark_complete()


def name(method, samples=16, seed=1):
    return f"{method}-max_train_samples_{samples}-seed_{seed}"


def test_drawing_is_the_first_runs_and_counted_once(tmp_path):
    study, runs = expanded(tmp_path)
    known = Known()
    for method, samples, stored in (("sft", 16, 10), ("sft", 64, 40), ("cot", 16, 800)):
        known.learn(record_of(runs[name(method, samples)], stored=stored))
    known.learn(record_of(runs[name("logit_kd")], stored=10), wall_seconds=20.0)

    def drawing(*names, finished=()):
        before = [runs[other] for other in finished]
        found = timing.expected([runs[n] for n in names], before, study.budget, known)
        return [run.drawing for run in found]

    sft, kd, cot = (name(method) for method in ("sft", "logit_kd", "cot"))
    assert drawing(sft, kd, name("sft", seed=2), cot, name("cot", seed=2)) == [10, 0, 0, 800, 0]
    # What is drawn for 16 prompts is a part of what 64 take, whoever asked first.
    assert drawing(sft, name("sft", 64)) == [10, 30]
    assert drawing(name("sft", 64), sft) == [40, 0]
    assert drawing(kd, cot, finished=[sft]) == [0, 800]
    # Of the rationales of 64 prompts nothing is known, but only their first run draws them.
    assert drawing(name("cot", 64), name("cot", 64, 2)) == [None, 0]
    (expected,) = timing.expected([runs[kd]], [runs[sft]], study.budget, known)
    assert expected == Expected(training=8.0, around=12.0, drawing=0.0)


def test_the_plan_and_the_study_at_work_expect_the_same(tmp_path):
    """A chain-of-thought run trains for 70 s and draws for 853 s: the next seed is no 923 s, and the plan no 70 s."""
    study, runs = expanded(tmp_path)
    cot, again, other = (runs[n] for n in (name("cot"), name("cot", seed=2), name("cot", 64)))
    finish(cot, training=70.0, drawing=853.0, stored=853.0)
    record = StudyRecord(tmp_path / "s/study.json", study, list(runs.values()))
    record[cot]["wall_seconds"] = 960.0
    executor = Executor(study, list(runs.values()), record, make_slots(1, None), None, Known())
    executor._finish(cot, "finished")
    known = timing.read_known(tmp_path, study)
    assert known == executor.known
    assert executor._expected([again, other]) == [
        Expected(70.0, 37.0, 0.0),
        Expected(70.0, 37.0, None),
    ]
    memory = {run.name: {"peak_gb": 1.0} for run in runs.values()}
    plan = tables.plan(study, [cot, again], memory, known, 1)
    assert "to do: 1 runs, 1 at a time: about 2 min (70 s of training, 37 s of loading" in plan
    # In another folder the completions are still to be drawn.
    content = STUDY | {"name": "t"}
    later, elsewhere = expanded(tmp_path, content)
    plan = tables.plan(later, [elsewhere[again.name]], memory, known, 1)
    assert "about 16 min (70 s of training, 14 min of the teacher's completions" in plan
    # What surrounds training is another thing where runs are evaluated.
    evaluated, _ = expanded(tmp_path, STUDY | {"evaluate": True})
    assert timing.read_known(tmp_path, evaluated).around == {}


def test_records_that_do_not_say_so_are_passed_over(tmp_path):
    study, runs = expanded(tmp_path)
    run = runs[name("sft")]
    content = record_of(run)
    for key in timing.NEEDED:
        known = Known()
        known.learn({k: value for k, value in content.items() if k != key})
        known.learn(content | {"method": "gone"})
        assert known == Known()
    finish(run)
    path = RunDirectory(run.directory).results / "run.json"
    path.write_text(json.dumps({"recipe": {}}))  # has no digest
    assert timing.read_known(tmp_path, study) == Known()


def whole(seconds):
    return Expected(seconds, 0.0, 0.0)


@pytest.mark.parametrize(
    ("waiting", "working", "jobs", "expected"),
    [
        ([], [], 1, "about 0 s"),
        ([10, 20], [], 1, "about 30 s"),
        ([10, 20], [], 2, "about 15 s"),
        ([10], [(10, 4)], 1, "about 16 s"),
        ([10], [(10, 40)], 1, "about 10 s"),
        ([], [(50, 0), (10, 0)], 2, "about 50 s"),
        ([600, None], [], 2, "at least 5 min"),
        ([7200], [(None, 3)], 1, "at least 2.0 h"),
        ([None], [(None, 3)], 1, "unknown"),
    ],
)
def test_time_left(waiting, working, jobs, expected):
    at_work = [(whole(seconds), spent) for seconds, spent in working]
    assert timing.time_left(map(whole, waiting), at_work, jobs) == expected


def test_a_part_that_is_unknown_makes_it_at_least(tmp_path):
    runs = [Expected(20.0, None, 0.0), Expected(20.0, 4.0, None)]
    assert timing.time_left(runs, [], 1) == "at least 44 s"
