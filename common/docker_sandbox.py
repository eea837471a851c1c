"""The Docker sandbox: one container per trajectory from the task's image, with the repository at /testbed.

    with DockerSandbox(row) as sandbox:            # row["image"]
        result = sandbox.run("python -m pytest -q")
        patch = sandbox.diff()

The container's first process is a bash that reaps orphans and, on SIGUSR1, kills every other process. A command is a fresh
`bash -c` in /testbed with the environment that the image's conda environment `testbed` makes, if it has one. When that
bash ends, and at the timeout, every other process in the container is killed.

Limits (arguments of DockerSandbox): memory without swap, CPU, processes and threads by the kernel; size of a file by
RLIMIT_FSIZE; what is written in all by asking the engine every few seconds while a command runs; output as in the local
sandbox: what is kept is bounded, a command that prints more than 64 MB is killed. No network unless asked for, no mounts,
no new privileges, and of root's capabilities those alone that changing owner, user and rights of files takes.

The patch is made here and not by a git in the container: the engine says which files changed since the image, and those
are compared (common/checkout.py) with the ones in the image. What the agent did to .git, or to git, does not matter.

Containers are marked with their owner and never stay behind: common/docker_engine.py.

Not done: counting what is written to files that were deleted while they are open (size of a file times open files bounds
it, and it goes with the command); a user namespace of its own (the engine's `userns-remap` does that), disk bandwidth limits.
"""

import contextlib
import io
import os
import ssl
import tarfile
import tempfile
import time
from pathlib import Path

from common import checkout, repository
from common.bubblewrap import home
from common.bubblewrap import remove as remove_folder
from common.docker_engine import STARTS, engine, images, labels, live, remove, said
from common.errors import InfraError
from common.limits import MEGABYTE, Output
from common.sandbox import MAX_PRINTED, CommandResult, kind_of

_clean: dict[str, bool] = {}  # image id -> whether its repository holds nothing but what HEAD reaches
DISK_LOOK = 3.0  # seconds between two looks at what a running command has written
MANY = 200  # changed files; more are fetched in one go, with the whole of /testbed
DEFAULTS = {"LANG": "C.UTF-8", "TERM": "dumb", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}  # as local
CAPABILITIES = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID"]

# `read` and `wait` once a second, because bash reaps orphans between commands only.
# bash would end at a signal that it has a handler for: all of them but USR1 (10) and CHLD (17) are ignored.
INIT = "trap 'kill -KILL -1' USR1; trap '' {1..9} {11..16} {18..31}; exec 3<> <(:); while :; do read -r -t 1 -u 3; wait; done"
# stdout and stderr go the same way, or their order would be lost; the wrapper's own words ("Killed") go nowhere.
COMMAND = 'exec 3>&1 >/dev/null 2>&1; cd /testbed 2>&3; bash -c "$1" >&3 2>&1 3>&-; code=$?; kill -KILL -1; exit $code'
ACTIVATE = """if [ -f /opt/miniconda3/bin/activate ]; then . /opt/miniconda3/bin/activate; conda activate testbed; fi >/dev/null 2>&1
env -0"""
# What HEAD does not reach goes: later commits are the answers. Tags that it reaches stay, some packages' versions need them.
FORGET = r"""cd /testbed || exit
git rev-parse HEAD >/dev/null 2>&1 || git config --global --add safe.directory '*'
git rev-parse HEAD >/dev/null || exit
for remote in $(git remote); do git remote remove "$remote"; done
# --no-deref: origin/HEAD leads to another ref that goes as well
git for-each-ref --no-merged=HEAD --format='delete %(refname)' | git update-ref --no-deref --stdin || exit
dir=$(git rev-parse --absolute-git-dir)
rm -rf "$dir/logs" "$dir/ORIG_HEAD" "$dir/FETCH_HEAD" "$dir/objects/pack/"*.{keep,promisor}
[ -z "$(git rev-list --all --not HEAD | head -n 1)" ] || { echo "refs beyond HEAD stay"; exit 1; }
if [ "$1" = search ] && [ -z "$(git fsck --connectivity-only --unreachable --no-reflogs --no-dangling 2>/dev/null |
    head -n 1)" ]; then echo clean; exit 0; fi
[ "$1" = clean ] && exit
git repack -a -d -q && git prune --expire=now
"""


