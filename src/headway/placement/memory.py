"""What this process may take of the host's memory and cores, and how the C library is to treat what it frees.

Linux bounds both by control groups: the process's own and all around it, of which the narrowest counts. In version 2
they are folders of one tree, in version 1 there is a tree for each kind of limit.
"""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_LARGEST_MMAP_THRESHOLD = 1 << 25  # that glibc takes before 2.35
_LARGE = 1 << 18  # a tensor from which on a mapping of its own is worth its system call
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take, within its control group. Files that are only cached count as free."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes next
        return torch.cuda.mem_get_info(device)[0] + kept
    least: int = psutil.virtual_memory().available
    for group in _groups("memory"):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                most = int((group / limit).read_text())  # "max", which is no number, is no limit
                taken = int((group / used).read_text())
                lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
                least = min(least, most - taken + sum(int(value) for name, value in lines if name == cached))
            except (OSError, ValueError):
                continue
    return least


def num_cores() -> int:
    """Cores that this process may use: those it may run on, and no more than its control group is given time for."""
    least = len(os.sched_getaffinity(0))
    for group in _groups("cpu"):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            try:
                quota, period = map(int, " ".join((group / name).read_text() for name in files).split())
            except (OSError, ValueError):
                continue
            if quota > 0 and period > 0:
                least = min(least, quota // period)
    return max(1, least)


def _groups(kind: str) -> Iterator[Path]:
    """Folders of this process's control groups that may limit it so, from its own up to the root. Within a container
    paths may be the host's: then only what is around them is found, which is the container's own."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and kind not in kinds.split(","):
            continue
        root = _GROUPS / kind if kinds else _GROUPS
        own = root / path.strip("/")
        yield from (own, *(group for group in own.parents if group == root or root in group.parents))


def return_freed_memory() -> None:
    """Tell the C library to return to the system what is freed of large tensors, for this whole process: what a model
    is loaded into, and packed from, nobody needs again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's; others manage as they do
        libc.mallopt(ctypes.c_int(_M_MMAP_THRESHOLD), ctypes.c_int(_LARGE))


def keep_freed_memory() -> None:
    """Tell the C library to keep what is freed, for this whole process: a fresh mapping for every large tensor costs a
    page fault per 4 KiB."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for threshold in (1 << 30, _LARGEST_MMAP_THRESHOLD):
            if libc.mallopt(ctypes.c_int(_M_MMAP_THRESHOLD), ctypes.c_int(threshold)):
                break
        libc.mallopt(ctypes.c_int(_M_TRIM_THRESHOLD), ctypes.c_int((1 << 31) - 1))


def give_back_freed_memory() -> None:
    """All of what is free at this moment, once: it is much, and nothing will need so much again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))
