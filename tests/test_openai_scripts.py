"""The scripts against a server that fails while they run: what becomes of trajectories, labels and the run itself."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from common import actions, jsonl, tasks, training_data
from tests import tiny
from tests.servers import Server, good, refuse
from tests.test_policies import act, open_policy
from tests.test_scripts import ROOT, say, script, summary, timeless

DOWN = refuse(503, "the engine is dead", headers={"retry-after": "0"})  # so that the script does not wait between tries
TURNS = [say("ls"), say("echo '# note' >> notes.txt"), say("cat notes.txt"), say("submit")]
STATEMENTS = [row["problem_statement"].strip() for row in tasks.load("toy:train:12")]


def model(handler):
    """A student that says TURNS, whatever the task is."""
    return good(TURNS[sum(m["role"] == "assistant" for m in handler.body["messages"])])


@pytest.fixture
def serve():
    servers = []

    def start(*script, **options):
        servers.append(Server(*script, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def collect(server, out, *more, n=3, ok=True, **options):
    return script("01_collect.py", "--tasks", f"toy:train:{n}", "--mix", "student", "--student",
                  f"openai:m@{server.url}", "--out", out, "--workers", 2, *more, ok=ok, **options)  # fmt: skip


def assistant(record):
    return [m for m in record["messages"] if m["role"] == "assistant"]


def test_a_context_refusal_ends_the_trajectory_and_its_patch_counts(serve, tmp_path):
    def short(handler):
        if sum(m["role"] == "assistant" for m in handler.body["messages"]) == 2:
            return refuse(400, "This model's maximum context length is 512 tokens.", "context_length_exceeded")
        return model(handler)

    done = collect(serve(short), tmp_path / "t.jsonl")
    assert summary(done)["exit_context_limit"] == "3" and summary(done)["infra_errors"] == "0"
    for record in jsonl.read(tmp_path / "t.jsonl", "trajectory"):
        assert len(assistant(record)) == 2 and "notes.txt" in record["patch"]
    assert not (tmp_path / "t.jsonl.infra.jsonl").exists()


@pytest.mark.slow
def test_an_outage_costs_one_try_of_one_trajectory(serve, tmp_path):
    """The second task's server is away at its second turn: five tries, an infra error; the others go on, and at the end
    it is tried again. The file is that of an undisturbed run."""
    tried = []

    def sick(handler):
        messages = handler.body["messages"]
        if messages[1]["content"] == STATEMENTS[1] and len(messages) == 4 and len(tried) < 5:
            tried.append(1)
            return DOWN
        return model(handler)

    done = collect(serve(sick), tmp_path / "t.jsonl")
    assert summary(done)["trajectories"] == "3" and len(tried) == 5
    (lost,) = map(json.loads, (tmp_path / "t.jsonl.infra.jsonl").read_text().splitlines())
    assert lost["exit_status"] == "infra_error" and len(assistant(lost)) == 1
    assert "given up after 5 tries" in lost["error"] and "the engine is dead" in lost["error"]
    collect(serve(model), tmp_path / "undisturbed.jsonl")
    assert timeless(tmp_path / "t.jsonl") == timeless(tmp_path / "undisturbed.jsonl")


@pytest.mark.slow
def test_a_run_of_failures_stops_early_and_the_same_command_goes_on(serve, tmp_path):
    dead = []

    def mortal(handler):
        if len(handler.body["messages"]) == 4 and handler.body["messages"][1]["content"] in STATEMENTS[2:]:
            dead.append(1)
        return DOWN if dead and not revived else model(handler)

    revived, server = [], serve(mortal)
    stopped = collect(server, tmp_path / "t.jsonl", n=12, ok=False)
    assert stopped.returncode == 1
    errors = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in stopped.stderr
    assert "failures of the machine in a row" in errors[0] and "the engine is dead" in errors[0]
    lost = (tmp_path / "t.jsonl.infra.jsonl").read_text().splitlines()
    assert 4 <= len(lost) <= 5 and len(server.requests) < 50  # 12 tasks, three rounds and five tries would be 180
    revived.append(1)
    assert summary(collect(server, tmp_path / "t.jsonl", n=12))["trajectories"] == "12"
    collect(serve(model), tmp_path / "undisturbed.jsonl", n=12)
    assert timeless(tmp_path / "t.jsonl") == timeless(tmp_path / "undisturbed.jsonl")


def test_an_interrupt_does_not_wait_for_the_server(serve, tmp_path):
    server = serve(lambda handler: time.sleep(30))
    command = [sys.executable, ROOT / "01_collect.py", "--tasks", "toy:train:2", "--mix", "student", "--student",
               f"openai:m@{server.url}", "--out", tmp_path / "t.jsonl"]  # fmt: skip
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not server.requests and time.monotonic() < deadline:
        time.sleep(0.05)
    asked = time.monotonic()
    os.kill(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=20)
    assert time.monotonic() - asked < 5
    assert running.returncode == 1 and "the same command goes on" in errors and "Traceback" not in errors


def test_each_server_gets_its_own_key_and_fields(serve, tmp_path):
    """01: the teacher's key and fields go to the teacher alone."""
    student, teacher = serve(model), serve(model)
    collect(student, tmp_path / "t.jsonl", "--mix", "turn", "--beta", 0.5, "--teacher", f"openai:t@{teacher.url}",
            "--teacher-key-env", "TEACHER_KEY", "--student-extra", '{"top_k": 5}', "--teacher-extra", '{"top_k": 7}',
            env=os.environ | {"TEACHER_KEY": "secret"})  # fmt: skip
    for server, key, top_k in ((student, "none", 5), (teacher, "secret", 7)):
        assert {headers["authorization"] for headers in server.headers} == {f"Bearer {key}"}
        assert {request["top_k"] for request in server.requests} == {top_k}
    for record in jsonl.read(tmp_path / "t.jsonl", "trajectory"):
        assert (record["student"]["extra"], record["teacher"]["extra"]) == ({"top_k": 5}, {"top_k": 7})