class DockerSandbox:
    """One task's container: start, run, diff, stop. Many may live in one process; one is used by one thread at a time."""

    def __init__(self, row: dict, *, command_timeout: float = 30.0, network: bool = False, memory: int = 4096 * MEGABYTE,
                 cpus: float = 2.0, processes: int = 1024, disk: int = 4096 * MEGABYTE, output_limit: int = 4000,
                 trajectory: str = ""):
        """Sizes in bytes, times in seconds, output_limit in characters. Raises InputError for a row without `image`."""
        kind_of(row, "docker")
        self.row, self.image, self.trajectory = row, row["image"], trajectory
        self.command_timeout, self.network, self.memory, self.cpus = command_timeout, network, memory, cpus
        self.processes, self.disk, self.output_limit = processes, disk, output_limit
        self.container, self.using = None, False

    def __enter__(self) -> "DockerSandbox":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        """Start the container and hide the repository's future. Raises InfraError; StageError without an engine."""
        with self._broken("cannot start a container"):
            self.image_id = images().use(self.image, self.row["instance_id"])
            self.using = True
            try:
                self.container = self._create(["bash", "-c", INIT], started=True)
                self.environment = None
                activated = self._checked(ACTIVATE)
                pairs = (part.split("=", 1) for part in activated.split("\0") if "=" in part)
                self.environment = DEFAULTS | {
                    name: value for name, value in pairs if name not in ("_", "SHLVL", "PWD", "OLDPWD")
                }
                self._forget()
                self.tracked = self._tracked()
            except BaseException:
                self.stop()
                raise

    def run(self, command: str, timeout: float | None = None) -> CommandResult:
        """Run one command; timeout in seconds, by default the sandbox's. Raises InfraError if the sandbox broke."""
        started = time.monotonic()
        if "\0" in command or len(command.encode("utf-8", "replace")) > 120_000:  # what execve would refuse
            why = "a NUL character in the command" if "\0" in command else "Argument list too long"
            return CommandResult(126, f"bash: {why}\n", 0.0, False, False)
        output = Output(self.output_limit)
        limit = self.command_timeout if timeout is None else timeout
        with self._broken("the sandbox broke"):
            killed, exit_code = self._exec(["bash", "-c", COMMAND, "bash", command], output, started + limit)
        text = output.text()
        if killed == "timeout":
            exit_code = 124
        elif killed:
            exit_code = 137
            text += ("\n" if text and not text.endswith("\n") else "") + f"(killed: {killed})\n"
        return CommandResult(exit_code, text, time.monotonic() - started, output.cut > 0, killed == "timeout")

    def diff(self) -> str:
        """The patch from the image's tree to what is in /testbed now, whatever happened to its .git."""
        with self._broken("cannot take the patch"):
            return self._diff()

    def stop(self) -> None:
        """Remove the container. Safe to call twice."""
        container, self.container = self.container, None
        if container is not None:
            remove(container)
        if self.using:
            self.using = False
            images().leave(self.image)

    # -----------------------------------------------------------------------------------------------------------------
    # The container

    def _create(self, entrypoint: list[str], started: bool):
        """A container of the image. The second one that `diff` compares with is never started."""
        import docker

        options = {
            "entrypoint": entrypoint, "command": [], "labels": labels(self.trajectory), "detach": True,
            "network_mode": "bridge" if self.network else "none", "working_dir": "/", "user": "root", "hostname": "sandbox",
            "mem_limit": self.memory, "memswap_limit": self.memory, "nano_cpus": int(self.cpus * 1e9),
            "pids_limit": self.processes, "cap_drop": ["ALL"], "cap_add": CAPABILITIES, "shm_size": 256 * MEGABYTE,
            "security_opt": ["no-new-privileges"], "log_config": docker.types.LogConfig(type="none"),
            "ulimits": [docker.types.Ulimit(name="core", soft=0, hard=0),
                        docker.types.Ulimit(name="fsize", soft=self.disk // 2, hard=self.disk // 2)],
        }  # fmt: skip
        client = engine()
        with STARTS:
            container = client.containers.create(self.image_id, **options)
            live[container.id] = container
            if started:
                try:
                    container.start()
                except BaseException:
                    remove(container)
                    raise
        return container

    @contextlib.contextmanager
    def _broken(self, what: str):
        """Whatever the engine says in here is a failure of the machine."""
        import docker
        import requests

        try:
            yield
        except (docker.errors.DockerException, requests.RequestException, OSError, tarfile.TarError) as error:
            raise InfraError(f"{self.row['instance_id']}: {what}: {said(error)}") from error

    def _exec(self, argv: list[str], output: Output, deadline: float) -> tuple[str | None, int]:
        """Run a command in the container; returns (why it was killed, its exit code)."""
        api = engine().api
        job = api.exec_create(self.container.id, argv, environment=self.environment, workdir="/")["Id"]
        stream = api.exec_start(job, socket=True)
        connection = getattr(stream, "_sock", stream)
        killed, look, frames = None, time.monotonic() + DISK_LOOK, Frames()
        try:
            output.add(frames.payload(_read_with_the_head(stream, connection)))
            while True:
                now = time.monotonic()
                if now >= deadline:
                    if killed is not None:
                        raise InfraError(f"{self.row['instance_id']}: the container's processes cannot be killed")
                    killed, deadline = "timeout", now + 30.0
                    self._kill_all()
                elif now >= look and killed is None:
                    if self._written() > self.disk:
                        killed, deadline = "too much written to the container", now + 30.0
                        self._kill_all()
                    look = time.monotonic() + DISK_LOOK
                connection.settimeout(max(0.01, min(deadline, look) - time.monotonic()))
                try:
                    data = connection.recv(1 << 16)
                except TimeoutError:
                    continue
                if not data:
                    break
                if output.add(frames.payload(data)) > MAX_PRINTED and killed is None:
                    killed, deadline = f"more than {MAX_PRINTED // MEGABYTE} MB of output", time.monotonic() + 30.0
                    self._kill_all()
        finally:
            with contextlib.suppress(OSError):
                stream.close()
                connection.close()
        exit_code = self._exit_code(job)
        if exit_code >= 128:  # our wrapper may have died as well: what it would have killed may be there still
            self._kill_all()
        if exit_code == 137:
            for pause in (0.0, 0.1, 0.3):  # the engine may need a moment to notice
                time.sleep(pause)
                self.container.reload()
                if self.container.status != "running":
                    raise InfraError(f"{self.row['instance_id']}: the container has ended ({self.container.status})")
        return killed, exit_code

    def _exit_code(self, job: str) -> int:
        """The engine hears of the end a moment after the output has ended."""
        for wait in (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0):
            time.sleep(wait)
            state = engine().api.exec_inspect(job)
            if not state["Running"] and state["ExitCode"] is not None:
                return state["ExitCode"]
        raise InfraError(f"{self.row['instance_id']}: a command whose output has ended does not end")

    def _kill_all(self) -> None:
        """Kill all but the first process. It needs no new process, so it works in a fork bomb too."""
        self.container.kill(signal="USR1")

    def _written(self) -> int:
        """Bytes in the container's writable layer."""
        found = engine().api.containers(all=True, size=True, filters={"id": self.container.id})
        return found[0].get("SizeRw", 0) if found else 0

    def _checked(self, script: str, *arguments: str) -> str:
        """The output of a script of our own, run before the agent's first command. Raises InfraError if it fails."""
        output = Output(50_000_000)
        _, exit_code = self._exec(["bash", "-c", script, "bash", *arguments], output, time.monotonic() + 600.0)
        if exit_code:
            raise InfraError(f"{self.row['instance_id']}: image {self.image}: {output.text().strip()[-500:] or script}")
        return output.text()

    def _forget(self) -> None:
        """Remove refs, reflogs and objects that HEAD does not reach. Whether an image has any is found out once."""
        if _clean.get(self.image_id) is None:
            _clean[self.image_id] = self._checked(FORGET, "search").strip() == "clean"
        else:
            self._checked(FORGET, "clean" if _clean[self.image_id] else "repack")

    # -----------------------------------------------------------------------------------------------------------------
    # The patch

    def _tracked(self) -> dict[str, str]:
        """path -> git mode of the files that the repository tracks."""
        listed = self._checked("cd /testbed && git ls-files -s -z 2>/dev/null")
        pairs = (entry.split("\t", 1) for entry in listed.split("\0")[:-1])
        return {path: head.split()[0] for head, path in pairs}

    def _diff(self) -> str:
        self._kill_all()
        now, gone = self._changes()
        modules = tuple(f"{path}/" for path, mode in self.tracked.items() if mode == "160000")
        below = tuple(f"{path}/" for path in gone)
        paths = {p for p in now if not p.startswith(modules)} if modules else set(now)
        paths |= {p for p in self.tracked if p in gone or below and p.startswith(below)}
        paths -= {p for p, mode in self.tracked.items() if mode == "160000"}
        if not paths:
            return ""
        folder = Path(tempfile.mkdtemp(dir=home()))
        template = repository.prepare({"instance_id": self.row["instance_id"], "local": {"source": {}}}, home())
        try:
            mirror = checkout.Checkout(template, folder, None)
            return self._compare(mirror, paths)
        finally:
            repository.release(template)
            remove_folder(folder)

    def _changes(self) -> tuple[set[str], set[str]]:
        """(paths in /testbed that were written, paths that were removed), relative; no .git, whatever it is."""
        now, gone = set(), set()
        for change in self.container.diff() or []:
            path = change["Path"]
            if path == "/testbed" and change["Kind"] == 2:
                gone |= set(self.tracked)
            if not path.startswith("/testbed/") or ".git" in path.lower().split("/"):
                continue
            (gone if change["Kind"] == 2 else now).add(path.removeprefix("/testbed/"))
        return now, gone

    def _compare(self, mirror: checkout.Checkout, paths: set[str]) -> str:
        """Put what matters of these paths, before and after, into an empty checkout, and let that say the difference."""
        rules = {p for p in self.tracked | dict.fromkeys(paths) if os.path.basename(p) == ".gitignore"}
        after = self._fetch(self.container, rules)
        for path, entry in after.items():
            _place(mirror.tree, path, entry)
        parents = {str(parent) for path in paths for parent in Path(path).parents}
        new = sorted(paths - self.tracked.keys() - parents)
        paths = paths - (parents - self.tracked.keys()) - set(mirror.ignored(new))
        after |= self._fetch(self.container, paths - rules)
        links = {path for path, entry in after.items() if entry[0] == "120000"}
        before: dict[str, tuple] = {}
        if old := {p for p in paths | links | rules if p in self.tracked} | self._replaced(after):
            image = self._create(["true"], started=False)
            try:
                before = self._fetch(image, old)
            finally:
                remove(image)
        for path in before.keys() & after.keys():
            if before[path][1] is None or after[path][1] is None:  # too large for a patch: as if it had not been touched
                after[path] = before[path] = ("100644", b"")
        mirror.base = {p: (mode, mirror.put(data)) for p, (mode, data) in before.items() if data is not None}
        for path, entry in after.items():
            _place(mirror.tree, path, entry)
        return mirror.diff()

    def _replaced(self, after: dict) -> set[str]:
        """Tracked files below what is no directory any more."""
        return {p for p in self.tracked if any(str(parent) in after for parent in Path(p).parents)}

    def _fetch(self, container, paths: set[str]) -> dict[str, tuple]:
        """path -> (git mode, content), for files and symlinks that are there; content None where a file is too large."""
        import docker

        found, linked = {}, {}
        if len(paths) > MANY:
            chunks, _ = container.get_archive("/testbed", chunk_size=1 << 20)
            with tarfile.open(fileobj=_Chunks(chunks), mode="r|") as tar:
                for member in tar:
                    name = member.name.removeprefix("testbed/")
                    if name in paths and member.islnk():  # a second name of a file that came before
                        linked[name] = member.linkname.removeprefix("testbed/")
                    elif name in paths and (entry := _entry(tar, member)):
                        found[name] = entry
            for name, first in linked.items():
                found |= {name: found[first]} if first in found else self._fetch(container, {name})
            return found
        for path in sorted(paths):
            if any(str(parent) in found for parent in Path(path).parents):  # beyond a symlink: it is not there
                continue
            try:
                chunks, status = container.get_archive(f"/testbed/{path}", chunk_size=1 << 20)
            except docker.errors.NotFound:
                continue
            with contextlib.closing(chunks):
                if status["mode"] & 1 << 31 or status["size"] > 64 * checkout.LARGEST_NEW_FILE:  # a directory; huge
                    if not status["mode"] & 1 << 31:
                        found[path] = ("100644", None)
                    continue
                with tarfile.open(fileobj=_Chunks(chunks), mode="r|") as tar:
                    if (member := tar.next()) is not None and (entry := _entry(tar, member)):
                        found[path] = entry
        return found


def _entry(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple | None:
    if member.issym():
        return "120000", os.fsencode(member.linkname)
    if not member.isfile():
        return None
    if member.size > 64 * checkout.LARGEST_NEW_FILE:
        return "100644", None
    return "100755" if member.mode & 0o100 else "100644", tar.extractfile(member).read()


def _place(tree: Path, path: str, entry: tuple) -> None:
    """Write one fetched file into a tree of ours, never through a link."""
    mode, data = entry
    target = tree / path
    if data is None or any((tree / parent).is_symlink() for parent in Path(path).parents):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if mode == "120000":
        os.symlink(data, os.fsencode(target))
    else:
        target.write_bytes(data)
        target.chmod(0o755 if mode == "100755" else 0o644)


def _read_with_the_head(stream, connection) -> bytes:
    """The first bytes of a command's output, where they came so soon that they were read together with the HTTP head.

    The SDK hands out the bare socket, and they lie in the buffer above it: on a busy machine a quick command printed nothing.
    """
    response = getattr(stream, "_response", None)
    buffer = response and response.raw._fp.fp
    if not isinstance(buffer, io.BufferedReader):  # through ssh there is none
        return b""
    connection.settimeout(0.0)  # what is not there yet comes later
    try:
        return buffer.peek()
    except ssl.SSLWantReadError:  # as TLS says that
        return b""


class _Chunks(io.RawIOBase):
    """A stream of bytes as a file to read."""

    def __init__(self, chunks):
        self.chunks, self.left = iter(chunks), b""

    def read(self, size: int = -1) -> bytes:
        while len(self.left) < size:
            try:
                self.left += next(self.chunks)
            except StopIteration:
                break
        data, self.left = self.left[:size], self.left[size:]
        return data


class Frames:
    """Takes the engine's multiplexed stream apart: 8 bytes (stream, length big-endian at 4), then the payload."""

    def __init__(self):
        self.left, self.head = 0, b""

    def payload(self, data: bytes) -> bytes:
        """What of these bytes was printed."""
        out = []
        while data:
            if not self.left:
                need = 8 - len(self.head)
                self.head, data = self.head + data[:need], data[need:]
                if len(self.head) < 8:
                    break
                self.left, self.head = int.from_bytes(self.head[4:], "big"), b""
            out.append(data[: self.left])
            self.left, data = self.left - len(out[-1]), data[self.left :]
        return b"".join(out)
