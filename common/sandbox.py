"""The local sandbox: every command in bubblewrap, with its own copy of the task's repository at /testbed.

    with LocalSandbox(row) as sandbox:
        result = sandbox.run("python -m pytest -q")
        patch = sandbox.diff()

A command is a fresh `bash -c` in /testbed. It can write to /testbed and /tmp (both last as long as the sandbox) and to
nothing else; it sees /usr, a few files of /etc, the task's interpreter and none of the host's environment, homes,
processes or network. When its bash ends, and at the timeout, every process that it started is killed with the PID
namespace they live in; when this program dies, however, they die too.

Limits (arguments of LocalSandbox), and who enforces them:
* wall time: the caller's thread, by killing the namespace.
* memory: a thread that looks at all processes of a command every 50 ms and kills them together; for what is faster than
  that the kernel (RLIMIT_DATA, four times as much, because threads reserve more than they use). What belongs to no
  process (memfd and the like) cannot be had: common/seccomp.py.
* processes and threads: RLIMIT_NPROC, which counts for the sandbox alone, because as root every sandbox has a user id
  of its own, and as another user it has a user namespace of its own (before Linux 5.14: the watching thread alone).
* size of a file: RLIMIT_FSIZE, half of `disk`. What is written to /testbed and /tmp in all: the watching
  thread, which adds it up when the disk's free space shrinks (a burst of some 100 ms is seen too late, a longer one
  is not). Files that were deleted while they are open are not added up: open files times their size bounds them.
* output: what is kept is bounded; a command that prints more than 64 MB is killed.

Not a virtual machine: an attack on the kernel is out of scope, and CPU time and disk bandwidth are shared.
Linux 5.3 or later only. Works as root and as any user, but not where user namespaces are off (for users) or inside most
containers.
"""

import contextlib
import dataclasses
import itertools
import os
import platform
import resource
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import checkout, repository
from common.bubblewrap import bubblewrap, home, interpreter, prune, remove
from common.errors import InfraError, InputError, StageError
from common.limits import MEGABYTE, DiskMeter, Job, Output, watcher

MAX_PRINTED = 64 * MEGABYTE
_numbers = itertools.count(1)
USER, FIRST_UID, UIDS = 1000, 20000, 40000  # inside, as a user; as root: a uid of these for each sandbox
ETC = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "mime.types", "os-release", "protocols", "services",
       "ssl/certs", "ssl/openssl.cnf", "ca-certificates", "pki")


@dataclasses.dataclass
class CommandResult:
    exit_code: int  # of bash; 124 at the timeout, 137 if killed for another limit (the output says which)
    output: str  # stdout and stderr as they came, the middle cut out if it is long
    seconds: float
    truncated: bool
    timed_out: bool


def kind_of(row: dict, kind: str = "auto") -> str:
    """Where a task runs: `local` where its row has that, else `docker`. Raises InputError if it cannot run there."""
    if kind not in ("auto", "docker", "local"):
        raise InputError(f"unknown sandbox {kind!r}: auto, docker or local")
    if kind == "auto":
        kind = "local" if row.get("local") is not None else "docker"
    if kind == "docker" and not (isinstance(row.get("image"), str) and row["image"]):
        raise InputError(f"{row.get('instance_id')}: neither `local`, for the local sandbox, nor `image`, for Docker"
                         if row.get("local") is None else
                         f"{row.get('instance_id')}: no field `image`, which the Docker sandbox needs")
    if kind == "local" and not isinstance(row.get("local"), dict):
        raise InputError(f"{row.get('instance_id')}: no field `local`, which the local sandbox needs")
    return kind


def prepare(rows: list[dict], kind: str, *, check_images: bool = False, evict_images: bool = False) -> None:
    """Before the first task: refuse rows that cannot run, and find the engine if any row needs one.

    Raises InputError for a row, StageError where no Docker engine answers.
    """
    kinds = [kind_of(row, kind) for row in rows]
    if "docker" in kinds:
        from common import docker_engine

        wanted = [row["image"] for row, kind in zip(rows, kinds) if kind == "docker"]
        docker_engine.images().evict = evict_images
        docker_engine.images().wanted |= set(wanted)
        if check_images:
            docker_engine.images().check(wanted)


