"""Start, share and stop `vllm serve`, and give it adapters.

    python -m common.serve start vllm:Qwen/Qwen3-8B,gpus=0 [SPEC...]      they stay until they are stopped
    python -m common.serve status
    python -m common.serve stop [SPEC...]                                 the given ones, or all

A SPEC is what the scripts take: vllm:MODEL[,adapter=DIR][,gpus=0+1][,util=0.4][,args=...]; others are passed over.

    gpus=0+1    these GPUs, tensor parallel; data parallel with args=--data-parallel-size 2. Numbers count the GPUs that
                CUDA_VISIBLE_DEVICES names, where it does
    util=0.4    share of a GPU's memory (two servers on one GPU: util=0.3 and util=0.6); vLLM's default takes nearly all
    args=...    comes last and takes the rest: more arguments for `vllm serve`, as args=--max-model-len 32768

A script with a `vllm:` policy uses the server of the same model, gpus, util and args if there is one, else it starts
one, which ends with the last script that uses it, whatever ends that (common/guard.py). With SWE_DAGGER_KEEPER=PID in
the environment it stays for the next script, for as long as the process PID lives: so run_loop.sh shares servers.

Each server has a directory under the cache: key, state.json, log, adapters. It listens on a loopback port and wants a
random key; vLLM asks for the key below /v1 alone, and other users of this machine can reach what lies elsewhere. An
adapter is copied and served under a name made of its hash: weights that change under one name would be mixed up with
cached ones. A server that was started without any adapter takes none (room for them costs memory and speed).

$SWE_DAGGER_VLLM names the program, by default the `vllm` beside this Python, or else on PATH.
Not here: servers on other machines (openai:MODEL@URL), more than one node.
"""

import atexit
import contextlib
import dataclasses
import fcntl
import http.client
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from itertools import takewhile
from pathlib import Path

from common import guard, models
from common.embedded import cache_dir, model_path
from common.errors import InputError, StageError
from common.hf_policy import hash_adapter
from common.run import ROOT, hash_json

START_LIMIT = 3600.0  # seconds until a server must be up; most of them go to fetching the weights
RANKS = (64, 128, 256, 320, 512)  # what a server makes room for: the first that is enough for its adapters
FORM = "vllm:MODEL[,adapter=DIR][,gpus=0+1][,util=0.4][,args=...]"


@dataclasses.dataclass(frozen=True)
class Spec:
    """What follows `vllm:`."""

    model: str
    adapter: str | None = None
    gpus: str | None = None
    util: str | None = None
    args: str = ""

    @property
    def folder(self) -> Path:
        """Where its server lives. One for all adapters; each machine has its own, for homes are shared."""
        same = dataclasses.asdict(self) | {"adapter": None, "model": _absolute(self.model), "gpus": self.devices()}
        return _servers() / f"{Path(self.model).name[:60]}-{hash_json(same)}"

    def devices(self) -> str | None:
        """What its server gets as CUDA_VISIBLE_DEVICES; raises InputError for a GPU that this process must not see."""
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        numbers = self.gpus and [int(number) for number in self.gpus.split("+")]
        if not (numbers and visible):
            return self.gpus and self.gpus.replace("+", ",")
        if max(numbers) >= len(visible):
            raise InputError(f"vllm:{self.model}: gpus={self.gpus}: CUDA_VISIBLE_DEVICES={','.join(visible)} names only "
                             f"{len(visible)} of them, numbers 0 to {len(visible) - 1}")  # fmt: skip
        return ",".join(visible[number] for number in numbers)

    def option(self, *names: str) -> str | None:
        """The value of an option in args."""
        words = shlex.split(self.args)
        words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
        return next((after for word, after in zip(words, words[1:]) if word in names), None)


