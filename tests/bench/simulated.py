"""A simulated server and simulated environments, with the same work for every engine.

    python tests/bench/simulated.py server                  prints its port; at the end of its stdin, what it has seen
    python tests/bench/simulated.py run SCRIPT ARGUMENTS    one of our scripts, with the simulated environment as sandbox

`Plan`, from the environment variable SIMULATED, says for every turn of every task how many tokens the answer has, how
long the command takes and how much it prints: drawn by its seed, so all engines do the same work. The server answers
`POST /v1/chat/completions`: a turn waits for its prefill (of what is new since the turn before), then, first come first
served, for one of `at_once` places, then for tokens / rate. The model's name is the fence that its command stands in.
Environments sleep. `Environment` is for mini-swe-agent. Nothing here is imported from the project but in `run`.
"""

import asyncio
import heapq
import json
import math
import os
import random
import resource
import runpy
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = Path(__file__).read_text() * 20  # what commands print


@dataclass
class Plan:
    tasks: int
    turns: int = 8  # of a trajectory, the last of which submits
    even: bool = True  # else half to one and a half times as many
    long: int = 0  # the first so many tasks have three times as many
    tokens: int = 80  # of an answer: half to one and a half times
    rate: float = 64.0  # tokens/s of one answer
    at_once: int = 16  # answers that are decoded at once
    prefill: float = 10_000.0  # tokens/s
    seconds: float = 0.7  # of a command: the median of a lognormal distribution
    spread: float = 1.0  # its sigma
    slots: int = 16  # commands at once
    printed: int = 5000  # characters that a command prints: half to one and a half times
    hold: int = 0  # the answers to last turns wait until so many of them are asked for
    seed: int = 0

    def _draw(self, *place) -> random.Random:
        return random.Random(f"{self.seed}/{place}")

    def turns_of(self, task: int) -> int:
        if task < self.long:
            return 3 * self.turns
        return self.turns if self.even else self._draw("turns", task).randint(self.turns // 2, self.turns * 3 // 2)

    def tokens_of(self, task: int, turn: int) -> int:
        return self._draw("tokens", task, turn).randint(self.tokens // 2, self.tokens * 3 // 2)

    def seconds_of(self, task: int, turn: int) -> float:
        return self._draw("seconds", task, turn).lognormvariate(math.log(self.seconds), self.spread)

    def printed_by(self, task: int, turn: int) -> int:
        return self._draw("printed", task, turn).randint(self.printed // 2, self.printed * 3 // 2)

    def decoding(self, task: int, turn: int) -> float:
        return self.tokens_of(task, turn) / self.rate

    def prefilling(self, task: int, turn: int) -> float:
        """Seconds; what was there at the turn before is in the server's cache."""
        return (self.printed_by(task, turn - 1) / 4 if turn else 500) / self.prefill

    def answer(self, task: int, turn: int, fence: str) -> str:
        last = turn == self.turns_of(task) - 1
        submit = "submit" if fence == "bash" else "submit_as_mini_does"
        command = f"{submit}" if last else f"step {task} {turn}"
        return f"{TEXT[:4 * self.tokens_of(task, turn)].replace('`', ' ')}\n```{fence}\n{command}\n```"

    def output(self, task: int, turn: int) -> str:
        length = self.printed_by(task, turn)
        start = (task * 31 + turn * 7) % 1000
        return TEXT[start:start + length]

    def limits(self) -> dict[str, float]:
        """Seconds that no engine can beat, by what sets them."""
        places = [(task, turn) for task in range(self.tasks) for turn in range(self.turns_of(task))]
        alone = dict.fromkeys(range(self.tasks), 0.0)
        decode = commands = 0.0
        for task, turn in places:
            last = turn == self.turns_of(task) - 1
            command = 0.0 if last else self.seconds_of(task, turn)
            alone[task] += self.prefilling(task, turn) + self.decoding(task, turn) + command
            decode += self.decoding(task, turn)
            commands += command
        return {"longest trajectory": max(alone.values()), "server": decode / self.at_once,
                "environments": commands / self.slots}


def plan() -> Plan:
    return Plan(**json.loads(os.environ["SIMULATED"]))


# ---------------------------------------------------------------- the server


class Server:
    """The times of its places are kept as numbers, so that a timer which is late makes no place late."""

    def __init__(self):
        self.plan = plan()
        self.free = [0.0] * self.plan.at_once  # when each place is free
        self.held: list = []
        self.first = self.last = None
        self.turns, self.again, self.late, self.tokens = set(), 0, 0.0, 0

    def ask(self, body: bytes, reply) -> None:
        """One request; reply(text) is called when its time has come."""
        now = time.monotonic()
        self.first = self.first or now
        request = json.loads(body)
        turn = sum(message["role"] == "assistant" for message in request["messages"])
        task = int(request["messages"][1]["content"].split("task number ")[1].split()[0])
        self.again += (task, turn) in self.turns
        self.turns.add((task, turn))
        text, out = self.plan.answer(task, turn, request["model"]), self.plan.tokens_of(task, turn)
        usage = {"prompt_tokens": len(body) // 4, "completion_tokens": out, "total_tokens": len(body) // 4 + out}
        message = {"role": "assistant", "content": text}
        answer = json.dumps({"id": f"{task}-{turn}", "object": "chat.completion", "created": 1, "model": "simulated",
                             "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage})
        loop = asyncio.get_running_loop()

        def send(due: float) -> None:
            self.last = time.monotonic()
            self.late = max(self.late, self.last - due)
            self.tokens += out
            reply(answer)

        def decode(ready: float) -> None:
            end = max(ready, heapq.heappop(self.free)) + self.plan.decoding(task, turn)
            heapq.heappush(self.free, end)
            loop.call_at(end, send, end)

        if self.plan.hold and turn == self.plan.turns_of(task) - 1:
            self.held.append(send)
            if len(self.held) == self.plan.hold:
                while self.held:
                    self.held.pop()(time.monotonic())
            return
        ready = now + self.plan.prefilling(task, turn)
        loop.call_at(ready, decode, ready)

    def seen(self) -> dict:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {"first": self.first, "last": self.last, "turns": len(self.turns), "again": self.again,
                "tokens": self.tokens, "late": self.late, "cpu": usage.ru_utime + usage.ru_stime}


class Connection(asyncio.Protocol):
    """As much HTTP/1.1 as the clients speak: bodies of a known length, one request at a time, kept alive."""

    server: Server

    def connection_made(self, transport) -> None:
        self.transport, self.data, self.length = transport, bytearray(), None

    def data_received(self, data: bytes) -> None:
        self.data += data
        if self.length is None:
            head, end, rest = self.data.partition(b"\r\n\r\n")
            if not end:
                return
            fields = dict(line.lower().split(b":", 1) for line in bytes(head).split(b"\r\n")[1:])
            self.data, self.length = rest, int(fields.get(b"content-length", 0))
        if len(self.data) >= self.length:
            body, self.data, self.length = bytes(self.data), bytearray(), None
            self.server.ask(body, self.reply)

    def reply(self, text: str) -> None:
        data = text.encode()
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data)
                             + data)


async def serve() -> None:
    loop = asyncio.get_running_loop()
    Connection.server = Server()
    listening = await loop.create_server(Connection, "127.0.0.1", 0, backlog=1024)
    print(listening.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    print(json.dumps(Connection.server.seen()), flush=True)


# ---------------------------------------------------------------- the environments


class Box:
    """A sandbox of ours. The slots are those of --slots."""

    def __init__(self, *_, **__):
        self.plan = plan()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass

    def run(self, command: str):
        from common.sandbox import CommandResult

        place = tuple(map(int, command.split()[1:]))
        seconds = self.plan.seconds_of(*place)
        time.sleep(seconds)
        return CommandResult(0, self.plan.output(*place), seconds, False, False)

    def diff(self) -> str:
        return "the patch"


class Environment:
    """An environment of mini-swe-agent's."""

    slots: threading.Semaphore | None = None
    lock = threading.Lock()

    def __init__(self):
        self.plan = self.config = plan()
        with self.lock:
            Environment.slots = Environment.slots or threading.Semaphore(self.plan.slots)

    def execute(self, action: dict, cwd: str = "") -> dict:
        from minisweagent.exceptions import Submitted

        if action["command"] == "submit_as_mini_does":
            extra = {"exit_status": "Submitted", "submission": "the patch"}
            raise Submitted({"role": "exit", "content": "the patch", "extra": extra})
        place = tuple(map(int, action["command"].split()[1:]))
        with self.slots:
            time.sleep(self.plan.seconds_of(*place))
        return {"output": self.plan.output(*place), "returncode": 0, "exception_info": ""}

    def get_template_vars(self, **more) -> dict:
        return asdict(self.plan) | more

    def serialize(self) -> dict:
        return {}


def run_script(script: str) -> None:
    sys.path.insert(0, str(ROOT))
    from common import sandbox

    sandbox.open_sandbox = Box
    sys.argv[:] = sys.argv[2:]
    runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    asyncio.run(serve()) if sys.argv[1] == "server" else run_script(sys.argv[2])
