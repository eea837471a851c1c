"""The scripts as their user runs them: real processes, real bash in the sandbox, the oracle and a scripted student."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import actions, jsonl, mixing, oracle, tasks

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("started", "finished", "seconds")


def script(name, *args, ok=True, **options):
    done = subprocess.run([sys.executable, ROOT / name, *map(str, args)], capture_output=True, text=True, **options)
    if ok:
        assert done.returncode == 0, done.stderr
    return done


def summary(done):
    line = done.stdout.strip().splitlines()[-1]
    assert line.startswith("summary ")
    return dict(word.split("=", 1) for word in line.split()[1:])


def say(command, thought="Hm."):
    return f"{thought}\n```bash\n{command}\n```"


JUNK = [
    say("ls"), "I do not know.", say("cat nothing.py"), say("git status --short"), say("sed -i 's/a/b/' none.py"),
    "```bash\nls\n```\n```bash\nls\n```", say("python -c 'print(1)'"), say("echo hi"), say("pwd"), say("ls -a"),
    say("date +%Y"), say("true"), say("false"), say("cat setup.py"), say("wc -l *.ini"), say("head -2 *.ini"),
]  # fmt: skip


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student that says something else at every turn, never anything useful."""
    path = tmp_path_factory.mktemp("student") / "junk.jsonl"
    lines = [{"instance_id": row["instance_id"], "turns": JUNK} for row in tasks.load("toy:train:12")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"replay:{path}"


def collect(out, student, *more, **options):
    return script("01_collect.py", "--tasks", "toy:train:6", "--teacher", "oracle", "--student", student, "--beta", 0.6,
                  "--out", out, *more, **options)  # fmt: skip


@pytest.fixture(scope="module")
def iteration(tmp_path_factory, student):
    """A collected and relabelled iteration directory."""
    home = tmp_path_factory.mktemp("run") / "iter_001"
    collected = collect(home / "trajectories.jsonl", student)
    relabelled = script("02_relabel.py", "--trajectories", home / "trajectories.jsonl", "--teacher", "oracle",
                        "--out", home / "labels.jsonl")  # fmt: skip
    return home, summary(collected), summary(relabelled)


def timeless(path):
    """Records without what depends on the clock."""

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in TIMES}
        return [strip(v) for v in value] if isinstance(value, list) else value

    text = path.read_text()
    return [strip(json.loads(line)) for line in text.splitlines()]


def test_who_acted_is_who_the_coins_named(iteration):
    home, counted, _ = iteration
    turns = [
        (record, m) for record in jsonl.read(home / "trajectories.jsonl") for m in record["messages"] if "actor" in m
    ]
    for record, message in turns:
        assert message["actor"] == mixing.actor(0.6, 0, 1, record["instance_id"], 0, message["turn"])
    share = sum(message["actor"] == "teacher" for _, message in turns) / len(turns)
    assert float(counted["teacher_turn_share"]) == pytest.approx(share)
    assert 0 < share < 1
    assert int(counted["turns"]) == len(turns)


def test_every_visited_state_has_exactly_one_label_and_it_is_the_teachers(iteration):
    """The heart of DAgger. The label of turn t is what the teacher does at the state before turn t: it is computed anew
    here, so a label of the state before or after (an off-by-one) fails."""
    home, _, counted = iteration
    rows = {row["instance_id"]: row for row in tasks.load("toy:train:6")}
    labels = {(r["trajectory_id"], r["turn"]): r for r in jsonl.read(home / "labels.jsonl", "label")}
    states = differing = 0
    for record in jsonl.read(home / "trajectories.jsonl", "trajectory"):
        for place, message in enumerate(record["messages"]):
            if message["role"] != "assistant":
                continue
            states += 1
            label = labels[record["trajectory_id"], message["turn"]]
            expert = oracle.act(rows[record["instance_id"]], record["messages"][:place])
            assert label["label"] == expert and label["valid"]
            if message["actor"] == "teacher":
                assert label["source"] == "executed" and label["label"] == message["content"]
                assert label["agrees"] is None
            else:
                assert label["source"] == "queried"
                assert label["agrees"] == (actions.parse(expert) == message["command"])
                differing += label["label"] != message["content"]
    assert len(labels) == states == int(counted["states"])
    assert differing > 0  # the student did say other things, so a label from it would have been seen
    assert int(counted["executed"]) + int(counted["queried"]) == states


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_workers_do_not_change_the_files(iteration, student, tmp_path, workers):
    home, _, _ = iteration
    collect(tmp_path / "trajectories.jsonl", student, "--workers", workers)
    assert timeless(tmp_path / "trajectories.jsonl") == timeless(home / "trajectories.jsonl")
    script("02_relabel.py", "--trajectories", tmp_path / "trajectories.jsonl", "--teacher", "oracle", "--out",
           tmp_path / "labels.jsonl", "--workers", workers)  # fmt: skip
    assert timeless(tmp_path / "labels.jsonl") == timeless(home / "labels.jsonl")