def parse(rest: str) -> Spec:
    """Read a spec; raises InputError. A script calls it for all its policies before it asks one: see _ranks."""
    start, _, args = rest.partition(",args=")
    model, *options = re.split(r",(?=[a-z_]+=)", start)
    given = dict(option.split("=", 1) for option in options)
    names = {"adapter", "gpus", "util"}
    if not model or set(given) - names or not all(given.values()) or len(given) < len(options):
        raise InputError(f"vllm:{rest}: wanted {FORM}")
    spec = Spec(model, args=args, **given)
    if spec.gpus and not re.fullmatch(r"\d+(\+\d+)*", spec.gpus):
        raise InputError(f"vllm:{rest}: gpus={spec.gpus}: numbers of GPUs, as gpus=0+1")
    spec.devices()
    if spec.util and not (re.fullmatch(r"\d*\.?\d+", spec.util) and 0 < float(spec.util) <= 1):
        raise InputError(f"vllm:{rest}: util={spec.util}: a share of the GPU's memory, as util=0.4")
    try:
        shlex.split(args)
    except ValueError as error:
        raise InputError(f"vllm:{rest}: args= cannot be split into words ({error})") from None
    if model.startswith((".", "/", "~")) and not Path(_absolute(model)).is_dir():
        raise InputError(f"vllm:{model}: no such directory")
    if spec.adapter:
        models.check_adapter(spec.adapter, model)
        config = json.loads((Path(spec.adapter) / "adapter_config.json").read_text())
        rank = max([config.get("r") or 1, *(config.get("rank_pattern") or {}).values()])
        if rank > RANKS[-1]:
            raise InputError(f"{spec.adapter}: rank {rank}, and vLLM serves adapters up to rank {RANKS[-1]}")
        _ranks[spec.folder] = max(rank, _ranks.get(spec.folder, 0))
    return spec


_ranks: dict[Path, int] = {}  # server -> the largest rank among the adapters that this process will give it
_used: dict[Path, object] = {}  # server -> our lock on its `users`


# ---------------------------------------------------------------- a server


