"""Starts the runs of a study, side by side if asked, and sees each of them end."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from tqdm import tqdm

from medistill_trl.errors import Interrupted, UserError
from medistill_trl.launch import die_with_parent, read_config
from medistill_trl.locks import try_lock
from medistill_trl.run_directory import RECORD, RunDirectory
from medistill_trl.study import progress, timing
from medistill_trl.study.commands import as_typed, commands, executable
from medistill_trl.study.definition import Study
from medistill_trl.study.grid import Run
from medistill_trl.study.record import StudyRecord, log_of

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.2
REFRESH_SECONDS = 2.0
GRACE_SECONDS = (
    60.0  # between asking a run to stop, which takes it a step and a checkpoint, and killing it
)
SHOWN_LINES = 12  # of the log of a run that failed


@dataclass(frozen=True)
class Slot:
    """Where one run at a time may work.

    Args:
        cores: Of the CPU.
        gpus: For CUDA_VISIBLE_DEVICES; None leaves it as it is.
    """

    cores: tuple[int, ...]
    gpus: str | None = None


def make_slots(jobs: int, config_file: str | None) -> list[Slot]:
    """Share out the machine: GPUs evenly where runs use them, cores evenly in any case.

    Raises:
        UserError: there are fewer GPUs than jobs.
    """
    cores = sorted(os.sched_getaffinity(0))
    shares = [tuple(cores[n::jobs]) or (cores[n % len(cores)],) for n in range(jobs)]
    config = read_config(Path(config_file)) if config_file else {}
    gpus = [] if config.get("use_cpu") else _gpus()
    if jobs == 1 or not gpus:
        return [Slot(share) for share in shares]
    if jobs > len(gpus):
        raise UserError(
            f"--jobs {jobs}: there are {len(gpus)} GPUs, and a run needs one of its own"
        )
    return [Slot(share, ",".join(gpus[n::jobs])) for n, share in enumerate(shares)]


def _gpus() -> list[str]:
    """Names of the GPUs that are visible, as CUDA_VISIBLE_DEVICES has them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False
    ).stdout
    return [str(n) for n in range(len(listed.splitlines()))]


def _how_ended(code: int) -> str:
    """The exit status of a command that failed, in words."""
    if code == -signal.SIGUSR1:
        return "refused"  # `launch.leave` has given the reason and stopped the launcher
    return f"exit status {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"


# --- one run


