"""run_loop.sh's presets and its dry run: which commands each preset means, without running one of them."""

import importlib
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from common import mixing, run, tasks

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests/data"
PRESETS = ["laptop", "paper", "paper-8b", "api-teacher"]
SCRIPTS = ["01_collect", "02_relabel", "03_train", "04_eval"]


def loop(home=ROOT, **knobs):
    """run_loop.sh with nothing but these knobs in its environment."""
    environment = {"PATH": os.environ["PATH"]} | knobs
    return subprocess.run([home / "run_loop.sh"], env=environment, capture_output=True, text=True)


def dry(preset="laptop", home=ROOT, **knobs):
    """What a dry run prints. The teacher of api-teacher has no default."""
    if preset == "api-teacher":
        knobs = {"TEACHER": "openai:MODEL@https://HOST/v1"} | knobs
    done = loop(home, PRESET=preset, DRY_RUN="1", **knobs)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def commands(text):
    """The printed commands as lists of words, without the interpreter."""
    return [shlex.split(line)[1:] for line in text.splitlines() if line and not line.startswith("#")]


def parsed(text):
    """(script, its parsed flags) of every stage; a flag that a script does not know ends the test."""
    found = []
    for words in commands(text):
        script = next((word for word in words if word.endswith(".py")), None)
        if script is None:
            assert words[0] == "-m" and words[1] in ("common.table", "common.serve", "common.report")
            continue
        words = words[words.index(script) + 1 :]
        words = ["1" if word == "N" else word for word in words]
        found.append((script, run.parse(importlib.import_module(script.removesuffix(".py")).Args, words)))
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_the_commands_of_each_preset(preset):
    """Two iterations of each, as a file to read. After a change that is meant:

    DRY_RUN=1 ITERATIONS=2 PRESET=paper ./run_loop.sh > tests/data/dry_run_paper.txt       (and the others; api-teacher
    with TEACHER=openai:MODEL@https://HOST/v1)
    """
    assert dry(preset, ITERATIONS="2") == (DATA / f"dry_run_{preset}.txt").read_text()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_command_is_one_that_its_script_takes(preset, monkeypatch):
    monkeypatch.setattr(tasks, "_from_dataset", lambda name, spec: [{"instance_id": spec}])
    everything = {"STUDENT_EXTRA": '{"top_k": 20}', "TEACHER_EXTRA": '{"a": 1}', "TEACHER_KEY_ENV": "KEY",
                  "INLINE": "1", "PRICE": "1,0.1,4", "MAX_COST": "50", "TRAIN_GPUS": "2", "AGGREGATE": "union",
                  "TEST_TASKS": ""}  # fmt: skip
    for knobs in ({}, everything):
        stages = parsed(dry(preset, ITERATIONS="2", **knobs))
        assert len(stages) == 2 + 4 * 2 + ("TEST_TASKS" not in knobs)
        for script, args in stages:
            if script == "01_collect.py":
                mixing.beta_at(args.schedule, args.iteration)
            if script in ("01_collect.py", "04_eval.py"):
                args.options("student")
                for spec in [args.tasks, *(getattr(args, "exclude_tasks", None) or [])]:
                    tasks.load(spec, 1)
            if script == "03_train.py":
                assert args.tokens_per_batch >= args.max_context  # or the longest sample would be refused
                acts = next(a.student for s, a in stages if s == "01_collect.py")
                assert acts.partition(":")[2].split(",")[0] == args.model


