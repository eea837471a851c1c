"""What is in the report's page, from runs made by hand. How it behaves in a browser: test_report_page.py."""

import base64
import hashlib
import json
import re
import time
import tracemalloc

import pytest

from common import metrics, report, report_numbers, report_trajectories
from common.errors import InputError
from tests.report_runs import (HOSTILE, collect, command, contents, evaluate, finish, label, rows, say, small_run,
                               trajectory, write)  # fmt: skip


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
    """In names of models, issues, observations and labels; settings and index are the part that is not in base64."""
    name = "hf:m</script><script>window.ran = 3</script><!--\u2028&amp;"
    one = trajectory("a__b-1", 1, [("student", HOSTILE, HOSTILE)], issue=HOSTILE + "\ud800")
    collect(tmp_path / "run/iter_001", [one], [label(one, 0, HOSTILE, False)], student=name)
    report.report([tmp_path / "run"], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    outside = text[text.index("</style>") :]
    assert len(re.findall("<script", outside)) == len(re.findall("</script>", outside)) == 3  # data, script, one chunk
    assert "<!--" not in outside and "\u2028" not in outside
    data, chunks = contents(tmp_path / "page.html")
    assert data["runs"][0]["settings"]["student"] == name and name in data["lead"]
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
    labels = report_trajectories.Labels(tmp_path / "labels.jsonl")
    assert {turn: one["label"] for turn, one in labels.of("a.i1.a0").items()} == {0: "x", 1: "z"}
    assert {turn: one["label"] for turn, one in labels.of("b.i1.a0").items()} == {0: "y"}
    assert labels.of("c.i1.a0") == {}


def test_gold_patches_of_toy_tasks_and_of_task_files(tmp_path):
    from common import toy_tasks

    row = toy_tasks.load("dev", 1)[0]
    same, other = (trajectory(row["instance_id"], base_commit=commit) for commit in (row["base_commit"], "another"))
    source = report_trajectories.Source("iter_000/eval", "evaluated", *[tmp_path / "none"] * 3, manifest=tmp_path / "manifest.json")
    finish(tmp_path / "manifest.json", {})
    gold = report_trajectories.Gold(source)
    assert gold.of(same) == row["patch"] and gold.of(other) is None and gold.of(trajectory("a__b-1")) is None
    write(tmp_path / "tasks.jsonl", [{"instance_id": "a__b-1", "base_commit": "c", "patch": "gold"}])
    finish(tmp_path / "manifest.json", {}, {"tasks": f"{tmp_path}/tasks.jsonl:1"})
    assert report_trajectories.Gold(source).of(trajectory("a__b-1")) == "gold"


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

    def spent():
        return [part["spent"] for part in report_numbers.describe_runs([metrics.read(home)])["runs"][0]["iterations"]]

    assert spent() == [{"tokens": n * 385, "minutes": n * 3.0, "dollars": None} for n in range(3)]
    for place, cost in (("labels.jsonl.manifest.json", 0.5), ("eval/manifest.json", 100)):
        for path in home.glob(f"iter_*/{place}"):
            path.write_text(path.read_text().replace('"summary": {', f'"summary": {{"cost": {cost}, '))
    assert [part["dollars"] for part in spent()] == [0, 0.5, 1]


def test_several_runs_are_compared(tmp_path):
    homes = [small_run(tmp_path / f"dagger{seed}", seed, (0, 1, 3 + seed)) for seed in (0, 1)]
    homes += [small_run(tmp_path / f"sft{seed}", seed, (0, 1, 1), mix="teacher", schedule=None) for seed in (0, 1)]
    report.report(homes, tmp_path / "page.html")
    data, _ = contents(tmp_path / "page.html")
    assert data["arms"] == ["DAgger linear:2", "SFT"] and [one["arm"] for one in data["runs"]] == [0, 0, 1, 1]
    assert [one["rate"] for one in data["means"][0]["iterations"]] == [0.0, 0.25, 0.875]
    assert data["lead"].startswith("hf:m learns to repair software from the teacher oracle (")
    assert data["means"][1]["test"] == {"rate": 0.5, "seeds": 2}
    assert [pair["name"] for pair in data["pairs"]][:2] == [
        "SFT against DAgger linear:2, seed 0",
        "SFT against DAgger linear:2, seed 1",
    ]
    assert data["pairs"][2]["name"] == "SFT against DAgger linear:2, 2 seeds, bootstrap"
    assert len(data["pairs"]) == 4 and all(pair["difference"] == 0 for pair in data["pairs"])
    assert {row["run"] for row in rows(data)} == {0, 1, 2, 3}
    mean = {"runs": 2, "tasks": 4, "resolved": 2, "failure_modes": {"tests_failed": 2}}
    assert data["endings"] == {"on": "toy:test", "test": True, "arms": [mean, mean]}


def test_groups_of_tasks_and_missing_iterations_of_several_runs(tmp_path):
    """Of four test tasks two are of a group; a group of one task, or of all, says nothing of its own. SFT's third
    resolves, DAgger's does not: +1 in one of two tasks of the group."""
    homes = [small_run(tmp_path / "dagger"), small_run(tmp_path / "sft", resolved=(0, 3), mix="teacher", schedule=None)]
    for home, iteration in zip(homes, (2, 1)):
        path = home / f"test/iter_00{iteration}/results.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()]
        for place, one in enumerate(found):
            groups = ["all", *(["repository x"] if place >= 2 else ["family y"])]
            one |= {"groups": groups, "resolved": place < 2 or (place == 2 and home == homes[1])}
        path.write_text("".join(json.dumps(one) + "\n" for one in found))
    report.report(homes, tmp_path / "page.html")
    data, _ = contents(tmp_path / "page.html")
    (one,) = [pair for pair in data["pairs"] if "repository x" in pair["name"]]
    assert (one["name"], one["n"], one["difference"]) == ("SFT against DAgger linear:2: repository x", 2, 0.5)
    assert (one["low"], one["high"]) == (0, 1)
    assert [pair["n"] for pair in data["pairs"]] == [4, 2]
    assert data["runs"][0]["missing"] == [] and data["runs"][1]["missing"] == ["Iteration 2 is missing."]
    assert "SFT: one run has more iterations than the other, and so more to choose from: seed 0." in data["pair_notes"]


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
    assert report_numbers.page_names([metrics.read(home) for home in homes]) == [str(home) for home in homes]


def test_every_failure_mode_has_its_definition():
    told = report_numbers.failure_modes()
    assert [name for name, _ in told] == list(metrics.FAILURE_MODES)
    assert all(len(text) > 10 for _, text in told)


@pytest.mark.parametrize("args, words", [
    (["no-run"], "no such directory"),
    (["empty"], "no finished stage"),
    (["one", "two"], "--out"),
    (["one", "two", "--out", ""], "its name ends in .html"),
    (["one", "--out", "one/iter_001/labels.jsonl"], "its name ends in .html"),
    (["one", "--out", "."], "its name ends in .html"),
    (["one", "one", "--out", "x.html"], "given twice"),
    (["one", "other", "--out", "x.html"], "cannot be compared: tasks is"),
    ([], "which runs?"),
])  # fmt: skip
def test_bad_input(tmp_path, args, words):
    (tmp_path / "empty").mkdir()
    for name, of in (("one", "h"), ("two", "h"), ("other", "h2")):
        evaluate(tmp_path / name / "iter_000/eval", [trajectory("dev-0", 0)], 0, contents=of)
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
    monkeypatch.setattr(report_trajectories, "CHUNK", 300_000)
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
