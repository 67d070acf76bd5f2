"""What sets recipes apart: a run's from the one its method is shipped with, and those of several runs."""

import contextlib
import json
from pathlib import Path
from typing import Any

from eval.report.tables import Table, words
from medistill_trl import recipe

SHIPPED = Path(__file__).resolve().parents[2] / "recipes"
NAMES = {"output_dir", "run_name", "completion_store"}  # places say nothing of what a run is
ABSENT = "not set"


def differences(used: dict) -> Table | None:
    """Every key whose value is not the shipped one; None where the shipped recipes are not there.

    Args:
        used: Resolved recipe of the run.
    """
    path = SHIPPED / f"{used['method']}.yaml"
    if not path.is_file():
        return None
    with contextlib.chdir(SHIPPED.parent):  # where its data files are found
        shipped = recipe.load([str(path)]).resolved()
    rows = [
        [words(key), _shown(shipped, key), _shown(used, key)]
        for key in sorted({*shipped, *used} - NAMES)
        if (key in shipped, shipped.get(key)) != (key in used, used.get(key))
    ]
    return Table(["key", f"recipes/{path.name}", "this run"], rows)


def across(recipes: dict[str, dict]) -> Table | None:
    """Every key in which recipes differ, but for their seeds; None for one recipe or none.

    Args:
        recipes: Resolved recipes by name.
    """
    if len(recipes) < 2:
        return None
    keys = {key for used in recipes.values() for key in used} - NAMES - {"seed"}
    rows = [
        [words(key), *(_shown(used, key) for used in recipes.values())]
        for key in sorted(keys)
        if len({json.dumps(used.get(key), sort_keys=True) for used in recipes.values()}) > 1
    ]
    return Table(["key", *recipes], rows)


def _shown(values: dict[str, Any], key: str):
    if key not in values:
        return words(ABSENT)
    value = values[key]
    return words(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
