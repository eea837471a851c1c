"""The report's page: what is in it, from runs made by hand; and how it behaves, in a real headless Chromium."""

import base64
import gzip
import hashlib
import json
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import browser
import pytest

from common import metrics, report
from common.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = (
    "exit 0\n</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'>\n\x1b[31mred\u202e{{chunks}}"
)
POLICY = {"model": "hf:m", "adapter": "a/iter_001/adapter", "sampling": {"temperature": 0.7, "top_p": 0.9}}


# ---------------------------------------------------------------------------------------------------------------------
# Runs made by hand


def say(command, thought="Look."):
    return f"{thought}\n```bash\n{command}\n```"


def trajectory(name, iteration=1, turns=(("student", "ls", "exit 0"),), issue="It breaks.", **changes):
    """turns: (actor, command, observation)."""
    messages = [{"role": "system", "content": "You repair."}, {"role": "user", "content": issue}]
    for number, (actor, command, observation) in enumerate(turns):
        messages.append(
            {
                "role": "assistant",
                "content": say(command),
                "turn": number,
                "actor": actor,
                "command": command,
                "finish_reason": "stop",
                "tokens": {"in": 9, "cached": 0, "out": 7},
                "seconds": 0.5,
                "logprob": -0.25,
            }
        )
        if observation is not None:
            messages.append(
                {"role": "user", "content": observation, "exit_code": 0, "seconds": 0.1, "truncated": False}
            )
    return {"schema": 1, "trajectory_id": f"{name}.i{iteration}.a0", "instance_id": name, "base_commit": "c",
            "iteration": iteration, "attempt": 0, "seed": 0, "mix": "turn", "beta": 0.5, "student": POLICY,
            "teacher": POLICY, "prompt": "toy-1", "limits": {}, "messages": messages, "exit_status": "submitted",
            "patch": "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n", "started": 1.0, "finished": 5.0} | changes  # fmt: skip


def label(of, turn, text, agrees, source="queried"):
    names = {name: of[name] for name in ("schema", "trajectory_id", "instance_id", "iteration")}
    return names | {"turn": turn, "label": text, "valid": True, "reason": None, "source": source, "teacher": POLICY,
                    "tokens": {"in": 9, "cached": 0, "out": 7}, "seconds": 0.1, "agrees": agrees}  # fmt: skip


def result(of, resolved, mode=None):
    tests = {
        "FAIL_TO_PASS": {"success": [], "failure": [] if resolved else ["t.py::test_<b>"]},
        "PASS_TO_PASS": {"success": ["t.py::a"], "failure": []},
    }
    return {"schema": 1, "instance_id": of["instance_id"], "trajectory_id": of["trajectory_id"], "resolved": resolved,
            "tests_status": tests, "exit_status": "submitted", "failure_mode": mode, "turns": 1, "tokens": None,
            "seconds": 1.0, "tampered": False}  # fmt: skip


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def finish(path, summary, settings=None, same=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "seed": 0,
        "mix": "turn",
        "schedule": "linear:2",
        "student": "hf:m",
        "teacher": "oracle",
        "tasks": "toy:dev",
    } | (settings or {})
    path.write_text(
        json.dumps({"finished": 1.0, "seconds": 60.0, "settings": settings, "same": same or {}, "summary": summary})
    )


def evaluate(directory, trajectories, resolved, seed=0, mode="tests_failed", tasks="toy:dev", contents="h"):
    """A finished evaluation in which the first `resolved` of the tasks are."""
    results = [result(t, place < resolved, None if place < resolved else mode) for place, t in enumerate(trajectories)]
    write(directory / "trajectories.jsonl", trajectories)
    write(directory / "results.jsonl", results)
    scores = {
        "tasks": len(results),
        "resolved": resolved,
        **metrics.rate(resolved, len(results)),
        "infra_errors": 0,
        "tokens_in": 10,
        "tokens_cached": 0,
        "tokens_out": 10,
        "failure_modes": {mode: len(results) - resolved} if resolved < len(results) else {},
        "groups": {},
    }
    finish(directory / "manifest.json", scores, {"tasks": tasks, "seed": seed}, {"tasks": contents, "grader": "auto"})


