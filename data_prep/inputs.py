"""Where the rows come from: the hub at pinned revisions, a folder of releases, or the sample."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from data_prep.reading import SUFFIXES
from data_prep.sources import DataFile, Source, load
from medistill_trl.errors import UserError, first_line

SAMPLE = Path(__file__).parent / "sample" / "raw"
LAYOUT = "DIR/medqa/, DIR/medmcqa/, DIR/pubmedqa/ and DIR/pubhealth/ (docs/data.md names the files)"


@dataclass(frozen=True)
class Input:
    """A dataset's files.

    Args:
        folder: Below which they lie.
        files: With the split each holds, in the order of their paths.
        ignored: Files whose path tells no split.
    """

    source: Source
    folder: Path
    files: list[DataFile]
    ignored: list[str]

    def digests(self) -> list[dict[str, str]]:
        """Path below the folder, split and sha256 of each file."""
        return [
            {
                "source": self.source.name,
                "file": file.path.relative_to(self.folder).as_posix(),
                "split": file.split,
                "sha256": sha256(file.path),
            }
            for file in self.files
        ]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find(name: str, raw_dir: Path | None) -> Input:
    """The files of a dataset, in its folder of `raw_dir` or, without one, from the hub.

    Raises:
        UserError: if there are none, naming both ways to get them.
    """
    source = load(name)
    folder = _from_hub(source) if raw_dir is None else raw_dir / name
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder; --raw_dir DIR wants {LAYOUT}. Leave a dataset out with "
            "--sources."
        )
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
    return _sorted_out(source, folder, found)


def passages(path: Path) -> Input:
    """Passages for MedPPL: one file, or all files below a folder.

    Raises:
        UserError: if there are none.
    """
    folder = path if path.is_dir() else path.parent
    candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [p for p in candidates if p.is_file() and p.suffix in (*SUFFIXES, ".txt")]
    if not found:
        raise UserError(
            f"--medppl_from {path}: no .jsonl, .json, .parquet, .tsv or .txt file there"
        )
    return _sorted_out(load("passages"), folder, found)


def _sorted_out(source: Source, folder: Path, found: list[Path]) -> Input:
    files, ignored = [], []
    for path in found:
        name = path.relative_to(folder).as_posix()
        # A hub snapshot's own path may hold any word; only what is below it names a split.
        match = next((split for pattern, split in source.splits if re.search(pattern, name)), "")
        if match:
            files.append(DataFile(path, match))
        elif match == "":
            ignored.append(f"{source.name}/{name}")
    if not files:
        named = ", ".join(ignored) or "nothing that ends in " + ", ".join(SUFFIXES)
        raise UserError(
            f"{folder}: no file whose name tells its split ({' or '.join(source.roles)}); found {named}"
        )
    return Input(source, folder, files, ignored)


def _from_hub(source: Source) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    hub = source.hub
    try:
        return Path(
            snapshot_download(
                hub.repository,
                repo_type="dataset",
                revision=hub.revision,
                allow_patterns=list(hub.files),
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{source.name}: {hub.repository} at {hub.revision[:12]} cannot be loaded from the hub "
            f"({first_line(error)}). Run once where the hub can be reached (its cache is used afterwards), "
            f"or download the releases and give --raw_dir DIR with {LAYOUT}. --sample needs neither."
        ) from error
