"""Tables on disk between the steps of a build, so that memory stays small and a kill costs one step.

A workspace belongs to one build: the same inputs, settings and code. For any other it starts empty.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features
from tqdm.auto import tqdm

from medistill_trl.files import write_text

CHUNK = 1000  # rows
FEWEST_PER_PROCESS = 2000  # below it, starting processes costs more than it saves


class Workspace:
    """Args:
    folder: Made if need be; emptied if another build left it.
    key: Stands for everything the tables depend on.
    jobs: Processes for `map`.
    """

    def __init__(self, folder: Path, key: str, jobs: int):
        self.folder, self.jobs = folder, jobs
        marker = folder / "key"
        if folder.exists() and not (marker.is_file() and marker.read_text() == key):
            shutil.rmtree(folder)
        self.resumed = folder.exists()
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
        """`function(columns of some rows, **given) -> columns`, in parallel, computed once."""
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
            cache_file_name=str(self.folder / f"{stage}.arrow"),
            new_fingerprint=stage,
            load_from_cache_file=True,
            desc=stage,
        )

    def close(self) -> None:
        """Remove the tables: the build is complete."""
        shutil.rmtree(self.folder)


def _typed(columns: dict, *, function: Callable, schema: pa.Schema, **given) -> pa.Table:
    """The columns with their types: left to guess, datasets takes no unsigned 64-bit numbers."""
    return pa.Table.from_pydict(function(columns, **given), schema)
