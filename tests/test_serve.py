"""Servers of our own, with a stand-in for vLLM: started, shared, stopped, and gone whoever is killed."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common import chat, guard, policies, serve, vllm_policy
from common.errors import InfraError, InputError, StageError

ROOT = Path(__file__).resolve().parent.parent
CHAT = [{"role": "user", "content": "hello"}]
# A script that uses a server, says so, and waits to be killed.
SCRIPT = """import sys, time
from common import serve
print(serve.start(serve.parse(sys.argv[1].removeprefix("vllm:"))).model, flush=True)
time.sleep(float(sys.argv[2]))"""


@pytest.fixture(autouse=True)
def program(tmp_path, monkeypatch):
    path = tmp_path / "vllm"
    path.write_text(f"#!{sys.executable} -IS\n" + (ROOT / "tests/fake_vllm.py").read_text())
    path.chmod(0o755)
    monkeypatch.setenv("SWE_DAGGER_VLLM", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SWE_DAGGER_KEEPER", raising=False)
    monkeypatch.setattr(vllm_policy.models, "load_tokenizer", no_tokenizer)
    yield path
    serve.leave()
    for folder in servers():
        serve.stop(folder)


def no_tokenizer(model: str):
    """The models here are names without files, and no hub is to be asked for them."""
    raise InputError(f"{model}: no such directory")


def servers() -> list[Path]:
    return sorted(serve._servers().glob("*/"))


def groups(path) -> list[int]:
    """The processes of stand-ins that run, children included."""
    found = subprocess.run(["pgrep", "-f", f"{path} serve"], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found if guard._members(int(pid))]


def adapter(path, weights: str = "w", rank: int = 8) -> str:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"r": rank, "base_model_name_or_path": "m"}))
    (path / "adapter_model.safetensors").write_text(weights)
    return str(path)


def open_policy(spec: str):
    return policies.open_policy(spec, role="student", temperature=0.0, top_p=1.0, max_new_tokens=4)


def ask(policy, words: str = "hello") -> str:
    return policy.act({}, [{"role": "user", "content": words}], seed=1, episode="e", turn=0, attempt=0).text


def command(*words: str):
    return subprocess.run([sys.executable, "-m", "common.serve", *words], cwd=ROOT, capture_output=True, text=True)


def script(spec: str, seconds: float = 60) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, spec, str(seconds)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, text=True)  # fmt: skip


def wait_until(true) -> None:
    until = time.monotonic() + 10
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


# ---------------------------------------------------------------- specs


@pytest.mark.parametrize("spec, words", [
    ("vllm:", "no such policy"), ("vllm:m,gpu=0", "wanted vllm:MODEL"), ("vllm:m,adapter=a,adapter=b", "wanted vllm:MODEL"), ("vllm:m,gpus=a", "numbers of GPUs"),
    ("vllm:m,util=2", "a share"), ("vllm:m,util=.", "a share"), ("vllm:m,args='", "cannot be split"),
    ("vllm:/no/such", "no such directory"), ("vllm:m,adapter=/no/such", "adapter_config.json is missing"),
])  # fmt: skip
def test_bad_specs(spec, words):
    with pytest.raises(InputError, match=words):
        open_policy(spec)


def test_a_spec_names_a_server_whatever_the_adapter(tmp_path):
    path = adapter(tmp_path / "a")
    spec = serve.parse(f"m,adapter={path},gpus=0+1,util=0.4,args=--max-model-len 2048,util=1 -q fp8")
    assert (spec.adapter, spec.gpus, spec.util) == (path, "0+1", "0.4")
    assert spec.option("--quantization", "-q") == "fp8" and spec.option("--max-model-len") == "2048,util=1"
    assert spec.folder == serve.parse("m,gpus=0+1,util=0.4,args=--max-model-len 2048,util=1 -q fp8").folder
    others = ["m", "m,gpus=0", "m,util=0.4", "m,args=--seed 1", "n"]
    assert len({serve.parse(other).folder for other in others} | {spec.folder}) == 6


def test_the_record_holds_neither_port_nor_key(tmp_path):
    policy = open_policy(f"vllm:m,adapter={adapter(tmp_path / 'a')},gpus=0,args=--quantization=bitsandbytes")
    assert policy.describe() == {
        "model": "vllm:m", "adapter": str(tmp_path / "a"), "adapter_hash": policy.adapter_hash,
        "quantisation": "bitsandbytes", "sampling": {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 4},
        "extra": {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}}  # fmt: skip
    assert open_policy("vllm:m").describe()["quantisation"] == "none"
    assert not servers()  # nothing starts before the first question


def test_the_command_line_of_a_server(tmp_path):
    """Several GPUs are tensor parallel unless args says otherwise; what args says comes last, so it holds."""
    def started(rest):
        return " ".join(serve._command(serve.parse(rest), 80))

    assert "--gpu-memory-utilization 0.4 --tensor-parallel-size 2 --max-model-len 99" in started(
        "m,gpus=0+1,util=0.4,args=--max-model-len 99")
    assert "--api-server-count 1 --tensor-parallel-size 1 --data-parallel-size=2" in started(
        "m,gpus=2+3,args=--data-parallel-size=2")
    assert "lora" not in started("m")
    assert "--enable-lora --max-lora-rank 128" in started(f"m,adapter={adapter(tmp_path / 'a', rank=65)}")


# ---------------------------------------------------------------- one server


def test_what_is_special_for_the_model_is_text_for_its_server(program, tmp_path, monkeypatch):
    """03_train.py makes every special token inert, "</s>" and "<filename>" too: the server must see what is trained on."""
    from tests import tiny

    model = tiny.model_dir(tmp_path / "model", arch="llama", template="tools")
    monkeypatch.undo()
    monkeypatch.setenv("SWE_DAGGER_VLLM", str(program))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "<s>" in chat.special_tokens(tiny.tokenizer("tools"))
    assert ask(open_policy(f"vllm:{model}"), "x <s> y").endswith(": x < s> y")


def test_two_copies_of_a_model_take_adapters(tmp_path):
    """vLLM has a front end for each copy, and then refuses to start where adapters may be loaded."""
    path = adapter(tmp_path / "a")
    assert ask(open_policy(f"vllm:m,adapter={path},args=--data-parallel-size 2")).startswith("adapter-")


def test_gpus_are_counted_among_those_that_are_visible(program, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7f,6")
    one, other = serve.parse("m,gpus=1+2"), serve.parse("m,gpus=0")
    assert (one.devices(), other.devices(), serve.parse("m").devices()) == ("GPU-7f,6", "4", None)
    here = other.folder
    with pytest.raises(InputError, match=r"gpus=0\+3: CUDA_VISIBLE_DEVICES=4,GPU-7f,6 names only 3 of them, numbers 0 to 2"):
        ask(open_policy("vllm:m,gpus=0+3"))
    assert ask(open_policy("vllm:m,gpus=0")) == "m: hello"
    (pid,) = groups(program)
    assert b"CUDA_VISIBLE_DEVICES=4\0" in Path(f"/proc/{pid}/environ").read_bytes()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert serve.parse("m,gpus=0").folder != here
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert serve.parse("m,gpus=1+2").devices() == "1,2"


def test_a_server_with_less_room_than_max_context_is_refused(program):
    """vLLM shortens what does not fit into its memory without an error; the record would say that the model did it."""
    kwargs = dict(role="student", temperature=0.0, top_p=1.0, max_new_tokens=4)
    with pytest.raises(InputError, match="room for conversations of 4096 tokens, and --max-context is 4097"):
        ask(policies.open_policy("vllm:m", max_context=4097, **kwargs))
    assert ask(policies.open_policy("vllm:m", max_context=4096, **kwargs)) == "m: hello"


def test_a_policy_starts_asks_and_leaves(program, tmp_path, capfd):
    policy = open_policy("vllm:m")
    assert ask(policy) == "m: hello"
    (folder,) = servers()
    assert groups(program) and "up after" in capfd.readouterr().err
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700
    key, state = (folder / "key").read_text(), (folder / "state.json").read_text()
    assert len(key) > 40 and key not in state  # the command line, which everybody can read, is in there
    serve.leave()
    assert not groups(program)
    assert sorted(path.name for path in folder.iterdir()) == ["alive", "log", "users"]


def test_the_servers_own_error_is_reported(program):
    with pytest.raises(StageError, match="did not come up: ValueError: Free memory .*log: .*/log"):
        ask(open_policy("vllm:m,args=--fail 'Free memory on device'"))
    with pytest.raises(StageError, match="did not come up: vllm serve: error: unrecognized arguments: --bogus"):
        ask(open_policy("vllm:m,args=--bogus"))
    assert not groups(program)


def test_no_program(program, monkeypatch, tmp_path):
    monkeypatch.setenv("SWE_DAGGER_VLLM", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="no vllm program at .*nothing"):
        ask(open_policy("vllm:m"))
    monkeypatch.delenv("SWE_DAGGER_VLLM")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(InputError, match="machines with a GPU.*requirements.txt"):
        ask(open_policy("vllm:m"))


def test_adapters_get_a_name_of_their_own(tmp_path):
    """Weights that change under one path are another adapter; the same weights elsewhere are the same."""
    path = adapter(tmp_path / "a", "first")
    first = ask(open_policy(f"vllm:m,adapter={path}"))
    assert ask(open_policy(f"vllm:m,adapter={path}")) == first
    assert ask(open_policy(f"vllm:m,adapter={adapter(tmp_path / 'b', 'first')}")) == first
    (tmp_path / "a/adapter_model.safetensors").write_text("second")
    second = open_policy(f"vllm:m,adapter={path}")
    (tmp_path / "a/adapter_model.safetensors").unlink()  # not needed any more once it is served
    with pytest.raises(InputError, match="rank 600"):
        open_policy(f"vllm:m,adapter={adapter(tmp_path / 'c', rank=600)}")
    (tmp_path / "a/adapter_model.safetensors").write_text("second")
    assert ask(second) != first and ask(second).startswith("adapter-")
    assert ask(open_policy("vllm:m")) == "m: hello"
    assert len(servers()) == 1
    with pytest.raises(InputError, match="rank 128 is greater.*args=--max-lora-rank N"):
        ask(open_policy(f"vllm:m,adapter={adapter(tmp_path / 'd', rank=128)}"))


def test_student_and_teacher_of_one_model_share_a_server_that_takes_adapters(tmp_path):
    student, teacher = open_policy("vllm:m"), open_policy(f"vllm:m,adapter={adapter(tmp_path / 'a')}")
    assert ask(student) == "m: hello" and ask(teacher) != "m: hello"
    assert len(servers()) == 1


# ---------------------------------------------------------------- who stops it


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_server_ends_with_its_script(program, number):
    running = script("vllm:m", 0.0 if number is None else 60)
    assert running.stdout.readline() == "m\n"
    if number:
        assert len(groups(program)) == 1
        running.send_signal(number)
    running.wait()
    wait_until(lambda: not groups(program) and not guard.alive(servers()[0]))


def test_two_scripts_share_one_server_and_the_last_one_ends_it(program):
    one, other = script("vllm:m,args=--slow 0.5"), script("vllm:m,args=--slow 0.5")  # started at the same time
    assert one.stdout.readline() == other.stdout.readline() == "m\n"
    assert len(groups(program)) == 1 and len(servers()) == 1
    one.kill()
    one.wait()
    time.sleep(0.5)
    assert groups(program)
    other.kill()
    other.wait()
    wait_until(lambda: not groups(program))


def test_when_the_first_process_is_killed_the_others_go_too(program):
    """vLLM's engine lives on when its API server is killed, and keeps the GPU."""
    policy = open_policy("vllm:m")
    ask(policy)
    (first,) = groups(program)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not guard._members(first))


