"""The oracle solves its tasks, from the start and from whatever a student made of them, by what the screen shows."""

import random
import re

import pytest

from common import actions, oracle, prompts, toy_tasks
from common.errors import InputError
from common.grading import grade
from common.sandbox import LocalSandbox

SPLITS = ("train", "train2", "dev", "dev2", "test")  # those of the study are read by the study alone


def block(command: str, thought: str = "Let me see.") -> str:
    return f"{thought}\n```bash\n{command}\n```"


def step(sandbox: LocalSandbox, messages: list[dict], text: str) -> bool:
    """One assistant turn and its observation, as the agent loop makes them. True if it submitted."""
    messages.append({"role": "assistant", "content": text})
    command = actions.parse(text)
    if command == actions.SUBMIT:
        return True
    seen = prompts.REMINDER if command is None else actions.observe(sandbox.run(command))
    messages.append({"role": "user", "content": seen})
    return False


def solve(sandbox, task, messages, limit: int) -> str:
    """Let the oracle go on; the patch at its submission."""
    for _ in range(limit):
        if step(sandbox, messages, oracle.act(task.row, messages)):
            return sandbox.diff()
    raise AssertionError(f"{task.row['instance_id']}: not submitted after {limit} turns\n{transcript(messages)}")


def transcript(messages) -> str:
    return "\n".join(f"[{m['role']}] {m['content']}" for m in messages)


def is_resolved(task, patch: str) -> bool:
    """Graded for real, unless the patch changes exactly what the gold patch changes."""
    changes = lambda p: [x for x in p.splitlines() if x[:1] in "+-" and x[:3] != "---" and x[:3] != "+++"]  # noqa: E731
    files = lambda p: [x for x in p.splitlines() if x.startswith("diff ")]  # noqa: E731
    if changes(patch) == changes(task.row["patch"]) and files(patch) == files(task.row["patch"]):
        return True
    return grade(task.row, patch)["resolved"]


def commands(messages) -> list[str]:
    return [actions.parse(m["content"]) for m in messages if m["role"] == "assistant"]


def first(kind: str, split: str = "dev") -> toy_tasks.Task:
    return next(t for t in (toy_tasks.task(split, i) for i in range(80)) if t.kind == kind)


def heads(messages) -> list[str]:
    return [c.split()[0] for c in commands(messages)]


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("direct", "grep cat sed pytest submit"),
        ("follow", "grep cat cat sed pytest submit"),
        ("traced", "pytest grep cat sed pytest submit"),
        ("double", "grep cat sed sed pytest submit"),
    ],
)
def test_from_the_start(kind, expected):
    task = first(kind)
    messages = prompts.opening(task.row)
    with LocalSandbox(task.row) as sandbox:
        patch = solve(sandbox, task, messages, 12)
    assert heads(messages) == expected.split(), transcript(messages)
    assert is_resolved(task, patch)


def test_wrong_edit_then_the_way_back():
    """The label that DAgger is about: the student's edit is wrong, the test fails, read again, edit again."""
    task = first("direct")
    edit = task.edits[0]
    messages = prompts.opening(task.row)
    with LocalSandbox(task.row) as sandbox:
        for _ in range(2):  # grep, cat
            step(sandbox, messages, oracle.act(task.row, messages))
        before, _, after = edit.site
        line = sandbox.run(f"sed -n {edit.number + 1}p {edit.path}").output.rstrip()
        old = line[len(before) : len(line) - len(after)]
        step(sandbox, messages, block(f"sed -i 's/{old}/{old} + 100/' {edit.path}"))
        n = len(commands(messages))
        patch = solve(sandbox, task, messages, 12)
    assert heads(messages)[n:] == ["pytest", "cat", "sed", "pytest", "submit"], transcript(messages)
    assert is_resolved(task, patch)


def test_goes_on_from_what_the_student_did_well():
    task = first("direct")
    edit = task.edits[0]
    messages = prompts.opening(task.row)
    with LocalSandbox(task.row) as sandbox:
        step(sandbox, messages, block(f"grep -rn {edit.function} ."))
        assert actions.parse(oracle.act(task.row, messages)) == f"cat {edit.path}"
        step(sandbox, messages, block(f"cd /testbed && cat ./{edit.path}"))
        assert actions.parse(oracle.act(task.row, messages)).startswith("sed -i")
        step(sandbox, messages, oracle.act(task.row, messages))
        step(sandbox, messages, block("python -m pytest -q"))
        assert actions.parse(oracle.act(task.row, messages)) == "submit"


