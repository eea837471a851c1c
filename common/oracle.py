"""The scripted expert of the toy tasks: a policy over the conversation, as any teacher.

It knows the gold patch and acts only on what the conversation shows: it opens the file that a search, an import or a
test named, edits a line as it was last printed, tests after an edit and submits after a passing run. Whoever made the
turns so far, it goes on from there. What a command did to the files is told by reading, never by trust: after a
failing test it reads the file again, and after a command that it does not know it looks at `git status` first.

The conversation is replayed into a `_Scene` (what is on the screen and still holds); `_decide` picks the next turn.
"""

import itertools
import re
import shlex
from dataclasses import dataclass, field, replace

from common import actions, toy_tasks
from common.toy_tasks import Edit, Task

_READERS = set("cat grep egrep fgrep ls head tail wc pwd nl tree which true false cd diff file less more stat du "
               "whoami date test sleep echo printf sort".split())  # fmt: skip
_GIT_READERS = {"status", "diff", "log", "show", "blame", "ls-files", "grep", "rev-parse", "add", "rev-list"}
_ROOT = "$(git rev-list --max-parents=0 HEAD)"  # the commit that the task began with, whatever was committed since

_STATUS_FROM_ROOT = f"git add -A && git diff --cached --name-status {_ROOT}"


def act(row: dict, messages: list[dict]) -> str:
    """The next assistant turn: a short sentence and one command. Raises InputError for a row that is no toy task."""
    task = toy_tasks.find(row)
    return _say(*_decide(task, _replay(task, messages)))


def slip(row: dict, messages: list[dict], choice: int) -> str:
    """A wrong turn that an expert might take here: another repair of the line than the right one; to submit without a
    test or at a failing one; to look around or to test again where something better is due.

    `choice`, a number drawn from a seed, picks among several wrong repairs. Raises as `act` does.
    """
    task = toy_tasks.find(row)
    scene = _replay(task, messages)
    why, command = _decide(task, scene)
    edits = [e for e in task.edits if e.others and command.endswith(e.path) and why.endswith(f" should be {e.site[1]}.")]
    if command.startswith("sed ") and edits:
        before, _, after = edits[0].site
        now = scene.views[edits[0].path].split("\n")[edits[0].number]
        others = [text for text in edits[0].others if before + text + after != now]  # what stands there is no repair
        if others:
            wrong = others[choice % len(others)]
            return _say(*_replace(scene, replace(edits[0], site=(before, wrong, after)), "HEAD"))
    if command == "submit":
        return _say("Run the tests once more.", "pytest")
    if scene.changed or scene.failed:
        return _say("That should do.", "submit")
    return _say("Look around.", "ls")


def _say(why: str, command: str) -> str:
    return f"{why}\n```bash\n{command}\n```"


@dataclass
class _Scene:
    issue: str
    shown: str = ""  # all that commands have printed so far
    places: dict[str, str] = field(default_factory=dict)  # function -> file, as displayed
    views: dict[str, str | None] = field(default_factory=dict)  # file -> its text as last displayed, plus known edits
    fresh: set[str] = field(default_factory=set)  # files whose view holds and was read after the last failing test
    tried: dict[str, int] = field(default_factory=dict)  # file -> edits since it was read
    touched: dict[str, set[int]] = field(default_factory=dict)  # file -> lines that those edits changed
    changed: bool = False  # something may have changed since the last full test run
    passed: bool = False  # the last full test run since the last change passed
    failed: bool = False  # ... or failed
    stray: list[str] = field(default_factory=list)  # files edited that have nothing to do with the task
    odd: bool = False  # a command whose effect is not known
    moved: bool = False  # HEAD may not be the first commit any more
    mess: bool = False  # git status shows more than edits of the right file
    was_reset: bool = False  # the last change was `git reset --hard`
    timeouts: int = 0  # test runs in a row that were killed
    looked: bool = False  # git status was clean and yet the tests fail


# ---- from the conversation to what is known -----------------------------------------------------------------------


