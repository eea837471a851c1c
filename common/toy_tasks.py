"""The embedded tasks: a seeded generator of small repair tasks in SWE-bench's schema, made for a very small student.

A task is a package of three modules with a pytest suite, one bug (some have two) and an issue that words the wanted
behaviour in one of many ways. What the issue leaves open, a failing test settles: it prints the call and the answer
that was expected. See toy_families for the kinds of bug and toy_words for the names, which no two of train, dev, test and
study share; train2, dev2 and study2 have those of train, dev and study.

Kinds: `direct`, the issue names the function with the bug; `follow`, it names a function that only calls that one in
another module; `traced`, it names none, and the failing test does; `double`, two functions of one module have a bug.

train2, dev2 and study2 ask whether a student learns the way back that no demonstration shows. The issue names a function
(direct and follow alone). It tells which of a few options is right (toy_families.TOLD, half of train2) or what to reckon
(COMPUTED, the other half), which the expert can and a very small student cannot. A failing test prints the right code, so
that a second try is a matter of looking. Of dev2 and study2 a sixth is of families that are not in train2.

Everything is derived from (split, index) by hashlib, so a task never depends on how many others were made.
"""

import difflib
import functools
import hashlib
import json
import random
from dataclasses import dataclass

from common import toy_families, toy_words
from common.errors import InputError
from common.toy_families import Function

SIZES = {"train": 600, "dev": 80, "test": 100, "study": 300, "train2": 600, "dev2": 80, "study2": 300}

# Knobs of the difficulty. A change of any makes other tasks: raise VERSION, which is part of every row and seed.
VERSION = "1"
KINDS = {"direct": 13, "follow": 2, "traced": 3, "double": 2}  # of every 20 tasks
KINDS_2 = {"direct": 17, "follow": 3}  # of train2, dev2, study2
VAGUE = 0.35  # share of the issues (where the family has such words) that fit several fixes
WORDINGS = 99  # at most so many different clauses for one option
FRAMES = 99  # at most so many different sentences around a clause
DOUBLE_TOLD = 1.0  # share of the double tasks whose issue names both functions; else a failing test shows the second
FUNCTIONS = 3  # in a module
SHOWS = "words"  # what a failing test prints: `values`, got and expected; `call`, the call and the answer expected;
#                 `words`, that and the behaviour in words that are always the same (train2, ...: the right code)

# The issue around a clause: {f} the function, {p} the package, {w} the clause, {W} the clause with a capital; {g} and
# {v} a second function and its clause.
_WANTED = (
    "Fix {f}(): {w}.", "{f}() is wrong. {W}.", "In {f}(), {w}. That is not what happens.",
    "{f}() gives bad results. {W}.",
    "We expect this of {f}(): {w}.", "{W} in {f}(), or so it should be.", "{f}() broke. {W}, says the manual.",
    "People complain about {f}(). {W}, they say.",
)  # fmt: skip
_COMPLAINT = (
    "Fix {f}(): {w}.", "{f}() is wrong: {w}.", "Bug in {f}(), {w}.", "{f}() broke, {w}.", "Look at {f}(). {W}.",
    "In {f}(), {w}.", "There is a problem with {f}(): {w}.", "People say of {f}() that {w}.",
)  # fmt: skip
_TRACED = ("A test in {p} fails. {W}.", "The tests of {p} are red: {w}.", "See the failing test in {p}. {W}.",
           "One test is broken in {p}: {w}.")  # fmt: skip
_DOUBLE = ("Fix {f}() and {g}(). In {f}(), {w}. In {g}(), {v}.",
           "{f}() and {g}() are wrong. For {f}(), {w}. For {g}(), {v}.")  # fmt: skip

_INI = f"""[pytest]
addopts = -qq --tb=no {"" if SHOWS == "values" else "--assert=plain "}-p no:cacheprovider
console_output_style = classic
pythonpath = .
"""


@dataclass(frozen=True)
class Edit:
    """One line to repair: `site` is (before, right, after), the text around and at the place of the fix."""

    path: str
    function: str
    number: int  # index of the line in the file
    site: tuple[str, str, str]
    others: tuple[str, ...]  # what could stand at the site too, but is neither the bug nor right

    @property
    def line(self) -> str:
        return "".join(self.site)


@dataclass(frozen=True)
class Task:
    """A row and what the oracle may know about it."""

    row: dict
    kind: str
    edits: tuple[Edit, ...]
    fixed: dict[str, str]  # path -> text of the files that the gold patch changes
    entry: tuple[str, str] | None  # (function, path) that the issue of a `follow` task names


