"""Every teacher completion drawn once: a content-addressed SQLite file that survives a kill.

A completion is addressed by the teacher's exact weights, the rendered prompt, the sampling settings
and the sample index. Any run or method that asks for the same address gets the same text, and the
second run makes no teacher call. So it is with what the untrained student answers to the held-out prompts (`untrained`);
where "teacher" stands here, it is whoever writes. Each batch is one transaction: after a kill at most the batch in the
making is drawn again. Of a server's answers those that arrive together are a batch.
"""

import contextlib
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from medistill_trl import disk
from medistill_trl.errors import UserError
from medistill_trl.teacher import Completion, Sampling
from medistill_trl.turns import turn
from medistill_trl.writer import Writer, batches

SCHEMA = """
CREATE TABLE IF NOT EXISTS completions (
    key          TEXT PRIMARY KEY,
    teacher      TEXT NOT NULL,
    prompt       TEXT NOT NULL,
    sampling     TEXT NOT NULL,
    sample_index INTEGER NOT NULL,
    text         TEXT NOT NULL,
    token_ids    TEXT NOT NULL,
    finished     INTEGER NOT NULL,
    end_id       INTEGER,
    created      REAL NOT NULL,
    seconds      REAL
)
"""
# Stores of earlier versions have no such column.
ADD_SECONDS = "ALTER TABLE completions ADD COLUMN seconds REAL"
DEFAULT_BATCH_SIZE = 16
LARGEST_ID = 2**31  # no vocabulary has so many tokens


@dataclass(frozen=True)
class Request:
    """One completion that is wanted."""

    prompt: str
    sample_index: int
    key: str