def test_a_killed_run_goes_on_to_the_same_file(iteration, student, tmp_path):
    home, _, _ = iteration
    out = tmp_path / "trajectories.jsonl"
    command = [sys.executable, ROOT / "01_collect.py", "--tasks", "toy:train:6", "--teacher", "oracle", "--student",
               student, "--beta", "0.6", "--out", out, "--workers", "1"]  # fmt: skip
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    part = tmp_path / "trajectories.jsonl.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not out.exists() and 1 <= len(part.read_text().splitlines()) < 6
    subprocess.run(command, check=True, capture_output=True)
    assert timeless(out) == timeless(home / "trajectories.jsonl")


def test_a_finished_file_is_left_alone_and_other_settings_are_refused(iteration, student):
    home, counted, _ = iteration
    before = (home / "trajectories.jsonl").stat().st_mtime_ns
    again = collect(home / "trajectories.jsonl", student)
    assert "nothing to do" in again.stderr and summary(again) == counted
    other = collect(home / "trajectories.jsonl", student, "--seed", 1, ok=False)
    assert other.returncode == 2 and "seed = 0, now it is 1" in other.stderr
    assert (home / "trajectories.jsonl").stat().st_mtime_ns == before


def test_bad_teacher_answers_are_asked_again_then_kept_as_invalid(iteration, tmp_path):
    """A teacher without a command in its answers labels nothing; the states still have their lines."""
    home, _, _ = iteration
    bad = tmp_path / "bad.jsonl"
    lines = [{"instance_id": row["instance_id"], "turns": ["no command"] * 20} for row in tasks.load("toy:train:6")]
    bad.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = script("02_relabel.py", "--trajectories", home / "trajectories.jsonl", "--teacher", f"replay:{bad}",
                  "--out", tmp_path / "labels.jsonl")  # fmt: skip
    labels = list(jsonl.read(tmp_path / "labels.jsonl", "label"))
    assert len(labels) == int(summary(done)["states"]) == int(summary(done)["invalid"])
    assert {label["reason"] for label in labels} == {"not exactly one command"}
    assert {label["source"] for label in labels} == {"queried"}  # another teacher than the recorded one: all asked
    (tmp_path / "trajectories.jsonl").write_bytes((home / "trajectories.jsonl").read_bytes())
    trained = script("03_train.py", "--data", tmp_path, "--out", tmp_path / "adapter", ok=False)
    assert trained.returncode == 2 and "no valid label" in trained.stderr


def test_gold_patches_resolve_everything_and_empty_ones_nothing(tmp_path):
    rows = tasks.load("toy:dev:6")
    for name, patch in (("gold", lambda row: row["patch"]), ("empty", lambda row: "")):
        # Predictions with the rows' other fields, the gold patch among them, are about model_patch all the same.
        lines = [r | {"model_name_or_path": name, "model_patch": patch(r), "messages": None, "started": "now"} for r in rows]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = summary(script("04_eval.py", "--tasks", "toy:dev:6", "--predictions", path, "--out", tmp_path / name))
        assert (done["resolved"], done["tasks"]) == ("6" if name == "gold" else "0", "6")
    results = list(jsonl.read(tmp_path / "gold" / "results.jsonl", "result"))
    assert all(not r["tests_status"]["FAIL_TO_PASS"]["failure"] for r in results)
    assert (tmp_path / "gold" / "logs" / f"{rows[0]['instance_id']}.txt").exists()