def test_children_that_ignore_sigterm_go_too(program, monkeypatch):
    monkeypatch.setattr(guard, "PATIENCE", 0.3)
    process = subprocess.Popen(["bash", "-c", "(trap '' TERM; echo; exec sleep 60) & exec sleep 60"],
                               start_new_session=True, stdout=subprocess.PIPE)  # fmt: skip
    process.stdout.readline()
    guard.end(program.parent, process)
    assert not guard._members(process.pid)


@pytest.mark.parametrize("by", ["status", "stop"])
def test_what_a_killed_guard_leaves_is_swept(program, by):
    running = script("vllm:m")
    running.stdout.readline()
    (folder,), (first,) = servers(), groups(program)
    guards = subprocess.run(["pgrep", "-f", f"common.guard {folder}"], capture_output=True, text=True).stdout.split()
    for pid in [*map(int, guards), running.pid]:
        os.kill(pid, signal.SIGKILL)
    running.wait()
    wait_until(lambda: not guard.alive(folder))
    assert guard._members(first)
    assert command(by).stdout == ""
    assert not guard._members(first) and not (folder / "group").exists()


@pytest.mark.parametrize("torn", ["", "12 3"])
def test_a_torn_note_of_the_group_stops_nobody(program, torn):
    folder = serve.parse("m").folder
    folder.mkdir(parents=True)
    (folder / "group").write_text(torn)
    guard.sweep(folder)
    assert not (folder / "group").exists()


