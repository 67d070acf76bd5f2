"""The keys of a recipe as tables for the terminal, read from the sources that define them."""

import json

from rich.table import Table

from medistill_trl.arguments import SHARED
from medistill_trl.recipe import methods
from medistill_trl.schema import (
    COMPUTED,
    REQUIRED,
    Field,
    config_class_name,
    read_about,
    read_fields,
    read_own_fields,
)


def tables(method: str | None) -> list[Table]:
    """The keys this project defines: those of all methods, and those of one if it is named."""
    groups = [
        (_headline(arguments), read_fields(arguments.__module__, arguments.__name__))
        for arguments in SHARED
    ]
    if method is not None:
        module = f"medistill_trl.methods.{method}"
        own = read_own_fields(module, config_class_name(module))
        groups.append((read_about(module)[0], own))
    return [_keys(title, fields) for title, fields in groups if fields]


def methods_table() -> Table:
    """The ten methods, in a line each."""
    table = _table("Methods, recipes/METHOD.yaml each", "method", "what the student learns")
    for name in methods():
        table.add_row(name, read_about(f"medistill_trl.methods.{name}")[0])
    return table


def _headline(arguments: type) -> str:
    return (arguments.__doc__ or "").partition("\n")[0]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _keys(title: str, fields: dict[str, Field]) -> Table:
    table = _table(title, "key", "default", "")
    for item in fields.values():
        choices = f" One of {', '.join(map(str, item.choices))}." if item.choices else ""
        table.add_row(f"--{item.name}", _default(item), item.help + choices)
    return table


def _default(item: Field) -> str:
    if item.default in (REQUIRED, COMPUTED):
        return "required" if item.default == REQUIRED else ""
    return item.default if isinstance(item.default, str) else json.dumps(item.default)
