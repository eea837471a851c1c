"""What holds a sandbox's commands to their limits: bounded output, and a thread that watches processes and disk."""

import codecs
import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import threading
import time
from pathlib import Path

MEGABYTE = 1 << 20
TICK = 0.05  # seconds between two looks at a command's processes


class Output:
    """Decodes what a command prints; keeps its head and tail in bounded memory."""

    def __init__(self, limit: int):
        self.limit, self.head, self.tail, self.cut, self.bytes = limit, "", "", 0, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, data: bytes, final: bool = False) -> int:
        """Returns the number of bytes so far."""
        self.bytes += len(data)
        text = self.decoder.decode(data, final)
        room = self.limit - len(self.head)
        if room > 0:
            self.head, text = self.head + text[:room], text[room:]
        self.tail += text
        if len(self.tail) > self.limit:
            self.cut += len(self.tail) - self.limit
            self.tail = self.tail[-self.limit:]
        return self.bytes

    def text(self) -> str:
        self.add(b"", True)
        if not self.cut and not self.tail:
            return self.head
        half = self.limit // 2
        self.cut += len(self.head) + len(self.tail) - 2 * half
        tail = (self.head + self.tail)[-half:] if half else ""
        return f"{self.head[:half]}\n[... {self.cut} characters cut ...]\n{tail}"


class Job:
    """One running command."""

    def __init__(self, process, output: int, status: int, memory: int, processes: int, meter: "DiskMeter"):
        self.process, self.output, self.status = process, output, status
        self.memory, self.processes, self.meter = memory, processes, meter
        self.init: int | None = None  # pidfd of the first process inside, once bwrap has told
        self.killed: str | None = None
        self.exit_code: int | None = None
        self.lock = threading.Lock()

    def kill(self, reason: str) -> None:
        """Kill all processes of the sandbox, by killing the init of their namespace."""
        with self.lock:
            if self.killed is None:
                self.killed = reason
            with contextlib.suppress(ProcessLookupError):
                if self.init is not None:
                    signal.pidfd_send_signal(self.init, signal.SIGKILL)
                else:
                    self.process.kill()  # --die-with-parent does the rest

    def told(self, status: bytes) -> None:
        """Take in what bwrap has said so far (--json-status-fd)."""
        for line in status.decode(errors="replace").split("\n")[:-1]:
            record = json.loads(line)
            if "child-pid" in record and self.init is None:
                with contextlib.suppress(ProcessLookupError):
                    self.init = os.pidfd_open(record["child-pid"])
            self.exit_code = record.get("exit-code", self.exit_code)

    def close(self) -> None:
        """Let go of the pidfd; the watching thread may be about to use it."""
        with self.lock:
            if self.init is not None:
                os.close(self.init)
                self.init = None

    def gone(self, seconds: float) -> bool:
        """Wait until the last process inside is dead: bwrap itself ends a moment before that."""
        if self.init is None:
            return True
        poll = select.poll()
        poll.register(self.init, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def check(self) -> None:
        """Kill the command if it is over a limit."""
        pids = _descendants(self.process.pid)
        resident = tasks = 0
        for pid in pids:
            with contextlib.suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{pid}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
                tasks += int(fields[17])
                resident += int(fields[21]) * resource.getpagesize()
        if resident > self.memory and sum(map(_proportional, pids)) > self.memory:
            self.kill(f"more than {self.memory // MEGABYTE} MB of memory")
        elif tasks >= self.processes:
            self.kill(f"more than {self.processes} processes and threads")
        elif self.meter.over():
            self.kill(self.meter.reason)


class DiskMeter:
    """Whether a sandbox has written more than it may. Adds up only after the disk's free space has shrunk."""

    def __init__(self, folders: list[Path], limit: int):
        self.folders, self.limit = folders, limit
        self.reason = "too much written to /testbed and /tmp"
        self.free = self._free()
        self.used = 0

    def _free(self) -> tuple[int, int]:
        status = os.statvfs(self.folders[0])
        return status.f_bfree * status.f_frsize, status.f_ffree

    def over(self) -> bool:
        free = self._free()
        self.free = tuple(map(max, self.free, free))  # what others give back is no room of ours
        if self.free[0] - free[0] < self.limit // 16 and self.free[1] - free[1] < 10_000:
            return False
        self.free, before = free, self.used
        self.used = _usage(self.folders)
        return self.used > self.limit and self.used > before  # what makes room again may run


class Watcher:
    """The thread that looks at all running commands. It exists while there are any."""

    def __init__(self):
        self.jobs: set[Job] = set()
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None

    def add(self, job: Job) -> None:
        with self.lock:
            self.jobs.add(job)
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._loop, daemon=True, name="sandbox watcher")
                self.thread.start()

    def remove(self, job: Job) -> None:
        with self.lock:
            self.jobs.discard(job)

    def _loop(self) -> None:
        idle = 0
        while True:
            time.sleep(TICK)
            with self.lock:
                jobs = list(self.jobs)
                idle = 0 if jobs else idle + 1
                if idle > 100:
                    self.thread = None
                    return
            for job in jobs:
                try:
                    job.check()
                except OSError:  # it has just ended
                    pass


watcher = Watcher()


def _children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                found += map(int, file.read().split())
    return found


def _descendants(pid: int) -> list[int]:
    found, queue = [], [pid]
    while queue:
        children = _children(queue.pop())
        found += children
        queue += children
    return found


def _proportional(pid: int) -> int:
    """Bytes of anonymous and shared memory of a process, what it shares counted in proportion."""
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/smaps_rollup") as file:
            sizes = dict(line.split(":", 1) for line in file if line.startswith("Pss"))
        return sum(int(sizes[key].split()[0]) for key in ("Pss_Anon", "Pss_Shmem")) * 1024
    return 0


def _usage(folders: list[Path]) -> int:
    """Bytes that these take on the disk, and half a kilobyte for each file. By du, which minds no depth."""
    total = 0
    for options, unit in ((["-B1"], 1), (["--inodes"], 512)):
        done = subprocess.run(["du", "-s", *options, "--", *map(str, folders)], capture_output=True, text=True)
        total += unit * sum(int(line.split()[0]) for line in done.stdout.splitlines())
    return total
