"""What a recipe may contain, read from the source of the config dataclasses.

Importing TRL takes seconds, and a wrong recipe should be refused at once. The fields of a dataclass
(names, types, choices) stand in its source, so this module parses that source with `ast` and follows
its base classes: `SFTDistillConfig` → `trl.SFTConfig` → `transformers.TrainingArguments`. The schema
is that of the installed versions, and there is no second list of fields to keep up to date.

A dataclass declares the bounds of its numbers in a class attribute, since TRL's parser hands field
metadata on to argparse, which knows no bounds:

    LIMITS = {"lora_r": {"min": 1}, "lora_dropout": {"min": 0, "below": 1}}

`min` and `max` are inclusive, `above` and `below` exclusive. A method that works with one value only of a
key that all methods share says so, and why, in another one:

    REQUIRES = {"teacher_completions": ("stored", "every epoch trains on the same answers")}

one that inherits keys which mean nothing to it says which, and why,

    UNUSED = {"gamma": "a sample has one weight, for all its tokens"}

and one that is trained on the student's own samples alone, never on completions of the teacher, says that:

    TRAINS_ON = "student"
"""

import ast
import importlib.util
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

PRIMITIVES = {"int", "float", "bool", "str", "list", "dict"}
REQUIRED = "<required>"  # stands for the default of a field that has none
COMPUTED = "<computed>"  # stands for a default that is not a literal


@dataclass(frozen=True)
class Field:
    """One key of a recipe.

    Args:
        name: The key.
        types: Accepted primitive types, a subset of `PRIMITIVES` plus `"none"`; empty means any.
        item_types: Accepted types of the items when the value is a list; empty means any.
        choices: Accepted values, or None.
        limits: Numeric bounds, keys min, max, above, below.
        default: The default where it is a literal, else `REQUIRED` or `COMPUTED`.
        help: One line for the user.
    """

    name: str
    types: frozenset[str]
    item_types: frozenset[str] = frozenset()
    choices: tuple | None = None
    limits: dict[str, float] = field(default_factory=dict)
    default: Any = None
    help: str = ""


def read_fields(module: str, class_name: str) -> dict[str, Field]:
    """The fields of a dataclass with those it inherits, without importing the module.

    Args:
        module: Dotted name of the module that defines or re-exports the class.
        class_name: The class.

    Raises:
        LookupError: no class of this name is reachable from the module.
    """
    return _read_class(*_require_class(module, class_name))


def read_own_fields(module: str, class_name: str) -> dict[str, Field]:
    """As `read_fields`, without what other packages define and without `UNUSED`."""
    path, class_def = _require_class(module, class_name)
    unused = _declared(class_def, "UNUSED")
    own = _read_class(path, class_def, within=Path(__file__).parent)
    return {name: item for name, item in own.items() if name not in unused}


def read_requirements(module: str, class_name: str) -> dict[str, tuple[Any, str]]:
    """What the class declares in `REQUIRES`: key → the one value that works, and why."""
    return _declared(_require_class(module, class_name)[1], "REQUIRES")


def read_unused(module: str, class_name: str) -> dict[str, str]:
    """What the class declares in `UNUSED`: inherited key → why it means nothing there."""
    return _declared(_require_class(module, class_name)[1], "UNUSED")


def read_trains_on(module: str, class_name: str) -> str:
    """Whose completions the loss is taken on: what the class declares in `TRAINS_ON`, or `teacher`."""
    return _declared(_require_class(module, class_name)[1], "TRAINS_ON") or "teacher"


