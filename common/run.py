"""What every script needs around its idea: the command line, exit codes, the manifest, resume, the summary line.

A script is `run.main(Args, work)`. Args is a dataclass; the text under a field is its help, its name is its flag.
`Stage` is one output with its manifest: it says whether the work is done, and stops when it is not the same work.
"""

import ast
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import json
import logging
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import types
import typing
from pathlib import Path

from common import jsonl
from common.errors import InputError, StageError

ROOT = Path(__file__).resolve().parent.parent
FILES = 16384  # open at once: a worker has up to a dozen
NOTE_SECONDS = 20.0
PARTS = ("settings", "same", "summary")  # of a manifest
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "swebench", "openai", "vllm")


# ---------------------------------------------------------------- the command line


def parse(args_class: type, argv: list[str] | None = None, usage: str | None = None):
    """Fill the dataclass from the command line. A field without a default is required; a bool field is a switch.

    usage: the first line of --help, where it is more than the flags.
    """
    import argparse

    script = inspect.getmodule(args_class)
    parser = argparse.ArgumentParser(
        usage=usage, description=script.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    fields = dataclasses.fields(args_class)  # inherited flags stand behind the script's own
    for field in sorted(fields, key=lambda field: field.name not in args_class.__annotations__):
        options = {"dest": field.name, "help": _help(args_class, field)}
        kind = field.type
        if typing.get_origin(kind) is types.UnionType:  # X | None
            kind = next(option for option in typing.get_args(kind) if option is not type(None))
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            options["required"] = True
        elif field.default_factory is not dataclasses.MISSING:
            options["default"] = field.default_factory()
        else:
            options["default"] = field.default
        if kind is bool:
            options["action"] = "store_true"
        elif typing.get_origin(kind) is list:
            options |= {"nargs": "+", "action": "extend", "type": typing.get_args(kind)[0], "metavar": "X"}
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper() if kind is not str else "X"}
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    return args_class(**vars(parser.parse_args(argv)))


def _help(args_class: type, field: dataclasses.Field) -> str:
    for owner in args_class.__mro__:
        if field.name in owner.__dict__.get("__annotations__", {}):
            text = _field_texts(owner).get(field.name, "")
            break
    shown = not any(field.default is nothing for nothing in (dataclasses.MISSING, None, False))
    return text.replace("%", "%%") + (f" (default: {field.default})" if shown else "")


@functools.cache
def _field_texts(owner: type) -> dict[str, str]:
    """The string under each annotated field in the source of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
    texts = {}
    for node, after in zip(body, body[1:]):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            texts[node.target.id] = " ".join(str(after.value.value).split())
    return texts


def main(args_class: type, work: typing.Callable, usage: str | None = None) -> typing.NoReturn:
    """Parse, work, exit: 0 done, 2 bad usage or input, 1 anything else. Stopping by Ctrl-C or SIGTERM loses nothing."""
    args = parse(args_class, usage=usage)
    signal.signal(signal.SIGTERM, _stop)
    _end_with_the_loop()
    _allow_files()
    # On a CPU it recommends a package with a faster NF4 kernel, which has no backward pass.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    code = 1
    same_command = "the same command" + (" without --overwrite" if getattr(args, "overwrite", False) else "")
    try:
        work(args)
        sys.stdout.flush()
        code = 0
    except BrokenPipeError:  # whoever read our output has read enough (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except InputError as error:
        code = 2
        print(f"error: {error}", file=sys.stderr)
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\nstopped; {same_command} goes on from here", file=sys.stderr)
    except OSError as error:
        if error.errno is None or error.filename is None and error.errno != 28:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror}; what was finished is kept, {same_command} goes on", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0:
        sys.exit(0)
    if docker_engine := sys.modules.get("common.docker_engine"):
        docker_engine.remove_all()
    if serve := sys.modules.get("common.serve"):
        serve.leave()
    os._exit(code)  # worker threads may still wait for a model or a command; their local sandboxes die with this process


def _allow_files() -> None:
    """Hundreds of workers need more open files than the usual 1024. Not all that may be had: some programs that are
    started from here close every number up to the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _stop(signum, frame):
    raise KeyboardInterrupt