def test_the_arms():
    """Every arm of the comparison is a knob away, and its commands are ones that the scripts take."""

    def of(script, **knobs):
        return [args for name, args in parsed(dry(ITERATIONS="3", **knobs)) if name == script]

    prefix = of("01_collect.py", MIX="prefix")
    assert {(args.mix, args.prefix_turns, args.schedule) for args in prefix} == {("prefix", "0:3", None)}
    assert {args.schedule for args in of("01_collect.py", MIX="student") + of("01_collect.py", MIX="teacher")} == {None}
    resolved = dry(ITERATIONS="1", KEEP="resolved", TEACHER="oracle,noise=0.3")
    names = [name for name, _ in parsed(resolved)]
    assert names[2:6] == ["01_collect.py", "04_eval.py", "02_relabel.py", "03_train.py"]  # graded before it is relabelled
    graded = parsed(resolved)[3][1]
    assert (graded.trajectories, graded.out) == ("runs/laptop/iter_001/trajectories.jsonl", "runs/laptop/iter_001/grades")
    assert parsed(resolved)[4][1].keep == "resolved"
    assert [args.max_labels for args in of("02_relabel.py", MAX_LABELS="50,40")] == [50, 40, 40]
    assert [args.max_labels for args in of("02_relabel.py")] == [None] * 3
    assert {args.label_states for args in of("02_relabel.py", LABEL_STATES="uncertain:0.25")} == {"uncertain:0.25"}
    data = [args.data for args in of("03_train.py", AGGREGATE="window:2")]
    assert data == [[f"runs/laptop/iter_00{i}" for i in which] for which in ([1], [1, 2], [2, 3])]
    assert {args.init_adapter for args in of("03_train.py", AGGREGATE="window:2")} == {None}


def test_some_stages_alone():
    """STAGES runs what it names, in the order of the loop, with the commands that the whole loop has for it."""
    whole = commands(dry(ITERATIONS="2", TEST_TASKS="toy:test:2", KEEP="resolved", STUDENT="vllm:MODEL"))
    kinds = {
        "baseline": lambda words: "--iteration" not in words and words[0] == "04_eval.py",
        "collect": lambda words: words[0] == "01_collect.py",
        "relabel": lambda words: words[0] == "02_relabel.py" or words[-2] == "--seed" and "--trajectories" in words,
        "train": lambda words: words[0] == "03_train.py" or words[:3] == ["-m", "common.serve", "stop"],
        "eval": lambda words: any(word.startswith("runs/laptop/iter") and word.endswith("/eval") for word in words)
        and "--iteration" in words,
        "report": lambda words: words[:2] == ["-m", "common.report"],
        "test": lambda words: "--best" in words or "runs/laptop/test/iter_N" in words,
    }  # fmt: skip
    knobs = {"ITERATIONS": "2", "TEST_TASKS": "toy:test:2", "KEEP": "resolved", "STUDENT": "vllm:MODEL"}
    assert commands(dry(STAGES=" ".join(kinds), **knobs)) == whole
    for chosen in [[kind] for kind in kinds] + [["train", "eval"], ["relabel", "collect"]]:
        said = commands(dry(STAGES=",".join(chosen), **knobs))
        wanted = [words for words in whole[:-1] if any(kinds[kind](words) for kind in chosen)]
        if chosen == ["report"]:
            wanted = wanted[:2]  # the third is there for what the test tasks gave
        assert said == [*wanted, whole[-1]] and wanted


@pytest.mark.parametrize("preset, iterations", [("laptop", 3), ("paper", 5), ("paper-8b", 5), ("api-teacher", 3)])
def test_as_many_iterations_as_asked_for(preset, iterations):
    for knobs, count in (({}, iterations), ({"ITERATIONS": "1"}, 1), ({"ITERATIONS": "7"}, 7)):
        assert sum("01_collect.py" in words for words in commands(dry(preset, **knobs))) == count


def test_the_paper_is_the_papers():
    """arXiv 2605.12913: 5 x 512 tasks, 100 turns, 64K tokens, 0.7 / 0.9 in rollouts, greedy scores, 16 x 3 epochs."""
    settings = (("paper", "Qwen/Qwen3-4B-Instruct-2507", 65536), ("paper-8b", "Qwen/Qwen3-8B", 40960))
    for preset, student, context in settings:
        for script, args in parsed(dry(preset, ITERATIONS="2")):
            if script == "01_collect.py":
                assert (args.tasks, args.sample, args.schedule, args.mix) == ("swe-gym:train", 512, "paper", "turn")
                assert (args.temperature, args.top_p, args.max_turns, args.max_context) == (0.7, 0.9, 100, context)
                assert args.teacher.startswith("vllm:Qwen/Qwen3-Coder-30B-A3B-Instruct,")
                assert args.exclude_tasks == ["swe-gym:holdout", "swe-bench-verified"]
                extra = {"chat_template_kwargs": {"enable_thinking": False}} if preset == "paper-8b" else None
                assert args.options("student")["extra"] == extra
            elif script == "03_train.py":
                assert (args.model, args.batch_size, args.epochs, args.quant) == (student, 16, 3, "auto")
                assert (args.init_adapter is None) == ("iter_001" in args.out)
            elif script == "04_eval.py":
                assert args.temperature == 0
    stages = parsed(dry("paper", ITERATIONS="1", LR="3e-6"))
    assert [args.lr for script, args in stages if script == "03_train.py"] == [3e-6]