def read_about(module: str) -> tuple[str, str]:
    """What a method is, in one line, and where it comes from: the beginning of its docstring, and the `paper`
    of its `METHOD`."""
    tree = _parse(_module_path(module))
    papers = [
        ast.literal_eval(keyword.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "METHOD"
        for keyword in node.value.keywords
        if keyword.arg == "paper"
    ]
    return ast.get_docstring(tree).partition("\n")[0], papers[0]


def _require_class(module: str, class_name: str) -> tuple[Path, ast.ClassDef]:
    path = _module_path(module)
    found = _find_class(path, class_name) if path else None
    if found is None:
        raise LookupError(f"no class {class_name} is reachable from module {module} ({path})")
    return found


def config_class_name(module: str) -> str:
    """The one class in the module whose name ends in `Config`: by convention the method's config."""
    tree = _parse(_module_path(module))
    names = [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    ]
    if len(names) != 1:
        raise LookupError(f"module {module} must define exactly one *Config class, found {names}")
    return names[0]


def _read_class(
    path: Path, class_def: ast.ClassDef, within: Path | None = None
) -> dict[str, Field]:
    """Its fields; of its bases only those defined below `within`, if that is given."""
    fields: dict[str, Field] = {}
    for base in reversed(class_def.bases):  # the first base wins, as in Python
        found = _find_class(path, base.id) if isinstance(base, ast.Name) else None
        if found and (within is None or found[0].is_relative_to(within)):
            fields.update(_read_class(*found, within))
    fields.update(_own_fields(path, class_def))
    return fields


def _own_fields(path: Path, class_def: ast.ClassDef) -> dict[str, Field]:
    limits = _declared(class_def, "LIMITS")
    return {
        node.target.id: _read_field(path, node, limits.get(node.target.id, {}))
        for node in class_def.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not (isinstance(node.annotation, ast.Name) and node.annotation.id == "InitVar")
    }


def _declared(class_def: ast.ClassDef, name: str) -> Any:
    """A class attribute that is a literal; an empty dict where the class has none."""
    for node in class_def.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    return {}


def _read_field(path: Path, node: ast.AnnAssign, limits: dict[str, float]) -> Field:
    types: set[str] = set()
    items: set[str] = set()
    choices: list = []
    _read_annotation(path, node.annotation, types, items, choices)
    default, metadata = _read_default(node.value)
    if default is None:
        types.add("none")
    declared = metadata.get("choices")
    return Field(
        name=node.target.id,
        types=frozenset() if "any" in types else frozenset(types),
        item_types=frozenset(items),
        # A Literal of false beside other types (`str | Literal[False]`) does not restrict those.
        choices=tuple(declared or [c for c in choices if isinstance(c, str)]) or None,
        limits=limits,
        default=default,
        help=str(metadata.get("help", "")),
    )


def _read_default(value: ast.expr | None) -> tuple[Any, dict]:
    """Default and metadata of `= value` or `= field(...)`."""
    if value is None:
        return REQUIRED, {}
    if not (isinstance(value, ast.Call) and getattr(value.func, "id", "") == "field"):
        return _literal(value, COMPUTED), {}
    keywords = {keyword.arg: keyword.value for keyword in value.keywords}
    metadata = {}
    if isinstance(keywords.get("metadata"), ast.Dict):
        for key, item in zip(keywords["metadata"].keys, keywords["metadata"].values, strict=True):
            metadata[_literal(key)] = _literal(item)
    if "default" in keywords:
        return _literal(keywords["default"], COMPUTED), metadata
    if "default_factory" in keywords:
        return COMPUTED, metadata
    return REQUIRED, metadata


def _literal(node: ast.expr | None, otherwise: Any = None) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return otherwise


def _read_annotation(
    path: Path, node: ast.expr, types: set[str], items: set[str], choices: list
) -> None:
    """Collect what an annotation accepts: primitives, list items, Literal and Enum values."""
    match node:
        case ast.Constant(value=None):
            types.add("none")
        case ast.Constant(value=str() as text):  # a quoted annotation
            _read_annotation(path, ast.parse(text, mode="eval").body, types, items, choices)
        case ast.BinOp(left=left, right=right):  # X | Y
            for side in (left, right):
                _read_annotation(path, side, types, items, choices)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            values = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            choices.extend(_literal(value) for value in values)
            types.update(type(_literal(value)).__name__ for value in values)
        case ast.Subscript(value=ast.Name(id=("Optional" | "Union")), slice=inner):
            if node.value.id == "Optional":
                types.add("none")
            for part in inner.elts if isinstance(inner, ast.Tuple) else [inner]:
                _read_annotation(path, part, types, items, choices)
        case ast.Subscript(value=ast.Name(id=("list" | "List")), slice=inner):
            types.add("list")
            _read_annotation(path, inner, items, set(), [])
        case ast.Subscript(value=ast.Name(id=("dict" | "Dict"))):
            types.add("dict")
        case ast.Name(id=name) if name in PRIMITIVES:
            types.add(name)
        case ast.Name(id=name) if values := _enum_values(path, name):
            choices.extend(values)
            types.add("str")
        case ast.Name(id=("Any" | "object")):
            types.add("any")
        case _:  # another class: a recipe cannot spell it, so only the other alternatives count
            pass


@cache
def _enum_values(path: Path, name: str) -> tuple[str, ...]:
    found = _find_class(path, name)
    if found is None or not any(getattr(b, "id", "").endswith("Enum") for b in found[1].bases):
        return ()
    return tuple(
        node.value.value
        for node in found[1].body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    )


@cache
def _find_class(path: Path, name: str) -> tuple[Path, ast.ClassDef] | None:
    """The class visible under `name` in a file, following `from x import name` across files."""
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    source = _imported_path(path, node)
                    if source and source != path:
                        return _find_class(source, alias.name)
    return None


def _imported_path(path: Path, node: ast.ImportFrom) -> Path | None:
    if node.level == 0:
        return _module_path(node.module)
    folder = path.parent
    for _ in range(node.level - 1):
        folder = folder.parent
    return _as_file(folder.joinpath(*(node.module or "").split(".")))


@cache
def _module_path(module: str) -> Path | None:
    """The file of a module; only the top-level package is looked up, and nothing is imported."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin)
    return _as_file(root.parent.joinpath(*rest)) if rest else root


def _as_file(stem: Path) -> Path | None:
    for candidate in (stem.with_name(stem.name + ".py"), stem / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