def _end_with_the_loop() -> None:
    """Whatever ends run_loop.sh alone ends the stage that it is in as SIGTERM does (Linux; not under torchrun)."""
    if sys.platform == "linux" and os.environ.get("SWE_DAGGER_KEEPER") == str(os.getppid()):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


# ---------------------------------------------------------------- hashes


def hash_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def hash_file(path: str | Path) -> str:
    """The first 16 hex digits of the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- one output and its manifest


class Stage:
    """One output of one script: a FILE (manifest in FILE.manifest.json) or a directory (manifest.json inside).

    `same` holds what makes it the same work: if the output was started with other values, this raises InputError that
    names the first difference. What only says how (workers, keys, addresses) does not belong in it.
    outputs: the jsonl.Output files of this work. With `overwrite` they are removed before the manifest changes; without,
    one that is there though there is no manifest is somebody else's, and an InputError, and so is one that this work reads.
    """

    def __init__(self, out: str, args, same: dict, *, directory: bool = False, overwrite: bool = False, outputs: tuple = ()):
        self.out = Path(out)
        self.args = args
        if not out:
            raise InputError("--out is empty")
        for output in outputs:
            _refuse_input(args, output.path)
        self.manifest_path = self.out / "manifest.json" if directory else Path(f"{out}.manifest.json")
        log_path = self.out / "log" if directory else Path(f"{out}.log")
        try:
            self.manifest_path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {out}: {error.strerror}") from None
        self.manifest = {}
        self.resumed = self.manifest_path.exists() and not overwrite
        if self.resumed:
            self.manifest = read_object(self.manifest_path)
            self._refuse_other_work(json.loads(json.dumps(same)))
        for output in outputs:
            if overwrite:
                output.remove()
            elif output.finished and not self.resumed:
                raise InputError(f"{output.path} is there, and {self.manifest_path}, which would say how it was made, is not: "
                                 "give another --out, or --overwrite to lose it")  # fmt: skip
        self.done = bool(self.manifest.get("finished"))
        self.began = self.noted = time.time()
        self.before = self.manifest.get("seconds", 0.0)  # that earlier calls took for this work
        self.log = _logger(log_path)
        if not self.done:
            self.manifest = {
                "argv": sys.argv,
                "command": shlex.join(sys.argv),
                "settings": dataclasses.asdict(args),
                "same": same,
                "commit": _git("rev-parse", "HEAD"),
                "diff": _git("diff", "HEAD"),
                "packages": {name: _version(name) for name in PACKAGES},
                "python": sys.version.split()[0],
                "started": self.manifest.get("started", time.time()),
                "seconds": self.before,
            }
            self._write()

    def _refuse_other_work(self, same: dict) -> None:
        then, now = _flat(self.manifest.get("same", {})), _flat(same)
        for name in sorted(then.keys() | now.keys()):
            if name.endswith(".adapter") and then.get(f"{name}_hash") and now.get(f"{name}_hash"):
                continue  # where it lies says nothing (a run may be moved); its hash says which it is
            if then.get(name) != now.get(name):
                what = " (a hash of the tasks' contents)" if name == "tasks" else ""
                raise InputError(
                    f"{self.out} was started with {name} = {then.get(name)!r}, now it is {now.get(name)!r}{what}: "
                    "give another --out, or --overwrite to start again"
                )
        commit = _git("rev-parse", "HEAD")
        if commit and self.manifest.get("commit") not in (None, commit) and not self.manifest.get("finished"):
            print(f"warning: {self.out} was started by commit {self.manifest['commit'][:9]}, this is {commit[:9]}",
                  file=sys.stderr)

    def note_time(self) -> None:
        """Note the seconds so far, now and then: what a killed call took is to be counted, too."""
        if time.time() - self.noted > NOTE_SECONDS:
            self.noted = time.time()
            self.manifest["seconds"] = self.before + self.noted - self.began
            self._write()

    def finish(self, summary: dict) -> None:
        """Note the end, the seconds of all calls, peak memory of this one, and the summary in the manifest; print the
        summary line."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1 << 20)
        self.manifest |= {
            "finished": time.time(),
            "seconds": self.before + time.time() - self.began,
            "peak_memory_mb": round(memory),
            "summary": summary,
        }
        self._write()
        print_summary(summary)

    @classmethod
    def finished(cls, out: str, args) -> "Stage":
        """The finished output directory `out`, whatever work it was. Raises InputError if it is not finished."""
        path = Path(out) / "manifest.json"
        manifest = read_object(path) if path.is_file() else {}
        if not manifest.get("finished"):
            raise InputError(f"{out}: not a finished output; the command that started it goes on with it")
        return cls(out, args, manifest["same"], directory=True)

    def amend(self, summary: dict) -> None:
        """Give a finished output a new summary, and note by which command; print the summary line."""
        by = {"command": shlex.join(sys.argv), "commit": _git("rev-parse", "HEAD"), "finished": time.time(),
              "packages": {name: _version(name) for name in PACKAGES}, "before": self.manifest["summary"]}  # fmt: skip
        self.manifest |= {"summary": summary, "amended": self.manifest.get("amended", []) + [by]}
        self._write()
        print_summary(summary)

    def say_done(self) -> None:
        print(f"{self.out} is finished; nothing to do", file=sys.stderr)
        print_summary(self.manifest["summary"])

    def _write(self) -> None:
        jsonl.write_atomically(self.manifest_path, json.dumps(self.manifest, indent=1) + "\n")