class _Names:
    """Fresh names for one module; each is given out once in it (functions: once in the task)."""

    def __init__(self, split: str, rng: random.Random, used: set[str]):
        self._pools = {role: toy_words.words(split, role) for role in toy_words.POOLS}
        self._rng, self._used = rng, used

    def _take(self, role: str, n: int) -> list[str]:
        taken = self._rng.sample([w for w in self._pools[role] if w not in self._used], n)
        self._used.update(taken)
        return taken

    def function(self) -> str:
        return self._take("function", 1)[0]

    def params(self, n: int) -> list[str]:
        return self._take("param", n)

    def lists(self, n: int) -> list[str]:
        return self._take("list", n)

    def keys(self, n: int) -> list[str]:
        return self._take("key", n)


def load(split: str, n: int | None = None) -> list[dict]:
    """The first `n` rows of a split (all by default). Raises InputError for an unknown split or too large an n."""
    if split not in SIZES:
        raise InputError(f"no toy split {split!r}: one of {', '.join(SIZES)}")
    if n is not None and not 1 <= n <= SIZES[split]:
        raise InputError(f"toy:{split} has {SIZES[split]} tasks, not {n}")
    return [task(split, i).row for i in range(SIZES[split] if n is None else n)]


def find(row: dict) -> Task:
    """The task behind a row, by its instance_id. Raises InputError where this generator makes another one."""
    try:
        _, split, number = row["instance_id"].split("-")
        found = task(split, int(number) - 1)
    except (KeyError, ValueError, InputError):
        raise InputError(f"{row.get('instance_id')!r} is no toy task, and the oracle knows no others") from None
    if found.row["base_commit"] != row["base_commit"]:
        raise InputError(f"{row['instance_id']} was made by another version of the generator (base_commit differs)")
    return found


@functools.lru_cache(maxsize=4096)
def task(split: str, index: int) -> Task:
    """Task number `index` (from 0) of a split."""
    if split not in SIZES or not 0 <= index < SIZES[split]:
        raise InputError(f"no toy task {index} in split {split!r}")
    families = toy_families.TOLD * 4 + toy_families.COMPUTED * 5 if split.endswith("2") else toy_families.SEEN
    if not split.startswith("train"):
        families += toy_families.UNSEEN * (4 if split.endswith("2") else 1)
    family = _spread(families, split, "family", index)
    kinds = KINDS_2 if split.endswith("2") else KINDS
    kind = _spread([kind for kind, share in kinds.items() for _ in range(share)], split, "kind", index)
    for attempt in range(50):
        made = _make(_rng(split, index, attempt), split, index, family, kind)
        if made:
            return made
    raise AssertionError(f"toy task {split} {index}: no valid task of {family.__name__}, {kind}")