def test_a_number_that_is_somebody_elses_by_now_is_left_alone(program):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True) as stranger:
        folder = serve.parse("m").folder
        folder.mkdir(parents=True)
        pid = stranger.pid
        for group in (f"{pid} 12345 {guard.boot()}", f"{pid} {guard.born(pid)} another-boot"):
            (folder / "group").write_text(group)
            guard.sweep(folder)
            assert not (folder / "group").exists() and stranger.poll() is None
        stranger.kill()


def test_an_interrupt_while_it_comes_up(program):
    running = script("vllm:m,args=--slow 60")
    wait_until(lambda: groups(program))
    running.send_signal(signal.SIGINT)
    running.wait()
    wait_until(lambda: not groups(program))


# ---------------------------------------------------------------- shared by hand, or by a loop


def test_start_status_stop(program, tmp_path):
    assert command("status").stdout == ""
    done = command("start", "oracle", "vllm:m")
    assert done.returncode == 0 and done.stdout.startswith("m up url=http://127.0.0.1:"), done.stderr
    (folder,) = servers()
    assert command("status").stdout == done.stdout
    assert command("start", "vllm:m").stdout == done.stdout  # once is enough
    assert ask(open_policy("vllm:m")) == "m: hello"
    serve.leave()
    assert len(groups(program)) == 1
    with pytest.raises(InputError, match="started without adapters"):
        ask(open_policy(f"vllm:m,adapter={adapter(tmp_path / 'a')}"))
    assert command("stop", "vllm:other", "oracle").stderr == ""
    assert command("stop").stderr == f"stopped {folder.name}\n"
    assert not groups(program)
    assert command("start", "vllm:m,args=--fail Kaputt").returncode == 1
    assert command().returncode == 2
    for bad in (["begin"], ["start"], ["start", "vllm:m,gpus=x"], ["status", "vllm:m"]):
        with pytest.raises(InputError):
            serve.main(bad)


