"""The whole comparison as one JSON-able object: comparison.json. Tables and pictures are made from it alone."""

import numbers
from collections.abc import Sequence

from eval.comparison import comparable, cost, verdict
from eval.comparison.columns import columns
from eval.comparison.curves import HELDOUT, heldout_curve
from eval.comparison.differences import (
    QUALITIES,
    Having,
    Samples,
    adjusted,
    against_baseline,
    compare,
    estimates,
    having,
    ranking,
    samples,
)
from eval.comparison.measures import MEASURES, TITLES
from eval.comparison.paired import RESAMPLES
from eval.comparison.runs import Configuration, Found, group
from medistill_trl.errors import UserError

SCHEMA_VERSION = 1
SHORT = {"kl": QUALITIES[0], "retention": "retention.all", "heldout_kl": QUALITIES[1]}
DEFAULT_BASELINE = "sft"


def build(
    found: Found,
    baseline: str | None = None,
    quality: str | None = None,
    x: str | None = None,
    allow_partial: bool = False,
    resamples: int = RESAMPLES,
) -> dict:
    """Compare; docs/comparison.md has the keys.

    Args:
        baseline: A configuration, a method or a run; the SFT one, else the first.
        quality: What the ranking is by, a measure's key.
        x: The recipe key of the ablation plot; the one that varies.
        allow_partial: Where some seeds of a configuration lack a measure, take those that have it.

    Raises:
        UserError: the runs are not comparable, or a name is unknown.
    """
    configurations = group(found.runs, [*([x] if x else []), *found.axes])
    comparable.check(found.runs)
    own = {str(run.path): columns(run) for run in found.runs}
    comparable.check_items([(run, own[str(run.path)]) for run in found.runs])
    members = having(configurations, own, allow_partial)
    measured = samples(members, own)
    base = choose_baseline(configurations, baseline).name
    chosen = choose_quality(measured, members, configurations, quality)
    others = [c.name for c in configurations if c.name != base]
    primary = [(chosen, name, base) for name in others]
    spent = cost.costs(configurations)
    qualities = {name: sample.value for name, sample in measured[chosen].items()}
    content = {
        "schema_version": SCHEMA_VERSION,
        "studies": found.studies,
        "configurations": [_described(c) for c in configurations],
        "baseline": base,
        "quality": chosen,
        "left_out": found.left_out,
        "missing": comparable.missing(found.runs),
        "notes": [
            *comparable.notes(configurations),
            *comparable.partly_measured(
                configurations, having(configurations, own, partial=True), allow_partial
            ),
            *cost.note(configurations),
        ],
        "measures": estimates(measured, members, configurations),
        "floors": _floors(configurations),
        "primary": adjusted(compare(measured, primary, resamples)),
        "differences": against_baseline(measured, base, resamples),
        "ranking": ranking(measured, chosen, resamples),
        "cost": spent,
        "pareto": cost.front(configurations, spent, qualities, MEASURES[chosen].better),
        "ablation": _ablation(configurations, found.axes, x),
        "pictures": [],  # named once they are drawn
        "curves": {c.name: _curves(c) for c in configurations},
    }
    return content | {"verdict": verdict.sentences(content)}


def choose_baseline(configurations: Sequence[Configuration], asked: str | None) -> Configuration:
    """The configuration of this name, or the only one of this method or with this run."""
    wanted = asked or DEFAULT_BASELINE
    fits = [c for c in configurations if c.name == wanted]
    fits = fits or [c for c in configurations if c.method == wanted]
    fits = fits or [c for c in configurations if wanted in [r.name for r in c.runs]]
    if len(fits) == 1:
        return fits[0]
    if asked is None:
        return (fits or configurations)[0]
    names = ", ".join(c.name for c in configurations)
    many = "is several configurations" if fits else "is none of the configurations"
    raise UserError(f"--baseline: {asked!r} {many}; choose one of {names}")


def choose_quality(
    measured: Samples, members: Having, configurations: Sequence[Configuration], asked: str | None
) -> str:
    """A measure that every configuration has; if nothing is asked for, one that every run has."""
    everywhere = [key for key, of_all in measured.items() if len(of_all) == len(configurations)]
    if asked is None:
        whole = {configuration.name: configuration.runs for configuration in configurations}
        return next(key for key in QUALITIES if key in everywhere and members[key] == whole)
    key = SHORT.get(asked, asked)
    if key in everywhere:
        return key
    known = "not measured for every run" if key in MEASURES else "no measure"
    raise UserError(
        f"--quality: {asked!r} is {known}; one of {', '.join([*SHORT, *everywhere])}, where measured"
    )


def _described(configuration: Configuration) -> dict:
    return {
        "name": configuration.name,
        "method": configuration.method,
        "settings": configuration.settings,
        "seeds": configuration.seeds,
        "runs": [str(run.path) for run in configuration.runs],
        "results": [run.digests for run in configuration.runs],
        "evaluated": all(run.evaluation is not None for run in configuration.runs),
    }


def _floors(configurations: Sequence[Configuration]) -> dict[str, dict]:
    """What needs no reading, of each benchmark that some run was asked."""
    floors: dict[str, dict] = {}
    for configuration in configurations:
        for run in configuration.runs:
            part = run.results.get("benchmarks", {})
            floors |= {name: part[name]["floor"] for name in TITLES if name in part}
    return floors


def _curves(configuration: Configuration) -> list[dict]:
    """The held-out check over the steps of each run."""
    curves = []
    for run in configuration.runs:
        curve: dict = {"seed": run.seed}
        for key in HELDOUT:
            steps, values = heldout_curve(run.record, key)
            if steps:
                curve |= {"steps": steps, key: values}
        curves.append(curve)
    return curves


# --- the ablation


def _ablation(
    configurations: Sequence[Configuration], axes: Sequence[str], asked: str | None
) -> dict | None:
    """The numeric recipe key that varies, and lines of configurations along it; None if none does.

    Raises:
        UserError: a key was asked for that does not vary, or is no number everywhere.
    """
    varying = list(dict.fromkeys(key for c in configurations for key in c.settings))
    for key in [asked] if asked else sorted(varying, key=lambda key: key not in axes):
        series = _series(configurations, key)
        if series:
            return {"key": key, "series": series}
    if asked:
        raise UserError(
            f"--x: {asked!r} is no number that varies among the configurations of a method; what varies: "
            f"{', '.join(varying) or 'nothing'}"
        )
    return None


def _series(configurations: Sequence[Configuration], key: str) -> dict[str, list[dict]]:
    """A line for each method and each setting of the other keys that vary: `configuration` and `x`, by x.

    Configurations without such a number are not on a line: an SFT run has no temperature. Empty where no line has
    two points.
    """
    series: dict[str, list[dict]] = {}
    for configuration in configurations:
        value = configuration.settings.get(key)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            continue
        others = [f"{k} {v}" for k, v in configuration.settings.items() if k != key]
        line = " ".join([configuration.method, *([f"({', '.join(others)})"] if others else [])])
        series.setdefault(line, []).append({"configuration": configuration.name, "x": value})
    lines = {line: sorted(points, key=lambda point: point["x"]) for line, points in series.items()}
    return lines if any(len(points) > 1 for points in lines.values()) else {}