def _replay(task: Task, messages: list[dict]) -> _Scene:
    start = next(i for i, m in enumerate(messages) if m["role"] == "user")
    scene = _Scene(issue=messages[start]["content"])
    for said, seen in zip(messages[start + 1 :: 2], messages[start + 2 :: 2]):
        command = actions.parse(said["content"])
        first, _, output = seen["content"].partition("\n")
        code = re.fullmatch(r"exit (-?\d+)", first)
        if command is not None and code is not None:
            _observe(task, scene, command, int(code[1]), output)
    return scene


def _observe(task: Task, scene: _Scene, command: str, code: int, output: str) -> None:
    """One command and what it printed."""
    scene.shown += output + "\n"
    for path, name in re.findall(r"^(?:\./)?(\w+/\w+\.py):(?:\d+:)?def (\w+)\(", output, re.M):
        scene.places[name] = path
    for package, module, names in re.findall(r"^from (\w+)\.(\w+) import ([\w, ]+)$", output, re.M):
        for name in names.split(", "):
            scene.places.setdefault(name, f"{package}/{module}.py")
    if code == 2 and re.match(r"bash: (-c: )?line 1: (syntax error|unexpected EOF)", output):
        return  # not a line of shell: nothing ran
    pieces, sure = _pieces(command)
    if len(pieces) > 1 and not all(_reads(p) for p in pieces):
        if not sure or (code != 0 and not (_is_pytest(pieces[-1]) and "short test summary" in output)):
            _unknown(scene)  # which of them ran is not clear
            return
    for i, words in enumerate(pieces):
        alone = all(p[:2] == ["git", "add"] for p in pieces[:-1])  # which prints nothing
        _step(task, scene, words, 0 if i + 1 < len(pieces) else code, output if alone else None)


def _step(task: Task, scene: _Scene, words: list[str], code: int, output: str | None) -> None:
    """One simple command. `output` is None where it is not known to be this command's alone."""
    if not words:
        _unknown(scene)
    elif _reads(words):
        if output is None:
            return
        if words[0] == "cat" and len(words) == 2 and code == 0:
            _viewed(scene, _clean(words[1]), output)
        elif words[0] == "cat" and "No such file" in output and _clean(words[-1]) in task.fixed:
            scene.odd = True
        elif code == 0 and (words[:4] == ["git", "diff", "--cached", "--name-status"]
                            or words[:3] == ["git", "status", "--short"] and not scene.moved):  # fmt: skip
            _status(task, scene, output)
        elif words[0] == "grep" and code == 1 and (name := re.fullmatch(r"def (\w+)\(", words[-1])):
            if name[1] in _named(task) and "r" in words[1] and len(words) == 3:
                scene.odd = True  # the issue or a test names it, and it is not there
    elif _is_pytest(words):
        _tested(scene, _full(words), code)
    elif words[0] == "sed":
        _sed(task, scene, words, code)
    elif words[0] == "git":
        _git(scene, words, code)
    elif code != 127:  # 127: no command at all
        _unknown(scene)