def collect(directory, trajectories, labels, seed=0, **settings):
    """A collected, labelled and trained iteration."""
    write(directory / "trajectories.jsonl", trajectories)
    shares = {"beta": 0.5, "teacher_turn_share": 0.5, "teacher_token_share": 0.4}
    teacher = {"teacher_tokens_in": 100, "teacher_tokens_cached": 0, "teacher_tokens_out": 10}
    student = {"student_tokens_in": 200, "student_tokens_cached": 0, "student_tokens_out": 20}
    finish(directory / "trajectories.jsonl.manifest.json", shares | teacher | student, {"seed": seed} | settings)
    write(directory / "labels.jsonl", labels)
    finish(
        directory / "labels.jsonl.manifest.json",
        {"agree": 0.5, "states": len(labels), "tokens_in": 50, "tokens_cached": 0, "tokens_out": 5},
        {"seed": seed},
    )
    finish(
        directory / "adapter/manifest.json",
        {"labels": len(labels), "loss": 0.25},
        {"seed": seed, "data": ["x"], "init_adapter": None},
    )


def small_run(home, seed=0, resolved=(0, 1, 3), **settings):
    """Untrained, one iteration, and another; four tasks; the chosen student tested."""
    for number, count in enumerate(resolved):
        if number:
            one = trajectory("task-a", number, [("student", "ls", "exit 0"), ("teacher", "submit", None)])
            labels = [label(one, 0, say("cat x"), False), label(one, 1, say("submit"), None, "executed")]
            collect(home / f"iter_{number:03d}", [one], labels, seed, **settings)
        evaluate(
            home / f"iter_{number:03d}/eval", [trajectory(f"dev-{place}", number) for place in range(4)], count, seed
        )
    best = max(range(len(resolved)), key=lambda number: (resolved[number], -number))
    evaluate(
        home / f"test/iter_{best:03d}",
        [trajectory(f"test-{place}", best) for place in range(4)],
        2,
        seed,
        tasks="toy:test",
    )
    return home


def contents(page):
    """The data of a page, and all its chunks."""
    text = Path(page).read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    packed = re.findall(r'<script type="application/octet-stream" id="chunk-\d+">(.*?)</script>', text)
    return data, [json.loads(gzip.decompress(base64.b64decode(chunk))) for chunk in packed]


def rows(data):
    return [dict(zip(data["fields"], row)) for row in data["rows"]]


