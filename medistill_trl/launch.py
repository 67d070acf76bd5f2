"""What stands between `accelerate launch` and the run: processes, signals, exit.

`accelerate launch` has habits a user should not have to know: some configs silently start one process
instead of two, a killed launcher leaves its child running, and any exit status but 0 becomes a Python
traceback below the actual message.
"""

import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from medistill_trl.errors import Interrupted, RunFailed, StartAgain, UserError, first_line

PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# The kernel's word that the launcher is gone. A signal of its own: one that stops launcher and run alike
# reaches the run first by itself and then by the launcher's death, and a second SIGTERM would mean haste.
LAUNCHER_DIED = signal.SIGUSR2
_PARENT = os.getppid()
# Loaded here: a child between fork and exec had better not.
_LIBC = ctypes.CDLL(None, use_errno=True)


def launcher() -> tuple[psutil.Process, list[str]] | None:
    """The parent process and the arguments of `accelerate launch`, if that is what started this one."""
    parent = psutil.Process().parent()
    try:
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    for index, word in enumerate(words[:4]):
        name = Path(word).name
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return parent, words[index + 1 :]
        if name == "accelerate" and words[index + 1 : index + 2] == ["launch"]:
            return parent, words[index + 2 :]
    return None


def die_with_launcher() -> None:
    """Ask the kernel to end this process when the launcher dies; otherwise it would train on, orphaned.

    Not done under a plain `python recipes/run.py`, which may rightly outlive its shell.
    """
    if launcher() is not None and sys.platform == "linux":
        _set_parent_death_signal(LAUNCHER_DIED)


def heeded_signals() -> list[signal.Signals]:
    """Those that stop a run. One that is ignored stays so: under nohup the terminal may close."""
    return [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def end_on_signals() -> None:
    """Let a signal end this process at once, with a message; before and after training there is nothing to
    save that a kill would lose."""
    process = os.getpid()

    def end(number: int, frame) -> None:
        if os.getpid() != process:  # a data loader's worker has inherited this
            os._exit(128 + number)
        name = signal.Signals(number).name
        leave(Interrupted(f"stopped by {name} outside of training; continue with --resume", number))

    for number in heeded_signals():
        signal.signal(number, end)


def die_with_parent() -> None:
    """For a child between fork and exec: the kernel kills it when the process that starts it dies."""
    if sys.platform == "linux":
        _set_parent_death_signal(signal.SIGKILL)


def leave(error: UserError) -> None:
    """Print a user's error and exit with its code, without a traceback of ours or of the launcher's.

    The launcher is stopped first: left to itself it raises CalledProcessError over the message. With
    several processes the main one speaks, and another one only if it alone has failed.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    interrupted = isinstance(error, Interrupted)
    if int(os.environ.get("RANK", "0")) > 0:
        signal.signal(LAUNCHER_DIED, signal.SIG_DFL)
        if interrupted or _outlives_launcher():
            os._exit(error.exit_code)
        time.sleep(3)
    print(f"\nmedistill_trl: {error}\n", file=sys.stderr, flush=True)
    found = launcher()
    if found is not None:
        if sys.platform == "linux":
            _set_parent_death_signal(0)
        # torch's agent, which stands between several processes, turns SIGTERM into a traceback.
        found[0].send_signal(error.number if interrupted and not several else signal.SIGUSR1)
    if several or interrupted:
        sys.stdout.flush()
        os._exit(error.exit_code)  # a live process group would abort a normal exit
    sys.exit(error.exit_code)


def start_again(error: StartAgain, resumed: bool) -> None:
    """Replace this process by a new one that resumes the run: nothing else gives back all its memory.

    Several processes are started again by torch's agent, if it may: `accelerate launch --max_restarts N`.

    Args:
        resumed: --resume was given already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        allowed, done = (
            int(os.environ.get(f"TORCHELASTIC_{name}", "0"))
            for name in ("MAX_RESTARTS", "RESTART_COUNT")
        )
        if done >= allowed:
            leave(
                RunFailed(
                    f"{error}. Continue with --resume, or let accelerate do so: --max_restarts 3"
                )
            )
        print(f"\nmedistill_trl: {error}\n", file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    print(f"\nmedistill_trl: {error}; starting again\n", file=sys.stderr, flush=True)
    sys.stdout.flush()
    for child in psutil.Process().children(recursive=True):  # data loaders
        child.kill()
    words = [sys.executable, *sys.orig_argv[1:], *([] if resumed else ["--resume"])]
    os.execv(words[0], words)


def restarted() -> bool:
    """Has torch's agent started this process again after another one had failed?"""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _outlives_launcher() -> bool:
    return os.getppid() != _PARENT


def _set_parent_death_signal(number: int) -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, number)


@dataclass(frozen=True)
class Request:
    """What the launcher was asked for; None and False for what was not said."""

    num_processes: int | None = None
    engine: str | None = None
    use_cpu: bool = False


def requested() -> Request:
    """Flags and config file of the `accelerate launch` that started this process."""
    found = launcher()
    return read_request(found[1]) if found else Request()


def read_request(arguments: list[str]) -> Request:
    """What these words ask of `accelerate launch`; its flags win over its config file.

    Args:
        arguments: Of `accelerate launch`, up to and beyond the script's name.
    """
    # Imported here: it loads torch, and die_with_launcher runs before the recipe is checked.
    from accelerate.commands.config import default_config_file

    options: dict[str, str] = {}
    for index, word in enumerate(arguments):
        if word.endswith(".py"):
            break
        if word.startswith("--"):
            key, separator, value = word[2:].replace("-", "_").partition("=")
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            options[key] = value if separator else following
    path = Path(options.get("config_file", default_config_file))
    config = read_config(path) if path.is_file() else {}
    count = options.get("num_processes", config.get("num_processes"))
    engine = str(config.get("distributed_type", ""))
    for option, name in (("use_deepspeed", "DEEPSPEED"), ("use_fsdp", "FSDP")):
        engine = name if option in options else engine
    return Request(
        num_processes=int(count) if count else None,
        engine=engine if engine in ("DEEPSPEED", "FSDP") else None,
        use_cpu="cpu" in options or bool(config.get("use_cpu")),
    )


def read_config(path: Path) -> dict:
    """A config file of accelerate.

    Raises:
        UserError: it is no YAML mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config_file {path}: cannot be read ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(
            f"--config_file {path}: must hold `key: value` lines, as those of accelerate_configs do"
        )
    return content


def check_processes(asked: Request, num_processes: int, engine: str) -> None:
    """Refuse a run on other processes than were asked for.

    Args:
        asked: Of the launcher.
        num_processes: That take part in this run.
        engine: accelerate's distributed type of this run.

    Raises:
        UserError: naming what was asked for, what there is, and the config that works.
    """
    if asked.num_processes is not None and asked.num_processes != num_processes:
        raise UserError(
            f"accelerate launch was asked for {asked.num_processes} processes and started "
            f"{num_processes}; on CPU use --config_file accelerate_configs/cpu_ddp.yaml, on GPUs "
            "accelerate_configs/multi_gpu.yaml (distributed_type MULTI_CPU and NO start one process, "
            "whatever num_processes says)"
        )
    if asked.engine is not None and asked.engine != engine:
        raise UserError(
            f"accelerate launch was asked for {asked.engine} and runs {engine}; is it installed, and does "
            "ACCELERATE_USE_CPU or use_cpu switch it off?"
        )