class CompletionStore:
    """Completions on disk.

    Args:
        path: SQLite file; made, with its folder, if it does not exist.

    Raises:
        UserError: the file exists and is not a completion store.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # The default rollback journal, not WAL: it is as safe, and works on network file systems.
            self._database = sqlite3.connect(self.path, timeout=120)
            with self._database:
                self._database.execute(SCHEMA)
            self._add_seconds()
        except (OSError, sqlite3.Error) as error:
            if disk.is_full(error):
                raise  # not the file's fault
            raise self._broken(error) from error

    def _add_seconds(self) -> None:
        if "seconds" in self._columns():
            return
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")  # another process may be about to do the same
            if "seconds" not in self._columns():
                self._database.execute(ADD_SECONDS)

    def _columns(self) -> set[str]:
        return {row[1] for row in self._database.execute("PRAGMA table_info(completions)")}

    def __len__(self) -> int:
        return self._database.execute("SELECT count(*) FROM completions").fetchone()[0]

    def draw(
        self,
        teacher: Writer,
        prompts: list[str],
        sampling: Sampling,
        num_samples: int = 1,
        batch_size: int | None = None,
        label: str = "teacher completions",
    ) -> list[list[Completion]]:
        """The completions of rendered prompts, drawing those that are missing.

        With several processes each draws its share; runs side by side take turns, so that nothing is
        drawn twice.

        Returns:
            For each prompt its `num_samples` completions.
        """
        requests = [
            [_request(teacher, prompt, sampling, index) for index in range(num_samples)]
            for prompt in prompts
        ]
        state = PartialState()
        with self._whole(), turn(self.path.with_name(self.path.name + ".lock"), self.path):
            missing = self._missing(request for group in requests for request in group)
            state.wait_for_everyone()  # all have read the same store before anyone writes to it
            self._fill(teacher, missing, sampling, batch_size or DEFAULT_BATCH_SIZE, label)
            state.wait_for_everyone()
            return [[self._get(request) for request in group] for group in requests]

    def _broken(self, why: object) -> UserError:
        return UserError(
            f"completion store {self.path}: {why}; move the file away, and its completions are drawn anew, or set "
            "completion_store to another path"
        )

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError:
            raise  # a full disk, a lock
        except sqlite3.DatabaseError as error:
            raise self._broken(error) from error

    def _missing(self, requests: Iterable[Request]) -> list[Request]:
        """Requests not yet stored, longest prompt first: batches of like length waste little padding,
        and running out of memory happens at the start, not after hours."""
        wanted = {request.key: request for request in requests}
        known = {key for (key,) in self._database.execute("SELECT key FROM completions")}
        missing = [request for key, request in wanted.items() if key not in known]
        return sorted(missing, key=lambda request: (-len(request.prompt), request.key))

    def _fill(
        self,
        teacher: Writer,
        missing: list[Request],
        sampling: Sampling,
        batch_size: int,
        label: str,
    ) -> None:
        """This process's share of the missing."""
        state = PartialState()
        share = missing[state.process_index :: state.num_processes]
        prompts = [request.prompt for request in share]
        seeds = [int(request.key[:8], 16) for request in share]
        spare = 0
        if missing and teacher.writes_with_others:
            own = len(batches(prompts, batch_size))
            spare = max(gather_object([own])) - own
        if not share and not spare:
            return
        progress = tqdm(
            total=len(share),
            desc=label,
            unit="completion",
            disable=not state.is_main_process,
        )
        with progress:
            start = time.monotonic()
            for drawn in teacher.draw(prompts, seeds, sampling, batch_size):
                # Processes draw at the same time, each its share of the missing.
                seconds = (time.monotonic() - start) / len(drawn) / state.num_processes
                self._put(teacher, sampling, [(share[n], c) for n, c in drawn], seconds)
                progress.update(len(drawn))
                start = time.monotonic()
            for _ in range(spare):  # for the others' sake; it is not kept
                teacher.complete([missing[0].prompt], sampling)

    def _put(
        self,
        teacher: Writer,
        sampling: Sampling,
        drawn: Iterable[tuple[Request, Completion]],
        seconds: float,
    ) -> None:
        """Keep a batch.

        Args:
            seconds: Of the time of drawing the share of each completion.
        """
        rows = [
            (
                request.key,
                teacher.identity,
                request.prompt,
                json.dumps(sampling.to_dict(), sort_keys=True),
                request.sample_index,
                completion.text,
                json.dumps(completion.token_ids),
                completion.finished,
                completion.end_id,
                time.time(),
                seconds,
            )
            for request, completion in drawn
        ]
        with self._database:  # one transaction: all of the batch or none of it
            self._database.executemany(
                "INSERT OR IGNORE INTO completions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows
            )

    def _get(self, request: Request) -> Completion:
        row = self._database.execute(
            "SELECT text, token_ids, finished, end_id, seconds FROM completions WHERE key = ?",
            (request.key,),
        ).fetchone()
        try:
            text, token_ids, finished, end_id, seconds = row
            completion = Completion(text, json.loads(token_ids), bool(finished), end_id, seconds)
        except (ValueError, TypeError, RecursionError) as error:
            raise self._broken(f"the completion {request.key[:12]} is damaged ({error})") from error
        if not _is_whole(completion):
            raise self._broken(f"the completion {request.key[:12]} is damaged")
        return completion


def _is_whole(completion: Completion) -> bool:
    """Whether it has the types it was stored with."""
    ids = completion.token_ids if isinstance(completion.token_ids, list) else [None]
    ends = [] if completion.end_id is None else [completion.end_id]
    whole = all(type(id) is int and 0 <= id < LARGEST_ID for id in (*ids, *ends))
    timed = isinstance(completion.seconds, float | None)
    return whole and timed and isinstance(completion.text, str)


def _request(teacher: Writer, prompt: str, sampling: Sampling, index: int) -> Request:
    address = json.dumps(
        [teacher.identity, prompt, sampling.to_dict(), index], sort_keys=True, ensure_ascii=False
    )
    return Request(prompt, index, hashlib.sha256(address.encode()).hexdigest())