def test_a_sed_that_failed_is_made_again_at_once():
    task = first("direct")
    edit = task.edits[0]
    messages = prompts.opening(task.row)
    with LocalSandbox(task.row) as sandbox:
        for text in (None, None, block(f"sed -i 's/a/b {edit.path}")):
            step(sandbox, messages, text or oracle.act(task.row, messages))
        assert actions.parse(oracle.act(task.row, messages)).startswith("sed -i")


def test_tests_that_the_student_changed_are_put_back():
    task = first("direct")
    messages = prompts.opening(task.row)
    test_file = task.row["FAIL_TO_PASS"][0].split("::")[0]
    with LocalSandbox(task.row) as sandbox:
        step(sandbox, messages, block(f"echo > {test_file}"))
        step(sandbox, messages, block("pytest"))  # passes now, and is not to be believed
        patch = solve(sandbox, task, messages, 14)
    assert task.row["patch"].count("diff ") == patch.count("diff "), transcript(messages)


@pytest.mark.parametrize(
    "kind, before, command",
    [
        ("traced", 1, "sed -i 's/assert .*/pass/' {test}"),  # nothing was searched for yet
        ("direct", 0, "# Let's fix the test\nsed -i 's/assert .*/pass/' {test}"),  # an apostrophe that opens no quote
        ("direct", 0, "sed -i 's/assert .*/pass/' {test} # Fixed"),
        ("direct", 0, "python -c \"import subprocess; subprocess.run(['sed', '-i', 's/assert .*/pass/', '{test}'])\""),
        ("direct", 0, "echo x=1 | sort -o{test}"),
    ],
)
def test_no_rewritten_test_is_believed(kind, before, command):
    task = first(kind)
    messages = prompts.opening(task.row)
    with LocalSandbox(task.row) as sandbox:
        for _ in range(before):
            step(sandbox, messages, oracle.act(task.row, messages))
        step(sandbox, messages, block(command.format(test=task.row["FAIL_TO_PASS"][0].split("::")[0])))
        step(sandbox, messages, block("pytest"))
        patch = solve(sandbox, task, messages, 14)
    assert is_resolved(task, patch), transcript(messages)


def test_no_tests_are_no_failing_tests():
    """A path or a name that is not there (exit 4, exit 5): the repair before it was right."""
    task = first("direct")
    for command in ("pytest tests/test_nope.py", "pytest -k nothing_is_called_so"):
        messages = prompts.opening(task.row)
        with LocalSandbox(task.row) as sandbox:
            for text in (None, None, None, block(command)):  # grep, cat, sed
                step(sandbox, messages, text or oracle.act(task.row, messages))
            n = len(commands(messages))
            patch = solve(sandbox, task, messages, 4)
        assert heads(messages)[n:] == ["pytest", "submit"], transcript(messages)
        assert is_resolved(task, patch)


def test_it_does_not_say_the_same_for_ever():
    task, follow = first("direct"), first("follow")
    edit = task.edits[0]
    home, name = edit.path.split("/")
    for task, begun, command in (
        (task, 0, f"ls && cd {home} && sed -i 's/zzz/yyy/' {name}"),  # where that file lies hangs on the cd
        (follow, 1, f"sed -i '/import/d' {follow.entry[1]}"),  # the link to what is called is gone
    ):
        messages = prompts.opening(task.row)
        with LocalSandbox(task.row) as sandbox:
            for _ in range(begun):
                step(sandbox, messages, oracle.act(task.row, messages))
            step(sandbox, messages, block(command))
            patch = solve(sandbox, task, messages, 14)
        assert is_resolved(task, patch), transcript(messages)


def test_a_function_that_is_called_is_looked_up_where_it_is_called():
    """The right file by chance: nothing on the screen says that it has to do with the issue."""
    task = first("follow")
    messages = prompts.opening(task.row)
    with LocalSandbox(task.row) as sandbox:
        step(sandbox, messages, block(f"cat {task.edits[0].path}"))
        assert actions.parse(oracle.act(task.row, messages)) == f"grep -rn 'def {task.entry[0]}('"
        assert is_resolved(task, solve(sandbox, task, messages, 12))


def test_it_knows_no_more_than_the_screen_shows():
    """Two labels that only the gold text explained: that an edited file was right, and that a repair which passes all tests
    is spelled otherwise than the gold one."""
    task = first("traced")
    right = task.edits[0].path
    other = next(path for path in task.row["local"]["source"] if path.endswith(".py") and path.split("/")[0] == right.split("/")[0]
                 and path != right and "__init__" not in path)  # fmt: skip
    for path in (right, other):
        messages = prompts.opening(task.row)
        messages += [{"role": "assistant", "content": block(f"sed -i 's/zzz/yyy/' {path}")}, {"role": "user", "content": "exit 0\n"}]
        assert actions.parse(oracle.act(task.row, messages)) == "pytest"  # both screens say the same
    task = first("direct")
    messages = prompts.opening(task.row)
    for command in (f"sed -i 's/return.*/return 1/' {task.edits[0].path}", "pytest"):
        messages += [{"role": "assistant", "content": block(command)}, {"role": "user", "content": "exit 0\n"}]
    assert actions.parse(oracle.act(task.row, messages)) == "submit"


