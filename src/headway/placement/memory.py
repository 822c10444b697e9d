"""What this process may take of the host's memory and cores, and how the C library is to treat what it frees."""

import ctypes
import os
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take, within its control group. Files that are only cached count as free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        lines = (line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cached = sum(int(value) for name, value in lines if name == "inactive_file")
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, int(limit) - used + cached)


def num_cores() -> int:
    """Cores that this process may use: those it may run on, and no more than its control group is given time for."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def keep_freed_memory() -> None:
    """Tell the C library to keep what is freed, for this whole process: a fresh mapping for every large tensor costs a
    page fault per 4 KiB."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's; others manage as they do
        libc.mallopt(ctypes.c_int(_M_MMAP_THRESHOLD), ctypes.c_int(1 << 30))
        libc.mallopt(ctypes.c_int(_M_TRIM_THRESHOLD), ctypes.c_int((1 << 31) - 1))
