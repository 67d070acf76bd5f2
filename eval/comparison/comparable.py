"""Refuses to compare what is not comparable, naming every difference; what is only worth knowing becomes a note."""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from eval.comparison.columns import Column
from eval.comparison.measures import FAMILIES, MEASURES
from eval.comparison.runs import Configuration, Run, identity
from eval.comparison.verdict import listed
from eval.options import Options
from eval.run import PARTS
from medistill_trl.errors import UserError

# Options that change no measure: how fast it goes, which benchmarks there are, what else is measured. The
# verifier's weights are compared, not its name.
HARMLESS = ("batch_size", "benchmarks", "option_shuffles", "teacher_quantisation", "verifier")
SHOWN = 120  # characters of a value
ADVICE = (
    "Compare runs of one pair on one set of data, and evaluate all of them alike: the same data folder, the same "
    "options and version (docs/comparison.md)."
)
Facts = dict[str, Any]


def check(runs: Sequence[Run]) -> None:
    """Refuse runs whose numbers would not mean the same.

    Raises:
        UserError: all that differs, with the runs on each side.
    """
    evaluated = [run for run in runs if run.evaluation is not None]
    problems = [
        f"{run.path}: its evaluation is of another recipe than its run; evaluate it again"
        for run in evaluated
        if _recipe(run.evaluation["recipe"] or {}) != _recipe(run.record["recipe"])
    ]
    problems += _differences(runs, trained_on)
    problems += _differences(evaluated, evaluated_on)
    _refuse(problems)


def check_items(columns: Sequence[tuple[Run, dict[str, Column]]]) -> None:
    """Refuse runs that were measured on other items, though their files and options agree.

    Raises:
        UserError: the first item that differs, for each measure.
    """
    problems = []
    for key, measure in MEASURES.items():
        having = [(run, found[key].items) for run, found in columns if key in found]
        having = [(run, items) for run, items in having if items]  # not one number a run
        if measure.common or not having:
            continue
        first_run, first = having[0]
        for run, items in having[1:]:
            if items != first:
                problems.append(f"{key}: {_first_difference(first_run, first, run, items)}")
    _refuse(problems)


def _recipe(recipe: dict) -> dict:
    return identity(recipe) | {"seed": recipe.get("seed")}


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise UserError(
            "these runs cannot be compared:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + f"\n{ADVICE}"
        )


def _first_difference(one: Run, items: tuple, other: Run, others: tuple) -> str:
    if set(items) == set(others):
        return f"{one.path} and {other.path} have the same items in another order"
    extra = next((item for item in items if item not in set(others)), None)
    where, missing = (one, other) if extra is not None else (other, one)
    item = extra if extra is not None else next(i for i in others if i not in set(items))
    return (
        f"item {item[0]} of {where.path} is not one of {missing.path}, or has other content there"
    )


# --- facts in which all must agree


def trained_on(run: Run) -> Facts:
    """What the held-out check and the training depend on, besides the recipe's settings."""
    record, recipe = run.record, run.record["recipe"]
    train, validation = record["data"]["files"]
    return {
        "teacher (weights, dtype, quantisation)": record["models"]["teacher"],
        "base student": record["models"]["student"],
        "training data, sha256": train["sha256"],
        "validation data, sha256": validation["sha256"],
        "held-out prompts": record["heldout"]["after"]["prompts"],
        "held-out tokens of the teacher": record["heldout"]["after"]["tokens"],
        "teacher_max_new_tokens": recipe["teacher_max_new_tokens"],
        "system_prompt": recipe.get("system_prompt"),
    }


def evaluated_on(run: Run) -> Facts:
    """What the evaluation depends on, besides the student."""
    content, results = run.evaluation, run.results
    facts = {
        "teacher of the evaluation": content["subjects"]["teacher"]["fingerprint"],
        **{
            f"option --{name}": value
            for name, value in content["options"].items()
            if name not in HARMLESS
        },
        **{f"{name}, sha256": digest for name, digest in content["data"]["sha256"].items()},
    }
    places = {
        "fidelity, longest answer and sampling": ("fidelity", "sampling"),
        "perplexity, window in tokens": ("perplexity", "window_tokens"),
        "perplexity, stride in tokens": ("perplexity", "stride_tokens"),
        "faithfulness, longest answer": ("faithfulness", "answer_tokens"),
    }
    facts |= {fact: results[part][key] for fact, (part, key) in places.items() if part in results}
    verifier = results.get("faithfulness", {}).get("verifier", {})
    if "fingerprint" in verifier:
        facts["faithfulness, verifier"] = verifier["fingerprint"]
    return facts


def _differences(runs: Sequence[Run], facts_of: Callable[[Run], Facts]) -> list[str]:
    """Every fact that two runs have and disagree in."""
    facts = [(run, facts_of(run)) for run in runs]
    keys = dict.fromkeys(key for _, known in facts for key in known)
    problems = []
    for key in keys:
        sides = _sides((run, known[key]) for run, known in facts if key in known)
        if len(sides) > 1:
            shown = (f"{value[:SHOWN]} ({who})" for value, who in sides.items())
            problems.append(f"{key}: {' and '.join(shown)}")
    return problems