def test_what_is_set_wins_over_every_preset():
    """With all knobs set no preset makes a difference."""
    knobs = {"RUN": "mine", "ITERATIONS": "2", "TASKS": "a.jsonl", "EVAL_TASKS": "b.jsonl", "TEST_TASKS": "",
             "STUDENT": "hf:MODEL,quant=none", "STUDENT_EXTRA": "{}", "TEACHER": "replay:turns.jsonl", "INLINE": "0",
             "SCHEDULE": "linear:5", "AGGREGATE": "union", "SAMPLE": "7", "SEED": "3", "WORKERS": "5", "CONTEXT": "999",
             "AGENT_FLAGS": "--max-turns 4", "LR": "0.5", "TRAIN_FLAGS": "--epochs 9", "TRAIN_GPUS": "1"}  # fmt: skip
    said = {dry(preset, **knobs) for preset in PRESETS}
    assert len(said) == 1
    second = [words for words in commands(said.pop()) if "iter_002" in " ".join(words)]
    assert "hf:MODEL,adapter=runs/mine/iter_001/adapter,quant=none" in second[0]
    assert second[2][:5] == ["03_train.py", "--data", "runs/mine/iter_001", "runs/mine/iter_002", "--model"]


def test_the_teachers_settings_reach_whoever_asks_it():
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "note": "it's \"quoted\" $HOME `x` \\ *"}
    text = dry("api-teacher", ITERATIONS="1", TEACHER_EXTRA=json.dumps(extra), TEACHER_KEY_ENV="KEY", PRICE="1,0.1,4",
               MAX_COST="50")  # fmt: skip
    untrained, teacher, collect, relabel, _, student = commands(text)[:6]

    def value(words, flag):
        return words[words.index(flag) + 1] if flag in words else None

    for words, flag in ((teacher, "--student-extra"), (collect, "--teacher-extra"), (relabel, "--teacher-extra")):
        assert json.loads(value(words, flag)) == extra
        for flag, expected in (("--teacher-key-env", "KEY"), ("--price", "1,0.1,4"), ("--max-cost", "50")):
            assert value(words, flag) == expected
    for words in (untrained, student):
        assert not {"--student-extra", "--price", "--max-cost", "--teacher-key-env"} & set(words)
    assert "--inline" in collect and value(collect, "--cache") == value(relabel, "--cache") == "runs/api-teacher/cache"
    # what is printed is what a shell would run
    line = next(line for line in text.splitlines() if "01_collect.py" in line)
    echoed = subprocess.run(["bash", "-c", f'printf "%s\\0" {line}'], capture_output=True, text=True).stdout
    assert echoed.split("\0")[1:-1] == collect