def _refuse_input(args, path: Path) -> None:
    """Raises InputError if a file that is to be written is one that a flag names to be read."""
    for flag, value in dataclasses.asdict(args).items():
        for one in value if isinstance(value, list) else [value]:
            name = re.sub(r":\d+$", "", one) if isinstance(one, str) and flag != "out" else ""  # mine.jsonl:5
            if name and Path(name).is_file() and path.exists() and Path(name).samefile(path):
                raise InputError(f"--{flag.replace('_', '-')} {one} is {path}, which this would write: give another --out")


def read_object(path: Path) -> dict:
    """The JSON object in a file that a stage has written whole. Raises InputError where it is damaged."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not all(isinstance(content.get(name, {}), dict) for name in PARTS):
        raise InputError(f"{path}: damaged, no JSON object; run its stage again with --overwrite")
    return content


def finite(value: object) -> object:
    """The same value, ready for JSON, with None for numbers that JSON does not have: the loss of a run that diverged."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def print_summary(summary: dict) -> None:
    """`summary key=value ...` on stdout, real numbers with 7 significant digits; lists and tables stay out of it."""
    shown = {key: value for key, value in summary.items() if value is None or isinstance(value, (int, float, str))}
    words = [f"{key}={value:.7g}" if isinstance(value, float) else f"{key}={value}" for key, value in shown.items()]
    print("summary " + " ".join(words), flush=True)


def _flat(value: dict, prefix: str = "") -> dict:
    flat = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat |= _flat(inner, f"{prefix}{key}.")
        else:
            flat[prefix + key] = inner
    return flat


def _logger(path: Path) -> logging.Logger:
    """Everything to the log file, warnings to the terminal as well."""
    log = logging.getLogger("swe-dagger")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
    to_file = logging.FileHandler(path, encoding="utf-8", delay=True)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to_screen = logging.StreamHandler()
    to_screen.setLevel(logging.WARNING)
    to_screen.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log.addHandler(to_file)
    log.addHandler(to_screen)
    return log


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