def _sides(values: Iterable[tuple[Run, Any]]) -> dict[str, str]:
    """Value → the runs that have it."""
    sides: dict[str, list[str]] = {}
    for run, value in values:
        sides.setdefault(str(value), []).append(run.name)
    return {
        value: ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for value, names in sides.items()
    }


# --- notes


def notes(configurations: Sequence[Configuration]) -> list[str]:
    """What does not forbid a comparison, but may explain a difference."""
    runs = [run for configuration in configurations for run in configuration.runs]
    evaluated = [run for run in runs if run.evaluation is not None]
    found = []
    for what, facts_of, members in (
        ("trained with", _training_environment, runs),
        ("evaluated with", _evaluation_environment, evaluated),
        ("written answers were asked for differently", _protocol, evaluated),
        ("unequal budgets", _budget, runs),
    ):
        found += [f"{what}: {line}" for line in _differences(members, facts_of)]
    found += [note for configuration in configurations for note in _fallbacks(configuration)]
    if any(not run.is_complete for run in runs):
        names = ", ".join(str(run.path) for run in runs if not run.is_complete)
        found.append(f"not finished, compared on request: {names}")
    if len({len(configuration.runs) for configuration in configurations}) > 1:
        found.append("the configurations have different numbers of seeds")
    return found


def _fallbacks(configuration: Configuration) -> list[str]:
    """Where most prompts had no rationale worth keeping, and were trained on as without any."""
    counts = [run.rationales["prompts"] for run in configuration.runs if run.rationales]
    most = max(counts, key=lambda count: count["fallback"], default={"fallback": 0, "total": 0})
    if 2 * most["fallback"] <= most["total"]:
        return []
    return [
        f"{configuration.name}: {most['fallback']} of {most['total']} prompts had no rationale that was kept, and were "
        "trained on with the teacher's plain completion"
    ]


def _environment(content: dict) -> Facts:
    known = {f"version of {name}": version for name, version in content["versions"].items()}
    return known | {"commit": content["git_commit"], "device": content["device"]}


def _training_environment(run: Run) -> Facts:
    return _environment(run.record) | {"processes": run.record["num_processes"]}


def _evaluation_environment(run: Run) -> Facts:
    return _environment(run.evaluation)


def _protocol(run: Run) -> Facts:
    part = run.results.get("generative")
    return {} if part is None else {key: part[key] for key in ("protocol", "answer_tokens")}


def _budget(run: Run) -> Facts:
    return {"optimizer steps": run.steps}


def partly_measured(
    configurations: Sequence[Configuration],
    members: Mapping[str, Mapping[str, Sequence[Run]]],
    taken: bool,
) -> list[str]:
    """Families of measures that some seeds of a configuration lack, and what became of the others.

    Args:
        members: Measure → configuration → the runs that have it.
        taken: Whether these stand for the configuration.
    """
    seeds: dict[tuple[str, str], set[int]] = {}
    for configuration in configurations:
        for key, of_all in members.items():
            own = of_all.get(configuration.name, configuration.runs)
            lacking = {run.seed for run in configuration.runs if run not in own}
            if lacking:
                family = FAMILIES[MEASURES[key].family]
                seeds.setdefault((configuration.name, family), set()).update(lacking)
    families: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (name, family), lacking in seeds.items():
        families.setdefault((name, tuple(sorted(lacking))), []).append(family)
    rest = (
        "its other seeds are taken, as asked"
        if taken
        else "so it is left out there; --allow_partial takes its other seeds"
    )
    return [
        f"{name}: seed {', '.join(map(str, lacking))} was not measured in {listed(found)}: {rest}"
        for (name, lacking), found in families.items()
    ]


# --- what is missing


def missing(runs: Sequence[Run]) -> list[dict]:
    """Runs without an evaluation, or with less of it than others, and the command that makes it.

    Returns:
        Of each `run`, `what` in words, `parts` and `command`.
    """
    measured = [name for name in PARTS if any(name in run.results for run in runs)]
    pattern = next((run for run in runs if run.evaluation is not None), None)
    words = [] if pattern is None else _flags(pattern)
    if measured and set(measured) != set(PARTS):
        words += ["--tasks", *measured]
    found = []
    for run in runs:
        absent = [name for name in measured or PARTS if name not in run.results]
        if absent:
            command = shlex.join(["python", "-m", "eval.run", str(run.path), *words])
            what = "has no evaluation" if run.evaluation is None else f"lacks {', '.join(absent)}"
            found.append({"run": str(run.path), "what": what, "parts": absent, "command": command})
    return found


def _flags(run: Run) -> list[str]:
    """Of the command that evaluates another run in the same way."""
    words = ["--data", run.evaluation["data"]["folder"]]
    for option in fields(Options):
        value = run.evaluation["options"].get(option.name)
        if option.name != "batch_size" and value != option.default:
            words += [f"--{option.name}", *map(str, value if isinstance(value, list) else [value])]
    return words
