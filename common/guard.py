"""The process behind a server: starts it, and ends its whole process group when nobody is left who needs it.

    python -m common.guard DIR        common/serve.py starts this, and it reads DIR/state.json

A server is several processes, and the others live on, GPU memory and all, when the first one is killed. So the guard
ends all of them: when the first one has ended, however that came; when it is told to (SIGTERM); and when nobody uses
the server any more. Who uses it says the kernel, by locks that end with their process:

    DIR/alive   locked by the guard for as long as it lives, that is for as long as there is a server
    DIR/users   locked, shared, by every script that uses the server; if nobody holds it, the server ends, unless
    DIR/keeper  is there: empty, the server stays until it is stopped; else, as long as the process that it names
    DIR/stop    ends it, whoever uses it

state.json goes first and `alive` last: a server that is just ending is no longer found, and not yet started again.
After kill -9 of the guard itself, `sweep` (the next start, status or stop) ends what DIR/group names.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from common.owners import boot, born

PATIENCE = 10.0  # seconds between the polite end of a process group and the other one


def main(folder: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    state = json.loads((folder / "state.json").read_text())
    leader = None
    try:
        with open(folder / "log", "ab") as log:
            leader = subprocess.Popen(state["command"], cwd=state["cwd"], stdin=subprocess.DEVNULL, stdout=log,
                                      stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        (folder / "group.new").write_text(name(leader.pid))
        (folder / "group.new").rename(folder / "group")
        with open(folder / "users", "a") as users:  # to write: NFS gives no other file an exclusive lock
            while leader.poll() is None and not (folder / "stop").exists() and (keeps(folder) or not free(users)):
                time.sleep(0.1)
            end(folder, leader)  # with the lock held, if nobody uses it: who wants it now waits, and starts another one
            leader = None
    finally:
        if leader:
            end(folder, leader)


def name(pid: int) -> str:
    """A process by number, start and boot."""
    return f"{pid} {born(pid)} {boot()}"


def keeps(folder: Path) -> bool:
    """Whether the server stays without a user."""
    try:
        keeper = (folder / "keeper").read_text()
    except FileNotFoundError:
        return False
    return not keeper or "None" not in keeper and name(int(keeper.split()[0])) == keeper


def free(lock, kind: int = fcntl.LOCK_EX) -> bool:
    """Take a lock if it can be had at once."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def alive(folder: Path) -> bool:
    """Whether there is a server, up or coming up."""
    try:
        with open(folder / "alive") as lock:
            return not free(lock, fcntl.LOCK_SH)  # shared: two who look at the same time do not see each other
    except FileNotFoundError:
        return False


def end(folder: Path, leader: subprocess.Popen | None = None) -> None:
    """End the process group of a server and remove what belonged to it; its log stays."""
    try:
        pid, since, at = (folder / "group").read_text().split() if leader is None else (leader.pid, None, boot())
    except (OSError, ValueError):  # somebody else has just ended it; a full disk when it was written
        pid, since, at = 0, None, None
    for file in ("state.json", "key", "keeper", "stop"):
        (folder / file).unlink(missing_ok=True)
    # The number may belong to somebody else by now; while the group has members, no new process gets it.
    if leader or at is not None and at == boot() and born(int(pid)) in (None, since):
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(int(pid), number)
            until = time.monotonic() + PATIENCE
            while (leader and leader.poll() is None or _members(int(pid))) and time.monotonic() < until:
                time.sleep(0.05)
    (folder / "group").unlink(missing_ok=True)
    shutil.rmtree(folder / "adapters", ignore_errors=True)


def _members(group: int) -> bool:
    """Whether a process group has members, those apart that have ended and are only not yet collected."""
    if not boot():  # no Linux
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, 0)
            return True
        return False
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


def sweep(folder: Path) -> None:
    """End what a guard has left that was killed with -9."""
    if (folder / "group").exists():
        with open(folder / "alive", "a") as lock:
            if free(lock):  # and no server starts before it is unlocked
                end(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
