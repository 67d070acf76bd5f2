"""Results per item, computed once: content-addressed files that survive a kill.

A result is addressed by its key (the subject's fingerprint, what is measured, the settings) and by the
item's content. So an interrupted evaluation goes on where it was, a larger `--limit` computes only what is
new, and a teacher's results serve every run that has it. Each key is one JSONL file: the key on its first
line, then a line for each item, added a chunk at a time. A line that a kill tore off is dropped.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from medistill_trl.errors import RunFailed, UserError
from medistill_trl.locks import try_lock
from medistill_trl.model_source import cache_folder

logger = logging.getLogger(__name__)

Item = Any  # a mapping or a dataclass, with an `id`, of nothing but JSON's types


class ItemStore:
    """Results on disk.

    Args:
        folder: Made when first written to; `evaluations` in the cache folder by default.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder or cache_folder() / "evaluations"
        self.computed = 0  # items, since this store was opened
        self.reused = 0

    def records(
        self,
        key: dict,
        items: Sequence[Item],
        compute: Callable[[list[Item]], Iterable[dict]],
        chunk: int,
        label: str,
    ) -> list[dict]:
        """The results of items, computing those that are not there.

        Runs side by side that want the same key take turns, so nothing is computed twice.

        Args:
            key: JSON-able; all that a result depends on besides its item: the subject's fingerprint,
                what is measured, the settings. Not the batch size.
            items: Mappings or dataclasses with an `id`, of JSON's types; their whole content counts.
            compute: From some items to a result each, in their order; results are JSON-able and finite.
            chunk: Items given to `compute` at a time; after each chunk its results are on disk.
            label: Of the progress bar.

        Returns:
            `{"id": …, **result}` for each item, in the order of `items`.

        Raises:
            UserError: a file of the store is damaged.
            RunFailed: a result is not finite.
        """
        path = self.folder / f"{_digest(key)}.jsonl"
        addresses = [_digest(_content(item)) for item in items]
        with _turn(path):
            known = _read(path, key)
            missing = {
                address: item
                for address, item in zip(addresses, items, strict=True)
                if address not in known
            }
            self.computed += len(missing)
            self.reused += len(items) - len(missing)
            if missing:
                _compute(path, missing, known, compute, chunk, label)
        return [
            {"id": _content(item)["id"], **known[address]}
            for address, item in zip(addresses, items, strict=True)
        ]


def _compute(
    path: Path,
    missing: dict[str, Item],
    known: dict[str, dict],
    compute: Callable[[list[Item]], Iterable[dict]],
    chunk: int,
    label: str,
) -> None:
    """Add the results of `missing` to the file and to `known`, a chunk at a time."""
    waiting = list(missing.items())
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(waiting), desc=label) as progress:
        for start in range(0, len(waiting), chunk):
            part = waiting[start : start + chunk]
            results = compute([item for _, item in part])
            lines = [
                _line(address, item, result, label)
                for (address, item), result in zip(part, results, strict=True)
            ]
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
            # Read back, so that a result is the same whether it was computed now or before.
            known.update(_parse(line) for line in lines)
            progress.update(len(part))


def _content(item: Item) -> Mapping:
    return item if isinstance(item, Mapping) else asdict(item)


def _digest(content: Mapping) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _line(address: str, item: Item, result: dict, label: str) -> str:
    try:
        text = json.dumps({"item": address, "result": result}, allow_nan=False)
    except ValueError as error:
        raise RunFailed(
            f"{label}: the result of item {_content(item)['id']} is not finite ({result}); the model's "
            "weights or its dtype are broken, so nothing is reported"
        ) from error
    return text + "\n"


def _parse(line: str | bytes) -> tuple[str, dict]:
    row = json.loads(line)
    return row["item"], row["result"]


def _read(path: Path, key: dict) -> dict[str, dict]:
    """Address → result; starts the file if there is none, and cuts off a torn last line."""
    header = json.dumps({"key": key}) + "\n"
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:
        path.write_text(header, encoding="utf-8")
        return {}
    if whole != content:
        os.truncate(path, len(whole))
    first, *lines = whole.splitlines()  # of bytes: it splits at nothing but line ends
    try:
        if json.loads(first)["key"] != json.loads(header)["key"]:
            raise _damaged(path, "its first line is not its key")
        return dict(_parse(line) for line in lines)
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"stored results {path}: damaged ({why}); remove the file and evaluate again")


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Hold the key's lock file; the kernel frees it when the process dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise UserError(
            f"stored results {path.parent}: {error.strerror}; set MEDISTILL_CACHE to a folder that can be "
            "written"
        ) from error
    with lock:
        if not try_lock(lock):
            logger.warning("waiting for another evaluation that is filling %s", path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
