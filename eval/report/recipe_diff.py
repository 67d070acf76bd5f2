"""What sets a run's recipe apart from the one its method is shipped with."""

import json
from pathlib import Path
from typing import Any

from eval.report.tables import Table, words
from medistill_trl import recipe

SHIPPED = Path(__file__).resolve().parents[2] / "recipes"
NAMES = {"output_dir", "run_name"}  # where a run lies says nothing of what it is
ABSENT = "not set"


def differences(used: dict) -> Table | None:
    """Every key whose value is not the shipped one; None where the shipped recipes are not there.

    Args:
        used: Resolved recipe of the run.
    """
    path = SHIPPED / f"{used['method']}.yaml"
    if not path.is_file():
        return None
    shipped = recipe.load([str(path)]).resolved()
    rows = [
        [words(key), _shown(shipped, key), _shown(used, key)]
        for key in sorted({*shipped, *used} - NAMES)
        if (key in shipped, shipped.get(key)) != (key in used, used.get(key))
    ]
    return Table(["key", f"recipes/{path.name}", "this run"], rows)


def _shown(values: dict[str, Any], key: str):
    if key not in values:
        return words(ABSENT)
    value = values[key]
    return words(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