@pytest.fixture
def home(tmp_path):
    """The shell scripts alone, on a machine without anything, with a set-up that would be noticed."""
    (tmp_path / "common").mkdir()
    for name in ("run_loop.sh", "common/presets.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "common/setup.sh").write_text("PYTHON=./python\ntouch installed\n")
    return tmp_path


@pytest.mark.parametrize("preset", PRESETS)
def test_a_dry_run_touches_nothing(home, preset):
    before = sorted(home.rglob("*"))
    dry(preset, home)
    assert sorted(home.rglob("*")) == before


def test_reasoning_and_quantisation_reach_every_script():
    text = dry("laptop", ITERATIONS="1", KEEP_REASONING="1", STUDENT="hf:MODEL,quant=nf4")
    for words in commands(text):
        if words[0][:3] in ("01_", "02_", "04_"):
            assert "--keep-reasoning" in words
        elif words[0] == "03_train.py":
            assert words[words.index("--quant") + 1] == "nf4"


@pytest.mark.parametrize("preset, knobs", [
    ("laptop", {}), ("laptop", {"RUN": "/tmp/my runs/one", "AGGREGATE": "union", "TEST_TASKS": "my tasks.jsonl"}),
    ("laptop", {"RUN": "a b"}), ("paper-8b", {}), ("api-teacher", {})])
def test_a_dry_run_prints_what_the_loop_runs(home, preset, knobs):
    """The loop with an interpreter that only writes down its arguments, and says that iteration 2 was best."""
    python = home / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\0" "$@" >> said; echo >> said; [ "${!#}" != --best ] || echo 2\n')
    python.chmod(0o755)
    expected = [[word.replace("iter_N", "iter_002") if word != "N" else "2" for word in words]
                for words in commands(dry(preset, home, **knobs))]
    teacher = {"TEACHER": "openai:MODEL@https://HOST/v1"} if preset == "api-teacher" else {}
    done = loop(home, PRESET=preset, **teacher, **knobs)
    assert done.returncode == 0 and (home / "installed").exists()
    said = [line.split("\0")[:-1] for line in (home / "said").read_text().splitlines()]
    assert [words for words in said if words[:2] != ["-m", "common.mixing"]] == expected  # it looks at SCHEDULE first


def test_mistakes_are_refused_before_anything_is_done(home):
    for knobs, words in (({"PRESET": "papers"}, "laptop, paper, paper-8b or api-teacher, not papers"),
                         ({"PRESET": "api-teacher"}, "needs TEACHER=openai:MODEL@URL, and the key in OPENAI_API_KEY"),
                         ({"AGGREGATE": "all"}, "AGGREGATE is current, union or window:K, not all"),
                         ({"MAX_COST": "5"}, "MAX_COST=5 needs the PRICE of the teacher"), ({"PRICE": "abc"}, "PRICE is IN,CACHED,OUT"),
                         ({"LABEL_STATES": "uncertain:2"}, "LABEL_STATES is"), ({"LABEL_STATES": "uncertain:."}, "LABEL_STATES is"),
                         ({"SEED": "9" * 20}, "SEED is a number"), ({"RUN": "a,b=1"}, "a comma in it"), ({"LR": "fast"}, "LR is a number"),
                         ({"TEACHER": "orcale"}, "TEACHER is oracle or a model"), ({"STAGES": ", "}, "STAGES names no stage"),
                         ({"MIX": "prefix", "PREFIX_TURNS": "x"}, "PREFIX_TURNS is START:GROWTH"),
                         ({"AGGREGATE": "window:0"}, "not window:0"),
                         ({"KEEP": "best"}, "KEEP is all or resolved, not best"),
                         ({"STAGES": "collect,grade"}, "and grade is none of them"),
                         ({"STUDENT": "hf:m,adapter=a"}, "without an adapter= of its own"),
                         ({"INLINE": "1", "MAX_LABELS": "9"}, "it does not go with KEEP"),
                         ({"MIX": "dagger"}, "MIX is turn, prefix, teacher or student, not dagger"),
                         ({"ITERATIONS": "08"}, "ITERATIONS is a number, 1 or more, not 08"),
                         ({"SAMPLE": "many"}, "SAMPLE is a number"), ({"SEED": "-1"}, "SEED is a number, 0 or more"),
                         ({"INLINE": "yes"}, "INLINE is 0 or 1, not yes"),
                         ({"STUDENT": "openai:m@http://h/v1"}, "hf:MODEL or vllm:MODEL, not openai:m@")):  # fmt: skip
        for how in ({}, {"DRY_RUN": "1"}):
            done = loop(home, **knobs, **how)
            assert (done.returncode, done.stdout) == (2, "") and words in done.stderr
    assert not (home / "installed").exists()
