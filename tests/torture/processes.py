"""Real processes of the real commands, forked from one that has imported everything: torch and its friends take ten times
as long to import as a tiny run takes to train."""

import importlib
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from medistill_trl.launch import die_with_parent

ROOT = Path(__file__).resolve().parent.parent.parent


def preload() -> dict[str, Callable[[list[str]], int | None]]:
    """Import all that the commands need; returns them by name."""
    from data_prep import build
    from eval import run as evaluation
    from eval.plots import draw, training_curves  # noqa: F401
    from medistill_trl import methods, pipeline, recipe  # noqa: F401

    for name in recipe.methods():
        methods.load(name)
    for part in evaluation.PARTS.values():
        importlib.import_module(part)
    spec = importlib.util.spec_from_file_location("run", ROOT / "recipes/run.py")
    entry = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(entry)
    return {"train": entry.main, "evaluate": evaluation.main, "build": build.main}


@dataclass
class Command:
    """One command, to be started any number of times.

    Args:
        main: Of its module.
        arguments: Of its command line.
        log: Where its output goes.
        environment: Added to ours.
    """

    main: Callable[[list[str]], int | None]
    arguments: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, *more: str) -> int:
        """Its process, the leader of a group of its own."""
        child = os.fork()
        if child == 0:
            self._work([*self.arguments, *more])
        return child

    def _work(self, arguments: list[str]) -> None:
        code = 1
        try:
            die_with_parent()
            os.setsid()
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(self.environment)
            os.chdir(ROOT)
            code = self.main(arguments) or 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def tail(self) -> str:
        return self.log.read_text()[-3000:]

    def finish(self, *more: str) -> int:
        """Start it and wait; its exit status, negative for a signal."""
        return wait(self.start(*more))


def wait(child: int, seconds: float = 600) -> int:
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            raise TimeoutError(f"process {child} hung for {seconds} s")
        time.sleep(0.005)


@dataclass
class Kills:
    """Ends commands at random times, and tells when.

    Args:
        seed: Of the times and the signals.
        wanted: In all.
        done: The signals so far, and after how many seconds of the process they came.
    """

    seed: int
    wanted: int
    done: list[tuple[str, float]] = field(default_factory=list)

    def __post_init__(self):
        self.draw = random.Random(self.seed)

    def until_finished(
        self, command: Command, seconds: float, resume: Callable[[], list[str]]
    ) -> None:
        """Kill a command, resume it, and kill it again, until it ends by itself or there were kills enough; then let it
        end.

        Args:
            seconds: That it takes undisturbed: kills come at random between none and these.
            resume: What to add to the command, given what is on disk.
        """
        while len(self.done) < self.wanted:
            after = self.draw.uniform(0, seconds)
            number = signal.SIGTERM if self.draw.random() < 0.2 else signal.SIGKILL
            child = command.start(*resume())
            time.sleep(after)
            os.kill(child, number)
            status = wait(child)
            if status == 0:
                return
            expected = {-number, 128 + number}  # by the kernel, or after a checkpoint
            assert status in expected, f"{status} after {number.name}: {command.tail()}"
            self.done.append((number.name, round(after, 3)))
        assert command.finish(*resume()) == 0, command.tail()

    def __str__(self) -> str:
        told = ", ".join(f"{kind} at {after} s" for kind, after in self.done)
        return f"seed {self.seed}, {len(self.done)} kills: {told}"