def test_is_a_function_of_the_conversation():
    task = first("traced")
    messages = prompts.opening(task.row)
    assert oracle.act(task.row, messages) == oracle.act(dict(task.row), [dict(m) for m in messages])
    with pytest.raises(InputError, match="no toy task"):
        oracle.act({"instance_id": "pallets__flask-5063", "base_commit": "x"}, messages)
    with pytest.raises(InputError, match="another version"):
        oracle.act(task.row | {"base_commit": "x"}, messages)


# ---- junk --------------------------------------------------------------------------------------------------------


def junk(rng: random.Random, task: toy_tasks.Task) -> str:
    """An assistant turn as an untrained, half-trained or unlucky student makes it; the repository stays recoverable."""
    source = task.row["local"]["source"]
    code = [p for p in source if p.endswith(".py") and "/" in p and not p.startswith("tests/") and source[p]]
    tests = [p for p in source if p.startswith("tests/")]
    edit = rng.choice(task.edits)
    gold, any_file, test = edit.path, rng.choice(code), rng.choice(tests)
    package = gold.split("/")[0]
    line = source[gold].split("\n")[edit.number].strip()
    word = rng.choice([w for w in source[any_file].replace("(", " ").replace(")", " ").split() if w.isalpha()])
    good = edit.line.strip()
    wrong = [
        f"sed -i 's/{word}/nothing/' {any_file}", f"sed -i 's/{word}/{word}s/g' {gold}", f"sed -i 's/(/[/' {gold}",
        f"sed -i 's/return/retrun/' {gold}", "sed -i 's/not there/at all/' " + gold, f"sed -i 's/def /de /g' {any_file}",
        f"sed -i '2d' {gold}", f"sed -i '1i import os' {gold}", f"sed -i 's/+/-/' {gold}", f"sed -i 's/return .*/return 3/' {gold}",
        f"sed -i 's/{word}/x' {gold}", f"sed -i 's/assert/assert not/' {test}", f"sed -i '/assert/d' {' '.join(tests)}",
        f"sed -i 's/a/b/' {package}/nope.py", f"sed -i -E 's/return (.*)/return (\\1)/' {gold}",
        f"sed -i 's/ and / or /; s/ or / and /' {gold}", f"sed -i 's/:$/: # x/' {gold}", f"sed -i 's/{word}/x/' {package}/*.py",
        f"sed -i \"s/{word}/x/\" {any_file} && pytest", f"sed -i 's/{word}/y/' {gold}; cat {gold}", f"sed 's/{word}/z/' {gold}",
        f"sed -i.bak 's/{word}/y/' {gold}",
    ]  # fmt: skip
    ruin = [
        f"rm {gold}", f"echo > {gold}", f"echo 'def x(:' >> {gold}", f"rm -rf {package}", f"mv {gold} {package}/old.py",
        "rm -rf tests", f"cp {any_file} {gold}", f"cat {test} > {gold}", "echo 'import sys; sys.exit(0)' > conftest.py",
        "echo 'def sorted(x): return x' > random.py", "rm pytest.ini", f"truncate -s 20 {gold}", "rm *", f": > {test}",
        f"printf 'x' | tee {gold}", f"mkdir -p {package}/sub && touch {package}/sub/a.py", "touch a.py b.py",
    ]  # fmt: skip
    git = [
        "git commit -am x", "git add -A && git commit -qm wip", "git stash", "git stash pop", f"git checkout -- {gold}",
        "git checkout .", f"git checkout {any_file}", "git checkout -b fix", "git reset --hard", "git diff", "git log",
        "git status", "git add .", "git rm -q --cached " + gold, f"git restore {gold}", "git checkout nowhere",
        "git status --short", "git clean -fd",
    ]  # fmt: skip
    look = [
        "ls", "ls -R", "cat", f"cat {gold}", f"cat {any_file}", f"cat {test}", "cat nope.py", f"cat {package}/main.py",
        f"grep -rn 'def {word}('", f"grep -rn '{edit.function}'", "grep -rn 'def nope('", "pwd", "cd /", f"cd {package}",
        "find . -name '*.py'", f"head -3 {gold}", "pytest", "python -m pytest -q", f"pytest {test}", f"pytest -k {edit.function}",
        "python -c 'print(1 / 0)'", f"python -c 'import {package}'", f"python {gold}", "seq 5000", "yes | head -20000",
        "cat /etc/passwd | head", "sleep 0.1", "exit 3", "kill $$", "true", "whatever", edit.function, f"cd {package} && ls",
        f"cat {gold} | head -2", f"{good}", f"def {edit.function}():", f"cat {gold} {test}", "echo 'it''s", "pytest; true",
    ]  # fmt: skip
    prose = [
        "", "I will fix it.", f"The bug is in {gold}.", "```bash\nls\n```\nand\n```bash\npwd\n```", "```\nls\n```",
        "```bash\ngrep -rn 'def", "Find it.\n```bash\n```", "```python\nprint(1)\n```", "submit", "x" * 3000,
    ]  # fmt: skip
    nearly = [f"sed -i 's/{line}/{line}/' {gold}", f"sed -i 's/{line.replace('[', '.').replace(']', '.')}/{good}/' {gold}"]
    pool = rng.choices([wrong, ruin, git, look, prose, nearly], weights=[4, 2, 2, 4, 1, 1])[0]
    text = rng.choice(pool)
    return text if pool is prose else block(text)


