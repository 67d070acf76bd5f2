"""Writing files so that a kill leaves the old content or the new, never half of it."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file in one step, making its folder if need be; safe beside other writers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)
