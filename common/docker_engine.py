"""The Docker engine, and whose containers are whose.

Every container of ours carries labels that name the run, the trajectory and the owner: machine, boot, PID namespace,
process and when that started. Containers go when their sandbox stops, when this process ends (remove_all), and, after kill
-9, when the next process asks for the engine, or `python -m common.sandbox prune` is called; those of living owners stay.
"""

import atexit
import functools
import os
import re
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from common.errors import StageError
from common.images import Images
from common.owners import boot, born, pid_namespace

LABEL = "swe-dagger"
live: dict = {}  # id -> container
STARTS = threading.BoundedSemaphore(8)  # containers that are being made at the same time
_engine_lock = threading.Lock()


def engine():
    """The client of the Docker engine (DOCKER_HOST or the usual socket). Raises StageError if none answers.

    The first call in a process removes what dead owners have left.
    """
    with _engine_lock:
        return _engine(os.getpid())


@functools.cache
def _engine(pid: int):
    client = connect()
    _prune(client)
    atexit.register(remove_all, pid)
    return client


def connect():
    """A new client of the engine, before anything is done with it. Raises StageError if none answers."""
    import docker
    import requests

    try:
        client = docker.from_env(timeout=120, max_pool_size=256)
        client.version()
    except (docker.errors.DockerException, requests.RequestException) as error:
        why = said(error)
        how = ("your user may not use its socket: `sudo usermod -aG docker $USER`, then log in again"
               if "ermission" in why else "start it (`sudo systemctl start docker`), or set DOCKER_HOST")  # fmt: skip
        raise StageError(f"no Docker engine: {why[:300]}; {how}") from None
    return client


@functools.cache
def images() -> Images:
    return Images(engine())


def said(error: Exception) -> str:
    """One line of what the engine said."""
    text = getattr(error, "explanation", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[-500:]


def labels(trajectory: str = "") -> dict[str, str]:
    """What a container of this process carries."""
    return {
        LABEL: "sandbox", f"{LABEL}.run": " ".join(sys.argv)[:400], f"{LABEL}.trajectory": trajectory,
        f"{LABEL}.host": socket.gethostname(), f"{LABEL}.boot": boot(), f"{LABEL}.pids": pid_namespace(),
        f"{LABEL}.owner": f"{os.getpid()}:{born(os.getpid())}",
    }  # fmt: skip


def dead(marks: dict[str, str]) -> bool:
    """Whether the owner that these labels name is dead. One on another machine or beyond a PID namespace is not."""
    if marks.get(f"{LABEL}.host") != socket.gethostname():
        return False
    if marks.get(f"{LABEL}.boot") != boot():
        return True
    if marks.get(f"{LABEL}.pids") != pid_namespace():
        return False
    pid, _, since = marks.get(f"{LABEL}.owner", "").partition(":")
    return pid.isdigit() and born(int(pid)) != since


def prune() -> list[str]:
    """Remove the containers whose owner is dead; returns their names. Raises StageError without an engine."""
    return _prune(connect())


def _prune(client) -> list[str]:
    gone = [c for c in client.containers.list(all=True, filters={"label": LABEL}, ignore_removed=True) if dead(c.labels)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(remove, gone))
    return [container.name for container in gone]


def remove_all(pid: int | None = None) -> None:
    """Remove all containers of this process: at its end, however that comes. It can make none after this."""
    if pid not in (None, os.getpid()):
        return
    until = time.monotonic() + 30.0
    for _ in range(8):  # wait for what other threads are making just now, or it would stay behind
        STARTS.acquire(timeout=max(0.0, until - time.monotonic()))
    if live:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(remove, list(live.values())))


def remove(container) -> None:
    """Remove a container, whatever it does; what a dead engine keeps is left to prune()."""
    import docker
    import requests

    for wait in (0.0, 0.5, 2.0):
        time.sleep(wait)
        try:
            container.remove(force=True, v=True)
        except docker.errors.NotFound:
            pass
        except docker.errors.APIError as error:
            if not re.search("already in progress", str(error)):
                continue
        except requests.RequestException:  # the engine is gone; `prune` does it when it is back
            return
        live.pop(container.id, None)
        return
