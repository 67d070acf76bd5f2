"""The page of a comparison: many runs, from comparison.json and the runs it names."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

from eval.comparison.verdict import left_out, single_students, too_few
from eval.report.items import browser
from eval.report.names import COSTS, FAMILIES
from eval.report.page import as_data, as_json, render
from eval.report.recipe_diff import across
from eval.report.tables import (
    CHANGE,
    MISSING,
    PERCENT,
    PLAIN,
    POINTS,
    Cell,
    Form,
    Section,
    Table,
    estimated,
    listed,
    number,
    p_value,
    words,
)
from eval.report.verdict import Verdict
from medistill_trl.errors import UserError
from medistill_trl.run_directory import RECORD, RunDirectory
from medistill_trl.sealed_json import read_record

RESULT = "comparison.json"
PICTURES = {
    "benchmark_comparison.png": "Benchmarks, with intervals and floors",
    "fidelity_metrics.png": "Fidelity to the teacher",
    "fidelitybench_radar.png": "Faithfulness to evidence",
    "pareto.png": "Quality against the seconds of training and of the teacher's writing",
    "ablation_plot.png": "Quality along the setting that varies",
    "training_curves.png": "The held-out check over training",
}
FEWEST_RANKED = 2
COST = (
    "Means over seeds. What the teacher wrote counts for every run that used it, whoever drew it; in all are the seconds "
    "of training and those."
)


def comparison_page(folder: Path, data: Path | None = None) -> str:
    """HTML from what `python -m eval.compare` left in a folder, and from the runs where they still are."""
    content = read_record(folder / RESULT, "compare again: python -m eval.compare")
    runs = first_runs(content, folder)
    records = {name: RunDirectory(run).read_result(RECORD) for name, run in runs.items()}
    items = browser({name: run / "results" for name, run in runs.items()}, data)
    sections = [_result(content), _families(content), _differences(content), _cost(content)]
    return render(
        "comparison.html",
        title=_title(content),
        studies=content["studies"],
        verdict=verdict(content),
        sections=[section for section in sections if section is not None],
        pictures=[
            {"title": title, "data": _picture(folder / name)}
            for name, title in PICTURES.items()
            if name in content["pictures"]
        ],
        items=items if items["sets"] else None,
        items_json=as_json(items),
        seeds=any(len(c["seeds"]) > 1 for c in content["configurations"]),
        runs=_runs(content, folder),
        recipes=across({name: record["recipe"] for name, record in records.items()}),
        environment=_environment(records),
        missing=content["missing"],
        notes=[
            *_outdated(content, folder),
            *content["notes"],
            *left_out(content),
        ],
    )


def _outdated(content: dict, folder: Path) -> list[str]:
    """Runs whose results are other ones by now: the items below are theirs, the numbers are not."""
    changed = [
        path
        for configuration in content["configurations"]
        for path, digests in zip(
            configuration["runs"], configuration.get("results", []), strict=False
        )
        if (run := find_run(path, folder)) is not None and RunDirectory(run).digests() != digests
    ]
    if not changed:
        return []
    return [
        f"trained or evaluated again since this comparison, which does not show it: {', '.join(changed)}; compare again"
    ]


def _picture(path: Path) -> str:
    if not path.is_file():
        raise UserError(
            f"{path}: is missing, though {RESULT} names it; draw it again: python -m eval.compare"
        )
    return as_data(path)


def first_runs(content: dict, folder: Path) -> dict[str, Path]:
    """The first run of each configuration, where it is found."""
    runs = {c["name"]: find_run(c["runs"][0], folder) for c in content["configurations"]}
    return {name: run for name, run in runs.items() if run is not None}


def find_run(path: str, folder: Path) -> Path | None:
    """Where a run lies: as it was named, or beside its comparison, as in a study's folder that was moved."""
    for run in (Path(path), folder.resolve().parent / Path(path).name):
        if (run / "results/run.json").is_file():
            return run
    return None


def _title(content: dict) -> str:
    if content["studies"]:
        return listed(study["name"] for study in content["studies"])
    names = [c["name"] for c in content["configurations"]]
    return listed(names) if len(names) < 5 else f"{len(names)} configurations compared"