def test_the_oracle_is_scored_like_a_student(tmp_path):
    done = script("04_eval.py", "--tasks", "toy:dev:4", "--student", "oracle", "--out", tmp_path / "eval")
    counted = summary(done)
    assert counted["resolved"] == counted["tasks"] == "4" and counted["exit_submitted"] == "4"
    content = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert content["rate"] == 1.0 and 0 < content["rate_low"] < 1 and content["rate_high"] == 1.0
    predictions = list(jsonl.read(tmp_path / "eval" / "predictions.jsonl", "prediction"))
    assert [p["instance_id"] for p in predictions] == [r["instance_id"] for r in tasks.load("toy:dev:4")]


def test_evaluation_tasks_are_never_collected_on(tmp_path, student):
    done = collect(tmp_path / "t.jsonl", student, "--exclude-tasks", "toy:train:2")
    assert summary(done)["excluded"] == "2" and summary(done)["trajectories"] == "4"


def test_show_prints_a_transcript(tmp_path):
    done = script("01_collect.py", "--tasks", "toy:train:1", "--teacher", "oracle", "--mix", "teacher", "--out",
                  tmp_path / "t.jsonl", "--show")  # fmt: skip
    assert " 0  teacher" in done.stdout and "    $ " in done.stdout and "RESOLVED" in done.stdout