def command(*args):
    return subprocess.run(
        [sys.executable, "-m", "common.report", *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is in the page


def test_the_command_writes_one_page_beside_the_run(tmp_path):
    done = command(small_run(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    page = tmp_path / "run/report.html"
    first, last = done.stdout.splitlines()
    assert first.startswith(f"{page}: ") and last == f"summary runs=1 trajectories=18 bytes={page.stat().st_size}"
    data, chunks = contents(page)
    assert data["bytes"] == page.stat().st_size and data["raw"] > 1000
    assert sum(len(chunk) for chunk in chunks) == 18
    assert [one["eval"]["resolved"] for one in data["runs"][0]["iterations"]] == [0, 1, 3]
    assert data["runs"][0]["chosen"] == 2 and data["runs"][0]["tests"][0]["score"]["resolved"] == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_only_this_script_and_this_style_may_run(tmp_path):
    report.report([small_run(tmp_path / "run")], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    rules = re.search(r'Content-Security-Policy" content="(.*?)"', text)[1]
    assert rules.startswith("default-src 'none'; ") and "unsafe" not in rules
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        inline = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S)[1]
        assert f"{kind} 'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'" in rules
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", text)


def test_hostile_text_cannot_leave_its_script_element(tmp_path):
    """In ids, issues, observations and labels; the index is the part that is not in base64."""
    name = "a__b-1</script><script>window.ran = 3</script><!--\u2028&amp;"
    one = trajectory(name, 1, [("student", HOSTILE, HOSTILE)], issue=HOSTILE + "\ud800")
    collect(tmp_path / "run/iter_001", [one], [label(one, 0, HOSTILE, False)])
    report.report([tmp_path / "run"], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    outside = text[text.index("</style>") :]
    assert len(re.findall("<script", outside)) == len(re.findall("</script>", outside)) == 3  # data, script, one chunk
    assert "<!--" not in outside and "\u2028" not in outside
    data, chunks = contents(tmp_path / "page.html")
    assert rows(data)[0]["instance_id"] == name
    assert chunks[0][0]["turns"][0]["observation"] == HOSTILE
    assert chunks[0][0]["turns"][0]["label"]["text"] == HOSTILE


def test_instance_ids_are_plain_text(tmp_path):
    report.report([small_run(tmp_path / "run")], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert all(f'"{name}"' in text for name in ("task-a", "dev-0", "dev-3", "test-1"))


def test_a_trajectory_with_its_labels(tmp_path):
    """By hand: a student's turn with another label, the teacher's own turn, one without a label, two answers to it."""
    one = trajectory(
        "task-a",
        1,
        [("student", "ls", "exit 0\na.py"), ("teacher", "cat a.py", "exit 0"), ("student", "pwd", "exit 0")],
    )
    one["messages"].append({"role": "user", "content": "Reply with one command."})
    labels = [label(one, 0, say("cat a.py"), False), label(one, 1, say("cat a.py"), None, "executed")]
    collect(tmp_path / "run/iter_001", [one], labels)
    report.report([tmp_path / "run"], tmp_path / "page.html")
    data, chunks = contents(tmp_path / "page.html")
    row, shown = rows(data)[0], chunks[0][0]
    assert (row["turns"], row["student_turns"], row["teacher_turns"], row["judged"], row["differ"]) == (3, 2, 1, 1, 1)
    assert (row["what"], row["place"], row["resolved"], row["failure_mode"]) == ("collected", "iter_001", None, None)
    first, second, third = shown["turns"]
    assert first["label"]["text"] == say("cat a.py") and first["label"]["agrees"] is False
    assert second["label"]["text"] is None  # equal to what was executed: not said twice
    assert "label" not in third and third["observation"] == "exit 0\n\nReply with one command."
    assert shown["issue"] == "It breaks." and shown["system"] == "You repair."
    assert shown["student"] == "hf:m + iter_001/adapter"


def test_the_teachers_own_evaluation_is_the_teachers(tmp_path):
    """Its records come from 04_eval.py, in which whoever is scored is the student."""
    home = small_run(tmp_path / "run")
    evaluate(home / "teacher/eval", [trajectory("dev-0", 0, mix="student", teacher=None)], 1)
    report.report([home], tmp_path / "page.html")
    data, chunks = contents(tmp_path / "page.html")
    found = [(row, chunks[row["chunk"]][row["position"]]) for row in rows(data)]
    (row, shown), *more = [one for one in found if one[0]["what"] == "teacher"]
    assert not more and (row["teacher_turns"], row["student_turns"]) == (1, 0)
    assert (shown["mix"], shown["student"], shown["teacher"]) == ("teacher", None, "hf:m + iter_001/adapter")
    assert [turn["actor"] for turn in shown["turns"]] == ["teacher"]
    assert {turn["actor"] for row, one in found if row["what"] == "evaluated" for turn in one["turns"]} == {"student"}


def test_labels_are_found_wherever_they_lie(tmp_path):
    """--max-labels and a hand's edit may leave them scattered."""
    two = [trajectory("a"), trajectory("b")]
    write(
        tmp_path / "labels.jsonl",
        [label(two[0], 0, "x", None), label(two[1], 0, "y", None), label(two[0], 1, "z", None)],
    )
    labels = report.Labels(tmp_path / "labels.jsonl")
    assert {turn: one["label"] for turn, one in labels.of("a.i1.a0").items()} == {0: "x", 1: "z"}
    assert {turn: one["label"] for turn, one in labels.of("b.i1.a0").items()} == {0: "y"}
    assert labels.of("c.i1.a0") == {}


def test_gold_patches_of_toy_tasks_and_of_task_files(tmp_path):
    from common import toy_tasks

    row = toy_tasks.load("dev", 1)[0]
    same, other = (trajectory(row["instance_id"], base_commit=commit) for commit in (row["base_commit"], "another"))
    source = report.Source("iter_000/eval", "evaluated", *[tmp_path / "none"] * 3, manifest=tmp_path / "manifest.json")
    finish(tmp_path / "manifest.json", {})
    gold = report.Gold(source)
    assert gold.of(same) == row["patch"] and gold.of(other) is None and gold.of(trajectory("a__b-1")) is None
    write(tmp_path / "tasks.jsonl", [{"instance_id": "a__b-1", "base_commit": "c", "patch": "gold"}])
    finish(tmp_path / "manifest.json", {}, {"tasks": f"{tmp_path}/tasks.jsonl:1"})
    assert report.Gold(source).of(trajectory("a__b-1")) == "gold"


def test_what_is_missing_is_said(tmp_path):
    """Iteration 2 is not there, iteration 3 is being trained, no student has been tested."""
    home = small_run(tmp_path / "run", resolved=(0, 1))
    one = trajectory("task-b", 3)
    write(home / "iter_003/trajectories.jsonl", [one])
    finish(
        home / "iter_003/trajectories.jsonl.manifest.json",
        {"beta": 0.0, "teacher_turn_share": 0.0, "teacher_token_share": 0.0},
    )
    (home / "test/iter_001/manifest.json").unlink()
    report.report([home], tmp_path / "page.html")
    told = contents(tmp_path / "page.html")[0]["runs"][0]
    assert [part["missing"] for part in told["iterations"]] == [False, False, True, False]
    assert told["missing"] == [
        "Iteration 2 is missing.",
        "Iteration 3 is not finished; not there yet: relabel, train, evaluate.",
        "The chosen student, of iteration 1, is not scored on test tasks yet.",
    ]
    assert told["iterations"][1]["spent"]["tokens"] == 385 and told["iterations"][3]["spent"]["tokens"] is None


def test_cost_by_hand(tmp_path):
    """An iteration: 100 + 10 + 200 + 20 tokens collecting, 50 + 5 relabelling, three minutes; its evaluation apart."""
    home = small_run(tmp_path / "run")
    spent = [part["spent"] for part in report.describe_runs([metrics.read(home)])["runs"][0]["iterations"]]
    assert spent == [{"tokens": n * 385, "minutes": n * 3.0, "dollars": None} for n in range(3)]


def test_several_runs_are_compared(tmp_path):
    homes = [small_run(tmp_path / f"dagger{seed}", seed, (0, 1, 3 + seed)) for seed in (0, 1)]
    homes += [small_run(tmp_path / f"sft{seed}", seed, (0, 1, 1), mix="teacher", schedule=None) for seed in (0, 1)]
    report.report(homes, tmp_path / "page.html")
    data, _ = contents(tmp_path / "page.html")
    assert data["arms"] == ["DAgger linear:2", "SFT"] and [one["arm"] for one in data["runs"]] == [0, 0, 1, 1]
    assert [one["rate"] for one in data["means"][0]["iterations"]] == [0.0, 0.25, 0.875]
    assert data["means"][1]["test"] == {"rate": 0.5, "seeds": 2}
    assert [pair["name"] for pair in data["pairs"]][:2] == [
        "SFT against DAgger linear:2, seed 0",
        "SFT against DAgger linear:2, seed 1",
    ]
    assert len(data["pairs"]) == 4 and all(pair["difference"] == 0 for pair in data["pairs"])
    assert {row["run"] for row in rows(data)} == {0, 1, 2, 3}


def test_arms_with_another_set_of_results_are_paired_on_what_both_have(tmp_path):
    """The machine failed a task of one arm, or all of them: everything else of the page is worth having."""
    homes = [small_run(tmp_path / "a"), small_run(tmp_path / "b", mix="teacher", schedule=None)]
    results = homes[1] / "test/iter_002/results.jsonl"
    results.write_text("".join(results.read_text().splitlines(keepends=True)[:3]))
    report.report(homes, tmp_path / "page.html")
    data, _ = contents(tmp_path / "page.html")
    assert data["pairs"][0]["n"] == 3 and "1 task left out" in data["pair_notes"][0]
    results.write_text(results.read_text().replace("test-", "other-"))
    report.report(homes, tmp_path / "page.html")
    data, _ = contents(tmp_path / "page.html")
    assert data["pairs"] == [] and "no task in common" in data["pair_notes"][0]


def test_two_directories_of_one_name(tmp_path):
    homes = [small_run(tmp_path / place / "run", seed) for seed, place in enumerate("ab")]
    assert report.page_names([metrics.read(home) for home in homes]) == [str(home) for home in homes]


def test_every_failure_mode_has_its_definition():
    told = report.failure_modes()
    assert [name for name, _ in told] == list(metrics.FAILURE_MODES)
    assert all(len(text) > 10 for _, text in told)


@pytest.mark.parametrize("args, words", [
    (["no-run"], "no such directory"),
    (["empty"], "no finished stage"),
    (["one", "two"], "--out"),
    (["one", "one", "--out", "x.html"], "given twice"),
    (["one", "other", "--out", "x.html"], "cannot be compared: tasks is"),
    ([], "which runs?"),
])  # fmt: skip
def test_bad_input(tmp_path, args, words):
    (tmp_path / "empty").mkdir()
    for name, contents in (("one", "h"), ("two", "h"), ("other", "h2")):
        evaluate(tmp_path / name / "iter_000/eval", [trajectory("dev-0", 0)], 0, contents=contents)
    paths = [str(tmp_path / arg) if arg != "--out" else arg for arg in args]
    done = command(*paths)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.rglob("*.html"))


def test_a_broken_record_is_named_and_the_old_page_stays(tmp_path):
    home = small_run(tmp_path / "run")
    (home / "report.html").write_text("the old page")
    with open(home / "iter_002/eval/trajectories.jsonl", "a") as stream:
        stream.write('{"schema": 1}\n')
    with pytest.raises(InputError, match=r"iter_002/eval/trajectories.jsonl:5: trajectory: field"):
        report.report([home], home / "report.html")
    assert (home / "report.html").read_text() == "the old page"
    assert not [path for path in home.iterdir() if path.is_file() and path.name != "report.html"]


def test_memory_is_bounded_by_the_chunk(tmp_path, monkeypatch):
    """20 MB of trajectories; at no time is more than a small part of them in memory."""
    monkeypatch.setattr(report, "CHUNK", 300_000)
    observation = "exit 0\n" + "\n".join(hashlib.sha256(bytes([n])).hexdigest() for n in range(150))
    many = [trajectory(f"a__b-{n}", 1, [("student", f"cat {n}", observation)] * 20) for n in range(100)]
    write(tmp_path / "run/iter_001/trajectories.jsonl", many)
    finish(
        tmp_path / "run/iter_001/trajectories.jsonl.manifest.json",
        {"beta": 0.5, "teacher_turn_share": 0.0, "teacher_token_share": 0.0},
    )
    size = (tmp_path / "run/iter_001/trajectories.jsonl").stat().st_size
    del many
    tracemalloc.start()
    report.report([tmp_path / "run"], tmp_path / "page.html")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    _, chunks = contents(tmp_path / "page.html")
    assert size > 19e6 and peak < 6e6
    assert len(chunks) >= 50 and sum(map(len, chunks)) == 100


def test_a_small_run_is_quick(tmp_path):
    """At the end of every iteration of a loop nobody wants to wait for it: 4 evaluations of 80 and 3 x 96 collected."""
    turns = [("student", "cat a.py", "exit 0\n" + "x = 1\n" * 20)] * 8
    for number in range(4):
        if number:
            batch = [trajectory(f"task-{n}", number, turns) for n in range(96)]
            collect(
                tmp_path / f"run/iter_{number:03d}",
                batch,
                [label(t, n, say("ls"), False) for t in batch for n in range(8)],
            )
        evaluate(
            tmp_path / f"run/iter_{number:03d}/eval", [trajectory(f"dev-{n}", number, turns) for n in range(80)], 3
        )
    began = time.process_time()
    report.report([tmp_path / "run"], tmp_path / "page.html")
    assert time.process_time() - began < 3


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

LONG = "exit 1\n" + "\n".join(f"line {n} of the log" for n in range(200))


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    """Two iterations. Collected: one of four turns, hostile and long output, two labels that differ; 150 plain ones."""
    home = small_run(tmp_path_factory.mktemp("runs") / "laptop")
    turns = [("student", "grep -rn 'def total'", HOSTILE), ("student", "sed -i 's/min(x)/max(x)/' a.py", LONG),
             ("teacher", "pytest", "exit 0\n..."), ("student", "submit", None)]  # fmt: skip
    one = trajectory("a__b-1", 1, turns, issue="The total is wrong. " + HOSTILE)
    labels = [label(one, 0, say("grep -rn 'def total'", "Search."), True),
              label(one, 1, say("sed -i 's/min(x)/min(x, 0)/' a.py"), False),
              label(one, 2, say("pytest"), None, "executed"),
              label(one, 3, say("pytest " + HOSTILE), False)]  # fmt: skip
    plain = [
        trajectory(f"plain-{n:03d}", 1, [("teacher", "submit", None)], issue=("Long " * 60 + f"needle{n}x"))
        for n in range(150)
    ]
    collect(home / "iter_001", [one, *plain], labels)
    report.report([home], home / "report.html")
    return home / "report.html"


@pytest.fixture(scope="module")
def chromium():
    if reason := browser.missing():
        pytest.skip(reason)
    with browser.open() as opened:
        yield opened


@pytest.fixture
def page(chromium, page_path):
    """The report, freshly opened at its beginning."""
    chromium.resize(1300, 900)
    chromium.media()
    return opened_at(chromium, page_path, "")


def opened_at(chromium, path, place):
    chromium.go("about:blank")  # an address that differs behind the # alone would not load anew
    chromium.go(path.as_uri() + place)
    chromium.wait("document.documentElement.dataset.ready === 'yes'")
    return chromium


def count(page):
    return page.run("return document.querySelector('#count').textContent")


def choose(page, name, value):
    script = (
        "const select = document.querySelector(`#filters select[name=${arguments[0]}]`);"
        "select.value = arguments[1]; select.dispatchEvent(new Event('change'))"
    )
    page.run(script, name, value)


def wait_title(page, name):
    page.wait(f"document.querySelector('#opened h1')?.textContent === {json.dumps(name)}")


FIRST = "#trajectory/laptop/iter_001/a__b-1.i1.a0"


@pytest.mark.slow
@pytest.mark.browser
class TestBrowser:
    def test_opens_from_disk_and_asks_the_network_for_nothing(self, page):
        assert page.run("return location.protocol") == "file:"
        page.wait("document.querySelectorAll('#overview svg .mark').length > 3")
        assert page.run("return performance.getEntriesByType('resource').length") == 0
        assert page.log() == []  # no error, no refusal of the policy
        assert "laptop: DAgger linear:2" in page.run("return document.querySelector('h1').textContent")
        assert "3/4 = 75 %" in page.run("return document.querySelector('#overview table').innerText")

    def test_the_policy_forbids_scripts_and_the_network(self, page):
        page.run(
            "const s = document.createElement('script'); s.textContent = 'window.ran = 4'; document.body.append(s)"
        )
        page.run("const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i)")
        assert page.run("return fetch('http://127.0.0.1:9/').then(() => 'loaded', () => 'refused')") == "refused"
        assert page.run("return window.ran === undefined")
        assert len([line for line in page.log() if "Content Security Policy" in line["message"]]) >= 3

    def test_hostile_text_stays_text(self, page, page_path):
        opened_at(page, page_path, FIRST)
        page.wait("document.querySelectorAll('.turn').length === 4")
        seen = page.run("return document.querySelector('#turn-0 .observation').innerText")
        assert "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'>" in seen
        assert "\u241b[31mred\u27e8U+202E\u27e9{{chunks}}" in seen  # what cannot be seen is shown
        assert page.run("return document.querySelectorAll('img').length") == 0
        assert page.run("return window.ran === undefined")
        assert page.log() == []

    def test_filters_and_search(self, page, page_path):
        opened_at(page, page_path, "#trajectories")
        assert count(page) == "168 trajectories"  # 151 + 1 collected, 3 x 4 evaluated, 4 tested
        assert page.run("return document.querySelectorAll('.row').length") < 60  # only what is seen
        choose(page, "labels", "differ")
        assert count(page) == "2 of 168 trajectories"
        choose(page, "iteration", "1")
        assert count(page) == "1 of 168 trajectories" and "labels=differ" in page.run("return location.hash")
        choose(page, "labels", "")
        choose(page, "iteration", "")
        choose(page, "what", "evaluated")
        choose(page, "mode", "tests_failed")
        assert count(page) == "8 of 168 trajectories"
        choose(page, "mode", "")
        choose(page, "result", "resolved")
        assert count(page) == "4 of 168 trajectories"
        page.run("[...document.querySelectorAll('#filters button')].at(-1).click()")
        choose(page, "actor", "student")
        assert count(page) == "18 of 168 trajectories"
        choose(page, "actor", "")
        page.press("/", *"PLAIN-01")
        assert count(page) == "10 of 168 trajectories"
        page.run("document.querySelector('#text').value = ''")
        page.press(*"needle149x")  # near the end of a long issue
        page.wait("document.querySelector('#count').textContent === '1 of 168 trajectories'")
        page.press(*"none")
        assert "No trajectory is like that." in page.run("return document.querySelector('#list').innerText")

    def test_a_number_of_the_failure_modes_leads_to_its_trajectories(self, page):
        page.run("document.querySelector('#failures td a[href*=\"iteration=1&mode=tests_failed\"]').click()")
        page.wait("!document.querySelector('#viewer').hidden")
        assert count(page) == "3 of 168 trajectories"

    def test_keys(self, page, page_path):
        opened_at(page, page_path, "#trajectories?what=collected&iteration=1")
        page.press("j")
        wait_title(page, "a__b-1.i1.a0")
        current = "return document.querySelector('.turn.current').id"
        assert page.run(current) == "turn-0"
        page.press("n", "n", "p")
        assert page.run(current) == "turn-1" and page.run("return location.hash") == f"{FIRST}/1"
        page.press("d")
        assert page.run(current) == "turn-3"
        page.press("j")
        wait_title(page, "plain-000.i1.a0")
        page.press("Right")
        wait_title(page, "plain-001.i1.a0")
        page.press("k", "Left")
        wait_title(page, "a__b-1.i1.a0")
        page.press("?")
        assert page.run("return document.querySelector('#help').open")
        page.press("Escape")
        assert not page.run("return document.querySelector('#help').open")
        page.press("/")
        assert page.run("return document.activeElement.id") == "text"
        page.press("j", "Escape")  # typed, not obeyed
        assert page.run("return document.querySelector('#text').value") == "j"
        page.press("Escape")
        assert page.run("return opened") is None

    def test_a_label_stands_beside_what_was_executed_with_the_differences_marked(self, page, page_path):
        opened_at(page, page_path, f"{FIRST}/1")
        page.wait("document.querySelectorAll('.turn').length === 4")
        marked = (
            "return [...document.querySelectorAll(`#turn-1 .action.${arguments[0]} mark`)].map((m) => m.textContent)"
        )
        assert page.run(marked, "student") == ["max"] and page.run(marked, "teacher") == ["min", ", 0"]
        assert "The label has the same command." in page.run("return document.querySelector('#turn-0').innerText")
        assert page.run("return document.querySelector('#turn-2').innerText").count("pytest") == 1  # its own label
        assert (
            page.run("return [...document.querySelectorAll('.strip button')].map((one) => one.textContent).join('')")
            == "SSTS"
        )
        assert page.run("return document.querySelectorAll('.strip .differs').length") == 2

    def test_long_observations_are_folded(self, page, page_path):
        opened_at(page, page_path, f"{FIRST}/1")
        page.wait("document.querySelector('#turn-1 .unfold')")
        seen = "return document.querySelector('#turn-1 .observation').innerText"
        assert "line 199" in page.run(seen) and "line 100 " not in page.run(seen)
        page.press("o")
        assert "line 100 " in page.run(seen)
        page.click("#turn-1 .unfold")
        assert "line 100 " not in page.run(seen)

    def test_deep_links(self, page, page_path):
        opened_at(page, page_path, f"{FIRST}/2")
        wait_title(page, "a__b-1.i1.a0")
        assert page.run("return document.querySelector('.turn.current').id") == "turn-2"
        assert page.run("return document.querySelector('.row[aria-selected=true] .id').textContent") == "a__b-1"
        page.run("location.hash = '#trajectory/laptop/iter_001/gone.i1.a0/0'")
        page.wait("document.querySelector('#opened').innerText.includes('no trajectory of that address')")
        page.run("history.back()")
        wait_title(page, "a__b-1.i1.a0")
        opened_at(page, page_path, "#cost")
        assert page.run("return scrollY") > 500

    def test_light_and_dark(self, page, page_path):
        ground = "getComputedStyle(document.documentElement).backgroundColor"
        light, dark = "rgb(253, 253, 251)", "rgb(20, 22, 26)"

        def is_ground(colour):
            page.wait(f"{ground} === '{colour}'")

        is_ground(light)
        page.dark(True)
        is_ground(dark)
        page.dark(False)
        is_ground(light)
        page.click("#theme")
        is_ground(dark)
        opened_at(page, page_path, "")
        is_ground(dark)  # remembered
        page.click("#theme")
        is_ground(light)
        page.run("localStorage.clear()")

    @pytest.mark.parametrize("width", [360, 700, 1200, 1800])
    def test_nothing_is_wider_than_the_window(self, page, page_path, width):
        page.resize(width, 800)
        for place in ("", "#trajectories", f"{FIRST}/1"):
            opened_at(page, page_path, place)
            if place.startswith(FIRST):
                page.wait("document.querySelectorAll('.turn').length === 4")
            assert page.run("return document.documentElement.scrollWidth") <= width, place

    @pytest.mark.parametrize("dark", [False, True])
    def test_contrast(self, page, page_path, dark):
        """WCAG AA: 4.5 for every text against its ground."""
        page.dark(dark)
        for place in ("", f"{FIRST}/1"):
            opened_at(page, page_path, place)
            if place:
                page.wait("document.querySelectorAll('.turn').length === 4")
            page.wait(f"document.documentElement.dataset.theme === '{'dark' if dark else 'light'}'")
            assert page.run(CONTRAST) == []


CONTRAST = """
const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
const ground = (e) => {
  const colour = numbers(getComputedStyle(e).backgroundColor);
  return colour.length < 4 || colour[3] === 1 ? colour : ground(e.parentElement);
};
const bad = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !e.checkVisibility() || e.disabled) continue;
  const style = getComputedStyle(e), svg = e instanceof SVGElement;
  const a = light(numbers(svg ? style.fill : style.color)), b = light(ground(svg ? e.closest("svg").parentElement : e));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) bad.push(`${e.outerHTML.slice(0, 80)} ${ratio.toFixed(2)}`);
}
return bad;
"""
