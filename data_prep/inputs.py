"""Where the rows come from: the hub at pinned revisions, a folder of releases, or the sample."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from data_prep.reading import SUFFIXES
from data_prep.sources import DataFile, Source, load
from medistill_trl.errors import UserError, first_line

PASSAGE_SUFFIXES = (*SUFFIXES, ".txt")
UNREAD = (".md",)  # notes about the files
UNKNOWN = ""
SAMPLE = Path(__file__).parent / "sample" / "raw"
LAYOUT = "DIR/medqa/, DIR/medmcqa/, DIR/pubmedqa/ and DIR/pubhealth/ (docs/data.md names the files)"


@dataclass(frozen=True)
class Input:
    """A dataset's files.

    Args:
        folder: Below which they lie.
        files: With the split each holds, in the order of their paths.
        beside: Files that are not rows but may tell something about them (PubMedQA's test ids).
        ignored: Files that are not read: their path tells no split, or their suffix no format.
    """

    source: Source
    folder: Path
    files: list[DataFile]
    beside: list[Path]
    ignored: list[str]

    def digests(self) -> list[dict[str, str]]:
        """Path below the folder, split and sha256 of each file; no split for those beside."""
        named = [(file.path, file.split) for file in self.files] + [(p, "") for p in self.beside]
        return [
            {
                "source": self.source.name,
                "file": path.relative_to(self.folder).as_posix(),
                "split": split,
                "sha256": sha256(path),
            }
            for path, split in named
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
    return _sorted_out(source, folder, _files(folder))


def passages(path: Path) -> Input:
    """Passages for MedPPL: one file, or all files below a folder.

    Raises:
        UserError: if there are none.
    """
    folder = path if path.is_dir() else path.parent
    found = _files(path) if path.is_dir() else [path]
    if not any(p.is_file() and p.suffix.lower() in PASSAGE_SUFFIXES for p in found):
        raise UserError(
            f"--medppl_from {path}: there is no file that ends in {', '.join(PASSAGE_SUFFIXES)}"
        )
    return _sorted_out(load("passages"), folder, found)


def _files(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, through links too, in the order of their paths."""
    walk = os.walk(folder, followlinks=True)
    found = [Path(top, name) for top, _, names in walk for name in names]
    return sorted(path for path in found if not path.name.startswith("."))


def _sorted_out(source: Source, folder: Path, found: list[Path]) -> Input:
    files, beside, ignored = [], [], []
    suffixes = PASSAGE_SUFFIXES if source.name == "passages" else SUFFIXES
    for path in found:
        name = path.relative_to(folder)
        if path.suffix.lower() in UNREAD:
            continue
        match = _split(source, name) if path.suffix.lower() in suffixes else UNKNOWN
        if match is None:
            beside.append(path)
        elif match == UNKNOWN:
            ignored.append(f"{source.name}/{name.as_posix()}")
        else:
            files.append(DataFile(path, match))
    if not files:
        named = ", ".join(ignored) or "nothing that ends in " + ", ".join(suffixes)
        raise UserError(
            f"{folder}: no file whose name tells its split ({' or '.join(source.roles)}); found {named}"
        )
    return Input(source, folder, files, beside, ignored)


def _split(source: Source, name: Path) -> str | None:
    """The split a file holds, None if it is not wanted, or UNKNOWN.

    Its own name tells, or else the nearest folder that does.
    """
    unwanted = [pattern for pattern, split in source.splits if split is None]
    if any(re.search(pattern, name.as_posix()) for pattern in unwanted):
        return None
    for part in reversed(name.parts):
        for pattern, split in source.splits:
            if split and re.search(pattern, part):
                return split
    return UNKNOWN


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