@pytest.mark.parametrize(
    "args, message",
    [
        (["--tasks", "toy:nothing", "--student", "oracle"], "no split 'nothing'"),
        (["--tasks", "nowhere.jsonl", "--student", "oracle"], "nowhere.jsonl: No such file"),
        (["--tasks", "toy:dev:2", "--student", "wizard"], "no such policy"),
        (["--tasks", "toy:dev:2", "--student", "replay:nowhere.jsonl"], "nowhere.jsonl"),
        (["--tasks", "toy:dev:2", "--student", "hf:smollm2-135m,adapter=nowhere"], "nowhere"),
        (["--tasks", "toy:dev:2", "--student", "oracle", "--workers", "0"], "--workers must be at least 1"),
        (["--tasks", "toy:dev:2", "--student", "oracle", "--limit", "-1"], "--limit must be at least 1, not -1"),
        (["--tasks", "toy:dev:2", "--student", "oracle", "--test-timeout", "0"], "--test-timeout must be more than 0"),
        (["--tasks", "toy:dev:2", "--student", "oracle", "--time-limit", "-1"], "--time-limit must be more than 0"),
        (["--tasks", "toy:dev:2", "--student", "oracle", "--max-cost", "nan"], "--max-cost must be more than 0"),
        (["--tasks", "toy:dev:2", "--student", "oracle", "--infra-retries", "-1"], "--infra-retries must be at least 0"),
        (["--tasks", "toy:dev:2", "--student", "oracle", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--tasks", "toy:dev:2"], "exactly one of --student"),
        (["--tasks", "toy:dev:2", "--predictions", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
    ],
)
def test_bad_input_is_exit_2_with_one_clear_line(tmp_path, args, message):
    done = script("04_eval.py", *args, "--out", tmp_path / "eval", ok=False, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "eval" / "results.jsonl").exists()


def test_nobody_elses_file_is_taken_for_ones_own_or_overwritten(tmp_path):
    """04 into the directory of an iteration: the teacher's repairs there are no work of the student."""
    home = tmp_path / "iter_001"
    task = tasks.load("toy:train:1")[0]["instance_id"]
    (tmp_path / "idle.jsonl").write_text(json.dumps({"instance_id": task, "turns": [say("submit")]}) + "\n")
    collect = ["--tasks", "toy:train:1", "--teacher", "oracle", "--mix", "teacher"]
    script("01_collect.py", *collect, "--out", home / "trajectories.jsonl")
    before = (home / "trajectories.jsonl").read_bytes()
    evaluate = ["--tasks", "toy:train:1", "--student", f"replay:{tmp_path}/idle.jsonl", "--out", home]
    for _ in range(2):  # the refusal leaves nothing that the next try would take for its own
        done = script("04_eval.py", *evaluate, ok=False)
        assert done.returncode == 2 and f"{home}/trajectories.jsonl is there, and {home}/manifest.json" in done.stderr
    done = script("01_collect.py", *collect, "--out", tmp_path / "idle.jsonl", ok=False)
    assert done.returncode == 2 and "idle.jsonl is there" in done.stderr
    assert (home / "trajectories.jsonl").read_bytes() == before and json.loads((tmp_path / "idle.jsonl").read_text())
    assert summary(script("04_eval.py", *evaluate, "--overwrite"))["resolved"] == "0"


def test_predictions_with_unknown_or_double_ids_are_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    for ids, message in ((["who"], "'who' is not in --tasks"), (["toy-dev-0000"] * 2, "is there twice")):
        ids = [tasks.load("toy:dev:1")[0]["instance_id"] if name.startswith("toy") else name for name in ids]
        path.write_text("".join(json.dumps({"instance_id": n, "model_patch": ""}) + "\n" for n in ids))
        done = script("04_eval.py", "--tasks", "toy:dev:2", "--predictions", path, "--out", tmp_path / "e", ok=False)
        assert done.returncode == 2 and message in done.stderr


def test_a_patch_for_a_repository_of_ones_own(tmp_path):
    """An issue and a git repository are a task; nothing is graded, and the patch applies where it came from."""
    home = tmp_path / "mine"
    home.mkdir()
    (home / "a.py").write_text("x = 1\n")
    git = ["git", "-C", home, "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    task = {"instance_id": "mine-1", "problem_statement": "x is 2.", "local": {"source": "mine"}}
    (tmp_path / "mine.json").write_text(json.dumps([task]))
    (tmp_path / "turns.jsonl").write_text(json.dumps({"instance_id": "mine-1", "turns": [say("sed -i s/1/2/ a.py"),
                                                                                         say("submit")]}))  # fmt: skip
    done = script("01_collect.py", "--tasks", tmp_path / "mine.json", "--mix", "student", "--student",
                  f"replay:{tmp_path / 'turns.jsonl'}", "--out", tmp_path / "t.jsonl", "--show")  # fmt: skip
    assert "submitted, not graded here" in done.stdout and "$ sed -i s/1/2/ a.py" in done.stdout
    (record,) = jsonl.read(tmp_path / "t.jsonl", "trajectory")
    subprocess.run([*git, "apply"], input=record["patch"], text=True, check=True)
    assert (home / "a.py").read_text() == "x = 2\n"
    done = script("04_eval.py", "--tasks", tmp_path / "mine.json", "--trajectories", tmp_path / "t.jsonl", "--out",
                  tmp_path / "eval", ok=False)  # fmt: skip
    assert done.returncode == 2 and "name no test" in done.stderr and not (tmp_path / "eval").exists()


@pytest.mark.slow
def test_a_full_disk_is_exit_1_and_loses_nothing(tmp_path, student):
    """A file system of 64 KB fills up in the middle of the run; with room again the same command finishes."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
    try:
        full = collect(small / "t.jsonl", student, "--attempts", 3, ok=False)
        assert full.returncode == 1 and "No space left on device" in full.stderr and "Traceback" not in full.stderr
        assert not (small / "t.jsonl").exists()
        subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
        assert summary(collect(small / "t.jsonl", student, "--attempts", 3))["trajectories"] == "18"
    finally:
        subprocess.run(["umount", small], check=True)


# ---- the arms


def test_a_prefix_of_the_student_then_the_teacher(student, tmp_path):
    """--mix prefix: kappa is drawn for each trajectory, the student acts before it and the teacher from it on."""
    common = ("--tasks", "toy:train:6", "--teacher", "oracle", "--student", student, "--iteration", 3, "--max-turns", 6)
    done = script("01_collect.py", *common, "--mix", "prefix", "--prefix-turns", "0:2", "--out", tmp_path / "t.jsonl")
    assert summary(done)["longest_prefix"] == "4" and summary(done)["beta"] == "None"
    kappas = []
    for record in jsonl.read(tmp_path / "t.jsonl", "trajectory"):
        kappas.append(record["kappa"])
        assert (record["mix"], record["beta"]) == ("prefix", None)
        assert record["kappa"] == mixing.prefix(4, 0, 3, record["instance_id"], 0)
        for message in record["messages"]:
            if message["role"] == "assistant":
                assert message["actor"] == ("student" if message["turn"] < record["kappa"] else "teacher")
    assert len(set(kappas)) > 1
    other = script("01_collect.py", *common, "--mix", "prefix", "--prefix-turns", "1:2", "--out", tmp_path / "t.jsonl", ok=False)
    assert other.returncode == 2 and "longest_prefix = 4, now it is 5" in other.stderr


@pytest.mark.parametrize("args, message", [
    (["--mix", "prefix"], "--mix prefix needs --prefix-turns START:GROWTH"),
    (["--prefix-turns", "0:3"], "nothing else takes it"),
    (["--mix", "prefix", "--prefix-turns", "0:3", "--beta", "0.5"], "--mix prefix has no beta"),
    (["--mix", "prefix", "--prefix-turns", "3", "--student", "oracle"], "is not START:GROWTH"),
    (["--mix", "prefix", "--prefix-turns", "2:0"], "--student is missing, and with a prefix of up to 2 turns it acts"),
    (["--mix", "teacher", "--teacher", "oracle", "--beta", "0.3"], "--mix teacher is beta 1, and --beta or --schedule say 0.3"),
    (["--mix", "student", "--student", "oracle", "--schedule", "paper"], "--mix student is beta 0, and"),
    (["--mix", "teacher", "--teacher", "oracle,noise=2"], "noise is the share of wrong turns"),
    (["--mix", "teacher", "--teacher", "oracle,luck=0.5"], "wanted oracle[,noise=P]"),
])  # fmt: skip
def test_mistakes_about_who_acts(tmp_path, args, message):
    done = script("01_collect.py", "--tasks", "toy:train:2", "--teacher", "oracle", *args, "--out", tmp_path / "t.jsonl", ok=False)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "t.jsonl").exists()


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Collected with a teacher that errs at half of its turns, and graded."""
    home = tmp_path_factory.mktemp("noisy")
    script("01_collect.py", "--tasks", "toy:train:8", "--teacher", "oracle,noise=0.5", "--mix", "teacher", "--out",
           home / "trajectories.jsonl")  # fmt: skip
    script("04_eval.py", "--tasks", "toy:train:8", "--trajectories", home / "trajectories.jsonl", "--out", home / "grades")
    return home


def test_rejection_sampling(noisy, tmp_path):
    """A teacher that errs fails sometimes; --keep resolved labels the trajectories that did not, and nothing else."""
    graded = {r["trajectory_id"]: r["resolved"] for r in jsonl.read(noisy / "grades/results.jsonl", "result")}
    assert 1 <= sum(graded.values()) <= 7
    command = ("02_relabel.py", "--trajectories", noisy / "trajectories.jsonl", "--teacher", "oracle,noise=0.5", "--out")
    script(*command, tmp_path / "labels.jsonl", "--keep", "resolved")
    labels = list(jsonl.read(tmp_path / "labels.jsonl", "label"))
    assert {label["trajectory_id"] for label in labels} == {name for name in graded if graded[name]}
    assert {label["source"] for label in labels} == {"executed"}

    moved = tmp_path / "ungraded"
    moved.mkdir()
    (moved / "trajectories.jsonl").write_bytes((noisy / "trajectories.jsonl").read_bytes())
    done = script("02_relabel.py", "--trajectories", moved / "trajectories.jsonl", "--teacher", "oracle", "--out",
                  moved / "labels.jsonl", "--keep", "resolved", ok=False)  # fmt: skip
    assert done.returncode == 2 and "grades/results.jsonl is missing: 04_eval.py --tasks TASKS" in done.stderr
    shutil.copytree(noisy / "grades", moved / "grades")
    lines = (noisy / "trajectories.jsonl").read_text().splitlines(keepends=True)
    (moved / "trajectories.jsonl").write_text("".join(lines[1:]))
    done = script("02_relabel.py", "--trajectories", moved / "trajectories.jsonl", "--teacher", "oracle", "--out",
                  moved / "labels.jsonl", "--keep", "resolved", ok=False)  # fmt: skip
    assert done.returncode == 2 and "is of other trajectories than" in done.stderr


def test_max_labels_takes_whole_trajectories_and_cuts_the_last(noisy, tmp_path):
    turns = {r["trajectory_id"]: sum(m["role"] == "assistant" for m in r["messages"])
             for r in jsonl.read(noisy / "trajectories.jsonl")}  # fmt: skip
    chosen = {}
    for seed in (0, 1):
        out = tmp_path / f"labels{seed}.jsonl"
        done = script("02_relabel.py", "--trajectories", noisy / "trajectories.jsonl", "--teacher", "oracle", "--out", out,
                      "--max-labels", 25, "--seed", seed)  # fmt: skip
        assert summary(done)["states"] == "25"
        of: dict = {}
        for label in jsonl.read(out, "label"):
            of.setdefault(label["trajectory_id"], []).append(label["turn"])
        assert all(found == list(range(len(found))) for found in of.values())  # from the first turn on
        assert sum(len(found) < turns[name] for name, found in of.items()) <= 1
        chosen[seed] = set(of)
    assert chosen[0] != chosen[1]
    many = script("02_relabel.py", "--trajectories", noisy / "trajectories.jsonl", "--teacher", "oracle", "--out",
                  tmp_path / "many.jsonl", "--max-labels", 9999)  # fmt: skip
    assert f"there are {sum(turns.values())} states to label, fewer than --max-labels 9999" in many.stderr


def test_which_states_are_labelled(iteration, tmp_path):
    """student: where it acted. uncertain:P: there the share P with the lowest log-probability (none: uncertain first), and
    what the teacher executed besides."""
    home, _, _ = iteration
    records = [json.loads(line) for line in (home / "trajectories.jsonl").read_text().splitlines()]
    actors = {(r["trajectory_id"], m["turn"]): m["actor"] for r in records for m in r["messages"] if "actor" in m}
    students = {key for key, actor in actors.items() if actor == "student"}

    def relabel(name, *more, ok=True):
        return script("02_relabel.py", "--trajectories", tmp_path / "trajectories.jsonl", "--teacher", "oracle", "--out",
                      tmp_path / name, *more, ok=ok)  # fmt: skip

    def labelled(name):
        return {(r["trajectory_id"], r["turn"]) for r in jsonl.read(tmp_path / name, "label")}

    (tmp_path / "trajectories.jsonl").write_bytes((home / "trajectories.jsonl").read_bytes())
    relabel("student.jsonl", "--label-states", "student")
    assert labelled("student.jsonl") == students
    alone = tmp_path / "alone.jsonl"  # iteration 1, where only the teacher acted, is labelled whole
    alone.write_text((home / "trajectories.jsonl").read_text().replace('"actor": "student"', '"actor": "teacher"'))
    done = script("02_relabel.py", "--trajectories", alone, "--teacher", "oracle", "--label-states", "student", "--out",
                  tmp_path / "whole.jsonl")  # fmt: skip
    assert summary(done)["states"] == str(len(actors))
    refused = relabel("none.jsonl", "--label-states", "uncertain:0.5", ok=False)
    assert refused.returncode == 2 and "no turn of the student in" in refused.stderr and "logprobs" in refused.stderr

    known, number = {}, 0
    for record in records:
        for message in record["messages"]:
            if message.get("actor") == "student":
                number += 1
                message["logprob"] = None if number == 1 else -((number * 7) % 11 + number / 100)
                known[record["trajectory_id"], message["turn"]] = message["logprob"]
    (tmp_path / "trajectories.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    done = relabel("uncertain.jsonl", "--label-states", "uncertain:0.3")
    ranked = sorted(known, key=lambda key: -99 if known[key] is None else known[key])
    assert labelled("uncertain.jsonl") == set(ranked[: -(-3 * len(ranked) // 10)]) | (set(actors) - students)
    assert int(summary(done)["queried"]) == -(-3 * len(ranked) // 10)

    for text, message in (("uncertain:0", "P in uncertain:P is a share"), ("uncertain", "is a share"),
                          ("certain", "is none of all, student, uncertain:P")):  # fmt: skip
        bad = relabel("bad.jsonl", "--label-states", text, ok=False)
        assert bad.returncode == 2 and message in bad.stderr and not (tmp_path / "bad.jsonl").exists()
    assert "now it is 'student'" in relabel("uncertain.jsonl", "--label-states", "student", ok=False).stderr
