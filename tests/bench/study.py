"""The study's results, one line of study.jsonl per (arm, seed), and its tables. tests/bench/study.sh makes the runs.

    python tests/bench/study.py tables [FILE]
    python tests/bench/study.py odd [RUNS]          patches that resolve their task and are not the gold one

What was decided before the first result on toy:study2 was there, and is what `tables` prints:

* The outcome is the share of the 300 tasks of toy:study2 that the chosen checkpoint resolves, greedy, alone.
* The first question: dagger - sft, with the same budget of labels and optimiser steps, over seeds 1 to 5 (seed 0 chose the
  design). The checkpoint is chosen on dev, so an arm may stop before its budget is spent. The answer is the
  mean difference with two 95 % intervals, the hierarchical bootstrap over seeds and tasks and the t-interval over the
  per-seed differences; the wider one counts. (The second one is about other seeds on these 300 tasks.) "DAgger is ahead" is said
  only if that one is clear of zero. The aim was 10 points.
  Corrected on 2026-11-26, when 16 of the 22 runs had results: that bootstrap drew tasks anew in each of its seeds, as if
  every seed had tasks of its own, and was too narrow. It draws them once for all seeds now, which made every interval of
  several seeds wider (that of dagger - sft was +46.1 to +55.1).
* Second questions, each with the same two intervals and without a claim of their own (they are many): every other arm
  against sft (seeds 1 to 3), dagger against sft-tasks (the match by tasks, seeds 1 to 3), and dagger - sft by kind of task
  (direct, follow; told, computed, families not in train). Added on 2026-11-26, when only sft and dagger had results: dagger
  against dagger-paper, aggrevate and rft; how many of those that erred edited again; tokens that training computed.
* Mechanism: how the unresolved tasks ended and what is wrong with their patches (failure modes); of the tasks whose first
  test run after the first edit failed ("erred"), how many were resolved after all ("recovered"), for tasks with one bug
  and with two apart (there, a failing test after the first edit is no error); and -log p per token of the expert's
  actions at the states that the student brings about itself and at those of the expert, on toy:dev2:24, after each
  iteration. Their difference is the shift.
* Expected: dagger ahead, by tasks that are repaired after a failing test, most of them `computed`; of first edits as many
  right as with sft or fewer. rft too may be ahead of sft: its teacher errs, and then shows how one goes on.
* rft has other training tasks than the others in part: it tries 90 in an iteration and they 64 (the same where both start).
* The expert was mended on 2026-11-26, in states that odd commands bring about (rewritten tests, a cd in the middle of a line,
  pytest on a file that is not there): none of the 3,413 labels that it was asked for in this study is another one since.
* No seed, arm or task is left out. A run is repeated only if the machine failed, from where it stopped.

This is the second design, and it was made so that the method can work: it says that and how DAgger helps where its premise
holds, not how often that is so. The premise: the expert does at once what the student cannot do at all, here to reckon
("17 dozens, in pieces": `computed`, 123 of the 300 tasks), so no demonstration shows what to do after a wrong edit; and that
is easy, for the failing test prints the right code. In 129 tasks (`told`) the issue says which of a few options is right;
48 are of families that are not in train.

The first one (2026-11-25, study_first.jsonl, at commit 1f15eae) had all families of bugs and all kinds of tasks (toy:train,
toy:dev:40, toy:study), a failing test that prints the wanted behaviour in words, and at most 9 turns. It was given up after
two runs of dagger, before any of sft had a result, because what it was to measure did not happen there: of 125 tasks with
one bug whose first edit failed, a dagger student resolved 9.5 after all (8 %). With 800 labels (two iterations) for some 45
choices it had not learnt to read what a failing test says, as little as it had learnt to read the issue; and 9 turns leave
room for one retry that is tested. Dagger's seeds resolved 46.0 and 38.0 %; one run of sft was finished all the same, with
44.0 % against the 46.0 % of the same seed (+2.0, -4.3 to +8.0), though the shift (below) was 0.13 with dagger and 0.32 with
sft.

Pilots, on tasks of dev splits and seed 0, after iteration 1 (sft) and after dagger's second (beta 0.5). Five families of
`told` alone (a design between the two, given up before its study tasks were read), 400 labels an iteration: of 60 tasks 30
and 33 resolved, of 35 and 34 that erred 6 and 12 repaired. With `computed`, 600 labels, at learning rates 1e-3 and 2e-3: of
48 tasks 9 and 10, then 34 and 35 resolved; of 39 and 38 that erred none repaired, then 25 of 39 and 25 of 36. So these tasks
were kept, and for a study of one night the labels halved, the limit set to 10 turns and dev to 24 tasks. study2 had been
read by nobody.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = Path(os.environ.get("RESULTS") or Path(__file__).with_name("study.jsonl"))
TASKS = 300
LABELS, STEPS = 300, 90  # in each iteration, as in study.sh
SPLIT = "study2"

from common import grading, jsonl, mixing, table, toy_families, toy_tasks  # noqa: E402
from common.failures import FAILURE_MODES, failure_mode  # noqa: E402
from common.intervals import combine_seeds  # noqa: E402


def read(path: Path = RESULTS) -> list[dict]:
    """The finished (arm, seed) lines."""
    return list(jsonl.read(path)) if path.exists() else []


def place(instance_id: str) -> int:
    """toy-study2-0007 -> 6."""
    return int(instance_id.rpartition("-")[2]) - 1


def match_tasks(runs: Path, seed: int) -> str:
    """MAX_LABELS of sft-tasks: in each iteration the labels of as many trajectories as dagger had labels from.

    02_relabel.py takes trajectories in an order drawn from the seed. Those of sft are the ones that sft-tasks collects
    too, since the expert does the same on the same tasks.
    """
    numbers = []
    for iteration in (1, 2, 3):
        home = f"iter_{iteration:03d}"
        labels = jsonl.read(runs / f"dagger-{seed}" / home / "labels.jsonl")
        wanted = len({label["trajectory_id"] for label in labels})
        turns = {record["trajectory_id"]: sum(m["role"] == "assistant" for m in record["messages"])
                 for record in jsonl.read(runs / f"sft-{seed}" / home / "trajectories.jsonl")}  # fmt: skip
        order = sorted(turns, key=lambda name: mixing.derive("max-labels", seed, name))
        numbers.append(min(LABELS, sum(turns[name] for name in order[:wanted])))
    return ",".join(map(str, numbers))


def erred(messages: list[dict]) -> tuple[bool, bool]:
    """(did the first test run after the first edit fail, was there another edit after that)"""
    edited = failed = False
    for said, seen in zip(messages[2::2], messages[3::2]):
        command = said["command"] or ""
        if failed and command.startswith("sed -i"):
            return True, True
        if edited and not failed and command.startswith(("pytest", "python -m pytest")):
            if seen["exit_code"] == 0:
                return False, False
            failed = True
        edited = edited or command.startswith("sed -i")
    return failed, False


def patch_mode(test: Path, row: dict, patch: str) -> str | None:
    """What is wrong with the patch, however the episode ended (most of those that fail end at the turn limit)."""
    end, log = grading.read_log(test / "logs" / f"{row['instance_id']}.txt", row, "local", patch)
    return failure_mode(row, None, patch, grading.regrade(row, end, log))


def mean_nll(home: Path) -> dict:
    """-log p per token of the labels in `home`, and their number."""
    lines = list(jsonl.read(home / "label_nll.jsonl"))
    tokens = sum(line["tokens"] for line in lines)
    return {"labels": len(lines), "nll": round(sum(line["before"] * line["tokens"] for line in lines) / tokens, 5)}


def answers(found: dict) -> int:
    """Turns for which the teacher was asked, in the rollout or for a label, used or not."""
    return found["collect"]["summary"]["teacher_turns"] + found["relabel"]["summary"]["queried"]


MADE = {  # stage -> its settings, in every arm
    "collect": {"tasks": "toy:train2", "max_turns": 10, "max_context": 2048, "temperature": 0.7, "top_p": 0.9, "attempts": 1},
    "relabel": {"label_states": "all"},
    "train": {"model": "smollm2-135m", "lr": 2e-3, "epochs": 3, "steps_per_epoch": 30, "batch_size": 4, "lora_rank": 16,
              "loss_norm": "token"},
    "eval": {"tasks": "toy:dev2:24", "max_turns": 10, "max_context": 2048, "temperature": 0.0},
}  # fmt: skip
OF_ARM = {  # the settings of collect in which arms differ
    "sft": {"mix": "turn", "schedule": "constant:1"},
    "sft-tasks": {"mix": "turn", "schedule": "constant:1"},
    "dagger": {"mix": "turn", "schedule": "linear:2"},
    "dagger-paper": {"mix": "turn", "schedule": "paper"},
    "aggrevate": {"mix": "prefix", "prefix_turns": "0:3"},
    "rft": {"mix": "teacher", "teacher": "oracle,noise=0.3", "sample": 90},
}


def check(run: Path, stages: dict, test: Path, arm: str, seed: int) -> None:
    """What was promised of every run. Raises SystemExit where it is not so."""

    def refuse(what: str):
        raise SystemExit(f"{run}: {what}")

    tested = table.manifest(test / "manifest.json")
    matched = match_tasks(run.parent, seed).split(",") if arm == "sft-tasks" else []
    manifests = {(i, stage): stages[i][stage] for i in (1, 2, 3) for stage in MADE} | {(0, "test"): tested}
    manifests |= {(i, "grades"): table.manifest(run / f"iter_{i:03d}/grades/manifest.json") for i in (1, 2, 3) if arm == "rft"}
    for (i, stage), found in manifests.items():
        where, settings, summary = f"iteration {i}: {stage}", found["settings"], found["summary"]
        if summary.get("infra_errors") or summary.get("exit_time_limit"):
            refuse(f"{where}: failures of the machine or a time limit")
        wanted = {"seed": seed} | (MADE["eval"] | {"tasks": f"toy:{SPLIT}"} if stage == "test" else MADE.get(stage, {}))
        if stage == "collect":
            usual = {"teacher": "oracle", "sample": 64}
            wanted |= usual | OF_ARM["sft" if i == 1 and arm not in ("rft", "aggrevate") else arm]
        elif stage == "relabel":
            wanted |= {"teacher": OF_ARM[arm].get("teacher", "oracle"), "keep": "resolved" if arm == "rft" else "all"}
            wanted |= {"max_labels": int(matched[i - 1]) if arm == "sft-tasks" else LABELS}
        elif stage == "train":
            budget = stages[i]["relabel"]["settings"]["max_labels"]
            if summary["steps"] != STEPS or summary["labels"] != budget:
                refuse(f"{where}: {summary['labels']} labels of {budget}, {summary['steps']} steps of {STEPS}")
            if (settings["init_adapter"] is None) != (i == 1):
                refuse(f"{where}: it goes on from {settings['init_adapter']}")
        for name, value in wanted.items():
            if settings.get(name) != value:
                refuse(f"{where}: {name} is {settings.get(name)}, not {value}")


def line(run: Path, arm: str, seed: int) -> dict:
    """Everything that `tables` needs of one finished run."""
    stages = table.read_run(run, 3)
    chosen = table.best_iteration(stages)
    test = run / f"test/iter_{chosen:03d}"
    results = {place(result["instance_id"]): result for result in jsonl.read(test / "results.jsonl")}
    if sorted(results) != list(range(TASKS)):
        raise SystemExit(f"{test}: {len(results)} of {TASKS} tasks have a result")
    rollouts = {place(record["instance_id"]): record for record in jsonl.read(test / "trajectories.jsonl")}
    check(run, stages, test, arm, seed)
    ends = [erred(rollouts[number]["messages"]) for number in range(TASKS)]
    failures: dict[str, list[int]] = {}
    patches: dict[str, list[int]] = {}
    for number, row in enumerate(toy_tasks.load(SPLIT)):
        if results[number]["failure_mode"]:
            failures.setdefault(results[number]["failure_mode"], []).append(number)
            patches.setdefault(patch_mode(test, row, rollouts[number]["patch"]), []).append(number)
    iterations = []
    for i in (1, 2, 3):
        home, found = run / f"iter_{i:03d}", stages[i]
        labels = list(jsonl.read(home / "labels.jsonl"))
        log = [step for step in jsonl.read(home / "adapter/training_log.jsonl") if step["epoch"] == 1]
        agrees = [label["agrees"] for label in labels if label["agrees"] is not None]
        iterations.append({
            "labels": found["train"]["summary"]["labels"],
            "label_tokens": sum(step["label_tokens"] for step in log),
            "steps": found["train"]["summary"]["steps"],
            "tokens": found["train"]["summary"]["tokens_computed"],
            "tasks": len({label["trajectory_id"] for label in labels}),
            "teacher_turns": round(found["collect"]["summary"]["teacher_turn_share"], 3),
            "asked": answers(found),
            "agree": round(sum(agrees) / len(agrees), 3) if agrees else None,
            "loss": round(found["train"]["summary"]["loss"], 5),
            "dev": found["eval"]["summary"]["resolved"],
            "at_states_of_student": mean_nll(home / "at_states_of_student"),
            "at_states_of_teacher": mean_nll(home / "at_states_of_teacher"),
        })  # fmt: skip
    manifests = [json.loads(path.read_text()) for path in run.rglob("*manifest.json")]
    return {
        "arm": arm,
        "seed": seed,
        "tasks": SPLIT,
        "chosen": chosen,
        "resolved": "".join(str(int(results[number]["resolved"])) for number in range(TASKS)),
        "failures": failures,
        "patches": patches,
        "erred": [number for number, (failed, _) in enumerate(ends) if failed],
        "edited_again": [number for number, (_, again) in enumerate(ends) if again],
        "turns": sum(result["turns"] for result in results.values()),
        "iterations": iterations,
        "minutes": round(sum(manifest.get("seconds", 0) for manifest in manifests) / 60),
        "commits": sorted({manifest["commit"] for manifest in manifests if manifest.get("commit")}),
    }


# ---------------------------------------------------------------- the tables


ARMS = ("sft", "dagger", "dagger-paper", "aggrevate", "rft", "sft-tasks")
ONE_BUG = ("direct", "follow", "traced")


def groups(split: str) -> dict[str, list[int]]:
    """Sets of study tasks that are compared apart."""
    rows = toy_tasks.load(split)
    kinds = [kind for kind in toy_tasks.KINDS if any(row["kind"] == kind for row in rows)]
    found = {kind: [i for i, row in enumerate(rows) if row["kind"] == kind] for kind in kinds}
    for i, row in enumerate(rows):
        found.setdefault(family_group(row), []).append(i)
    return found


def family_group(row: dict) -> str:
    if row["unseen_family"]:
        return "not in train"
    return "computed" if row["family"] in {family.__name__ for family in toy_families.COMPUTED} else "told"


def outcomes(found: dict, tasks: list[int]) -> dict[str, bool]:
    return {str(number): found["resolved"][number] == "1" for number in tasks}


def compare(lines: dict, a: str, b: str, tasks: list[int]) -> list[str] | None:
    """Cells: seeds, rates of both arms, their difference b - a with both intervals; None without a common seed."""
    seeds = [seed for arm, seed in sorted(lines) if arm == a and (b, seed) in lines]
    if not seeds:
        return None
    pairs = [(outcomes(lines[a, seed], tasks), outcomes(lines[b, seed], tasks)) for seed in seeds]
    whole = combine_seeds(pairs)
    means = [sum(sum(pair[side].values()) for pair in pairs) / len(seeds) / len(tasks) for side in (0, 1)]
    t = "-" if whole["t_low"] is None else f"{100 * whole['t_low']:+.1f} to {100 * whole['t_high']:+.1f}"
    each = " ".join(f"{100 * difference:+.1f}" for difference in whole["differences"])
    return [str(len(seeds)), f"{means[0]:.1%}", f"{means[1]:.1%}", f"{100 * whole['difference']:+.1f}",
            f"{100 * whole['low']:+.1f} to {100 * whole['high']:+.1f}", t, each]  # fmt: skip


def print_table(title: str, heads: list[str], rows: list[list[str]]) -> None:
    """As Markdown."""
    print(f"\n{title}\n\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def mean(numbers) -> float:
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def arms_of(lines: dict) -> dict[str, list[dict]]:
    """The lines of each arm by seed, and those of the seeds that all arms have apart where an arm has more."""
    found = {arm: {seed: lines[arm, seed] for name, seed in sorted(lines) if name == arm} for arm in ARMS}
    found = {arm: by_seed for arm, by_seed in found.items() if by_seed}
    shared = set.intersection(*(set(by_seed) for by_seed in found.values()))
    whole = {}
    for arm, by_seed in found.items():
        whole[arm] = list(by_seed.values())
        if shared and len(shared) < len(by_seed):
            whole[f"{arm}, seeds {' '.join(map(str, sorted(shared)))}"] = [by_seed[seed] for seed in sorted(shared)]
    return whole


def in_short(arm: str, found: list[dict], apart: dict[str, list[int]], family_groups: list[str]) -> list[str]:
    """A row of the table that the README shows."""
    wrong = max(1, sum(len(one["erred"]) for one in found))
    again = sum(len(set(one["erred"]) & set(one["edited_again"])) for one in found) if "edited_again" in found[0] else None
    back = sum(one["resolved"][i] == "1" for one in found for i in one["erred"])
    seen = [part for one in found for part in one["iterations"][: one["chosen"]]]
    labels, tokens = (sum(part[name] for part in seen) / len(found) for name in ("labels", "label_tokens"))
    shifts = [mean(one["iterations"][i]["at_states_of_student"]["nll"] - one["iterations"][i]["at_states_of_teacher"]["nll"]
                   for one in found) for i in range(3)]  # fmt: skip
    of_groups = (mean(mean(one["resolved"][i] == "1" for i in apart[name]) for one in found) for name in family_groups)
    return [arm, ", ".join(f"{100 * one['resolved'].count('1') / TASKS:.1f}" for one in found) + " %",
            *(f"{100 * rate:.0f} %" for rate in of_groups), f"{labels:.0f}, {tokens:,.0f}", f"{wrong / len(found):.0f}",
            "-" if again is None else f"{100 * again / wrong:.0f} %", f"{100 * back / wrong:.0f} %",
            ", ".join(f"{shift:.2f}" for shift in shifts)]  # fmt: skip


def tables(path: Path) -> None:
    lines = {(found["arm"], found["seed"]): found for found in read(path)}
    if not lines:
        raise SystemExit(f"{path}: no results yet; tests/bench/study.sh makes them")
    splits = {found.get("tasks", "study") for found in lines.values()}  # the first design did not say
    if len(splits) > 1:
        raise SystemExit(f"{path}: lines of several task sets ({', '.join(sorted(splits))}) cannot be compared")
    (split,) = splits
    dev_tasks = "toy:dev2:24" if split.endswith("2") else "toy:dev:40"
    by_arm = arms_of(lines)
    every, apart = list(range(TASKS)), groups(split)
    family_groups = [name for name in ("told", "computed", "not in train") if name in apart]
    one_bug = set().union(*(apart.get(kind, []) for kind in ONE_BUG))

    print_table("In short", ["arm", "resolved, by seed", *family_groups, "labels seen, their tokens", "first edit failed",
                             "edited again", "resolved after all", "shift after iteration 1, 2, 3"],
                [in_short(arm, [lines[key] for key in sorted(lines) if key[0] == arm], apart, family_groups)
                 for arm in ARMS if any(key[0] == arm for key in lines)])  # fmt: skip
    rows = []
    for arm, found in by_arm.items():
        rates = [one["resolved"].count("1") / TASKS for one in found]
        by_group = [mean(mean(one["resolved"][i] == "1" for i in apart[name]) for one in found) for name in family_groups]
        seen = [part for one in found for part in one["iterations"][: one["chosen"]]]
        total = [f"{sum(part[name] for part in seen) / len(found):,.0f}" if all(name in part for part in seen) else "-"
                 for name in ("labels", "label_tokens", "steps", "tokens", "tasks", "asked")]  # fmt: skip
        rows.append([arm, str(len(found)), f"{mean(rates):.1%}", " ".join(f"{rate:.1%}" for rate in rates),
                     *(f"{rate:.1%}" for rate in by_group), *total,
                     " ".join(str(one["chosen"]) for one in found)])  # fmt: skip
    print_table(f"toy:{split}, {TASKS} tasks, resolved by the checkpoint that was best on {dev_tasks}, and what it was trained on",
                ["arm", "seeds", "resolved", "each", *family_groups, "labels", "label tokens", "steps", "tokens computed",
                 "tasks with labels", "teacher asked", "chosen iteration"], rows)  # fmt: skip

    pairs = [("sft", "dagger"), *(("sft", arm) for arm in ("dagger-paper", "aggrevate", "rft")),
             *((arm, "dagger") for arm in ("sft-tasks", "dagger-paper", "aggrevate", "rft"))]  # fmt: skip
    heads = ["seeds", "rate of the first", "of the second", "points", "95 %, bootstrap", "95 %, t", "each seed"]
    found = [(f"{b} - {a}", compare(lines, a, b, every)) for a, b in pairs]
    print_table("Differences on the same tasks", ["", *heads], [[name, *cells] for name, cells in found if cells])
    found = [(f"{name} ({len(tasks)})", compare(lines, "sft", "dagger", tasks)) for name, tasks in apart.items()]
    print_table("dagger - sft by kind of task", ["tasks", *heads], [[name, *cells] for name, cells in found if cells])

    for name, title in (("failures", "How unresolved tasks ended"), ("patches", "What is wrong with their patches")):
        modes = [mode for mode in FAILURE_MODES if any(mode in found[name] for found in lines.values())]
        print_table(f"{title} (mean number of tasks per run)", ["arm", *modes],
                    [[arm, *(f"{mean(len(one[name].get(mode, [])) for one in found):.1f}" for mode in modes)]
                     for arm, found in by_arm.items()])  # fmt: skip
    for name, inside in (("one bug", True), ("two bugs", False)):
        if one_bug.issuperset(every) and not inside:
            continue
        rows = []
        for arm, found in by_arm.items():
            wrong = [[i for i in one["erred"] if (i in one_bug) == inside] for one in found]
            again = [sum(i in one.get("edited_again", []) for i in of) for one, of in zip(found, wrong)]
            back = [sum(one["resolved"][i] == "1" for i in of) for one, of in zip(found, wrong)]
            whole = max(1, sum(map(len, wrong)))
            known = all("edited_again" in one for one in found)
            rows.append([arm, f"{mean(map(len, wrong)):.1f}", f"{sum(again) / whole:.0%}" if known else "-",
                         f"{mean(back):.1f}", f"{sum(back) / whole:.0%}"])  # fmt: skip
        print_table(f"Tasks with {name} whose first test run after the first edit failed, what became of them (per run)",
                    ["arm", "erred", "of these edited again", "resolved after all", "share"], rows)  # fmt: skip
    rows = []
    for arm, found in by_arm.items():
        for i in range(3):
            student, teacher = (mean(one["iterations"][i][f"at_states_of_{who}"]["nll"] for one in found)
                                for who in ("student", "teacher"))  # fmt: skip
            share = mean(one["iterations"][i]["teacher_turns"] for one in found)
            dev = mean(one["iterations"][i]["dev"] for one in found)
            rows.append([arm, str(i + 1), f"{share:.2f}", f"{student:.3f}", f"{teacher:.3f}", f"{student - teacher:.3f}",
                         f"{dev:.1f}/{dev_tasks.rpartition(':')[2]}"])  # fmt: skip
    print_table(f"-log p per token of the expert's actions on {dev_tasks}, at the states of the student's own episodes and of "
                "the expert's", ["arm", "iteration", "teacher turns", "student's states", "expert's states", "shift",
                                 f"resolved of {dev_tasks}"], rows)  # fmt: skip


def odd(runs: Path) -> None:
    """The patches in `runs` that resolved their study task and add other lines than the gold patch: are they repairs?"""
    def added(patch: str) -> list[str]:
        return [line[1:].strip() for line in patch.splitlines() if line[:1] == "+" and line[:3] != "+++"]

    gold, resolved = {row["instance_id"]: added(row["patch"]) for row in toy_tasks.load(SPLIT)}, 0
    for home in sorted(runs.glob("*/test/iter_[0-9][0-9][0-9]")):
        good = {result["instance_id"] for result in jsonl.read(home / "results.jsonl") if result["resolved"]}
        resolved += len(good)
        for record in jsonl.read(home / "trajectories.jsonl"):
            name, lines = record["instance_id"], added(record["patch"])
            if name in good and sorted(lines) != sorted(gold[name]):
                print(f"{home.parent.parent.name} {name}: {' / '.join(lines)}    gold: {' / '.join(gold[name])}")
    print(f"of {resolved} that resolved their task")


def main() -> None:
    command, *rest = sys.argv[1:] or ["help"]
    if command == "has":
        print("yes" if any((found["arm"], found["seed"]) == (rest[0], int(rest[1])) for found in read()) else "no")
    elif command == "match-tasks":
        print(match_tasks(Path(rest[0]), int(rest[1])))
    elif command == "line":
        made = json.dumps(line(Path(rest[0]), rest[1], int(rest[2])))
        with open(RESULTS, "a", encoding="utf-8") as stream:
            stream.write(made + "\n")
        print(made[:200])
    elif command == "odd":
        odd(Path(rest[0]) if rest else Path("runs/study"))
    elif command == "tables":
        tables(Path(rest[0]) if rest else RESULTS)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
