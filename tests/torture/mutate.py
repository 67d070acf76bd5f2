"""Seeded damage: to bytes, to texts, to the values of a JSON or YAML document."""

import copy
import datetime
import random
from typing import Any

# What a hand, another program or another version of this one puts where something else was expected.
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e-320, 1e308,
    float("inf"), float("-inf"), float("nan"), "", " ", "x", "0", "-1", "1e9", "nan", "null", "None", "yes",
    "x" * 5000, "\0", "a\0b", "\ud800", "naïve 🩺", "\u202e\u2028\x1b[31m", "../../../../etc/passwd", "/etc/passwd",
    "/dev/full", "~", "~root/x", "{{ 7 * 7 }}", "${HOME}", "%s%n", "<script>alert(1)</script>", [], [[]], [None],
    [0, 1], ["x"], {}, {"x": 1}, {"": {}}, [[[[[[[[1]]]]]]]], datetime.date(2026, 1, 1), b"\xff\x00",
)  # fmt: skip
ODD_BYTES = (
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b"\t", b"\x1a", b"{", b"}", b"[", b"]",
    b'"', b"'", b"\\", b":", b",", b"-", b"#", b"&a ", b"*a ", b"<<: ", b"!!python/object/apply:os.system ",
    b"!!binary ", b"!!set ", b"!!timestamp ", b"? ", b"| ", b"> ", b"%TAG ! x\n", b"---\n", b"...\n", b".nan", b".inf",
    b"1e999", b"9" * 5000, b"[" * 2000, b"{a: " * 300, b"\\ud800", b'"\\ud800"', b"NaN", b"Infinity", b"-",
    b"2026-13-45", b"0x", b"\xc2\xa0", "🩺".encode(), "\u2028".encode(), b"\x1b[2J",
)  # fmt: skip


def damage_bytes(content: bytes, draw: random.Random) -> bytes:
    """One to three small accidents."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        content = draw.choice(_BYTE_ACCIDENTS)(content, draw)
    return content


def damage_value(value: Any, draw: random.Random, odd: tuple[Any, ...] = ODD_VALUES) -> Any:
    """A copy of a document in which one to three places are another thing, missing, or there twice."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return draw.choice(odd)
        draw.choice(_VALUE_ACCIDENTS)(*draw.choice(places), draw, odd)
    return value


# --- bytes


def _truncate(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _flip(content: bytes, draw: random.Random) -> bytes:
    if not content:
        return content
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def _insert(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content) + 1)
    return content[:place] + draw.choice(ODD_BYTES) + content[place:]


def _cut(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) + 1)
    return content[:start] + content[start + draw.randrange(1, 40) :]


def _repeat(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) + 1)
    part = content[start : start + draw.randrange(1, 200)]
    return content[:start] + part * draw.randrange(2, 5) + content[start + len(part) :]


def _zeros(content: bytes, draw: random.Random) -> bytes:
    """As a file looks whose blocks never reached the disk."""
    start = draw.randrange(len(content) + 1)
    return content[:start] + bytes(len(content) - start)


def _swap_lines(content: bytes, draw: random.Random) -> bytes:
    lines = content.split(b"\n")
    draw.shuffle(lines)
    return b"\n".join(lines)


def _empty(content: bytes, draw: random.Random) -> bytes:
    return b""


_BYTE_ACCIDENTS = (_truncate, _flip, _flip, _insert, _insert, _cut, _repeat, _zeros, _swap_lines)
_BYTE_ACCIDENTS += (_empty,)


# --- values


def _places(value: Any):
    """Every `(container, key)` of a document."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


def _replace(inside: Any, key: Any, draw: random.Random, odd: tuple[Any, ...]) -> None:
    inside[key] = copy.deepcopy(draw.choice(odd))


def _drop(inside: Any, key: Any, draw: random.Random, odd: tuple[Any, ...]) -> None:
    del inside[key]


def _wrap(inside: Any, key: Any, draw: random.Random, odd: tuple[Any, ...]) -> None:
    inside[key] = draw.choice(([inside[key]], {"value": inside[key]}, str(inside[key])))


def _rename(inside: Any, key: Any, draw: random.Random, odd: tuple[Any, ...]) -> None:
    if isinstance(inside, dict):
        inside[draw.choice((f"{key}s", key[:-1], key.upper(), "", "../x", "a\0b"))] = inside.pop(
            key
        )
    else:
        inside.append(copy.deepcopy(inside[key]))


def _add(inside: Any, key: Any, draw: random.Random, odd: tuple[Any, ...]) -> None:
    if isinstance(inside, dict):
        inside[f"more_{draw.randrange(9)}"] = copy.deepcopy(draw.choice(odd))
    else:
        inside.insert(key, copy.deepcopy(draw.choice(odd)))


_VALUE_ACCIDENTS = (_replace, _replace, _replace, _drop, _wrap, _rename, _add)
