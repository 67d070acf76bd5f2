"""What a part of an evaluation takes: seconds and peak memory."""

import os
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # of the resident set, see proc(5)


@dataclass
class Cost:
    """Measures a `with` block, of this process.

    Args:
        seconds: Wall clock.
        peak_host_memory_gb: Largest resident set within the block, in GB (10⁹ bytes). Where the kernel
            does not let the peak be reset, the largest since the process began.
        peak_device_memory_gb: The same of the accelerator; None without one.
    """

    seconds: float = field(default=0.0, init=False)
    peak_host_memory_gb: float = field(default=0.0, init=False)
    peak_device_memory_gb: float | None = field(default=None, init=False)

    def __enter__(self) -> "Cost":
        _reset_peak()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error) -> None:
        self.seconds = round(time.perf_counter() - self._start, 2)
        self.peak_host_memory_gb = round(_peak_host_bytes() / 1e9, 3)
        if torch.cuda.is_available():
            self.peak_device_memory_gb = round(torch.cuda.max_memory_reserved() / 1e9, 3)


def _reset_peak() -> None:
    if os.access(CLEAR, os.W_OK):
        CLEAR.write_text(RESET_PEAK)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_host_bytes() -> int:
    for line in STATUS.read_text().splitlines() if STATUS.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