def _rng(*parts) -> random.Random:
    digest = hashlib.sha256(json.dumps(["toy", VERSION, *parts]).encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def _spread(values, split: str, what: str, index: int):
    """Each value once in every block of len(values) tasks, in an order of the block's own: whole blocks are balanced."""
    block, place = divmod(index, len(values))
    order = list(range(len(values)))
    _rng(split, what, block).shuffle(order)
    return values[order[place]]


# ---- one function: its answers and its tests --------------------------------------------------------------------


def _answers(function: Function, arguments: list[tuple]) -> list[list]:
    """For each tuple of arguments the answers of every option: (type, value), or the exception's name."""
    table = []
    compiled = []
    for option in range(len(function.options)):
        space = {"print": lambda *a: None}
        exec(compile(function.code(option), "toy", "exec"), space)  # our own text, a few lines without effects
        compiled.append(space[function.name])
    for arguments_ in arguments:
        row = []
        for call in compiled:
            try:
                value = call(*arguments_)
                row.append((type(value).__name__, value))
            except (TypeError, ValueError, ArithmeticError, LookupError) as error:
                row.append(("raises", type(error).__name__))
        table.append(row)
    return table


def _choose(function: Function, rng: random.Random) -> tuple[list, list, list] | None:
    """Cases (arguments, answer) for three tests: the visible one tells the right option from all others, a second one
    fails with the bug too, a third (may be empty) passes with and without it."""
    pool = []
    for _ in range(24):
        case = function.cases(rng)
        if case not in pool:
            pool.append(case)
    table = _answers(function, pool)
    good = [i for i, row in enumerate(table) if row[function.right][0] != "raises"]
    wrong = set(range(len(function.options))) - {function.right}
    told = {i: {o for o in wrong if table[i][o] != table[i][function.right]} for i in good}
    failing = [i for i in good if function.bug in told[i]]
    passing = [i for i in good if function.bug not in told[i]]
    if not failing:
        return None
    shown = [max(failing, key=lambda i: (len(told[i]), -i))]  # the first assertion fails with the bug
    while missing := wrong - set().union(*(told[i] for i in shown)):
        more = max(good, key=lambda i: len(told[i] & missing))
        if not told[more] & missing:
            return None
        shown.append(more)
    again = [i for i in failing if i not in shown][:2] or shown[:1]
    as_cases = lambda chosen: [(pool[i], table[i][function.right][1]) for i in chosen]  # noqa: E731
    return as_cases(shown), as_cases(again), as_cases([i for i in passing if i not in shown][:1])


def _test(name: str, function: str, cases: list, words: str) -> str:
    lines = [f"def test_{name}():"]
    words = f", {words}" if SHOWS == "words" and words[0] != "!" else ""
    for arguments, answer in cases:
        call = f"{function}({', '.join(map(repr, arguments))})".replace("'", '"')
        is_ = "is" if answer is None or isinstance(answer, bool) else "=="
        value = repr(answer).replace("'", '"')
        shown = "" if SHOWS == "values" else f", '{call} is {value}{words}'"
        lines.append(f"    assert {call} {is_} {value}{shown}")
    return "\n".join(lines) + "\n"


# ---- one task ---------------------------------------------------------------------------------------------------


def _make(rng: random.Random, split: str, index: int, family, kind: str) -> Task | None:
    """A task, or None if the dice gave one that is not valid (the text to replace is not unique, no telling test)."""
    used: set[str] = set()
    fresh = lambda: _Names(split, rng, used)  # noqa: E731
    package = fresh()._take("package", 1)[0]
    modules = fresh()._take("module", 3)
    seen = toy_families.SEEN
    unseen = family in toy_families.UNSEEN

    # the module with the bug, and a second bug in it for a double task
    families = [family] + rng.sample([f for f in seen if f is not family], FUNCTIONS - 1)
    target = []
    for make in families:
        function = make(rng, fresh())
        function.family = make.__name__
        target.append(function)
    broken = target[: 2 if kind == "double" else 1]
    rng.shuffle(target)

    # the others: correct code, and a name much like the one the issue tells
    used -= {w for role in ("param", "list", "key") for w in toy_words.words(split, role)}
    spare = [make(rng, fresh()) for make in rng.sample(seen, FUNCTIONS)]
    used -= {w for role in ("param", "list", "key") for w in toy_words.words(split, role)}
    other = [make(rng, fresh()) for make in rng.sample(seen, FUNCTIONS)]
    rng.choice(other).name = broken[0].name + rng.choice(["_all", "_both", "_once", "_more"])
    places = rng.sample(modules, 3)
    contents = dict(zip(places, (target, spare, other)))
    home = f"{package}/{places[0]}.py"

    entry = None
    extra = {}
    if kind == "follow":
        inner = broken[0]
        name = fresh().function()
        entry = (name, f"{package}/{places[1]}.py")
        contents[places[1]] = spare[:1]
        given = ", ".join(inner.params[: 1 if inner.line.startswith("def ") else None])  # leaves a default to the other
        imports = f"from {package}.{places[0]} import {inner.name}\n\n"
        extra[places[1]] = (imports, f"def {name}({given}):\n    return {inner.name}({given})\n")

    def text(module: str, fixed: bool) -> str:
        parts = [f.code(f.bug if f in broken and not fixed else f.right) for f in contents[module]]
        before, more = extra.get(module, ("", ""))
        return before + "\n".join([more] * bool(more) + parts)

    files = {f"{package}/__init__.py": "", "pytest.ini": _INI}
    for module in modules:
        files[f"{package}/{module}.py"] = text(module, fixed=False)
    fixed = {home: text(places[0], fixed=True)}

    edits = []
    lines, now = fixed[home].split("\n"), files[home].split("\n")
    for function in broken:
        before, after = function.line.replace("{name}", function.name).split("{site}")
        right = function.options[function.right]
        number = lines.index(before + right + after)
        others = tuple(o for i, o in enumerate(function.options) if i not in (function.right, function.bug))
        edits.append(Edit(home, function.name, number, (before, right, after), others))
        if lines.count(before + right + after) > 1 or files[home].count(function.options[function.bug]) > 1:
            return None
        if now[number] != before + function.options[function.bug] + after:
            return None
    edits.sort(key=lambda e: e.number)

    # the tests: what stands in the repository, and what the test patch adds
    visible, hidden, fail, keep = {}, {}, [], []
    for module in modules:
        path = f"tests/test_{module}.py"
        names = [f.name for f in contents[module]] + ([entry[0]] if module in extra else [])
        shown, added = [], []
        for function in contents[module]:
            cases = _choose(function, rng)
            if cases is None:
                return None
            is_broken, words = function in broken, function.clear[function.right][0]
            if split.endswith("2"):
                words = function.options[function.right]
            tests = [("", cases[0]), ("_2", cases[1]), ("_3", cases[2])]
            if is_broken and entry:  # the public function has the visible test
                outer = [(entry[0] + suffix, entry[0], chosen) for suffix, chosen in tests]
                first = f"tests/test_{places[1]}.py"
                extra["tests"] = (first, _test(*outer[0], words), "\n\n" + _test(*outer[1], words))
                fail += [f"{first}::test_{outer[0][0]}", f"{first}::test_{outer[1][0]}"]
                added.append(_test(function.name, function.name, cases[0], words))
                fail.append(f"{path}::test_{function.name}")
                tests = tests[2:]
            for suffix, chosen in tests:
                if not chosen or (suffix and not is_broken and module != places[0]):
                    continue
                (added if suffix else shown).append(_test(function.name + suffix, function.name, chosen, words))
                wrong = is_broken and suffix != "_3"
                (fail if wrong else keep).append(f"{path}::test_{function.name}{suffix}")
        imports = f"from {package}.{module} import {', '.join(sorted(names))}\n"
        visible[path] = "\n\n".join([imports, *shown])
        hidden[path] = "".join("\n\n" + test for test in added)
    if entry:
        path, shown, added = extra["tests"]
        visible[path] += "\n\n" + shown
        hidden[path] += added
    files |= visible

    row = {
        "instance_id": f"toy-{split}-{index + 1:04d}",
        "repo": f"toy/{package}",
        "base_commit": hashlib.sha1(json.dumps(files, sort_keys=True).encode()).hexdigest(),
        "problem_statement": _issue(rng, kind, package, broken, entry),
        "hints_text": "",
        "patch": _diff(files, fixed),
        "test_patch": _diff(files, {p: visible[p] + hidden[p] for p in sorted(visible) if hidden[p]}),
        "FAIL_TO_PASS": sorted(fail),
        "PASS_TO_PASS": sorted(keep),
        "version": VERSION,
        "prompt": "toy",
        # So wide that no assertion is cut; and plugins that happen to be installed would double the time of every test run.
        "local": {"source": files, "env": {"COLUMNS": "160", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}},
        "split": split,
        "family": family.__name__,
        "unseen_family": unseen,
        "kind": kind,
    }
    return Task(row, kind, tuple(edits), fixed, entry)


def _issue(rng: random.Random, kind: str, package: str, broken: list[Function], entry) -> str:
    def clause(function):
        return rng.choice(function.wants(rng.random() < VAGUE, kind == "traced")[:WORDINGS])

    w = clause(broken[0])
    name = entry[0] if entry else broken[0].name
    values = {"f": name, "p": package, "w": w.lstrip("!"), "W": w.lstrip("!")[0].upper() + w.lstrip("!")[1:]}
    if kind == "double" and rng.random() < DOUBLE_TOLD:
        return rng.choice(_DOUBLE).format(g=broken[1].name, v=clause(broken[1]).lstrip("!"), **values)
    frames = _TRACED if kind == "traced" else _COMPLAINT if w.startswith("!") else _WANTED
    return rng.choice(frames[:FRAMES]).format(**values)


def _diff(before: dict[str, str], after: dict[str, str]) -> str:
    """A unified diff that `git apply` takes; every text ends with a newline."""
    out = []
    for path, text in after.items():
        out.append(f"diff --git a/{path} b/{path}\n")
        old, new = before[path].splitlines(keepends=True), text.splitlines(keepends=True)
        out += difflib.unified_diff(old, new, f"a/{path}", f"b/{path}")
    return "".join(out)
