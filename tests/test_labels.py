"""No state is asked twice: the cache, labels through the real scripts from a deterministic server, --inline, the costs."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from servers import Server, good
from test_scripts import JUNK, ROOT, script, summary, timeless

from common import cache, cost, jsonl, labels, policies, prompts, tasks
from common.errors import InputError, StageError


class Teacher(Server):
    """Its answer hangs on the messages alone; 100 tokens in, 60 of them cached, 10 out."""

    def __init__(self, delay=0.0):
        self.asked = []  # names of the states, in the order in which they came

        def answer(handler):
            time.sleep(delay)
            name = hashlib.sha256(json.dumps(handler.body["messages"]).encode()).hexdigest()
            with self.lock:
                self.asked.append(name)
            status, headers, body = good(JUNK[int(name, 16) % 5])
            body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 60}}
            return status, headers, body

        super().__init__(answer)
        self.policy = f"openai:m@{self.url}"


@pytest.fixture
def teacher():
    server = Teacher()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Says the same junk in both attempts of a task, so that their states are equal as long as the student acts."""
    path = tmp_path_factory.mktemp("student") / "junk.jsonl"
    lines = [{"instance_id": row["instance_id"], "turns": JUNK} for row in tasks.load("toy:train:4")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"replay:{path}"


def collect(out, student, teacher, *more, **options):
    return script("01_collect.py", "--tasks", "toy:train:4", "--teacher", teacher, "--student", student, "--beta", 0.4,
                  "--attempts", 2, "--max-turns", 6, "--out", out, *more, **options)  # fmt: skip


def relabel(home, teacher, *more, name="labels.jsonl", **options):
    return script("02_relabel.py", "--trajectories", home / "trajectories.jsonl", "--teacher", teacher, "--out", home / name,
                  *more, **options)  # fmt: skip


def same_but_cached(path):
    """What a label says, without where it came from."""
    return [{k: v for k, v in record.items() if k not in ("source", "tokens")} for record in timeless(path)]


# ---------------------------------------------------------------- a budget of labels


def test_max_labels_counts_those_that_are_good(student, tmp_path):
    """The teacher talks instead of acting at about every third state: others are asked until there are as many as wanted."""
    collect(tmp_path / "trajectories.jsonl", student, "oracle", "--beta", 0)

    def answer(handler):
        name = hashlib.sha256(json.dumps(handler.body["messages"]).encode()).digest()
        return good("Let me think." if name[0] % 3 == 0 else JUNK[0])

    server, found = Server(answer), {}
    try:
        for name, most in (("few", 12), ("all", None)):
            more = ["--max-labels", most] if most else []
            done = relabel(tmp_path, f"openai:m@{server.url}", *more, name=f"{name}.jsonl")
            records = list(jsonl.read(tmp_path / f"{name}.jsonl", "label"))
            found[name] = {(r["trajectory_id"], r["turn"]): r["valid"] for r in records}
            assert summary(done)["invalid"] == str(sum(not r["valid"] for r in records))
    finally:
        server.stop()
    good_of = {name: sum(valid.values()) for name, valid in found.items()}
    assert good_of["few"] == 12 < len(found["few"]) and good_of["all"] > 12  # some were spoilt, and made up for
    assert found["few"].items() <= found["all"].items()
    order = [(r["trajectory_id"], r["turn"]) for r in jsonl.read(tmp_path / "few.jsonl")]
    assert order == [key for key in found["all"] if key in found["few"]]  # written in the order of trajectories and turns


# ---------------------------------------------------------------- the cache


def test_equal_questions_at_once_are_asked_once(tmp_path):
    kept, asked = cache.Cache(tmp_path / "c"), []

    def ask():
        asked.append(1)
        time.sleep(0.2)
        return policies.Answer("a", "stop", 5, 2, 1, 0.2, -0.1, "because")

    found = []
    threads = [threading.Thread(target=lambda: found.append(kept.answer("k", ask))) for _ in range(20)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(asked) == 1
    assert sorted(was_there for _, was_there in found) == [False] + [True] * 19
    assert {answer.reasoning for answer, _ in found} == {"because"} and {answer.logprob for answer, _ in found} == {-0.1}
    assert cache.Cache(tmp_path / "c").answer("k", ask)[1] and len(asked) == 1
    assert kept.locks == {}


def test_answers_of_an_edited_expert_are_not_taken_from_the_old_one(tmp_path):
    row, kept = tasks.load("toy:train:1")[0], cache.Cache(tmp_path / "c")
    state, sources = prompts.opening(row), []
    for code in (None, None, "edited"):
        teacher = policies.OraclePolicy({})
        teacher.code = code or teacher.code
        labeller = labels.Labeller(teacher, kept, 0, len)
        sources.append(labeller.label(row, "toy-1", state, episode="e", turn=0, attempt=0)["source"])
    assert sources == ["queried", "cache", "queried"]


def test_a_question_that_fails_is_not_kept(tmp_path):
    kept = cache.Cache(None)

    def fail():
        raise InputError("no")

    with pytest.raises(InputError):
        kept.answer("k", fail)
    assert kept.answer("k", lambda: policies.Answer("a", "stop"))[1] is False


def test_fresh_asks_once_more_and_replaces(tmp_path):
    old = cache.Cache(tmp_path)
    old.answer("k", lambda: policies.Answer("old", "stop"))
    fresh = cache.Cache(tmp_path, fresh=True)
    assert fresh.answer("k", lambda: policies.Answer("new", "stop")) == (policies.Answer("new", "stop"), False)
    assert fresh.answer("k", lambda: 1 / 0)[1]
    assert old.answer("k", lambda: 1 / 0)[0].text == "new"


def _write(directory, name, number):
    kept = cache.Cache(directory)
    for i in range(number):
        kept.answer(f"{i}", lambda: policies.Answer(f"{name} {i}", "stop"))


@pytest.mark.slow
def test_many_writers_and_kill_9(tmp_path):
    """Four processes write the same keys, one of them without end until it is killed: every answer is whole and there."""
    context = multiprocessing.get_context("spawn")
    killed = context.Process(target=_write, args=(tmp_path, 0, 10**9))
    writers = [context.Process(target=_write, args=(tmp_path, n, 300)) for n in (1, 2, 3)]
    [writer.start() for writer in [killed, *writers]]
    [writer.join(120) for writer in writers]
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    kept = cache.Cache(tmp_path)
    while not kept._get("400"):  # the other one goes on alone
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(20)
    assert killed.exitcode == -signal.SIGKILL
    assert all(kept.answer(f"{i}", lambda: 1 / 0)[0].text.endswith(f" {i}") for i in range(400))
    assert kept.answer("another", lambda: policies.Answer("new", "stop"))[1] is False


@pytest.mark.parametrize("content", [b"this is no database, but long enough to look at", b"{}\n" * 400])
def test_a_damaged_cache_is_named(tmp_path, content):
    (tmp_path / "answers.sqlite").write_bytes(content)
    with pytest.raises(InputError, match="--cache .*database"):
        cache.Cache(tmp_path)


# ---------------------------------------------------------------- labels through the scripts


@pytest.mark.slow
def test_no_state_is_asked_twice_by_any_run(tmp_path, teacher, student):
    collect(tmp_path / "trajectories.jsonl", student, teacher.policy)
    teacher.asked.clear()
    first = summary(relabel(tmp_path, teacher.policy, "--cache", tmp_path / "cache"))
    tries = len(teacher.asked)
    assert len(set(teacher.asked)) < tries  # an answer without one command is asked for again
    records = list(jsonl.read(tmp_path / "labels.jsonl", "label"))
    assert int(first["cached"]) > 0  # the second attempt at a task begins like the first
    assert int(first["queried"]) == sum(r["source"] == "queried" for r in records)
    assert int(first["tokens_in"]) == 100 * tries and int(first["tokens_cached"]) == 60 * tries

    teacher.asked.clear()
    again = summary(relabel(tmp_path, teacher.policy, "--cache", tmp_path / "cache", name="again.jsonl"))
    assert teacher.asked == [] and again["queried"] == "0" and again["tokens_in"] == "0"
    assert same_but_cached(tmp_path / "again.jsonl") == same_but_cached(tmp_path / "labels.jsonl")

    relabel(tmp_path, teacher.policy, "--cache", tmp_path / "cache", "--fresh", name="fresh.jsonl")
    assert len(teacher.asked) == tries
    relabel(tmp_path, teacher.policy, "--workers", 1, name="alone.jsonl")  # without --cache: within this run
    assert len(teacher.asked) == 2 * tries
    for name in ("fresh.jsonl", "alone.jsonl"):
        assert same_but_cached(tmp_path / name) == same_but_cached(tmp_path / "labels.jsonl")


@pytest.mark.slow
def test_another_sampling_is_another_question(tmp_path, teacher, student):
    collect(tmp_path / "trajectories.jsonl", student, teacher.policy)
    relabel(tmp_path, teacher.policy, "--cache", tmp_path / "cache")
    teacher.asked.clear()
    done = relabel(tmp_path, teacher.policy, "--cache", tmp_path / "cache", "--temperature", 0, name="greedy.jsonl")
    assert summary(done)["executed"] == "0" and teacher.asked


@pytest.mark.parametrize("who", ["oracle", "server"])
def test_inline_gives_the_same_labels(tmp_path, teacher, student, who):
    name = "oracle" if who == "oracle" else teacher.policy
    for place, more in (("plain", []), ("inline", ["--inline", "--cache", tmp_path / "cache"])):
        made = collect(tmp_path / place / "trajectories.jsonl", student, name, *more)
    inline = summary(made)
    assert int(inline["inline_labels"]) > 0
    teacher.asked.clear()
    plain = summary(relabel(tmp_path / "plain", name))
    tries = len(teacher.asked)
    found = summary(relabel(tmp_path / "inline", name, "--cache", tmp_path / "cache"))
    assert len(teacher.asked) == tries  # the second 02 asked nobody
    assert found["queried"] == "0" and found["cached"] == str(int(plain["queried"]) + int(plain["cached"]))
    assert inline["inline_out"] == plain["tokens_out"] and inline["inline_in"] == plain["tokens_in"]
    assert same_but_cached(tmp_path / "inline/labels.jsonl") == same_but_cached(tmp_path / "plain/labels.jsonl")
    drop = [{k: v for k, v in r.items() if k != "inline"} for r in timeless(tmp_path / "inline/trajectories.jsonl")]
    assert drop == timeless(tmp_path / "plain/trajectories.jsonl")


def test_inline_hides_behind_the_environment(tmp_path):
    """The label of a turn is on its way while the command of that turn runs, in the order of the turns."""
    events, lock = [], threading.Lock()

    class Slow(policies.OraclePolicy):
        def act(self, row, messages, **where):
            with lock:
                events.append(("asked", where["turn"]))
            time.sleep(0.1)
            return policies.Answer("```bash\nls\n```", "stop", 1, 0, 1, 0.1)

    teacher = Slow({})
    labeller = labels.Labeller(teacher, cache.Cache(None), 0, len)
    row = tasks.load("toy:train:1")[0]
    with labels.ThreadPoolExecutor(4) as pool:
        ahead = labels.Ahead(labeller, pool, row, "e", 0)
        started = time.monotonic()
        for turn in range(4):
            ahead.ask(turn, [{"role": "user", "content": str(turn)}])
        assert time.monotonic() - started < 0.1  # nobody waited
        ahead.wait()
    assert events == [("asked", turn) for turn in range(4)]
    assert ahead.asked["labels"] == 4


def test_inline_gives_up_once_and_loses_no_trajectory(tmp_path, student):
    """Here --max-cost ends the asking, elsewhere a server that is down: one line, not one for every turn."""
    done = script("01_collect.py", "--tasks", "toy:train:2", "--student", student, "--mix", "student", "--teacher",
                  "openai:m@http://127.0.0.1:9/v1", "--inline", "--cache", tmp_path / "c", "--max-turns", 4, "--price",
                  "1000,1000,1000", "--max-cost", 0.01, "--out", tmp_path / "t.jsonl")  # fmt: skip
    assert summary(done)["trajectories"] == "2" and summary(done)["inline_labels"] == "0"
    assert done.stderr.count("no more labels are asked for ahead") == 1


def test_inline_wants_a_teacher_and_a_cache(tmp_path):
    done = script("01_collect.py", "--tasks", "toy:train:1", "--student", "oracle", "--mix", "student", "--inline", "--cache",
                  tmp_path / "c", "--out", tmp_path / "t.jsonl", ok=False)  # fmt: skip
    assert done.returncode == 2 and "--inline needs a --teacher" in done.stderr
    assert not (tmp_path / "t.jsonl.manifest.json").exists()


# ---------------------------------------------------------------- money


def test_cost_by_hand(tmp_path):
    meter = cost.Meter(tmp_path / "t", "3,0.3,15", None)
    assert meter.cost(1_000_000, 400_000, 10_000) == pytest.approx(0.6 * 3 + 0.4 * 0.3 + 0.01 * 15)


def test_a_line_that_a_kill_tore_costs_no_other(tmp_path):
    usage = tmp_path / "t.usage.jsonl"
    usage.write_text('{"in": 1000000, "cached": 0, "out": 0}\n{"in": 100')
    spent = []
    for _ in range(2):
        meter = cost.Meter(tmp_path / "t", "3,0.3,15", 100.0)
        meter.open()
        spent.append(meter.spent)
        meter.settle(meter.reserve(0, 0), (1_000_000, 0, 0))
    assert spent == [3, 6]


@pytest.mark.parametrize("price", ["3", "3,4", "a,b,c", "1,2,-3", "1,2,inf", "1,2,nan"])
def test_bad_prices(tmp_path, price):
    with pytest.raises(InputError, match="--price"):
        cost.Meter(tmp_path / "t", price, None)
    with pytest.raises(InputError, match="--max-cost needs --price"):
        cost.Meter(tmp_path / "t", None, 1.0)


def test_the_limit_is_never_passed_and_waits_for_answers_underway(tmp_path):
    """Twenty threads; each answer costs 1, at most 8 + 3 are set aside for it. 20 dollars: 10 answers, since the eleventh
    could pass the limit; with threads that do not wait for each other it would end earlier."""
    meter = cost.Meter(tmp_path / "t", "1000000,1000000,1000000", 20.0)
    meter.open()

    class Paid(policies.Plain):
        free = False

        def act(self, row, messages, **where):
            time.sleep(0.01)
            return policies.Answer("", "stop", 1, 0, 0)

    paid, answered, refused = meter.watch(Paid({"max_new_tokens": 3})), [], []

    def ask():
        try:
            answered.append(paid.act({}, []))
        except StageError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(20)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(answered) == 10 and len(refused) == 10 and meter.spent == 10.0
    assert "--max-cost 20: 10.0000 are spent, and the next request may cost up to 11.0000" in refused[0]
    again = cost.Meter(tmp_path / "t", "2000000,0,0", None)  # the price was wrong: the tokens stay
    again.open()
    assert again.spent == 20.0


def test_an_answer_that_is_too_long_was_paid_for(tmp_path):
    meter = cost.Meter(tmp_path / "t", "1000000,0,0", None)
    meter.open()

    class TooLong(policies.Plain):
        free = False

        def act(self, row, messages, **where):
            limit = policies.ContextLimit("30 tokens")
            limit.tokens = (30, 0, 2)
            raise limit

    with pytest.raises(policies.ContextLimit):
        meter.watch(TooLong({"max_new_tokens": 3})).act({}, [])
    assert meter.spent == 30.0 and meter.underway == 0


def test_max_cost_stops_and_goes_on(tmp_path, teacher, student):
    """2 $ per million fresh tokens, 1 cached, 10 out: an answer costs (40 * 2 + 60 * 1 + 10 * 10) / 1e6 = 0.00024."""
    priced = ["--price", "2,1,10"]
    collect(tmp_path / "trajectories.jsonl", student, teacher.policy)
    teacher.asked.clear()
    stopped = relabel(tmp_path, teacher.policy, *priced, "--max-cost", 0.004, ok=False)
    assert stopped.returncode == 1 and "--max-cost 0.004" in stopped.stderr and "goes on" in stopped.stderr
    assert 0 < len(teacher.asked) * 0.00024 <= 0.004
    done = summary(relabel(tmp_path, teacher.policy, *priced, "--max-cost", 1))
    assert float(done["cost"]) == pytest.approx(len(teacher.asked) * 0.00024)
    assert len((tmp_path / "labels.jsonl.usage.jsonl").read_text().splitlines()) == len(teacher.asked)
    relabel(tmp_path, teacher.policy, name="whole.jsonl")
    assert same_but_cached(tmp_path / "labels.jsonl") == same_but_cached(tmp_path / "whole.jsonl")


@pytest.mark.slow
def test_what_a_killed_run_paid_is_counted(tmp_path, student):
    """The turns of trajectories that a kill -9 lost were paid for all the same."""
    server = Teacher(delay=0.05)
    argv = [sys.executable, ROOT / "01_collect.py", "--tasks", "toy:train:4", "--teacher", server.policy, "--mix", "teacher",
            "--max-turns", "6", "--price", "2,1,10", "--out", tmp_path / "t.jsonl"]  # fmt: skip
    running = subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while len(server.asked) < 8:
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.01)
    running.kill()
    running.wait()
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, check=True)
    paid = len((tmp_path / "t.jsonl.usage.jsonl").read_text().splitlines())
    assert float(summary(done)["cost"]) == pytest.approx(paid * 0.00024)
    assert paid > int(summary(done)["teacher_turns"])
    used = next(jsonl.read(tmp_path / "t.jsonl", "trajectory"))["usage"]["teacher"]
    turns = used["turns"]
    assert used.pop("seconds") >= 0.05 * turns
    assert used == {"turns": turns, "in": 100 * turns, "cached": 60 * turns, "out": 10 * turns}
    server.stop()


@pytest.mark.slow
def test_the_scored_policy_has_a_price_too(tmp_path, teacher):
    done = script("04_eval.py", "--tasks", "toy:dev:2", "--student", teacher.policy, "--max-turns", 3, "--price", "2,1,10",
                  "--out", tmp_path / "eval")  # fmt: skip
    assert float(summary(done)["cost"]) == pytest.approx(len(teacher.asked) * 0.00024)
    assert teacher.asked
    assert json.loads((tmp_path / "eval/summary.json").read_text())["tokens_in"] == 100 * len(teacher.asked)