def _pieces(command: str) -> tuple[list[list[str]], bool]:
    """The simple commands of a line as lists of words, and whether each ran only if all before it went well.

    [[]] where the line is more than simple commands in a row: redirections, substitutions, loops.
    """
    command = command.replace(_ROOT, "ROOT")
    lexer = shlex.shlex(command, posix=True, punctuation_chars="();<>|&\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    pieces: list[list[str]] = [[]]
    sure = True
    try:
        for word in lexer:
            if word.strip("\n") in ("&&", ";", "|", "||", ""):
                pieces.append([])
                sure = sure and word.strip("\n") == "&&"
            elif set(word) <= set("();<>|&\n"):
                return [[]], False
            else:
                pieces[-1].append(word)
    except ValueError:  # an open quote: the shell runs nothing
        return [[]], False
    if "`" in command or "$" in command and ('"' in command or "$(" in command):
        return [[]], False
    pieces = [list(itertools.takewhile(lambda word: not word.startswith("#"), p)) for p in pieces]
    pieces = [p for p in pieces if p]
    if any(p[0] == "cd" for p in pieces[1:]) and not all(_reads(p) for p in pieces):
        return [[]], False
    if pieces and pieces[0][0] == "cd" and len(pieces) > 1:
        if len(pieces[0]) == 2 and pieces[0][1] in ("/testbed", "/testbed/", "."):
            pieces = pieces[1:]
        elif not all(_reads(p) for p in pieces):
            return [[]], False
        else:
            return [["true"]], True  # paths would not mean what they say
    return pieces or [["true"]], sure


def _reads(words: list[str]) -> bool:
    head = words[0]
    if head == "git":
        return len(words) > 1 and words[1] in _GIT_READERS
    if head == "sed":
        in_place = any(re.match(r"--in-place|-[a-zA-Z]*i", w) for w in words[1:])
        return not in_place and not re.search(r"\bw ", " ".join(words))  # `s/a/b/w FILE` writes too
    if head == "find":
        return not {"-delete", "-exec", "-execdir", "-fprint"} & set(words)
    if head in ("python", "python3"):
        code = " ".join(words[1:])
        return words[1:2] == ["-c"] and not re.search(r"open|write|os|sys|shutil|Path|exec|eval|import \*|process|input|__", code)
    return head in _READERS and not ("sort" == head and any(w.startswith(("-o", "--o")) for w in words))


def _is_pytest(words: list[str]) -> bool:
    return words[0] in ("pytest", "py.test") or words[:3] in (["python", "-m", "pytest"], ["python3", "-m", "pytest"])


def _full(words: list[str]) -> bool:
    """Does this pytest command run every test?"""
    rest = words[3:] if words[0].startswith("python") else words[1:]
    return all(w in (".", "tests", "tests/", "-q", "-v", "-x", "-s", "-vv", "-qq", "-rA", "--tb=short") for w in rest)


def _clean(path: str) -> str:
    return path.removeprefix("/testbed/").removeprefix("./")


def _viewed(scene: _Scene, path: str, text: str) -> None:
    scene.views[path] = text.rstrip("\n")
    scene.fresh.add(path)
    scene.tried[path] = 0
    scene.touched[path] = set()
    for name in re.findall(r"^def (\w+)\(", text, re.M):
        scene.places[name] = path


def _tested(scene: _Scene, full: bool, code: int) -> None:
    scene.timeouts = scene.timeouts + 1 if code in (124, 137) else 0
    if scene.timeouts == 1:
        return  # killed: says nothing, so run it again; the second time in a row it is a failure
    if code in (4, 5) and not full:
        return  # no such file, or no test in it
    if code != 0:
        scene.fresh.clear()
        scene.passed, scene.failed, scene.changed = False, True, False
    elif full:
        scene.fresh -= {path for path, tries in scene.tried.items() if tries}
        scene.passed, scene.failed, scene.changed = True, False, False


def _altered(scene: _Scene) -> None:
    scene.changed, scene.passed, scene.failed, scene.looked, scene.was_reset = True, False, False, False, False


def _unknown(scene: _Scene) -> None:
    """Any file may be another one now."""
    _altered(scene)
    scene.odd = True
    scene.fresh.clear()
    scene.views = dict.fromkeys(scene.views)


def _sed(task: Task, scene: _Scene, words: list[str], code: int) -> None:
    """An edit in place. One that failed changed nothing."""
    parsed = _sed_parts(words)
    if parsed is None:
        if code == 0:
            _unknown(scene)
        return
    scripts, paths = parsed
    if code != 0:
        if len(paths) > 1:
            _unknown(scene)
        return
    _altered(scene)
    for path in paths:
        if path not in task.fixed:
            scene.stray.append(path)
            continue
        scene.tried[path] = scene.tried.get(path, 0) + 1
        before = scene.views.get(path)
        after = _apply(scripts, before)
        scene.views[path] = after
        if after is None:
            scene.fresh.discard(path)
        else:
            pairs = zip(before.split("\n"), after.split("\n"))
            scene.touched.setdefault(path, set()).update(i for i, (x, y) in enumerate(pairs) if x != y)


def _sed_parts(words: list[str]) -> tuple[list[str], list[str]] | None:
    """(scripts, files) of `sed -i SCRIPT FILE...` and `sed -i -e SCRIPT ... FILE...`; None for other forms."""
    rest = [w for w in words[1:] if w != "-i"]
    scripts = []
    while len(rest) > 1 and rest[0] == "-e":
        scripts.append(rest[1])
        rest = rest[2:]
    if not scripts and rest:
        scripts, rest = rest[:1], rest[1:]
    if not rest or any(w.startswith("-") for w in scripts + rest) or any(set(w) & set("*?[~$") for w in rest):
        return None
    return scripts, [_clean(w) for w in rest]


def _apply(scripts: list[str], text: str | None) -> str | None:
    """What sed makes of the text; None where that is not clear."""
    for script in scripts:
        parts = re.fullmatch(r"s/((?:[^/\\]|\\.)*)/((?:[^/\\]|\\.)*)/(g?)", script)
        if text is None or parts is None or not parts[1]:
            return None
        pattern = ""
        for piece in re.findall(r"\\.|.", parts[1]):
            if piece == ".":
                pattern += "."
            elif piece[0] == "\\" and piece[1] in "./*[]^$\\":
                pattern += re.escape(piece[1])
            elif piece[0] in "\\*[]^$":
                return None
            else:
                pattern += re.escape(piece)
        new = parts[2].replace("\\/", "/")
        if "\\" in new or "&" in new or "\n" in script:
            return None
        count = 0 if parts[3] else 1
        text = "\n".join(re.sub(pattern, lambda _: new, line, count=count) for line in text.split("\n"))
    return text


def _git(scene: _Scene, words: list[str], code: int) -> None:
    """git commands that change something."""
    what = words[1] if len(words) > 1 else ""
    rest = [w for w in words[2:] if w not in ("--", "-q", "-f", "ROOT", "HEAD")]
    if what == "commit":  # the files stay, HEAD moves
        scene.moved = True
    elif what in ("checkout", "restore") and rest and all("/" in w or w == "." for w in rest):
        if code != 0:
            scene.odd, scene.stray = True, []
        else:
            _altered(scene)
            scene.fresh.clear()
            back = {_clean(w) for w in rest}
            scene.views = {p: None if "." in back or p in back else v for p, v in scene.views.items()}
            scene.stray = [] if "." in back else [p for p in scene.stray if p not in back]
    elif what == "reset" and "--hard" in rest and code == 0:
        was_odd = scene.odd
        _unknown(scene)
        scene.mess, scene.stray = False, []
        scene.moved = scene.moved and "ROOT" not in words
        scene.odd, scene.was_reset = was_odd or scene.moved, True  # new files are still there
    elif what == "clean":
        scene.odd = scene.odd and (scene.moved or not scene.was_reset)
        _altered(scene)
    elif what == "stash":
        _unknown(scene)
    elif code == 0:
        _unknown(scene)
        scene.moved = True


def _status(task: Task, scene: _Scene, output: str) -> None:
    """`git status --short`: nothing but changes inside the right files, or a mess."""
    lines = [line.split() for line in output.splitlines() if line.strip()]
    scene.mess = any(len(line) != 2 or line[0] != "M" or line[1] not in task.fixed for line in lines)
    scene.odd, scene.stray = False, []
    scene.looked = not scene.mess
    for edit in task.edits:  # a file that was changed and holds no such function any more: worth a look
        if any(line[-1:] == [edit.path] for line in lines):
            scene.places.setdefault(edit.function, edit.path)


# ---- from what is known to the next turn --------------------------------------------------------------------------


def _named(task: Task) -> set[str]:
    return {e.function for e in task.edits} | ({task.entry[0]} if task.entry else set())


def _decide(task: Task, scene: _Scene) -> tuple[str, str]:
    """(reason, command). The order of the questions is the order of what anyone would settle first."""
    root = f" {_ROOT}" if scene.moved else ""
    back = _ROOT if scene.moved else "HEAD"
    if scene.mess:
        return "Too much has changed. Start again.", f"git reset -q --hard{root} && git clean -fdq"
    if scene.odd:
        return "See what changed.", _STATUS_FROM_ROOT if scene.moved else "git status --short"
    seen = any(edit.function in scene.places for edit in task.edits)
    if scene.stray and (seen or any(p.startswith("tests/") for p in scene.stray)):  # it is seen to stand elsewhere
        return "That file was right. Undo.", f"git checkout {back} {scene.stray[0]}"
    if scene.passed:  # whatever the repair looks like: the tests tell it from all that it is not
        return "The tests pass.", "submit"

    in_sight = [e for e in task.edits if _in_sight(task, scene, e)]
    in_sight.sort(key=lambda e: scene.issue.find(f"{e.function}()"))
    if not in_sight and not scene.failed:
        return "Run the tests.", "pytest"
    for edit in in_sight:
        linked = not task.entry or f"return {edit.function}(" in scene.shown
        if not linked or edit.function not in scene.places and edit.path not in scene.views:
            return _find(task, scene, edit)
        if edit.path not in scene.fresh:
            again = " again" if edit.path in scene.views else ""
            return f"Read {edit.path}{again}.", f"cat {edit.path}"
        if not _whole(task, scene, edit.path):
            return "The file is broken. Restore it.", f"git checkout {back} {edit.path}"
    open_ = [e for e in in_sight if not _right(scene.views[e.path], e)]
    tried = sum(scene.tried.values())
    waiting = [e for e in open_ if e.number not in scene.touched.get(e.path, ())]
    if waiting and tried < len(in_sight):
        return _replace(scene, waiting[0], back)
    if scene.changed or not scene.failed:
        return "Run the tests.", "pytest"
    if scene.looked:
        return "Something else is broken. Start again.", f"git reset -q --hard {_ROOT} && git clean -fdqx"
    return "See what changed.", "git status --short"


def _in_sight(task: Task, scene: _Scene, edit: Edit) -> bool:
    """Has the issue or a failing test named the function with this bug (or the one that calls it)?"""
    names = {edit.function, task.entry[0]} if task.entry else {edit.function}
    return any(f"{name}()" in scene.issue or re.search(rf"FAILED .*::test_{name}\b", scene.shown) for name in names)


def _find(task: Task, scene: _Scene, edit: Edit) -> tuple[str, str]:
    name = edit.function
    if task.entry:  # the issue tells the function that calls it
        name, path = task.entry
        if name in scene.places and path not in scene.fresh:
            return f"Read {path}.", f"cat {path}"
        if name in scene.places:
            return "The file is broken. Restore it.", f"git checkout HEAD {path}"
    return f"Find {name}.", f"grep -rn 'def {name}('"


def _right(text: str, edit: Edit) -> bool:
    lines = text.split("\n")
    return edit.number < len(lines) and lines[edit.number].rstrip() == edit.line


def _whole(task: Task, scene: _Scene, path: str | None = None) -> bool:
    """Are all lines but those to be edited as they should be?"""
    for p, fixed in task.fixed.items():
        if path in (None, p):
            edits = {e.number for e in task.edits}
            now, goal = (scene.views.get(p) or "").split("\n"), fixed.rstrip("\n").split("\n")
            if len(now) != len(goal) or any(x != y for i, (x, y) in enumerate(zip(now, goal)) if i not in edits):
                return False
    return True


def _replace(scene: _Scene, edit: Edit, back: str) -> tuple[str, str]:
    """The sed for one line, as it stands on the screen."""
    text = scene.views[edit.path]
    line = text.split("\n")[edit.number]
    before, new, after = edit.site
    old = line[len(before) : len(line) - len(after)]
    if not (line.startswith(before) and line.endswith(after) and old and text.count(old) == 1):
        old, new = line.strip(), edit.line.strip()
    if "'" in old or not old or text.count(old) != 1:
        return "The line is broken. Restore it.", f"git checkout {back} {edit.path}"
    why = f"{old} should be {new}."
    return why, f"sed -i 's/{_escape(old)}/{new}/' {edit.path}"


def _escape(text: str) -> str:
    return re.sub(r"([\\/*\[\]^$])", r"\\\1", text)
