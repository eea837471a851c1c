"""Which process is which: a process number alone may since have been given to another one."""

import os
from pathlib import Path


def boot() -> str:
    """Names the time since this machine was last started; empty where that is not known (no Linux)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def born(pid: int) -> str | None:
    """When a process started, in clock ticks since boot: with its number that names it. None if there is none."""
    try:
        if boot():
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        os.kill(pid, 0)
        return "unknown"
    except (OSError, IndexError):
        return None