def open_sandbox(row: dict, kind: str = "auto", command_timeout: float = 30.0, *, network: bool = False,
                 trajectory: str = ""):
    """The sandbox of a task, not started: a LocalSandbox or a DockerSandbox. Raises InputError as kind_of does.

    network: let a container out (the local sandbox never does). trajectory: its id, for the container's label.
    """
    if kind_of(row, kind) == "local":
        return LocalSandbox(row, command_timeout=command_timeout)
    from common.docker_sandbox import DockerSandbox

    return DockerSandbox(row, command_timeout=command_timeout, network=network, trajectory=trajectory)


class LocalSandbox:
    """One task's sandbox: start, run, diff, stop. Many may live in one process; one is used by one thread at a time."""

    def __init__(self, row: dict, *, command_timeout: float = 30.0, memory: int = 2048 * MEGABYTE, processes: int = 512,
                 disk: int = 1024 * MEGABYTE, output_limit: int = 4000):
        """Sizes in bytes, times in seconds, output_limit in characters. Raises InputError for a row without `local`."""
        kind_of(row, "local")
        self.row, self.local = row, row["local"]
        self.command_timeout, self.memory, self.processes, self.disk = command_timeout, memory, processes, disk
        self.output_limit = output_limit
        self.folder: Path | None = None
        self.checkout: checkout.Checkout

    def __enter__(self) -> "LocalSandbox":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        """Copy the repository and run the set-up commands. Raises InputError (bad row, no bubblewrap) or InfraError."""
        self.bubblewrap = bubblewrap()
        prefixes, bin_directory = interpreter(self.local.get("python") or sys.executable)
        try:
            number = next(_numbers)
            self.folder = home() / f"{number:06d}"
            self.folder.mkdir()
            self.uid = FIRST_UID + (os.getpid() * 64 + number) % UIDS if os.geteuid() == 0 else None
            template = repository.prepare(self.row, home())
            try:
                self.checkout = checkout.Checkout(template, self.folder, self.uid)
            except BaseException:
                repository.release(template)
                raise
            self.environment = {
                "PATH": f"{bin_directory}:/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp/home", "LANG": "C.UTF-8",
                "TERM": "dumb", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0",
            }
            if not self.local.get("python"):  # our own environment's plugins are no part of the task, and slow to load
                self.environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
            self.environment |= {str(k): str(v) for k, v in (self.local.get("env") or {}).items()}
            self.arguments = self._arguments(prefixes)
            tree = sum(status.st_size + 4096 for _, status in checkout.walk(self.checkout.tree))
            self.meter = DiskMeter([self.checkout.tree, self.folder / "tmp"], self.disk + 2 * tree)
            for command in self.local.get("setup") or []:
                result = self.run(command, timeout=3600.0)
                if result.exit_code:
                    raise InfraError(f"{self.row['instance_id']}: set-up command {command!r} ended with "
                                     f"{result.exit_code}: {result.output.strip()}")
            if self.local.get("setup"):
                self.checkout.rebase()
        except OSError as error:
            self.stop()
            raise InfraError(f"{self.row['instance_id']}: cannot start a sandbox: {error}") from error
        except BaseException:
            self.stop()
            raise

    def run(self, command: str, timeout: float | None = None) -> CommandResult:
        """Run one command; timeout in seconds, by default the sandbox's. Raises InfraError if the sandbox broke."""
        return self.execute(command, timeout=self.command_timeout if timeout is None else timeout)

    def diff(self) -> str:
        """The patch from the base commit to what is in /testbed now, whatever happened to its .git."""
        return self.checkout.diff()

    def stop(self) -> None:
        """Remove the copy. Safe to call twice."""
        if self.folder is not None:
            with contextlib.suppress(AttributeError):
                repository.release(self.checkout.template)
                del self.checkout
            remove(self.folder)
            self.folder = None

    def execute(self, command: str, *, timeout: float, mounts: tuple[str, ...] = (), environment: dict | None = None,
                output_limit: int | None = None) -> CommandResult:
        """`run` with more bwrap arguments (mounts), another environment or another limit of the kept output."""
        started = time.monotonic()
        command_bytes = command.encode("utf-8", "replace")
        if b"\0" in command_bytes or len(command_bytes) > 120_000:  # what execve would refuse
            why = "a NUL character in the command" if b"\0" in command_bytes else "Argument list too long"
            return CommandResult(126, f"bash: {why}\n", 0.0, False, False)
        output = Output(self.output_limit if output_limit is None else output_limit)
        try:
            with contextlib.ExitStack() as stack:
                job = self._spawn(command_bytes, mounts, environment or self.environment, stack)
                self._follow(job, output, started + timeout)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InfraError(f"{self.row['instance_id']}: the sandbox broke: {error}") from error
        text = output.text()
        if job.killed is None and job.exit_code is None:
            raise InfraError(f"{self.row['instance_id']}: bubblewrap failed: {text.strip()[-1000:]}")
        if job.killed is None and self.meter.over():
            job.killed = self.meter.reason
        if job.killed is None:
            exit_code = job.exit_code
        else:
            exit_code = 124 if job.killed == "timeout" else 137
            if job.killed != "timeout":
                text += ("\n" if text and not text.endswith("\n") else "") + f"(killed: {job.killed})\n"
        return CommandResult(exit_code, text, time.monotonic() - started, output.cut > 0, job.killed == "timeout")

    def _arguments(self, prefixes: list[str]) -> list[str]:
        """bwrap's arguments, the same for every command of this sandbox."""
        uid = USER if self.uid is None else self.uid
        etc, tmp = self.folder / "etc", self.folder / "tmp"
        etc.mkdir()
        (etc / "passwd").write_text(f"root:x:0:0:root:/root:/bin/bash\nagent:x:{uid}:{uid}::/tmp/home:/bin/bash\n")
        (etc / "group").write_text(f"root:x:0:\nagent:x:{uid}:\n")
        (etc / "hosts").write_text("127.0.0.1 localhost sandbox\n::1 localhost\n")
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        for folder in (tmp, tmp / "tmp", tmp / "tmp" / "home", tmp / "shm"):
            folder.mkdir()
            if self.uid is not None:
                os.chown(folder, self.uid, self.uid)
        (tmp / "tmp").chmod(0o1777)
        (tmp / "shm").chmod(0o1777)
        arguments = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--hostname", "sandbox",
                     "--die-with-parent", "--new-session"]
        if self.uid is None:
            arguments += ["--unshare-user", "--uid", str(uid), "--gid", str(uid)]
        else:
            arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        for folder in ("/etc", "/etc/ssl"):  # here and below: bwrap would make them 0700
            arguments += ["--perms", "0755", "--dir", folder]
        arguments += ["--ro-bind", "/usr", "/usr"]
        for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
            if os.path.islink(path):
                arguments += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                arguments += ["--ro-bind", path, path]
        arguments += ["--ro-bind-try", "/nix/store", "/nix/store"]
        for name in ETC:
            arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        for name in ("passwd", "group", "hosts", "nsswitch.conf"):
            arguments += ["--ro-bind", str(etc / name), f"/etc/{name}"]
        arguments += ["--proc", "/proc", "--dev", "/dev", "--bind", str(tmp / "shm"), "/dev/shm"]
        arguments += ["--remount-ro", "/dev", "--bind", str(tmp / "tmp"), "/tmp"]
        for folder in _parents(prefixes):
            arguments += ["--perms", "0755", "--dir", folder]
        for prefix in prefixes:
            arguments += ["--ro-bind", os.path.realpath(prefix), prefix]
        arguments += ["--bind", str(self.checkout.tree), "/testbed", "--chdir", "/testbed"]
        return arguments

    def _spawn(self, command: bytes, mounts: tuple[str, ...], environment: dict, stack: contextlib.ExitStack) -> "Job":
        arguments = [*self.arguments, *mounts, "--remount-ro", "/"]
        # Through a file, because /proc/1/cmdline inside shows what is on the command line.
        with tempfile.TemporaryFile(dir=self.folder) as file:
            file.write(b"".join(os.fsencode(a) + b"\0" for a in arguments))
            file.flush()
            file.seek(0)
            handles = [file.fileno()]
            argv = [self.bubblewrap, "--args", str(file.fileno())]
            if (filter_file := home() / "seccomp").exists():
                handles.append(stack.enter_context(open(filter_file, "rb")).fileno())
                argv += ["--seccomp", str(handles[-1])]
            output, output_end = os.pipe()
            status, status_end = os.pipe()
            argv += ["--json-status-fd", str(status_end), "--", *self._limits(), "bash", "-c"]
            try:
                process = subprocess.Popen([*argv, command], stdin=subprocess.DEVNULL, stdout=output_end,
                                           stderr=output_end, env=environment, cwd="/", start_new_session=True,
                                           pass_fds=[*handles, status_end])
            except OSError as error:
                os.close(output), os.close(status)
                raise InfraError(f"{self.row['instance_id']}: cannot start bubblewrap: {error}") from error
            finally:
                os.close(output_end), os.close(status_end)
        stack.callback(os.close, output)
        stack.callback(os.close, status)
        return Job(process, output, status, self.memory, self.processes, self.meter)

    def _limits(self) -> list[str]:
        """The commands before bash that set its limits, and as root its user."""
        limits = {"core": 0, "fsize": self.disk // 2, "data": 4 * self.memory, "nofile": 1024}
        if self.uid is not None or _kernel() >= (5, 14):
            limits["nproc"] = self.processes
        argv = ["prlimit"]
        for name, value in limits.items():
            hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            argv.append(f"--{name}={value}:{value}")
        if self.uid is not None:
            argv += ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "--inh-caps=-all"]
        return argv

    def _follow(self, job: "Job", output: "Output", deadline: float) -> None:
        """Read until the sandbox is gone; kill it at the deadline."""
        poll = select.poll()
        poll.register(job.output, select.POLLIN)
        poll.register(job.status, select.POLLIN)
        opened, status = {job.output, job.status}, b""
        try:
            watcher.add(job)
            while opened:
                left = deadline - time.monotonic()
                if left <= 0:
                    if job.killed is not None:
                        raise InfraError(f"{self.row['instance_id']}: the sandbox cannot be killed")
                    job.kill("timeout")
                    deadline = time.monotonic() + 20.0
                    continue
                for handle, _ in poll.poll(left * 1000 + 1):
                    data = os.read(handle, 1 << 16)
                    if not data:
                        poll.unregister(handle)
                        opened.discard(handle)
                    elif handle == job.status:
                        status += data
                        job.told(status)
                    elif output.add(data) > MAX_PRINTED:
                        job.kill(f"more than {MAX_PRINTED // MEGABYTE} MB of output")
            job.process.wait(20)
            if not job.gone(20):
                raise InfraError(f"{self.row['instance_id']}: the sandbox cannot be killed")
        except BaseException:
            job.kill("stopped")
            job.process.kill()
            job.process.wait()
            raise
        finally:
            watcher.remove(job)
            job.close()


def _parents(paths: list[str]) -> list[str]:
    """All directories above these, but the root; the shortest first."""
    return sorted({str(parent) for path in paths for parent in Path(path).parents} - {"/"})


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])


if __name__ == "__main__":
    if sys.argv[1:] != ["prune"]:
        sys.exit("usage: python -m common.sandbox prune")
    for removed in prune():
        print(f"removed {removed}")
    try:
        from common import docker_engine

        for name in docker_engine.prune():
            print(f"removed container {name}")
    except StageError as error:
        print(f"no containers to look at: {error}", file=sys.stderr)