@dataclasses.dataclass(frozen=True)
class Server:
    """One that is up. `stays`: somebody started it by hand, and stops it by hand."""

    folder: Path
    model: str
    url: str
    key: str
    adapters: bool
    stays: bool

    def alive(self) -> bool:
        return _state(self.folder).get("url") == self.url and guard.alive(self.folder)

    def adapter(self, directory: str) -> str:
        """Load an adapter unless it is there, and say under which name. Raises InputError where vLLM refuses it."""
        if not self.adapters:
            raise InputError(f"the server of {self.model} was started without adapters: python -m common.serve stop; "
                             "then start it with adapter=, or let the script start it")  # fmt: skip
        name = f"adapter-{hash_adapter(directory)[:16]}"
        if name in self._names():
            return name
        copy = self.folder / "adapters" / name
        if not copy.exists():
            half = copy.with_name(f"{name}.{os.getpid()}")
            half.mkdir(parents=True, exist_ok=True)
            for file in Path(directory).glob("adapter_*"):
                shutil.copy(file, half)
            with contextlib.suppress(OSError):  # another process was first
                half.rename(copy)
        try:
            self._call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(copy)}, timeout=600)
        except urllib.error.HTTPError as error:
            words = error.read().decode(errors="replace")
            if "already been loaded" not in words:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    words = json.loads(words)["error"]["message"]
                words = " ".join(words.split())[:400]
                raise InputError(f"{directory}: vLLM does not take this adapter: {words} (a larger rank: start the "
                                 "server with this adapter, or args=--max-lora-rank N)") from None  # fmt: skip
        return name

    def healthy(self) -> bool:
        """Whether it answers, and is ours: somebody else may have got the port."""
        try:
            self._call("/health")
            return self.model in self._names()
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            return False

    def context(self) -> int | None:
        """Tokens of the longest conversation that it has room for; None where it does not say."""
        return next((card.get("max_model_len") for card in self._cards() if card["id"] == self.model), None)

    def _names(self) -> set[str]:
        return {card["id"] for card in self._cards()}

    def _cards(self) -> list[dict]:
        return json.loads(self._call("/v1/models"))["data"]

    def _call(self, path: str, body: dict | None = None, timeout: float = 30.0) -> bytes:
        request = urllib.request.Request(
            self.url.removesuffix("/v1") + path, body and json.dumps(body).encode(),
            {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"})  # fmt: skip
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy can reach our loopback
        with direct.open(request, timeout=timeout) as reply:
            return reply.read()


def start(spec: Spec, keeper: str | None = None) -> Server:
    """The server of a spec, a running one or a new one; returns when it is up. Raises StageError with its last error.

    keeper: "" lets it stay until it is stopped. It lives as long as this process does, unless it fails or is stopped.
    """
    from tqdm import tqdm

    def say(words: str) -> None:
        tqdm.write(f"vllm serve {spec.model}: {words}", file=sys.stderr)

    _servers().mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(_servers() / "starting", "w") as turn:  # one after the other: vLLM measures what memory is free
        if not guard.free(turn):
            say("waiting for another server to come up")
            fcntl.flock(turn, fcntl.LOCK_EX)
        _use(spec.folder)
        for folder in _servers().glob("*/"):
            guard.sweep(folder)
            if _server(folder) is None:
                _gone(folder)  # one that is just ending: its memory is needed
        guard_process = None
        if not guard.alive(spec.folder):
            guard_process = _launch(spec, keeper)
            say(f"starting, log: {spec.folder / 'log'}")
        elif keeper == "":
            (spec.folder / "keeper").write_text("")
        try:
            server = _wait(spec, guard_process, say)
        except BaseException:
            if guard_process:
                (spec.folder / "stop").touch()
            raise
    if spec.folder in _ranks and not server.adapters:
        server.adapter(spec.adapter)  # says what to do
    return server


def find(spec: Spec) -> Server | None:
    """The server of a spec if there is one, up or coming up."""
    return _server(spec.folder) if guard.alive(spec.folder) else None


def stop(folder: Path) -> None:
    """End a server, whoever uses it; returns when its processes are gone."""
    if guard.alive(folder):
        (folder / "stop").touch()
        _gone(folder)


def leave() -> None:
    """This process uses no server any more, and those that nobody uses are gone when this returns."""
    for folder in list(_used):
        lock = _used.pop(folder)
        last = guard.free(lock) and not guard.keeps(folder)
        lock.close()
        if last:
            _gone(folder)


def last_words(folder: Path) -> str:
    """The last error in a server's log that says something, else its last line."""
    try:
        lines = (folder / "log").read_text(errors="replace").splitlines()[-2000:]
    except OSError:
        return "it left no log"
    # (EngineCore pid=1) ERROR 11-24 00:05:08 [core.py:317] ValueError: ...
    lines = [re.sub(r"^(\(.*?pid=\d+\) )?([A-Z]+ \S+ [\d:]+ \[\S+\] )?", "", line).strip() for line in lines]
    said = [n for n, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception): |.*\berror: ", line)
            and not re.search("root cause above|Engine core init", line)]  # fmt: skip
    if said:
        found = " ".join(takewhile(lambda line: "Traceback" not in line, lines[said[-1] :][:3]))
    else:
        found = next((line for line in reversed(lines) if line), "nothing in its log")
    return f"{found[:500]} (log: {folder / 'log'})"


def _servers() -> Path:
    return cache_dir() / "servers" / socket.gethostname()


def _absolute(model: str) -> str:
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def _state(folder: Path) -> dict:
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        return {}


def _server(folder: Path) -> Server | None:
    state = _state(folder)
    try:
        stays = not (folder / "keeper").read_text()
    except OSError:
        stays = False
    try:
        key = (folder / "key").read_text()
    except OSError:
        return None  # it is just going
    return Server(folder, state["model"], state["url"], key, state["adapters"], stays) if state else None


def _use(folder: Path) -> None:
    """Be a user of the server in `folder`, now or soon; waits for one that is just ending."""
    if folder not in _used:
        folder.mkdir(exist_ok=True, mode=0o700)
        lock = open(folder / "users", "a+")
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not _used:
            atexit.register(leave)
        _used[folder] = lock


def _gone(folder: Path) -> None:
    until = time.monotonic() + 3 * guard.PATIENCE
    while guard.alive(folder) and time.monotonic() < until:
        time.sleep(0.05)


def _command(spec: Spec, port: int) -> list[str]:
    rank, gpus = _ranks.get(spec.folder), (spec.gpus or "").split("+")
    command = [
        executable(), "serve", model_path(_absolute(spec.model)), "--served-model-name", spec.model,
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "auto",
        "--enable-prefix-caching", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    if spec.util:
        command += ["--gpu-memory-utilization", spec.util]
    copies = int(spec.option("--data-parallel-size", "-dp") or 1)
    if copies > 1:  # with a front end for each, which is its default, vLLM refuses to load adapters
        command += ["--api-server-count", "1"]
    if len(gpus) > 1:
        command += ["--tensor-parallel-size", str(max(1, len(gpus) // copies))]
    if rank:
        command += ["--enable-lora", "--max-lora-rank", str(next(enough for enough in RANKS if enough >= rank))]
    return command + shlex.split(spec.args)  # last: what is said there holds


def _launch(spec: Spec, keeper: str | None) -> subprocess.Popen:
    """Start the guard, and with it the server."""
    folder = spec.folder
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = _command(spec, port)
    key = secrets.token_urlsafe(32)
    environment = os.environ | {"VLLM_API_KEY": key, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "DO_NOT_TRACK": "1"}
    if spec.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = spec.devices()
    if keeper is None and (pid := os.environ.get("SWE_DAGGER_KEEPER")):
        keeper = guard.name(int(pid))
    (folder / "keeper").unlink(missing_ok=True)  # of one that never came up
    if keeper is not None:
        (folder / "keeper").write_text(keeper)
    with open(os.open(folder / "key", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(key)
    (folder / "stop").unlink(missing_ok=True)
    if (folder / "log").exists():
        (folder / "log").replace(folder / "log.1")
    state = {"model": spec.model, "url": f"http://127.0.0.1:{port}/v1", "adapters": folder in _ranks,
             "started": time.time(), "command": command, "cwd": os.getcwd()}  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    # Locked here and inherited, so that there is no moment in which the server is on its way and not seen.
    with open(folder / "alive", "w") as alive, open(folder / "log", "ab") as log:
        fcntl.flock(alive, fcntl.LOCK_EX)
        return subprocess.Popen([sys.executable, "-m", "common.guard", folder], cwd=ROOT, env=environment, stdout=log,
                                stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                                pass_fds=[alive.fileno()])  # fmt: skip


def _wait(spec: Spec, process: subprocess.Popen | None, say) -> Server:
    """Wait until the server is up; says so every ten seconds. Raises StageError if it ends or takes too long."""
    began = said = time.monotonic()
    while True:
        if process:
            process.poll()  # collect it if it has ended
        server = _server(spec.folder)
        if not guard.alive(spec.folder) or server is None:
            raise StageError(f"vllm serve {spec.model} did not come up: {last_words(spec.folder)}")
        if server.healthy():
            if process:
                say(f"up after {time.monotonic() - began:.0f} s")
            return server
        if time.monotonic() - began > START_LIMIT:
            raise StageError(f"vllm serve {spec.model} is not up after {START_LIMIT:.0f} s: {last_words(spec.folder)}")
        if time.monotonic() - said > 10:
            said = time.monotonic()
            say(f"{said - began:.0f} s")
        time.sleep(0.1)


def executable() -> str:
    """The vllm program. Raises InputError if there is none."""
    named = os.environ.get("SWE_DAGGER_VLLM")
    beside = Path(sys.executable).with_name("vllm")
    found = shutil.which(named or (str(beside) if beside.exists() else "vllm"))
    if not found:
        raise InputError(f"no vllm program at {named} (SWE_DAGGER_VLLM)" if named else
                         "vllm: is for machines with a GPU, and vllm is not installed: pip install the version that "
                         "requirements.txt names, or use hf: (no server) or openai: (a server that runs)")  # fmt: skip
    return found


# ---------------------------------------------------------------- the command line


def main(words: list[str]) -> None:
    what, specs = words[0] if words else "", [word for word in words[1:] if word.startswith("vllm:")]
    if what not in ("start", "status", "stop") or what == "start" and not words[1:] or what == "status" and words[1:]:
        raise InputError("usage: python -m common.serve start SPEC... | status | stop [SPEC...]; SPEC: " + FORM)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parsed = [parse(word.removeprefix("vllm:")) for word in specs]
    if what == "start":
        for spec in parsed:
            _show(start(spec, keeper="").folder)
        return
    folders = [spec.folder for spec in parsed] if words[1:] else sorted(_servers().glob("*/"))
    for folder in folders:
        guard.sweep(folder)
        if guard.alive(folder):
            if what == "stop":
                stop(folder)
                print(f"stopped {folder.name}", file=sys.stderr)
            else:
                _show(folder)


def _show(folder: Path) -> None:
    """One server, in words that can be used: openai:MODEL@URL with OPENAI_API_KEY=$(cat KEYFILE)."""
    server, state = _server(folder), _state(folder)
    if server:
        up = "up" if server.healthy() else "not up"
        print(f"{server.model} {up} url={server.url} key={folder / 'key'} log={folder / 'log'} "
              f"adapters={'yes' if server.adapters else 'no'} minutes={(time.time() - state['started']) / 60:.0f}",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, StageError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2 if isinstance(problem, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(1)
