"""The numbers that decide which arm is better, each against a published or a hand-worked example."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import metrics, schema
from common.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def pair(both, only_a, only_b, neither):
    """Outcomes of two arms with this table."""
    cells = [(True, True)] * both + [(True, False)] * only_a + [(False, True)] * only_b + [(False, False)] * neither
    return {f"t{n}": a for n, (a, _) in enumerate(cells)}, {f"t{n}": b for n, (_, b) in enumerate(cells)}


# ---------------------------------------------------------------------------------------------------------------------
# Two arms, several seeds

@pytest.mark.parametrize("table, interval", [((59, 6, 16, 80), (0.0046, 0.1186)), ((1, 1, 7, 12), (0.026, 0.507))])
def test_the_paired_interval_of_published_examples(table, interval):
    """Cavo et al. 2012 and Bentur et al. 2009, as in Fagerland, Lydersen and Laake, Statistical Analysis of Contingency
    Tables, chapter 8 (there as after minus before, with the other sign)."""
    found = metrics.paired(*pair(*table))
    digits = len(str(interval[0])) - 2
    assert (round(found["low"], digits), round(found["high"], digits)) == interval
    assert [found[name] for name in ("both", "only_a", "only_b", "neither")] == list(table)


def test_mcnemar_by_hand():
    """Five tasks that only b resolved, one that only a did: two tails of 6 coins, 2 (1 + 6) / 64."""
    found = metrics.paired(*pair(3, 1, 5, 2))
    assert found["p"] == pytest.approx(14 / 64) and found["difference"] == pytest.approx(4 / 11)
    assert (found["rate_a"], found["rate_b"]) == (pytest.approx(4 / 11), pytest.approx(8 / 11))
    a, b = pair(3, 1, 5, 2)
    other = metrics.paired(b, a)
    assert [other[name] for name in ("difference", "low", "high", "p")] == pytest.approx(
        [-found["difference"], -found["high"], -found["low"], found["p"]])  # fmt: skip
    same = metrics.paired(a, a)
    assert same["p"] == 1 and same["difference"] == 0 and same["low"] < 0 < same["high"]


def test_other_tasks_are_refused_and_named():
    a, b = pair(3, 1, 5, 2)
    del b["t4"]
    for compare in (lambda: metrics.paired(a, b), lambda: metrics.combine_seeds([(a, a), (a, b)])):
        with pytest.raises(InputError, match=r"not the same tasks: 1 of 11 have a result on one side alone \(t4\)"):
            compare()
    with pytest.raises(InputError, match="no results"):
        metrics.paired({}, {})


def test_seeds_together_by_hand():
    """Differences of 0.1 and 0.3: mean 0.2, t interval 0.2 +- 12.706 * 0.1414 / sqrt(2). One seed with two tasks, of which
    b gained one: two draws give 0, 1/2 or 1 with chances 1/4, 1/2, 1/4."""
    found = metrics.combine_seeds([pair(4, 0, 1, 5), pair(4, 0, 3, 3)])
    assert found["differences"] == pytest.approx([0.1, 0.3]) and found["difference"] == pytest.approx(0.2)
    assert (found["t_low"], found["t_high"]) == (pytest.approx(0.2 - 1.2706, abs=1e-4), pytest.approx(0.2 + 1.2706, abs=1e-4))
    assert 0 <= found["low"] < 0.2 < found["high"] < found["t_high"]  # two seeds: the bootstrap is far too narrow
    one = metrics.combine_seeds([pair(0, 0, 1, 1)])
    assert (one["low"], one["high"], one["t_low"], one["t_high"]) == (0, 1, None, None)
    assert metrics.combine_seeds([pair(4, 0, 1, 5), pair(4, 0, 3, 3)]) == found
    # Five seeds with the same outcomes are one about other tasks: what they share does not average out.
    one, five = (metrics.combine_seeds([pair(20, 4, 16, 20)] * seeds) for seeds in (1, 5))
    assert [five["low"], five["high"]] == pytest.approx([one["low"], one["high"]], abs=0.03) and one["high"] - one["low"] > 0.2


def test_intervals_over_seeds_cover_the_truth():
    """300 experiments of eight seeds and 60 tasks whose true difference is 0.1; tasks and seeds differ in how much b gains.

    Both intervals should cover it in about 95 % of them. With a true coverage of 93.5 % or more, fewer than 88 % has a
    probability below 2e-4 (binomial). An interval that forgets that tasks of one seed share a student covers it in 81 %.
    """
    random, covered, seeds, n = np.random.default_rng(5), np.zeros(2), 8, 60
    for experiment in range(300):
        base, of_task, of_seed = random.uniform(0.3, 0.6, n), random.uniform(-0.1, 0.1, n), random.uniform(-0.15, 0.15, (seeds, 1))
        a, b = random.random((seeds, n)) < base, random.random((seeds, n)) < base + 0.1 + of_task + of_seed
        names = [str(task) for task in range(n)]
        runs = [tuple(dict(zip(names, arm[s].tolist())) for arm in (a, b)) for s in range(seeds)]
        found = metrics.combine_seeds(runs, draws=300, seed=experiment)
        covered += [found["low"] <= 0.1 <= found["high"], found["t_low"] <= 0.1 <= found["t_high"]]
    assert (covered / 300 >= 0.88).all(), covered / 300


# ---------------------------------------------------------------------------------------------------------------------
# Covariate shift

def test_shift_by_hand():
    """Turn 1: (2 * 1.0 + 6 * 3.0) / 8 = 2.5 nats a token before training; the unmeasured label counts for agreement."""
    def row(turn, student_turns, agrees, tokens=None, before=None, after=None):
        return {"turn": turn, "student_turns": student_turns, "agrees": agrees, "tokens": tokens, "before": before, "after": after}

    lines = metrics.shift([
        row(0, 0, None, 4, 0.5, 0.25), row(1, 0, True), row(1, 1, False, 2, 1.0, None), row(1, 1, True, 6, 3.0, 0.5), row(2, 2, True),
    ])  # fmt: skip
    shown = {(line.pop("history"), line.pop("turn")): tuple(line.values()) for line in lines}
    assert shown == {  # labels, tokens, before, after, compared, agree
        ("teacher", None): (1, 4, 0.5, 0.25, 1, 1.0),
        ("teacher", 0): (1, 4, 0.5, 0.25, 0, None),
        ("teacher", 1): (0, 0, None, None, 1, 1.0),
        ("student", None): (2, 8, 2.5, 0.5, 3, 2 / 3),
        ("student", 1): (2, 8, 2.5, 0.5, 2, 0.5),
        ("student", 2): (0, 0, None, None, 1, 1.0),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Runs made by hand

LIMITS = {"max_turns": 9, "max_context": 2048}


def lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def manifest(path, settings, summary, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"finished": 1.0, "seconds": 60.0, "settings": settings, "summary": summary, "commit": "c" * 40, "diff": ""}
    path.write_text(json.dumps(content | more))


def evaluation(place, resolved, *, on="toy:dev", seed=0, limits=LIMITS, tasks_hash="d0", student="hf:m,adapter=a/b,quant=none",
               grader="local", sandbox="local", temperature=0.0, **same):  # fmt: skip
    """resolved: whether each of the tasks t0, t1, ... is; of these, t0 and t1 are of repository a, others of b."""
    record = {"schema": schema.VERSION, "trajectory_id": None, "tests_status": {}, "exit_status": None, "failure_mode": None,
              "turns": None, "tokens": None, "seconds": 0.0, "tampered": False}  # fmt: skip
    lines(place / "results.jsonl", [record | {"instance_id": f"t{n}", "resolved": bool(good), "groups": ["repository a" if n < 2 else "repository b"]}
                                    for n, good in enumerate(resolved)])  # fmt: skip
    counted = {"tasks": len(resolved), "resolved": sum(resolved), **metrics.rate(sum(resolved), len(resolved))}
    counted |= {"grader": grader, "sandbox": sandbox}
    same = {"tasks": tasks_hash, "grader": "auto", "test_timeout": 120.0, "prompts": ["toy-1"], "limits": limits,
            "student": {"sampling": {"temperature": temperature}}} | same  # fmt: skip
    settings = {"tasks": on, "student": student, "seed": seed}
    manifest(place / "manifest.json", settings, counted | {"tokens_in": 5, "tokens_out": 1}, same=same)


def make_run(home, scores=((0, 0, 0, 1), (0, 1, 1, 1)), *, seed=0, mix="turn", keep=None, schedule="linear:2", data=None, test=None,
             teacher="oracle", actor=None, collect=None, lr=(1e-4,), **options):  # fmt: skip
    """A run with iterations 0, 1, ...: scores are the resolved tasks of each; collect: more settings of 01; lr: of the
    first iterations, and the last one of all that follow."""
    home.mkdir(parents=True)
    for number, resolved in enumerate(scores):
        place = home / f"iter_{number:03d}"
        evaluation(place / "eval", resolved, seed=seed, **options)
        if number:
            settings = {"mix": mix, "schedule": schedule, "beta": None, "prefix_turns": "0:2", "teacher": teacher,
                        "student": actor or options.get("student", "hf:m"), "seed": seed} | (collect or {})  # fmt: skip
            collected = {"trajectories": 1, "turns": 2, "teacher_turn_share": 0.5, "teacher_token_share": 0.4,
                         **{f"{who}_tokens_{kind}": 10 for who in ("student", "teacher") for kind in ("in", "cached", "out")}}  # fmt: skip
            manifest(place / "trajectories.jsonl.manifest.json", settings, collected | {"cost": 0.5}, same={"prompts": ["toy-1"]})
            used = data[number - 1] if data else [str(place)]
            manifest(place / "adapter/manifest.json", {"data": used, "init_adapter": None, "keep": keep,
                     "lr": lr[min(number, len(lr)) - 1]}, {"labels": 2, "loss": 0.1})
    if test is not None:
        best = max(range(1, len(scores)), key=lambda i: (sum(scores[i]), -i))
        evaluation(home / f"test/iter_{best:03d}", test, on="toy:test", seed=seed, tasks_hash="t0")
    return home


def label_two_turns(place):
    """The teacher acted at turn 0, the student at turn 1 otherwise than the teacher would; both labels are measured."""
    turns = [{"role": "assistant", "turn": turn, "actor": actor} for turn, actor in enumerate(("teacher", "student", "student"))]
    lines(place / "trajectories.jsonl", [{"trajectory_id": "t0.i1.a0", "messages": turns}])
    label = {"schema": schema.VERSION, "trajectory_id": "t0.i1.a0", "instance_id": "t0", "iteration": 1, "label": "x", "valid": True,
             "reason": None, "source": "queried", "teacher": {}, "tokens": {"in": 9, "cached": 0, "out": 3}, "seconds": 0.0}  # fmt: skip
    lines(place / "labels.jsonl", [label | {"turn": turn, "agrees": agrees} for turn, agrees in enumerate((None, False, True))])
    nll = {"trajectory_id": "t0.i1.a0", "instance_id": "t0", "iteration": 1, "tokens": 3, "student_turns": 0}
    lines(place / "adapter/label_nll.jsonl", [nll | {"turn": 0, "before": 1.0, "after": 0.5},
                                              nll | {"turn": 2, "before": 2.0, "after": 0.5, "student_turns": 1}])  # fmt: skip
    manifest(place / "labels.jsonl.manifest.json", {"label_states": "all", "seed": 0},
             {"states": 3, "tokens_in": 9, "tokens_cached": 0, "tokens_out": 3, "cost": 0.25})  # fmt: skip


def test_the_summary_of_an_iteration(tmp_path):
    home = make_run(tmp_path / "r")
    label_two_turns(home / "iter_001")
    found = metrics.write_summaries(home)
    assert found.best == 1 and found.seed == 0 and found.settings["student"] == "hf:m,quant=none"
    assert json.loads((home / "iter_001/summary.json").read_text()) == found.iterations[1]
    first = found.iterations[1]
    assert first["eval"]["resolved"] == 3 and first["eval"]["on"] == "toy:dev"
    assert (first["labels"]["labels"], first["labels"]["per_task"]) == (3, 3.0)
    assert [line for line in first["shift"] if line["turn"] is None] == [
        {"history": "teacher", "turn": None, "labels": 1, "tokens": 3, "before": 1.0, "after": 0.5, "compared": 1, "agree": 0.0},
        {"history": "student", "turn": None, "labels": 1, "tokens": 3, "before": 2.0, "after": 0.5, "compared": 1, "agree": 1.0},
    ]
    assert first["cost"] == {
        "teacher": {"in": 19, "cached": 10, "out": 13}, "student": {"in": 10, "cached": 10, "out": 10},
        "eval": {"in": 5, "cached": None, "out": 1}, "dollars": 0.75,
        "seconds": {"collect": 60.0, "grades": None, "labels": 60.0, "train": 60.0, "eval": 60.0},
    }  # fmt: skip
    assert {name: part for name, part in found.iterations[0].items() if name not in ("eval", "cost")} == dict.fromkeys(
        ("collect", "grades", "labels", "train", "shift"))  # fmt: skip
    manifest(home / "iter_001/grades/manifest.json", {"tasks": "toy:train", "seed": 0}, {"resolved": 1})
    assert metrics.read(home).iterations[1]["cost"]["seconds"]["grades"] == 60.0  # rejection sampling has its price
    shutil.rmtree(home / "iter_001")
    assert metrics.read(home).iterations[0]["eval"]  # the untrained student alone is a run
    shutil.rmtree(home / "iter_000")
    make_run(tmp_path / "later", ((0, 0), (0, 1), (1, 1)))
    for number in (0, 1):
        shutil.rmtree(tmp_path / f"later/iter_00{number}")
    assert [(number, part is None) for number, part in metrics.read(tmp_path / "later").iterations.items()] == [(1, True), (2, False)]


def test_the_names_of_arms(tmp_path):
    kinds = {"dagger0": {}, "dagger1": {"seed": 1}, "sft": {"mix": "teacher"}, "sft_linear1": {"mix": "teacher", "schedule": "linear:1", "seed": 1},
             "kept": {"mix": "teacher", "keep": "resolved"}, "aggrevate": {"mix": "prefix"}, "on": {"mix": "student"}}  # fmt: skip
    runs = [metrics.read(make_run(tmp_path / name, **options)) for name, options in kinds.items()]
    assert metrics.arm_names(runs) == ["DAgger linear:2"] * 2 + ["SFT"] * 2 + ["SFT, resolved only", "AggreVaTe 0:2", "on-policy"]
    assert metrics.arm_names([metrics.read(make_run(tmp_path / f"how{seed}", seed=seed, teacher=teacher, student=student)) for seed, teacher, student in (
        (0, "openai:big@http://one:8000/v1", "vllm:Q/small,gpus=0"), (1, "openai:big@http://two:8001/v1", "vllm:Q/small,gpus=1,util=0.3"))
    ]) == ["DAgger linear:2"] * 2  # fmt: skip  where a policy runs makes no arm
    always = metrics.read(make_run(tmp_path / "always", schedule="constant:1"))
    assert metrics.arm_names([runs[2], always]) == ["SFT, mix teacher", "SFT, mix turn, schedule constant:1"]
    # arms that begin with the same iteration 1, which is SFT in all of them, are told apart by what came after
    for name, schedule in (("shared0", "linear:2"), ("shared1", "constant:1")):
        place = make_run(tmp_path / name, ((0, 0), (0, 1), (1, 1)), schedule=schedule) / "iter_001/trajectories.jsonl.manifest.json"
        place.write_text(place.read_text().replace("linear:2", "constant:1"))
    shared = [metrics.read(tmp_path / name) for name in ("shared0", "shared1")]
    assert metrics.arm_names(shared) == ["DAgger linear:2", "SFT"]
    for run, numbers in ((runs[0], (5, 5)), (runs[1], (5, 4))):
        for number, labels in enumerate(numbers, 1):
            lines(run.home / f"iter_00{number}/labels.jsonl", [])
            manifest(run.home / f"iter_00{number}/labels.jsonl.manifest.json", {"max_labels": labels, "keep": "resolved"}, {})
    budgets = [metrics.read(run.home) for run in runs[:2]]
    assert [run.settings["max_labels"] for run in budgets] == [5, "5,4"]
    assert metrics.arm_names(budgets)[1] == "DAgger linear:2, resolved only, max labels 5,4"
    three = ((0, 0), (0, 1), (1, 1))
    more = {"union": {"data": [["1"], ["1", "2"]]}, "window": {"data": [["1"], ["2"]]}}
    union, window = (metrics.read(make_run(tmp_path / name, three, **options)) for name, options in more.items())
    assert metrics.arm_names([union, window]) == ["DAgger linear:2, aggregate union", "DAgger linear:2, aggregate window:1"]
    again = metrics.read(make_run(tmp_path / "again", three, data=more["union"]["data"]))
    assert metrics.arm_names([union, again]) == ["DAgger linear:2", "DAgger linear:2 (again)"]  # a copy leaves the arm whole
    again.settings["code"] = "ccccccccc with changes 1a2b"
    assert metrics.arm_names([union, again]) == ["DAgger linear:2 (ccccccccc)", "DAgger linear:2 (ccccccccc with changes 1a2b)"]


def test_a_run_that_is_not_finished_is_of_its_arm(tmp_path):
    """What its stages have not come to yet is no difference, and does not make it what all others are set against."""
    half = make_run(tmp_path / "s0", THREE, mix="teacher", lr=(1e-4, 2e-4))
    for name in ("iter_001/eval", "iter_002"):
        shutil.rmtree(half / name)
    whole = [make_run(tmp_path / f"s{seed}", THREE, mix="teacher", seed=seed, lr=(1e-4, 2e-4)) for seed in (1, 2)]
    other = make_run(tmp_path / "d1", THREE, seed=1, lr=(1e-4, 2e-4))
    runs = [metrics.read(home) for home in (half, *whole, other)]
    assert metrics.arm_names(runs) == ["SFT"] * 3 + ["DAgger linear:2"]
    (begun := tmp_path / "s9").mkdir()
    shutil.copytree(half / "iter_000", begun / "iter_000")
    shown = table(begun, *(found.home for found in runs))
    assert "DAgger linear:2 against SFT, each at its chosen iteration" in shown
    assert "not collected against SFT: no seed in which both were evaluated" in shown


def test_a_score_of_other_weights_is_not_quoted(tmp_path):
    home = make_run(tmp_path / "run", test=[1, 1])
    shutil.copytree(home / "test/iter_001", home / "test/iter_001.bak")  # somebody's copy: neither read nor in the way
    for place, found in ((home / "test/iter_001", "old"), (home / "iter_001/eval", "new")):
        content = json.loads((place / "manifest.json").read_text())
        content["same"]["student"]["adapter_hash"] = found
        (place / "manifest.json").write_text(json.dumps(content))
        assert list(metrics.read(home).test) == [1] if found == "old" else True
    with pytest.raises(InputError, match="test/iter_001: this score is of other weights than .*/iter_001/eval"):
        metrics.read(home)


THREE = ((0, 0), (0, 1), (1, 1))


@pytest.mark.parametrize("usual, other, names", [
    ({}, {"teacher": "oracle,noise=0.9"}, ["SFT, teacher oracle", "SFT, teacher oracle,noise=0.9"]),
    ({}, {"collect": {"temperature": 1.5}}, ["SFT", "SFT, temperature 1.5"]),
    ({"lr": (1e-4, 2e-4)}, {"lr": (3e-4, 2e-4)}, ["SFT, lr 0.0001,0.0002", "SFT, lr 0.0003,0.0002"]),
    ({"mix": "student"}, {"mix": "student", "actor": "oracle,noise=0.3"}, ["on-policy", "on-policy (oracle,noise=0.3 acting)"]),
    ({"labels": "oracle"}, {"labels": "oracle,noise=0.9"}, ["SFT", "SFT, label teacher oracle,noise=0.9"]),
    ({"labels": "oracle"}, {"labels": "oracle", "label_temperature": 1.5}, ["SFT", "SFT, label temperature 1.5"]),
    ({}, {"prompts": ["swe-1"]}, ["SFT, prompts ['toy-1']", "SFT, prompts ['swe-1']"]),
])  # fmt: skip
def test_seeds_of_an_arm_differ_in_nothing_else(tmp_path, usual, other, names):
    """In nothing that makes a student: what is in the manifests of any of its iterations counts."""
    runs = []
    for seed, options in enumerate((usual, usual, other)):
        options = {"mix": "teacher"} | options
        labels, temperature, prompts = (options.pop(name, None) for name in ("labels", "label_temperature", "prompts"))
        home = make_run(tmp_path / str(seed), THREE, seed=seed, **options)
        if prompts:
            place = home / "iter_002/trajectories.jsonl.manifest.json"
            place.write_text(json.dumps(json.loads(place.read_text()) | {"same": {"prompts": prompts}}))
            shutil.rmtree(home / "iter_001")
        if labels:
            for place in (home / "iter_001", home / "iter_002"):
                lines(place / "labels.jsonl", [])
                manifest(place / "labels.jsonl.manifest.json", {"teacher": labels, "temperature": temperature, "seed": seed}, {})
        runs.append(metrics.read(home))
    assert metrics.arm_names(runs) == [names[0], names[0], names[1]]


@pytest.mark.parametrize("options, message", [
    ({"tasks_hash": "d1", "on": "toy:dev:4"}, r"tasks is toy:dev \(contents d0\) in .*a/iter_000/eval and toy:dev:4 \(contents d1\) in .*b/iter_000/eval"),
    ({"limits": LIMITS | {"max_turns": 12}}, "limit max_turns is 9 in .* and 12 in "),
    ({"limits": LIMITS | {"network": True}}, "limit network is None in .* and True in "),
    ({"grader": "swebench"}, "grader is local in .* and swebench in "),
    ({"sandbox": "docker"}, "sandbox is local in .* and docker in "),
    ({"prompts": ["toy-2"]}, r"prompts is \['toy-1'\] in .* and \['toy-2'\] in "),
    ({"test_timeout": 60.0}, "test_timeout is 120.0 in .* and 60.0 in "),
    ({"swebench": {"version": "5.0.2"}}, "swebench is None in .* and {'version': '5.0.2'} in "),
    ({"temperature": 0.5}, "sampling temperature is 0.0 in .* and 0.5 in "),
])  # fmt: skip
def test_runs_that_cannot_be_compared_are_refused(tmp_path, options, message):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", **options)
    with pytest.raises(InputError, match=f"these runs cannot be compared: {message}"):
        metrics.check_comparable([metrics.read(a), metrics.read(b)])
    metrics.check_comparable([metrics.read(a), metrics.read(a)])


def test_only_what_both_recorded_is_compared(tmp_path):
    """--grader auto and --grader local may be the same grader: what counts is who graded. Older runs did not say where."""
    a, b, c = make_run(tmp_path / "a"), make_run(tmp_path / "b"), make_run(tmp_path / "c", sandbox=None)
    for place in b.glob("iter_*/eval/manifest.json"):
        content = json.loads(place.read_text())
        place.write_text(json.dumps(content | {"same": content["same"] | {"grader": "local"}}))
    metrics.check_comparable([metrics.read(home) for home in (a, b, c)])
    unsaid, official = (make_run(tmp_path / name, grader=grader) for name, grader in (("d", None), ("e", "swebench")))
    with pytest.raises(InputError, match="grader is local in .*/a/iter_000/eval and swebench in .*/e/iter_000/eval"):
        metrics.check_comparable([metrics.read(home) for home in (unsaid, a, official)])


def test_iterations_of_a_run_that_were_evaluated_differently_are_refused(tmp_path):
    home = make_run(tmp_path / "run")
    evaluation(home / "iter_001/eval", [1], on="toy:dev:1", tasks_hash="d1")
    told = table(home, code=2)
    assert "the iterations of this run cannot be compared: tasks is toy:dev (contents d0) in" in told and "one run at a time" not in told


def table(*homes, code=0):
    done = subprocess.run([sys.executable, "-m", "common.metrics", *homes], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_command_compares_arms_seed_by_seed_on_the_test_tasks(tmp_path):
    sft = [make_run(tmp_path / f"sft{s}", mix="teacher", seed=s, test=[1, 0, 0, 0, 0, 0]) for s in range(2)]
    dagger = [make_run(tmp_path / f"dagger{s}", seed=s, test=[1, 1, 1, 1, 0, s]) for s in range(2)]
    (sft[1] / "iter_001").rename(sft[1] / "iter_002")
    (sft[1] / "test/iter_001").rename(sft[1] / "test/iter_002")
    shown = table(*sft, *dagger)
    rows = [line.split() for line in shown.splitlines()]
    assert [line for line in shown.splitlines() if "sft1" in line and "missing" in line] and (sft[0] / "iter_001/summary.json").exists()
    assert "DAgger linear:2 against SFT, each at its chosen iteration, on toy:test" in shown
    assert ["seed", "0", "16.7%", "66.7%", "+50.0"] in [row[:5] for row in rows] and "0.25" in shown
    assert "2 seeds together: +58.3 points" in shown and "-47.6 to +164.2 (t over seeds)" in shown
    arms = [[metrics.read(home) for home in arm] for arm in (sft, dagger)]
    assert metrics.compare(*arms)["test"] and list(metrics.compare(*arms)["seeds"]) == [0, 1]
    (dagger[1] / "test/iter_001/manifest.json").unlink()
    arms[1][1] = metrics.read(dagger[1])
    found = metrics.compare(*arms)  # seed 1 has not met the test tasks in one arm
    assert (found["test"], list(found["seeds"]), found["seeds_left_out"]) == (True, [0], [1])
    assert "not in it, for not both have met the test tasks there: seed 1" in table(*sft, *dagger)
    (dagger[0] / "test/iter_001/manifest.json").unlink()
    arms[1][0] = metrics.read(dagger[0])
    found = metrics.compare(*arms)  # none has
    assert (found["test"], found["on"], found["together"]["difference"], found["seeds_left_out"]) == (False, "toy:dev", 0, [])
    assert metrics.compare(arms[0][:1], arms[1][1:]) is None  # other seeds


def test_a_task_that_the_machine_failed_is_left_out_of_the_comparison(tmp_path):
    """Of six test tasks the second arm has results for five; on these it is +1; the third arm is compared all the same."""
    runs = [make_run(tmp_path / name, mix=mix, test=[1, 0, 0, 0, 0, 0]) for name, mix in (("a", "teacher"), ("b", "turn"), ("c", "student"))]
    results = runs[1] / "test/iter_001/results.jsonl"
    kept = [json.loads(line) for line in results.read_text().splitlines()][1:]
    lines(results, [result | {"resolved": place == 0} for place, result in enumerate(kept)])
    shown = table(*runs)
    found = metrics.compare([metrics.read(runs[0])], [metrics.read(runs[1])])
    assert (found["left_out"], found["together"]["tasks"], found["together"]["difference"]) == (1, 5, 0.2)
    assert "1 task left out" in shown and "on-policy against SFT" in shown
    lines(results, [result | {"instance_id": f"x{place}"} for place, result in enumerate(kept)])
    shown = table(*runs)
    assert "DAgger linear:2 against SFT: no task in common" in shown and "on-policy against SFT, each at its" in shown


def test_where_and_how_two_arms_differ(tmp_path):
    """By hand: of t0, t1 (repository a) and t2 to t5 (b) SFT's seeds resolve t0; DAgger's t0, t1 and t2, and t0, t1."""
    sft = [make_run(tmp_path / f"sft{s}", mix="teacher", seed=s, test=[1, 0, 0, 0, 0, 0]) for s in range(2)]
    dagger = [make_run(tmp_path / f"dagger{s}", seed=s, test=[1, 1, 1 - s, 0, 0, 0]) for s in range(2)]
    modes = ({"no_patch": 5}, {"no_patch": 4, "tests_failed": 1}, {"turn_limit": 3}, {})
    for home, found in zip((*sft, *dagger), modes):
        place = home / "test/iter_001/manifest.json"
        content = json.loads(place.read_text())
        place.write_text(json.dumps(content | {"summary": content["summary"] | {"failure_modes": found}}))
    arms = [[metrics.read(home) for home in arm] for arm in (sft, dagger)]
    groups = metrics.compare(*arms)["groups"]
    assert {name: (of["tasks"], of["differences"]) for name, of in groups.items()} == {
        "repository a": (2, [0.5, 0.5]), "repository b": (4, [0.25, 0])}  # fmt: skip
    ends = metrics.endings(arms)
    assert (ends["on"], ends["test"]) == ("toy:test", True)
    assert ends["arms"] == [
        {"runs": 2, "tasks": 6, "resolved": 1, "failure_modes": {"no_patch": 4.5, "tests_failed": 0.5}},
        {"runs": 2, "tasks": 6, "resolved": 2.5, "failure_modes": {"turn_limit": 1.5}},
    ]
    shown = [line.split() for line in table(*sft, *dagger).splitlines()]
    assert ["repository", "b", "(4", "tasks):", "+12.5;"] in [row[:5] for row in shown]
    assert ["no", "patch", "4.5", "0"] in shown and ["resolved", "1", "2.5"] in shown
    assert metrics.endings([[], arms[1]])["arms"][0] is None and metrics.endings([[], []]) is None


def test_iterations_that_one_run_has_not_are_missing_and_said(tmp_path):
    short, long = make_run(tmp_path / "sft", mix="teacher"), make_run(tmp_path / "dagger", THREE)
    shown = table(short, long)
    assert [line.split()[-3] for line in shown.splitlines() if line.startswith("SFT")] == ["missing"]
    assert "one run has more iterations than the other, and so more to choose from: seed 0" in shown
    other = make_run(tmp_path / "other", THREE, seed=1)
    assert "code of" not in table(long, other)
    path = other / "iter_002/trajectories.jsonl.manifest.json"
    path.write_text(path.read_text().replace("c" * 40, "d" * 40))
    assert "DAgger linear:2: its runs were made by code of 2 commits, ccccccccc, ddddddddd" in table(long, other)
    assert "missing" not in table(long) and metrics.compare([metrics.read(long)], [metrics.read(long)])["uneven"] == []


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    (damaged := make_run(tmp_path / "damaged") / "iter_001/eval/manifest.json").write_text("")
    assert table(tmp_path / "damaged", code=2) == f"error: {damaged}: damaged, no JSON object; run its stage again with --overwrite\n"
    assert "which runs?" in table(code=2)
    assert table(tmp_path / "none", code=2) == f"error: {tmp_path}/none: no such directory; RUN=none ./run_loop.sh makes a run\n"
    (tmp_path / "empty/iter_001").mkdir(parents=True)
    assert table(tmp_path / "empty", code=2).startswith(f"error: {tmp_path}/empty: no finished stage in there")
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", tasks_hash="d1")
    assert table(a, b, code=2).startswith("error: these runs cannot be compared: tasks is toy:dev")
