"""comparison.md: the comparison for a reader, made from comparison.json alone."""

from collections.abc import Iterable, Sequence

from eval.comparison.cost import NAMES
from eval.comparison.measures import FAMILIES
from eval.comparison.paired import NO_ITEMS
from eval.comparison.verdict import interval, left_out, listed, number, p_value, signed

SHOWN = 3  # of what is missing
WHOLE_STUDY = (
    "Or evaluate all of a study's runs: give its command again with `--set 'evaluate={limit: 64}'`; what is trained is "
    "not trained again."
)

HOW = """\
- **Intervals** are of 95 %. With several seeds they are for other items and other seeds, with one for other items
  of this one run. `±` is the standard deviation over seeds.
- **Items**: exact McNemar test where answers are right or wrong (over several seeds its generalisation, the exact
  sign-flip test); else a sign-flip test, and a paired BCa bootstrap interval, of few items Student's t. Runs are
  averaged over seeds item by item before.
- **Seeds**, with two or more on both sides: Student's t with the variance between items and that between runs
  added. A difference has to pass both; `p` is the larger.
- **Several tests**: p-values are adjusted by Holm's method over the configurations, and over the benchmarks in
  their tables. **Bold** differences can be told apart from none at 5 %; with one seed on either side none is, since
  its p-value is about two students and not about two methods. The primary test is that of the first table; the
  others show where to look.
- **Without items** (macro F1, ECE, BLEU) there is a test over seeds alone.
- **Detectable** is the smallest true difference that one such test, unadjusted, finds with a power of 80 %; `–` where
  items are so few that none could be found, or where nothing is known of it.
"""


def document(content: dict) -> str:
    """The whole page, of comparison.json."""
    names = [c["name"] for c in content["configurations"]]
    parts = [
        f"# {' against '.join(names) if len(names) < 3 else f'{len(names)} configurations compared'}",
        " ".join(content["verdict"]),
        *_missing(content),
        *_notes(content),
        "## What is compared\n\n" + _configurations(content),
        *([primary(content)] if content["primary"] else []),
        *(f"![{name}]({name})" for name in content["pictures"]),
        *_families(content),
        "## Cost\n\n" + _cost(content),
    ]
    if len(names) > 1:
        parts.append("## How to read this\n\n" + HOW.strip())
    return "\n\n".join(parts) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table whose first column is text and the others numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _configurations(content: dict) -> str:
    rows = []
    for c in content["configurations"]:
        role = (
            " (baseline)" if c["name"] == content["baseline"] and len(content["cost"]) > 1 else ""
        )
        seeds = ", ".join(map(str, c["seeds"]))
        rows.append([f"{c['name']}{role}", seeds, "<br>".join(f"`{run}`" for run in c["runs"])])
    text = table(["configuration", "seeds", "runs"], rows)
    for study in content["studies"]:
        budget = study["budget"]
        amount = f"{budget['amount']:g} {budget['kind'].replace('_', ' ')}"
        text += f"\n\nStudy {study['name']}: {study['description']} Budget of every run: {amount}."
    return text


def primary(content: dict) -> str:
    """The first table: every configuration by the measure that was declared, against the baseline."""
    measure = content["measures"][content["quality"]]
    share, front = measure["share"], content["pareto"]["front"]
    tests = {test["configuration"]: test for test in content["primary"]}
    rows = []
    for name in content["ranking"]["order"]:
        value = measure["values"][name]
        row = [name, _value(value, share)]
        test = tests.get(name)
        row += ["baseline", "", ""] if test is None else _difference(test, share)
        row.append(number(content["cost"][name]["total_seconds"], False))
        rows.append([*row, "" if front is None else "yes" if name in front else "no"])
    heads = [
        "configuration",
        measure["label"],
        "difference to the baseline",
        "p (Holm)",
        "detectable",
    ]
    title = f"## {measure['label']}: {FAMILIES[measure['family']].lower()}\n\n"
    return title + table([*heads, "cost, s", "on the Pareto front"], rows)


def _value(value: dict, share: bool) -> str:
    spread = ""
    if "sd_over_seeds" in value:
        sd = value["sd_over_seeds"]
        spread = f" ± {100 * sd:.1f}" if share else f" ± {sd:.3f}"
    without = f" without seed {listed(value['without_seeds'])}" if "without_seeds" in value else ""
    shown = f"{number(value['value'], share)}{spread}"
    return f"{shown} {interval(value['interval_95'], share)}".strip() + without


