"""Tables on disk between the steps of a build, so that memory stays small and a kill costs one step.

A workspace belongs to one build: the same inputs, settings and code. For any other it starts empty.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features, concatenate_datasets
from tqdm.auto import tqdm

from medistill_trl.errors import UserError
from medistill_trl.files import write_text

CHUNK = 1000  # rows worked on together
SLICE = 50_000  # rows between two points to go on from
FEWEST_PER_PROCESS = 2000  # below it, starting processes costs more than it saves


class Workspace:
    """The tables of one build, in a folder that no other build may use meanwhile.

    Args:
        folder: Made if need be; emptied if another build left it.
        key: Stands for everything the tables depend on.
        jobs: Processes for `map`.

    Raises:
        UserError: the folder is not a build's, or another build is using it.
    """

    def __init__(self, folder: Path, key: str, jobs: int):
        self.folder, self.jobs = folder, jobs
        marker = folder / "key"
        self.resumed = marker.is_file() and marker.read_text(encoding="utf-8") == key
        if folder.exists() and any(folder.iterdir()) and not marker.is_file():
            raise UserError(
                f"{folder} is in the way: it was not made by a data build. Move it, or give another --out."
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{folder.parent}: another build is writing there; let it finish"
            ) from error
        if not self.resumed:
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
        write_text(marker, key)

    def table(self, stage: str, rows: Callable[[], Iterator[dict]], features: Features) -> Dataset:
        """A table written once, of whatever `rows` yields."""
        path = self.folder / f"{stage}.arrow"
        if not path.exists():
            unfinished = path.with_suffix(".partial")
            schema = features.arrow_schema
            with (
                pa.OSFile(str(unfinished), "wb") as sink,
                pa.ipc.new_stream(sink, schema) as writer,
            ):
                chunk = []
                for row in tqdm(rows(), desc=stage, unit=" rows", mininterval=1.0):
                    chunk.append(row)
                    if len(chunk) == CHUNK:
                        writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema))
                        chunk = []
                writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema))
            os.replace(unfinished, path)
        return Dataset.from_file(str(path))

    def map(
        self,
        stage: str,
        table: Dataset,
        function: Callable[[dict], dict],
        features: Features,
        **given,
    ) -> Dataset:
        """`function(columns of some rows, **given) -> columns`, in parallel, computed once.

        A slice at a time: a process keeps the pages of the file it has read, and an interruption costs
        one slice.
        """
        starts = range(0, len(table), SLICE)
        if not starts:  # map would give back the columns it was given
            return Dataset(pa.Table.from_pylist([], features.arrow_schema))
        slices = []
        for number, start in enumerate(starts, start=1):
            rows = table.select(range(start, min(start + SLICE, len(table))))
            name = f"{stage} ({number} of {len(starts)})" if len(starts) > 1 else stage
            slices.append(self._map_slice(name, rows, function, features, given))
        return concatenate_datasets(slices)

    def _map_slice(
        self, name: str, table: Dataset, function: Callable, features: Features, given: dict
    ) -> Dataset:
        parallel = self.jobs > 1 and len(table) >= FEWEST_PER_PROCESS
        return table.map(
            partial(_typed, function=function, schema=features.arrow_schema),
            batched=True,
            batch_size=CHUNK,
            num_proc=self.jobs if parallel else None,
            features=features,
            remove_columns=table.column_names,
            fn_kwargs=given,
            # Ours decide what is reused: the key above covers all that the function's result rests on.
            cache_file_name=str(self.folder / f"{name}.arrow"),
            new_fingerprint=name,
            load_from_cache_file=True,
            desc=name,
        )

    def close(self) -> None:
        """Remove the tables: the build is complete."""
        shutil.rmtree(self.folder)
        self._lock.close()


def _typed(columns: dict, *, function: Callable, schema: pa.Schema, **given) -> pa.Table:
    """The columns with their types: left to guess, datasets takes no unsigned 64-bit numbers."""
    return pa.Table.from_pydict(function(columns, **given), schema)