def test_a_keeper_carries_a_server_from_one_script_to_the_next(program, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as keeper:
        monkeypatch.setenv("SWE_DAGGER_KEEPER", str(keeper.pid))
        for _ in range(2):
            running = script("vllm:m", 0)
            assert running.stdout.readline() == "m\n" and running.wait() == 0
            (pid,) = groups(program)
        keeper.kill()
    wait_until(lambda: not groups(program))


# ---------------------------------------------------------------- a server that dies


@pytest.fixture
def hasty(monkeypatch):
    from common import openai_policy

    monkeypatch.setattr(openai_policy, "BACKOFF", 0.01)


def test_a_server_that_dies_is_started_again(program, hasty):
    policy = open_policy("vllm:m")
    ask(policy)
    (first,) = groups(program)
    os.kill(first, signal.SIGKILL)
    said = []
    threads = [threading.Thread(target=lambda: said.append(ask(policy))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == ["m: hello"] * 4 and policy.restarts == 1
    assert len(groups(program)) == 1 and groups(program) != [first]


def test_not_for_ever(hasty, monkeypatch):
    monkeypatch.setattr(vllm_policy, "RESTARTS", 1)
    policy = open_policy("vllm:m")
    with pytest.raises(InfraError, match="the server died: .*loading.*; it was started again 1 times"):
        ask(policy, "die")


def test_one_that_was_started_by_hand_is_not_started_again(program, hasty):
    command("start", "vllm:m")
    policy = open_policy("vllm:m")
    ask(policy)
    command("stop")
    with pytest.raises(InfraError, match="the server died.*common.serve start brings it back"):
        ask(policy)
    assert not groups(program)
    command("start", "vllm:m")
    assert ask(policy) == "m: hello"


@pytest.mark.slow
def test_the_loop_shares_a_server_but_not_with_training(program, tmp_path):
    """Two stages before the training and one after it: two starts; none is alive while it trains, or at the end."""
    import tiny

    model = tiny.model_dir(tmp_path / "model")
    done = subprocess.run([ROOT / "run_loop.sh"], capture_output=True, text=True, env=os.environ | {
        "RUN": str(tmp_path / "run"), "STUDENT": f"vllm:{model},util=0.5", "MIX": "student", "ITERATIONS": "1",
        "SAMPLE": "1", "EVAL_TASKS": "toy:dev:1", "TEST_TASKS": "", "WORKERS": "2", "TRAIN_FLAGS": "--epochs 1",
        "AGENT_FLAGS": "--max-turns 2 --max-new-tokens 8"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = re.findall(r"^(?:== (?:iteration \d: )?(\w+))|(?:: (up) after)|^(stopped)", done.stderr, re.MULTILINE)
    assert " ".join(map("".join, said)) == "the up the collect relabel stopped train evaluate up report"
    wait_until(lambda: not groups(program))
    made = json.loads((tmp_path / "run/iter_001/eval/trajectories.jsonl").read_text())
    assert made["student"]["adapter"] == str(tmp_path / "run/iter_001/adapter")
    assert made["messages"][2]["content"].startswith("adapter-")
