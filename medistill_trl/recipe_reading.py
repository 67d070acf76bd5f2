"""YAML files and flags → entries that know where they stand. Nothing is judged here but syntax."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from medistill_trl.schema import Field

LARGEST = 10_000  # values of a file
TOO_LARGE = (
    f"a value contains itself, or the file has more than {LARGEST:,} values, aliases written out"
)
# What YAML's own constructors raise on values that a tag such as !!int promises and that are not there.
UNREADABLE = (
    yaml.YAMLError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    RecursionError,
)


@dataclass(frozen=True)
class Entry:
    """One key as someone wrote it.

    Args:
        where: `file:line`, or the flag.
        text: The text of a flag before it was read as YAML.
    """

    key: str
    value: Any
    where: str
    text: str | None = None

    def say(self, problem: str) -> str:
        """A problem with this entry, as the user reads it."""
        return (
            f"{self.where}: {problem}"
            if self.text is not None
            else f"{self.where}: {self.key}: {problem}"
        )

    def fitted(self, schema: dict[str, Field]) -> "Entry":
        """A flag has no quotes and no brackets: `--run_name 7` is a text, `--x a` may be a list."""
        types = schema[self.key].types if self.key in schema else frozenset()
        if self.text is None or not types or type(self.value).__name__ in types:
            return self
        if isinstance(self.value, list):
            return self
        if "str" in types and self.value is not None:
            return replace(self, value=self.text)
        if "list" in types and self.value is not None:
            return replace(self, value=[self.value])
        return self


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2: `1e-4` is a number, `no` and `off` are words."""

    yaml_implicit_resolvers = {
        first: [(tag, rx) for tag, rx in pairs if not tag.endswith((":bool", ":float", ":int"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9]\d*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^([-+]?(\d[\d_]*\.\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(inf|Inf)|\.(nan|NaN))$"
    ),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """A value as a flag or a file would spell it.

    Raises:
        ValueError: it is no YAML.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        if _is_too_large(root):
            raise ValueError(TOO_LARGE)
        return loader.construct_object(root, deep=True)
    except UNREADABLE as error:
        raise ValueError(f"cannot be read: {getattr(error, 'problem', None) or error}") from error


def read_file(path: str, problems: list[str], kind: str = "recipe") -> list[Entry]:
    """The entries of a YAML file.

    Args:
        kind: What the file is, for messages.
    """
    if not path.endswith((".yaml", ".yml")):
        problems.append(f"{path}: not a {kind}; name YAML files first and options as --key value")
        return []
    try:
        text = Path(path).read_text(encoding="utf-8")
        loader = _Loader(text)
        root = loader.get_single_node()
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
        return []
    except UnicodeDecodeError as error:
        problems.append(f"{path}: not UTF-8 text (byte {error.start})")
        return []
    except RecursionError:
        problems.append(f"{path}: nested too deeply to be a {kind}")
        return []
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problems.append(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}")
        return []
    if not isinstance(root, yaml.MappingNode):
        problems.append(f"{path}: must be a mapping of `key: value` lines")
        return []
    if _is_too_large(root):
        problems.append(f"{path}: {TOO_LARGE}")
        return []
    _find_duplicates(root, path, problems)
    entries = []
    for key_node, value_node in root.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        try:
            key = loader.construct_object(key_node, deep=True)
            value = loader.construct_object(value_node, deep=True)
        except UNREADABLE as error:
            problems.append(f"{where}: cannot be read: {getattr(error, 'problem', None) or error}")
            continue
        if not isinstance(key, str):
            problems.append(f"{where}: keys are words, got {key!r}")
            continue
        entries.append(Entry(key, value, where))
    return entries


def _is_too_large(root: yaml.Node) -> bool:
    """Whether a document has more values than any recipe, once its aliases are written out."""
    left, waiting = LARGEST, [root]
    while waiting and left:
        left -= 1
        node = waiting.pop()
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    return bool(waiting)


def _find_duplicates(node: yaml.Node, path: str, problems: list[str]) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _find_duplicates(item, path, problems)
    if not isinstance(node, yaml.MappingNode):
        return
    first_line: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if isinstance(key_node, yaml.ScalarNode):
            if key_node.value in first_line:
                problems.append(
                    f"{path}:{line}: {key_node.value}: given twice, first in line "
                    f"{first_line[key_node.value]}; keep one"
                )
            first_line.setdefault(key_node.value, line)
        _find_duplicates(value_node, path, problems)


def read_flags(flags: list[str], problems: list[str]) -> list[Entry]:
    """`--key value`, `--key=value`, `--key a b` (a list) and `--key` alone (true)."""
    entries: list[Entry] = []
    position = 0
    while position < len(flags):
        key, separator, attached = flags[position][2:].partition("=")
        position += 1
        texts = [attached] if separator else []
        while not separator and position < len(flags) and not flags[position].startswith("--"):
            texts.append(flags[position])
            position += 1
        key = key.replace("-", "_")
        if any(entry.key == key for entry in entries):
            problems.append(f"--{key}: given twice; keep one")
        try:
            parsed = [parse_value(text) for text in texts]
        except ValueError as error:
            problems.append(f"--{key}: {error}")
            continue
        value = True if not parsed else parsed[0] if len(parsed) == 1 else parsed
        text = " ".join(texts)
        entries.append(Entry(key, value, f"--{key}", text))
    return entries
