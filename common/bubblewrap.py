"""What common/sandbox.py finds out once: bubblewrap, an interpreter's directories, and this process's place for sandboxes."""

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from common import seccomp
from common.errors import InputError

PREFIX = "swe-dagger-sandboxes-"


@functools.cache
def interpreter(python: str) -> tuple[list[str], str]:
    """(directories to mount so that this interpreter works, directory to put on PATH). Raises InputError."""
    script = ("import os, sys; print(getattr(sys, 'base_prefix', sys.prefix)); print(sys.prefix); "
              "print(os.path.realpath(sys.executable))")
    if not os.path.isabs(python):
        raise InputError(f"local.python must be an absolute path: {python}")
    try:
        done = subprocess.run([python, "-s", "-E", "-c", script], capture_output=True, text=True, timeout=60,
                              check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(f"the interpreter {python} (local.python) does not work: {error}") from None
    base, prefix, executable = done.stdout.splitlines()
    prefixes = [base, prefix, os.path.realpath(base), os.path.realpath(prefix)]
    link = python  # each step of python -> python3 -> /somewhere/bin/python3.11 must exist inside, and no more than that
    while True:
        prefixes.append(os.path.dirname(link))
        if not os.path.islink(link):
            break
        link = os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link)))
    prefixes.append(os.path.dirname(os.path.dirname(executable)))
    seen = ("/usr", "/bin", "/lib", "/lib64", "/sbin")
    kept = []
    for path in dict.fromkeys(prefixes):
        if path != "/" and (os.path.expanduser("~") + "/").startswith(path + "/") or path == "/etc":
            raise InputError(f"the interpreter {python} lives directly in {path}: use a virtual environment")
        if path != "/" and not any(path == s or path.startswith(s + "/") for s in seen):
            kept.append(path)
    return sorted(kept), os.path.dirname(python)


@functools.cache
def bubblewrap() -> str:
    """Where bubblewrap is. Raises InputError if it is missing or does not work here."""
    how = ("the local sandbox needs bubblewrap: `apt-get install bubblewrap` (or dnf, pacman) and user namespaces; "
           "or use tasks with a Docker image. Where Ubuntu's AppArmor keeps user namespaces from you (23.10 and later), "
           "`sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0` allows them, or a profile for bwrap does")
    path = shutil.which("bwrap")
    if path is None:
        raise InputError(how)
    argv = [path, "--unshare-pid", "--unshare-net", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc",
            "--dev", "/dev", "prlimit", "--core=0", "true"]
    if os.geteuid():
        argv[1:1] = ["--unshare-user"]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{how}. bwrap says: {' '.join(done.stderr.split())[-300:]}")
    return path


_home: tuple[int, Path, object] | None = None
_home_lock = threading.Lock()


def home() -> Path:
    """This process's directory for sandboxes, locked for as long as the process lives; removes those of dead ones."""
    global _home
    with _home_lock:
        if _home is None or _home[0] != os.getpid():
            prune()
            starting = Path(tempfile.mkdtemp(prefix=f"starting-{PREFIX}{os.getpid()}-"))
            lock = open(starting / "lock", "w")
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (code := seccomp.program()) is not None:
                (starting / "seccomp").write_bytes(code)
            folder = starting.rename(starting.with_name(starting.name.removeprefix("starting-")))
            _home = (os.getpid(), folder, lock)
            atexit.register(_leave, os.getpid(), folder)
        return _home[1]


def _leave(pid: int, folder: Path) -> None:
    if pid == os.getpid():
        remove(folder)


def prune() -> list[Path]:
    """Remove the sandbox directories whose process is dead: those whose lock can be had. Returns them."""
    gone = []
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            with open(folder / "lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(folder)
                gone.append(folder)
        except FileNotFoundError:  # half removed
            remove(folder)
        except OSError:  # alive, or another user's
            continue
    return gone


def remove(folder: Path) -> None:
    """Remove a directory, whatever modes and depths a command has left in it."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        subprocess.run(["chmod", "-R", "u+rwx", "--", str(folder)], capture_output=True)
        subprocess.run(["rm", "-rf", "--", str(folder)], capture_output=True)