def verdict(content: dict) -> Verdict:
    """The comparison's own sentences under a lead that says no more than its tests."""
    order = content["ranking"]["order"]
    best = [pair for pair in content["ranking"]["pairs"] if pair["configuration"] == order[0]]
    if len(order) < FEWEST_RANKED:
        return Verdict(f"{order[0]} by itself", "unclear", content["verdict"])
    if too_few(content):
        return Verdict(
            f"Too few items to tell anything apart; {order[0]} comes first",
            "unclear",
            content["verdict"],
        )
    single = single_students(content)
    lead = f"{order[0]} comes first{' of these single students' if single else ''}"
    alike = [pair["minus"] for pair in best if not pair["significant"]]
    if alike:
        others = "any other" if len(alike) == len(best) else listed(alike)
        lead += f", but is not told apart from {others}"
    return Verdict(lead, "unclear" if alike or single else "better", content["verdict"])


# --- tables ----------------------------------------------------------------------------------------


def _form(measure: Mapping, signed: bool = False) -> Form:
    if measure["share"]:
        return POINTS if signed else PERCENT
    return CHANGE if signed else PLAIN


def _value(measure: Mapping, estimate: dict | None) -> Cell:
    """A value with its interval, and what seeds do to it."""
    cell = estimated(estimate, _form(measure))
    known, details = estimate or {}, [cell.detail]
    if "sd_over_seeds" in known:
        spread = _form(measure).bare(known["sd_over_seeds"])
        details.append(f"±\u00a0{spread}\u00a0over\u00a0{known['seeds']}\u00a0seeds")
    if "without_seeds" in known:
        details.append(f"without seed {listed(map(str, known['without_seeds']))}")
    return Cell(cell.text, cell.sort, " ".join(filter(None, details)))


def _name(content: dict, name: str) -> Cell:
    base = name == content["baseline"] and len(content["configurations"]) > 1
    return words(name, "the baseline" if base else "")


def _told_apart(test: dict) -> str:
    if test["told_apart"]:
        return "yes"
    return "these students alone" if test["significant"] else "no"


def _difference(measure: Mapping, test: dict) -> list[Cell]:
    least = test["minimum_detectable"]
    return [
        estimated(test, _form(measure, signed=True)),
        Cell(MISSING, detail="not tested")
        if test["p_holm"] is None
        else Cell(p_value(test["p_holm"]), test["p_holm"]),
        words(_told_apart(test)),
        Cell(MISSING) if least is None else Cell(_form(measure)(least), least),
    ]


def _result(content: dict) -> Section:
    """The measure that is ranked by, with the primary tests."""
    measure = content["measures"][content["quality"]]
    tests = {test["configuration"]: test for test in content["primary"]}
    front = content["pareto"]["front"]
    rows = []
    for name in content["ranking"]["order"]:
        row = [_name(content, name), _value(measure, measure["values"][name])]
        row += _difference(measure, tests[name]) if name in tests else [Cell(MISSING)] * 4
        row.append(number(content["cost"][name]["total_seconds"], Form(0)))
        row.append(words("–" if front is None else "yes" if name in front else "no"))
        rows.append(row)
    columns = [
        "configuration", measure["label"], f"minus {content['baseline']}", "p (Holm)", "told apart", "detectable",
        "cost, s", "on the Pareto front",
    ]  # fmt: skip
    family = FAMILIES.get(measure["family"], measure["family"])
    return Section(
        "result",
        f"{measure['label']}: {family}",
        f"What the ranking is by; {measure['better']} is better. These are the primary tests: each configuration "
        f"against {content['baseline']}, adjusted by Holm's method. Detectable is the smallest true difference that "
        "one such test finds with a power of 80 %.",
        [Table(columns, rows)],
        [content["pareto"]["note"]] if "note" in content["pareto"] else [],
    )


def _families(content: dict) -> Section:
    """Every measure, a table for each family."""
    families = dict.fromkeys(measure["family"] for measure in content["measures"].values())
    tables = [_family(content, family) for family in families]
    return Section("measures", "All measures", "In brackets is which way is better.", tables)