@pytest.mark.slow
def test_a_scored_teacher_gets_its_key_and_fields(serve, tmp_path):
    """04 scores whoever is given with --student, a teacher too."""
    server = serve(model)
    score = ["04_eval.py", "--tasks", "toy:dev:1", "--student", f"openai:m@{server.url}",
             "--teacher-key-env", "TEACHER_KEY"]  # fmt: skip
    env = os.environ | {"TEACHER_KEY": "secret"}
    script(*score, "--out", tmp_path / "e", "--student-extra", '{"top_k": 5}', env=env)
    assert server.headers[0]["authorization"] == "Bearer secret" and server.requests[0]["top_k"] == 5
    for answer, message in (
        (refuse(401, "Unauthorized"), "environment variable TEACHER_KEY"),
        (refuse(404, "The model `m` does not exist."), "its models: qwen3-8b"),
    ):
        server.script, server.models = [answer], ["qwen3-8b"]
        done = script(*score, "--out", tmp_path / "f", "--overwrite", ok=False, env=env)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    done = script(*score, "--out", tmp_path / "g", "--student-extra", '{"temperature": 1}', ok=False, env=env)
    assert done.returncode == 2 and "--student-extra: the field 'temperature' cannot be set there" in done.stderr


def test_training_renders_with_the_students_template_arguments(serve, tmp_path):
    """The server renders its prompts with a tokenizer; the hf: policy of the same model does, and so does training: the
    ids are the same three times. With enable_thinking false Qwen3's prompts end in an empty think block."""
    path, extra = tiny.model_dir(tmp_path, "qwen3", "qwen3"), {"chat_template_kwargs": {"enable_thinking": False}}
    tokenizer, home = tiny.tokenizer("qwen3"), tmp_path / "iter_001"
    server = serve(model)
    collect(server, home / "trajectories.jsonl", "--student-extra", json.dumps(extra))
    script("02_relabel.py", "--trajectories", home / "trajectories.jsonl", "--teacher", "oracle", "--out",
           home / "labels.jsonl")  # fmt: skip
    served = {json.dumps(body["messages"]): tokenizer.apply_chat_template(
                  body["messages"], add_generation_prompt=True, return_dict=False, **body["chat_template_kwargs"])
              for body in server.requests}  # fmt: skip

    (labels,), kwargs = training_data.read_labels([str(home)])
    assert kwargs == extra["chat_template_kwargs"]
    policy, acted = open_policy(f"hf:{path}", extra=extra, max_new_tokens=1), []
    act(policy)
    generate = policy.engine.generate
    policy.engine.generate = lambda ids, **how: acted.append(ids) or generate(ids, **how)
    for record in jsonl.read(home / "trajectories.jsonl", "trajectory"):
        made, _ = training_data.tokenise(record, labels[record["trajectory_id"]], tokenizer, kwargs, 4096)
        states = [record["messages"][: 2 + 2 * turn] for turn in range(len(TURNS))]
        for state, sample in zip(states, made.samples(), strict=True):
            sent = [{"role": m["role"], "content": m["content"]} for m in state]
            act(policy, sent)
            prompt = sample.ids[: sample.n_prompt].tolist()
            assert prompt == served[json.dumps(sent)] == acted[-1]
            assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
    policy.close()


def test_reasoning_is_never_a_label_unless_asked_for(serve, tmp_path):
    """The thought holds a command; what is executed and labelled is what comes after it."""
    thought = f"\nWell, {say('touch thought.txt')}\nNo.\n"

    def thinker(handler):
        status, headers, body = model(handler)
        body["choices"][0]["message"]["reasoning"] = thought
        return status, headers, body

    server = serve(thinker)
    for name, flags in (("apart", []), ("kept", ["--keep-reasoning"])):
        home = tmp_path / name
        collect(server, home / "trajectories.jsonl", *flags, n=1)
        script("02_relabel.py", "--trajectories", home / "trajectories.jsonl", "--teacher", f"openai:m@{server.url}",
               "--out", home / "labels.jsonl", *flags)  # fmt: skip
        (record,) = jsonl.read(home / "trajectories.jsonl", "trajectory")
        texts = [f"<think>{thought}</think>{turn}" if flags else turn for turn in TURNS]
        assert [m["content"] for m in assistant(record)] == texts
        assert [m.get("reasoning") for m in assistant(record)] == [None if flags else thought] * len(TURNS)
        assert [m["command"] for m in assistant(record)] == [actions.parse(turn) for turn in TURNS]
        assert "notes.txt" in record["patch"] and "thought.txt" not in record["patch"]
        labels = list(jsonl.read(home / "labels.jsonl", "label"))
        assert [label["label"] for label in labels] == texts and all(label["valid"] for label in labels)
        assert all("Well" not in m["content"] for body in server.requests for m in body["messages"]) or flags
    other = collect(server, tmp_path / "kept" / "trajectories.jsonl", n=1, ok=False)  # it is other work
    assert other.returncode == 2 and "keep_reasoning = True, now it is None" in other.stderr