@dataclass
class Job:
    """A run at work: its commands one after the other, in one slot.

    Args:
        expected: What it will take, as far as known.
    """

    run: Run
    waiting: list[list[str]]
    slot: Slot
    expected: timing.Expected
    started: float = field(default_factory=time.monotonic)
    process: subprocess.Popen | None = None
    command: list[str] = field(default_factory=list)

    def start_next(self) -> None:
        self.command = self.waiting.pop(0)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.slot.gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.slot.gpus
        log = log_of(self.run)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as output:
            print(
                f"\n{progress.COMMAND}{time.strftime('%F %T')} {as_typed(self.command)}",
                file=output,
                flush=True,
            )
            self.process = subprocess.Popen(
                executable(self.command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is the study's to hand on
                preexec_fn=die_with_parent,  # and nothing trains on once the study is gone
            )
        os.sched_setaffinity(self.process.pid, self.slot.cores)

    def signal(self, number: int) -> None:
        """To the launcher and all it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def is_alive(self) -> bool:
        """Is the launcher, or a run that has outlived it, still at work?"""
        if self.process.poll() is None:
            return True
        # Not by signal 0: what has ended may wait for a reaper that is not ours.
        return any(
            _group(process) == self.process.pid and process.info["status"] != psutil.STATUS_ZOMBIE
            for process in psutil.process_iter(["status"])
        )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def _group(process: psutil.Process) -> int | None:
    with suppress(ProcessLookupError, PermissionError):
        return os.getpgid(process.pid)
    return None


# --- all of them


@contextmanager
def only_study(out: Path) -> Iterator[None]:
    """Keep a second study out of a folder for as long as this one works in it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        if not try_lock(lock):
            raise UserError(f"{out}: a study is at work here; wait for it, or give --out")
        yield


class Executor:
    """Works through the runs of a study.

    Args:
        config_file: Of accelerate launch; None for none.
        known: What earlier runs took; those that finish here are added.
    """

    def __init__(
        self,
        study: Study,
        runs: list[Run],
        record: StudyRecord,
        slots: list[Slot],
        config_file: str | None,
        known: timing.Known,
    ):
        self.study, self.runs, self.record = study, runs, record
        self.free, self.num_slots = list(slots), len(slots)
        self.config_file, self.known = config_file, known
        self.waiting: list[Run] = []
        self.finished: list[Run] = []
        self.working: list[Job] = []
        self.stop_signal: int | None = None
        tqdm.monitor_interval = 0  # no second thread in a process that forks
        self.bar = tqdm(total=len(runs), unit="run", disable=None)

    def work(self) -> None:
        """Until every run has ended, or a signal comes.

        Raises:
            Interrupted: the study was stopped; its runs are, too.
        """
        for run in self.runs:
            if self._commands(run):
                self.waiting.append(run)
                self.record[run]["state"] = "waiting"
            else:
                self._finish(run, "finished already")
        self.record.write()
        with self._handled_signals(), self.bar:
            try:
                self._loop()
            finally:
                self._stop_all()
        if self.stop_signal is not None:
            name = signal.Signals(self.stop_signal).name
            raise Interrupted(
                f"stopped by {name}; the same command goes on from here", self.stop_signal
            )

    def _commands(self, run: Run) -> list[list[str]]:
        return commands(run, self.study, self.record, self.config_file)

    def _loop(self) -> None:
        refreshed = 0.0
        while (self.waiting or self.working) and self.stop_signal is None:
            while self.waiting and self.free:
                self._start(self.waiting.pop(0))
            for job in list(self.working):
                if job.process.poll() is not None:
                    self._ended(job, job.process.returncode)
            if time.monotonic() - refreshed > REFRESH_SECONDS:
                self._show_progress()
                refreshed = time.monotonic()
            time.sleep(POLL_SECONDS)

    def _start(self, run: Run) -> None:
        (expected,) = self._expected([run])
        job = Job(run, self._commands(run), self.free.pop(0), expected)
        how = "resumed" if "--resume" in job.waiting[0] else "started"
        job.start_next()
        self.working.append(job)
        self.record.update(run, state="running", exit_code=None, problem=None)
        self._say(f"{run.name}: {how}, log {log_of(run)}")

    def _ended(self, job: Job, code: int) -> None:
        if code == 0 and "eval.run" in job.command:
            self.record[job.run]["evaluated"] = job.command
        if code == 0 and job.waiting:
            job.start_next()
            return
        self._release(job)
        if code == 0:
            self._finish(job.run, f"finished in {timing.duration(job.seconds)}")
        else:
            problem = f"{_how_ended(code)}: {as_typed(job.command)}"
            self.record.update(job.run, state="failed", exit_code=code, problem=problem)
            lines = progress.failure(log_of(job.run), SHOWN_LINES)
            shown = "\n".join(f"    {line}" for line in lines)
            self._say(f"{job.run.name}: FAILED, {problem}; its log ends\n{shown}")
            self.bar.update()

    def _release(self, job: Job) -> None:
        self.working.remove(job)
        self.free.append(job.slot)
        entry = self.record[job.run]
        entry["wall_seconds"] = round(entry["wall_seconds"] + job.seconds, 1)

    def _finish(self, run: Run, how: str) -> None:
        result = progress.results(run)
        problem = progress.shortfall(self.study.budget, result)
        state = "short" if problem else "finished"
        self.record.update(run, **result, state=state, exit_code=0, problem=problem)
        self.finished.append(run)
        self.known.learn(
            RunDirectory(run.directory).read_result(RECORD), self.record[run]["wall_seconds"]
        )
        self._say(f"{run.name}: {problem or how}")
        self.bar.update()

    def _stop_all(self) -> None:
        """Leave no run behind: whatever made the study end, its runs end with it."""
        for job in self.working:
            job.signal(signal.SIGTERM)
        patience = time.monotonic() + GRACE_SECONDS
        for job in list(self.working):
            while job.is_alive() and time.monotonic() < patience:
                time.sleep(POLL_SECONDS)
            job.signal(signal.SIGKILL)
            job.process.wait()
            self._release(job)
            self.record.update(job.run, state="stopped")

    @contextmanager
    def _handled_signals(self) -> Iterator[None]:
        def note(number, frame):
            self.stop_signal = number

        # One that is ignored stays so: under nohup the terminal may close.
        heeded = [n for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, note) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- what the user sees

    def _say(self, text: str) -> None:
        self.bar.write(f"{time.strftime('%T')} {text}", file=sys.stdout)
        sys.stdout.flush()

    def _expected(self, runs: Sequence[Run]) -> list[timing.Expected]:
        """What runs will take that start after those at work."""
        before = [*self.finished, *(job.run for job in self.working)]
        return timing.expected(runs, before, self.study.budget, self.known)

    def _show_progress(self) -> None:
        working = [(job.expected, job.seconds) for job in self.working]
        left = timing.time_left(self._expected(self.waiting), working, self.num_slots)
        steps = [
            f"{j.run.name} {progress.current_step(log_of(j.run)) or '…'}" for j in self.working
        ]
        self.bar.set_postfix_str(f"left: {left}; {', '.join(steps)}")