def _family(content: dict, family: str) -> Table:
    own = {key: m for key, m in content["measures"].items() if m["family"] == family}
    columns = ["configuration", *(f"{m['label']} ({m['better']})" for m in own.values())]
    rows = [
        [_name(content, c["name"]), *(_value(m, m["values"].get(c["name"])) for m in own.values())]
        for c in content["configurations"]
    ]
    if any(measure["teacher"] for measure in own.values()):
        rows.append([words("teacher"), *(estimated(m["teacher"], _form(m)) for m in own.values())])
    floors = [content["floors"].get(key.split(".")[1]) for key in own]
    if any(floors) and all(key.endswith(".accuracy") for key in own):
        shown = [Cell(MISSING) if f is None else number(f["majority_accuracy"], PERCENT) for f in floors]  # fmt: skip
        rows.append([words("floor", "always the commonest answer"), *shown])
    return Table(columns, rows, FAMILIES.get(family, family))


def _differences(content: dict) -> Section | None:
    """Every tested difference from the baseline; those that are told apart first."""
    rows = []
    for family, tests in content["differences"].items():
        for test in tests:
            if test["p"] is None:
                continue
            measure = content["measures"][test["measure"]]
            row = [
                words(test["configuration"]),
                words(measure["label"], FAMILIES.get(family, family)),
                *_difference(measure, test),
                number(test["n"], Form(0)),
            ]
            rows.append((not test["significant"], row))
    if not rows:
        return None
    rows.sort(key=lambda entry: entry[0])
    columns = ["configuration", "measure", f"minus {content['baseline']}", "p (Holm)", "told apart", "detectable", "items"]  # fmt: skip
    return Section(
        "differences",
        f"Differences from {content['baseline']}",
        "They show where to look: p-values are adjusted within each family, not over all of this table.",
        [Table(columns, [row for _, row in rows], f"{len(rows):,} tests", folded=True)],
    )


def _cost(content: dict) -> Section:
    keys = [key for key in COSTS if any(cost.get(key) is not None for cost in content["cost"].values())]  # fmt: skip
    rows = [
        [words(name), *(_amount(cost[key]) for key in keys)]
        for name, cost in content["cost"].items()
    ]
    columns = ["configuration", *(COSTS[key] for key in keys)]
    return Section("cost", "Cost", COST, [Table(columns, rows)])


def _amount(value: float | None) -> Cell:
    if value is None:
        return Cell(MISSING)
    whole = abs(value) >= 100 or value == int(value)
    return Cell(f"{value:,.0f}" if whole else f"{value:.3g}", value)


# --- the runs --------------------------------------------------------------------------------------


def _runs(content: dict, folder: Path) -> Table:
    """Every run, with a link to its own page where it has one."""
    rows = []
    for configuration in content["configurations"]:
        for run, seed in zip(configuration["runs"], configuration["seeds"], strict=True):
            link = Cell(run, run, href=_page_of(find_run(run, folder), folder))
            rows.append([words(configuration["name"]), number(seed, Form(0)), link])
    return Table(["configuration", "seed", "run"], rows)


def _page_of(run: Path | None, folder: Path) -> str | None:
    if run is None or not (run / "results/report.html").is_file():
        return None
    place = os.path.relpath((run / "results/report.html").resolve(), folder.resolve())
    return f"./{quote(place)}"  # a folder may be called javascript:...


def _environment(records: dict[str, dict]) -> Table:
    """What the first runs were trained with; one value where all agree."""
    facts: dict[str, Callable[[dict], str]] = {
        "device": lambda record: record["device"],
        "processes": lambda record: str(record["num_processes"]),
        "commit": lambda record: str(record["git_commit"]),
    }
    packages = dict.fromkeys(name for record in records.values() for name in record["versions"])
    facts |= {
        name: lambda record, name=name: record["versions"].get(name, MISSING) for name in packages
    }
    rows = []
    for fact, value_of in facts.items():
        users: dict[str, list[str]] = {}
        for name, record in records.items():
            users.setdefault(value_of(record), []).append(name)
        shown = [value if len(users) == 1 else f"{value} ({listed(names)})" for value, names in users.items()]  # fmt: skip
        rows.append([words(fact), words("; ".join(shown))])
    return Table([], rows, sortable=False)
