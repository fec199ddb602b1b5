"""How much memory this process holds, has held, and may take."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path


def peak_mib(now: bool = False) -> float:
    """The largest memory of the process so far, or what it holds `now`, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        wanted = "VmRSS:" if now else "VmHWM:"
        for line in status.read_text().splitlines():
            if line.startswith(wanted):
                return int(line.split()[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def forget_peak() -> None:
    """Starts the count of the peak anew where the system can; elsewhere it holds."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def give_back() -> None:
    """Returns freed memory to the system, which else would hide in the next peak; does nothing where it cannot."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def limit_memory(mib: float) -> None:
    """Makes this process fail to get more than `mib` beyond what it has; does nothing where the system cannot."""
    status = Path("/proc/self/status")
    if not status.exists():
        return
    import resource

    held = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmData:"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(held * 1024 + mib * 2**20), hard))


def free_mib() -> float:
    """What a new process may take before the system or a limit on this group of processes stops it."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    info = Path("/proc/meminfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) / 1024 if "MemAvailable" in lines else free
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        free = min(free, limit / 2**20)
    return free