def _difference(test: dict, share: bool) -> list[str]:
    """The difference, its p-value and what could have been found."""
    low_high = test["interval_95"]
    shown = signed(test["value"], share)
    if low_high is not None:
        shown += f" [{', '.join(signed(end, share).removesuffix(' points') for end in low_high)}]"
    least = test["minimum_detectable"]
    return [
        f"**{shown}**" if test["told_apart"] else shown,
        p_value(test["p_holm"]).removeprefix("p ").removeprefix("= "),
        "–" if least is None else signed(least, share).removeprefix("+"),
    ]


def _families(content: dict) -> list[str]:
    """For each family its values, and its differences from the baseline."""
    measures = content["measures"]
    parts = []
    for family, title in FAMILIES.items():
        own = {key: m for key, m in measures.items() if m["family"] == family}
        if not own:
            continue
        parts.append(f"## {title}\n\n" + _values(content, own))
        tests = content["differences"].get(family, [])
        if any(test["p"] is not None for test in tests):
            parts.append(_differences(measures, tests))
    return parts


def _values(content: dict, own: dict[str, dict]) -> str:
    names = [c["name"] for c in content["configurations"]]
    rows = [
        [name, *(_cell(measure["values"].get(name), measure["share"]) for measure in own.values())]
        for name in names
    ]
    if any(measure["teacher"] for measure in own.values()):
        rows.append(["teacher", *(_cell(m["teacher"], m["share"]) for m in own.values())])
    floors = [content["floors"].get(key.split(".")[1], {}) for key in own]
    if any(floors) and all(key.endswith(".accuracy") for key in own):
        shown = [number(floor.get("majority_accuracy"), True) for floor in floors]
        rows.append(["always the commonest answer", *shown])
    arrows = {"higher": "↑", "lower": "↓"}
    heads = [f"{measure['label']} {arrows[measure['better']]}" for measure in own.values()]
    return table(["", *heads], rows)


def _cell(value: dict | None, share: bool) -> str:
    return "–" if value is None else _value(value, share)


def _differences(measures: dict[str, dict], tests: Sequence[dict]) -> str:
    """Rows of configurations, columns of measures; what has no test is in the table of values alone."""
    tested = {(t["configuration"], t["measure"]): t for t in tests if t["p"] is not None}
    names = dict.fromkeys(name for name, _ in tested)
    keys = dict.fromkeys(key for _, key in tested)

    def cell(test: dict | None, share: bool) -> str:
        if test is None:
            return "–"
        shown, p, _ = _difference(test, share)
        return f"{shown}, p {p}"

    rows = [
        [name, *(cell(tested.get((name, key)), measures[key]["share"]) for key in keys)]
        for name in names
    ]
    heads = [f"minus {tests[0]['minus']}", *(measures[key]["label"] for key in keys)]
    counts = sorted({t["n"] for t in tested.values()})
    items = " or ".join(f"{n:,}" for n in counts)
    kinds = ", ".join(dict.fromkeys(t["test"] for t in tested.values()))
    if kinds == NO_ITEMS:
        note = "Over seeds alone: nothing is kept of single items, so this says nothing about other ones."
    else:
        note = f"{items} items; {kinds}."
    return f"{table(heads, rows)}\n\n{note}"


def _cost(content: dict) -> str:
    known = [
        name for name in NAMES if any(cost[name] is not None for cost in content["cost"].values())
    ]
    rows = [
        [name, *("–" if cost[key] is None else _amount(cost[key]) for key in known)]
        for name, cost in content["cost"].items()
    ]
    front = content["pareto"].get("note")
    text = table(["", *(NAMES[key] for key in known)], rows)
    return text if front is None else f"{text}\n\nNo Pareto front: {front}."


def _amount(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _missing(content: dict) -> list[str]:
    if not content["missing"]:
        return []
    shown, more = content["missing"][:SHOWN], len(content["missing"]) - SHOWN
    lines = [f"- `{m['run']}` {m['what']}" for m in shown]
    commands = "\n".join(m["command"] for m in shown)
    made = f"made by\n\n```bash\n{commands}\n```"
    rest = [f"- and {more} more"] if more > 0 else []
    if content["studies"]:
        made += f"\n\n{WHOLE_STUDY}"
    return ["## What is missing\n\n" + "\n".join([*lines, *rest]) + f"\n\n{made}"]


def _notes(content: dict) -> list[str]:
    lines = [f"- {note}" for note in content["notes"]]
    lines += [f"- {line}" for line in left_out(content)]
    return ["## To be kept in mind\n\n" + "\n".join(lines)] if lines else []