def survives(split: str, seed: int) -> None:
    """After k junk turns, mixed with turns of the oracle, it resolves the task within k + 12 turns."""
    rng = random.Random(seed)
    task = toy_tasks.task(split, rng.randrange(toy_tasks.SIZES[split]))
    messages = prompts.opening(task.row)
    k = rng.randint(1, 6)
    good_turns = 0
    with LocalSandbox(task.row) as sandbox:
        for _ in range(k):
            while good_turns < 4 and rng.random() < 0.4:
                good_turns += 1
                text = oracle.act(task.row, messages)
                if actions.parse(text) != actions.SUBMIT:
                    step(sandbox, messages, text)
            step(sandbox, messages, junk(rng, task))
        patch = solve(sandbox, task, messages, k + 12)
    assert is_resolved(task, patch), f"seed {seed}: {patch}\n{transcript(messages)}"


@pytest.mark.parametrize("seed", range(6))
def test_survives_junk(seed):
    survives(SPLITS[seed % len(SPLITS)], seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1300))
def test_survives_much_junk(seed):
    survives(SPLITS[seed % len(SPLITS)], seed)


@pytest.mark.parametrize("kind", toy_tasks.KINDS)
def test_a_slip_is_one_command_that_is_not_the_right_one(kind):
    """At every turn of an expert's episode; a wrong edit is another option of the family, and the expert recovers."""
    task, wrong_edits = first(kind, "train"), 0
    with LocalSandbox(task.row) as sandbox:
        messages = prompts.opening(task.row)
        for turn in range(20):
            right, slip = oracle.act(task.row, messages), oracle.slip(task.row, messages, choice=turn)
            assert actions.parse(slip) and slip != right
            if actions.parse(right) == actions.SUBMIT:
                break
            edits = actions.parse(slip).startswith("sed ")
            wrong_edits += edits
            step(sandbox, messages, slip if edits and wrong_edits == 1 else right)
        assert wrong_edits >= 1 and is_resolved(task, sandbox.diff())


def test_a_slip_never_puts_in_what_stands_there():
    """After a slip at an edit, the same choice again: another repair or another kind of slip."""
    tried = 0
    for index in range(40):
        task = toy_tasks.task("train", index)
        if task.kind != "direct" or not task.edits[0].others:
            continue
        tried += 1
        with LocalSandbox(task.row) as sandbox:
            messages, said = prompts.opening(task.row), []
            for _ in range(12):
                right, slip = oracle.act(task.row, messages), oracle.slip(task.row, messages, choice=0)
                edits = actions.parse(right).startswith("sed ")
                said += [slip] if edits else []
                if step(sandbox, messages, slip if edits else right) or len(said) == 2:
                    break
            assert len(said) == 2 and said[0] != said[1]
            assert not any(re.search(r"s/(.+)/\1/", actions.parse(text)) for text in said)
        if tried == 4:
            break
    assert tried == 4


def test_noise_is_the_share_of_slips():
    """1,000 turns at 0.3: within 4 standard deviations (0.058); fixed by the seeds, one in 16,000 for others."""
    from common.policies import open_policy

    row = toy_tasks.task("train", 0).row
    state = [{"role": m["role"], "content": m["content"]} for m in prompts.opening(row)]
    policy = open_policy("oracle,noise=0.3", role="teacher", temperature=0, top_p=1, max_new_tokens=64)
    said = [policy.act(row, state, seed=seed, episode="", turn=0, attempt=0).text for seed in range(1000)]
    share = sum(text != oracle.act(row, state) for text in said) / 1000
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 1000) ** 0.5)
    assert said == [policy.act(row, state, seed=seed, episode="", turn=0, attempt=0).text for seed in range(1000)]
