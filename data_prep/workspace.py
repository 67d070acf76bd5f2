"""Tables on disk between the steps of a build, so that memory stays small and a kill costs one step.

A workspace belongs to one build: the same inputs, settings and code. For any other it starts empty.
"""

import os
import shutil
from collections.abc import Callable, Iterator
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

    def table(self, name: str, rows: Callable[[], Iterator[dict]], features: Features) -> Dataset:
        """A table written once, of whatever `rows` yields."""
        path = self.folder / f"{name}.arrow"
        if not path.exists():
            partial = path.with_suffix(".partial")
            schema = features.arrow_schema
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                chunk = []
                for row in tqdm(rows(), desc=name, unit=" rows", mininterval=1.0):
                    chunk.append(row)
                    if len(chunk) == CHUNK:
                        writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema))
                        chunk = []
                writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema))
            os.replace(partial, path)
        return Dataset.from_file(str(path))

    def map(
        self,
        name: str,
        table: Dataset,
        function: Callable[[dict], dict],
        features: Features,
        **given,
    ) -> Dataset:
        """`function(columns of some rows, **given) -> columns`, in parallel, computed once."""
        parallel = self.jobs > 1 and len(table) >= FEWEST_PER_PROCESS
        return table.map(
            function,
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
