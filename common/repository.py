"""A task's repository at base_commit: made once per process, copied for each sandbox, and its patches read and applied.

`prepare(row)` builds a Template out of row["local"]["source"] (inline files, a directory, a tarball, or a git repository
checked out at row["base_commit"]): a work tree whose .git holds one commit and nothing else, the same for everybody
(author, date and branch are fixed), and a second, private git directory that never enters a sandbox.

Git never runs on a tree that an agent has written: its .git, its config, hooks, attributes and nested repositories are
its own business. A changed tree is read by a plain walk, and from there on everything is a dict of path -> (mode, blob)
in the private git directory: the patch is the difference of two such dicts, a patch is applied to a dict.

Not done: submodules stay empty, Git LFS pointers stay pointers, file times are all the same fixed date.
"""

import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from common.errors import InfraError, InputError

Files = dict[str, tuple[str, str]]  # path -> (git mode, blob id); paths as os.fsdecode gives them

DATE = 1577836800  # 2020-01-01, of the commit and of every file
LARGEST_NEW_FILE = 1_000_000  # bytes; a larger file is no part of a patch
KEPT_TEMPLATES = 64

GIT_ENVIRONMENT = {
    "PATH": os.environ.get("PATH", os.defpath), "HOME": "/nonexistent", "LC_ALL": "C",
    "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_ATTR_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0",
    "GIT_AUTHOR_NAME": "swe-dagger", "GIT_AUTHOR_EMAIL": "swe-dagger@localhost", "GIT_AUTHOR_DATE": f"{DATE} +0000",
    "GIT_COMMITTER_NAME": "swe-dagger", "GIT_COMMITTER_EMAIL": "swe-dagger@localhost",
    "GIT_COMMITTER_DATE": f"{DATE} +0000",
}
# checkStat=minimal: the index of the template stays fresh in a copy, whose inodes and change times differ.
CONFIG = ("[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = {bare}\n\tlogallrefupdates = false\n"
          "\tcheckStat = minimal\n\ttrustctime = false\n[gc]\n\tauto = 0\n")
# Of higher precedence than any .gitattributes: bytes stay what they are.
ATTRIBUTES = "* -text -ident !filter !working-tree-encoding !diff !merge\n"


class PatchError(Exception):
    """A patch does not apply, or names a path outside the repository. Says what git said."""


class Template:
    """The repository of one task: `tree` (work tree with a one-commit .git) and `git` (private git directory)."""

    def __init__(self, folder: Path):
        self.folder, self.tree, self.git_dir = folder, folder / "tree", folder / "git"
        self.commit = ""
        self.files: Files = {}
        self.users = 0

    def git(self, *args: str, stdin: bytes | None = None, objects: Path | None = None, **environment: str) -> bytes:
        """Run git in the private directory. New objects go to `objects` if that is given. Raises InfraError."""
        environment = GIT_ENVIRONMENT | {"GIT_DIR": str(self.git_dir)} | environment
        if objects is not None:
            environment |= {"GIT_OBJECT_DIRECTORY": str(objects),
                            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(self.git_dir / "objects")}
        return _git(args, environment, self.folder, stdin)


def _git(args, environment: dict, cwd: Path, stdin: bytes | None = None) -> bytes:
    try:
        done = subprocess.run(["git", *args], input=b"" if stdin is None else stdin, env=environment, cwd=cwd,
                              capture_output=True, timeout=600, start_new_session=True)
    except FileNotFoundError:
        raise InputError("git is not installed: apt-get install git") from None
    except subprocess.TimeoutExpired:
        raise InfraError(f"git {args[0]} took longer than 600 s") from None
    if done.returncode:
        raise InfraError(f"git {' '.join(args)[:200]} failed: {done.stderr.decode(errors='replace').strip()[-2000:]}")
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Templates

_templates: OrderedDict[str, Template] = OrderedDict()
_building: dict[str, threading.Lock] = {}
_lock = threading.Lock()


def prepare(row: dict, folder: Path) -> Template:
    """The template of a task, built below `folder` at its first use; give it back with release(). Thread-safe.

    Raises InputError, which names the instance and the path, if the repository is not there or has no base_commit.
    """
    key = _key(row, folder)
    with _lock:
        building = _building.setdefault(key, threading.Lock())
    with building:
        with _lock:
            template = _templates.get(key)
        if template is None:
            template = _build(row, folder / f"template-{hashlib.sha256(key.encode()).hexdigest()[:16]}")
        with _lock:
            template.users += 1
            _templates[key] = template
            _templates.move_to_end(key)
    return template


def release(template: Template) -> None:
    """Say that a template is no longer used; the oldest unused ones are removed beyond KEPT_TEMPLATES."""
    old = []
    with _lock:
        template.users -= 1
        for key in [k for k, t in _templates.items() if not t.users][:max(0, len(_templates) - KEPT_TEMPLATES)]:
            old.append(_templates.pop(key))
            os.rename(old[-1].folder, f"{old[-1].folder}.old-{id(old[-1])}")
    for gone in old:
        shutil.rmtree(f"{gone.folder}.old-{id(gone)}", ignore_errors=True)


def _key(row: dict, folder: Path) -> str:
    source = row["local"].get("source")
    if isinstance(source, dict):
        digest = hashlib.sha256()
        for path in sorted(source):
            digest.update(f"{len(path)} {path} {len(source[path])} {source[path]}".encode())
        return f"{folder} {digest.hexdigest()}"
    return f"{folder} {source} {row.get('base_commit')}"


def _build(row: dict, folder: Path) -> Template:
    shutil.rmtree(folder, ignore_errors=True)
    template = Template(folder)
    for part in ("objects/info", "objects/pack", "refs/heads", "info"):
        (template.git_dir / part).mkdir(parents=True)
    template.tree.mkdir()
    (template.git_dir / "HEAD").write_text("ref: refs/heads/main\n")
    (template.git_dir / "config").write_text(CONFIG.format(bare="false"))
    (template.git_dir / "info" / "attributes").write_text(ATTRIBUTES)
    try:
        _fill(template, row, row["local"].get("source"))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(f"{row['instance_id']}: repository {_name(row)}: {error}") from None
    except (InputError, InfraError):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return template


def _name(row: dict) -> str:
    source = row["local"].get("source")
    return "(inline files)" if isinstance(source, dict) else str(source)


def _fill(template: Template, row: dict, source) -> None:
    """Put the files of `source` into template.tree and commit them."""
    name = f"{row['instance_id']}: repository {_name(row)}"
    work = {"GIT_WORK_TREE": str(template.tree)}
    if isinstance(source, dict):
        _write_inline(template.tree, source, name)
        _commit(template, ["-f"])
    elif not isinstance(source, (str, os.PathLike)) or not str(source):
        raise InputError(f"{row['instance_id']}: local.source must be a path or {{path: text}}")
    elif not (source := Path(source)).exists():
        raise InputError(f"{name} does not exist (local.source; a directory, a tarball or a git repository)")
    elif source.is_file():
        unpacked = _unpack(source, template.folder / "unpacked", name)
        if (unpacked / ".git").is_dir():
            _fill(template, row, unpacked)
        else:
            unpacked.rename(template.folder / "whole")
            shutil.rmtree(template.tree)
            _copy(template.folder / "whole", template.tree)
            _commit(template, ["-f"])
        for part in ("unpacked", "whole"):
            shutil.rmtree(template.folder / part, ignore_errors=True)
    elif (git_dir := _git_directory(source)) is not None:
        commit = row.get("base_commit")
        if not commit:
            raise InputError(f"{name} is a git repository, and the task has no base_commit")
        environment = GIT_ENVIRONMENT | {"GIT_DIR": str(git_dir)}
        safe = ("-c", "safe.directory=*")
        try:
            tree = _git((*safe, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{tree}}"),
                        environment, template.folder).decode().strip()
            pack = _git((*safe, "pack-objects", "--revs", "--stdout", "-q"), environment, template.folder,
                        f"{tree}\n".encode())
        except InfraError as error:
            raise InputError(f"{name} has no commit {commit} (base_commit), or not all of it: fetch it there "
                             f"({error})") from None
        template.git("index-pack", "--stdin", stdin=pack)
        template.git("read-tree", tree)
        template.git("checkout-index", "-a", "-f", **work)
        _commit(template, None)
    else:
        shutil.rmtree(template.tree)
        _copy(source, template.tree)
        _commit(template, [])


def _git_directory(source: Path) -> Path | None:
    for git_dir in (source / ".git", source):
        if git_dir.is_file() or (git_dir / "HEAD").is_file() and (git_dir / "objects").is_dir():
            return git_dir
    return None


def _write_inline(tree: Path, source: dict, name: str) -> None:
    for path, text in source.items():
        parts = Path(path).parts
        if not parts or Path(path).is_absolute() or ".." in parts or any(p.lower() == ".git" for p in parts):
            raise InputError(f"{name}: bad path {path!r}")
        target = tree / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8", newline="")
        target.chmod(0o755 if text.startswith("#!") else 0o644)


def _unpack(source: Path, folder: Path, name: str) -> Path:
    """Unpack a tarball; a single top-level directory is stripped."""
    if not hasattr(tarfile, "data_filter"):
        raise InputError("unpacking a tarball safely needs Python 3.11.4 or later")
    folder.mkdir()
    try:
        with tarfile.open(source) as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise InputError(f"{name} is no directory, no git repository and no tarball ({error})") from None
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() and not inside[0].is_symlink() else folder


def _copy(source: Path, target: Path) -> None:
    """Copy a directory without any .git in it; symlinks stay symlinks."""
    shutil.copytree(source, target, symlinks=True,
                    ignore=lambda _, names: [n for n in names if n.lower() == ".git"])


def _commit(template: Template, add: list[str] | None) -> None:
    """Commit template.tree, with `git add -A` and these options first unless None, and give it its own .git."""
    work = {"GIT_WORK_TREE": str(template.tree)}
    for folder, directories, names in os.walk(template.tree, topdown=False):
        for path in [os.path.join(folder, name) for name in names + directories] + [folder]:
            if not os.path.islink(path):
                os.chmod(path, os.stat(path).st_mode & 0o777 | 0o644 | 0o111 * os.path.isdir(path))
            os.utime(path, (DATE, DATE), follow_symlinks=False)
    if add is None:
        template.git("update-index", "-q", "--refresh", **work)
    else:
        template.git("add", "-A", *add, ".", **work)
    tree = template.git("write-tree").decode().strip()
    template.commit = template.git("commit-tree", "-m", "base", tree).decode().strip()
    (template.git_dir / "refs/heads/main").write_text(template.commit + "\n")
    template.files = read_index(template)
    if sum(1 for _ in (template.git_dir / "objects").glob("??/*")) > 200:
        template.git("repack", "-adq")
    inner = template.tree / ".git"
    shutil.copytree(template.git_dir, inner, ignore=lambda folder, _: ["info"] if folder == str(template.git_dir) else [])
    os.utime(template.tree, (DATE, DATE))


def read_index(template: Template, **environment: str) -> Files:
    """What a git index holds; without GIT_INDEX_FILE that of the base commit."""
    files = {}
    for entry in template.git("ls-files", "-s", "-z", **environment).split(b"\0")[:-1]:
        head, path = entry.split(b"\t", 1)
        mode, blob, _ = head.decode().split()
        files[os.fsdecode(path)] = (mode, blob)
    return files


# ---------------------------------------------------------------------------------------------------------------------
# The copy of one sandbox

class Checkout:
    """One sandbox's copy of a template at folder/testbed, with a private place for git objects beside it."""

    def __init__(self, template: Template, folder: Path, owner: int | None):
        """Copies the tree. owner: a uid that all of it is given to (needs root)."""
        self.template, self.folder, self.owner = template, folder, owner
        self.tree, self.objects = folder / "testbed", folder / "objects"
        self.objects.mkdir()
        done = subprocess.run(["cp", "-a", "--", str(template.tree), str(self.tree)], capture_output=True)
        if done.returncode:
            raise InfraError(f"cannot copy the repository: {done.stderr.decode(errors='replace').strip()[-500:]}")
        if owner is not None:
            _give(self.tree, owner)
        self.base = template.files
        # (inode, change time) of a file that is surely the base's: a user process cannot set its change time
        self.fresh = {path: (s.st_ino, s.st_ctime_ns) for path, s in walk(self.tree) if path in self.base}

    def rebase(self) -> None:
        """What is there now (after the set-up commands) is what patches are made against."""
        self.base = self.read()

    def read(self) -> Files:
        """The state of the tree: base files as they are now, and new files that are neither ignored nor too large."""
        files = {path: entry for path, entry in self.base.items() if entry[0] == "160000"}
        new = []
        for path, status in walk(self.tree):
            known = self.base.get(path)
            if known and self.fresh.get(path) == (status.st_ino, status.st_ctime_ns):
                files[path] = self.template.files.get(path, known)
                continue
            try:
                if stat.S_ISLNK(status.st_mode):
                    files[path] = ("120000", self.put(os.fsencode(os.readlink(self.tree / path))))
                elif status.st_size <= LARGEST_NEW_FILE or known and status.st_size <= 2 * self._size(known[1]):
                    mode = "100755" if status.st_mode & 0o100 else "100644"
                    files[path] = (mode, self.put(_read(self.tree / path)))
                else:
                    if known:  # grown beyond all bounds: as if it had not been touched
                        files[path] = known
                    continue
            except OSError:  # a name too long to be opened
                continue
            if not known:
                new.append(path)
        for path in self._ignored(new):
            del files[path]
        return files

    def diff(self) -> str:
        """The patch from the base to what is there now; deterministic, and UTF-8 (other text goes as binary)."""
        return self.compare(self.base, self.read())

    def compare(self, old: Files, new: Files) -> str:
        """The patch between two states."""
        if old == new:
            return ""
        changed = sorted({p for p in old.keys() | new.keys() if old.get(p) != new.get(p)})
        attributes = [ATTRIBUTES]
        for path in changed:
            if not all(_is_text(self.blob(f[path][1])) for f in (old, new) if path in f and f[path][0] != "160000"):
                attributes.append(f'"/{_pattern(path)}" -diff\n')
        folder = self.folder / "compare"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "info").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "objects").mkdir()
        (folder / "HEAD").write_text("ref: refs/heads/main\n")
        (folder / "config").write_text(CONFIG.format(bare="true"))
        (folder / "info" / "attributes").write_bytes(b"".join(os.fsencode(a) for a in attributes))
        environment = {"GIT_DIR": str(folder)}
        trees = []
        for name, files in (("old", old), ("new", new)):
            index = environment | {"GIT_INDEX_FILE": str(folder / name)}
            self._fill_index({p: files[p] for p in changed if p in files}, index)
            trees.append(self.template.git("write-tree", objects=self.objects, **index).decode().strip())
        patch = self.template.git("-c", "diff.algorithm=myers", "-c", "core.quotePath=true", "diff-tree", "-r", "-p",
                                  "--binary", "--full-index", "--no-renames", "--no-color", "--no-ext-diff",
                                  "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/", "-U3", *trees,
                                  objects=self.objects, **environment)
        return patch.decode("utf-8")

    def apply(self, files: Files, patch: str) -> Files:
        """The state after a patch. Raises PatchError; git refuses paths outside the tree, in .git or beyond symlinks."""
        if not patch.strip():
            return dict(files)
        index = {"GIT_INDEX_FILE": str(self.folder / "apply")}
        (self.folder / "apply").unlink(missing_ok=True)
        self._fill_index(files, index)
        try:
            self.template.git("apply", "--cached", "--whitespace=nowarn", "-",
                              stdin=os.fsencode(patch), objects=self.objects, **index)
        except InfraError as error:
            raise PatchError(str(error)) from None
        return {os.fsdecode(p): v for p, v in read_index(self.template, **index).items()}

    def write(self, files: Files) -> None:
        """Turn the tree, in which no foreign code has run yet, from the base into `files`."""
        gone = sorted((p for p in self.base if p not in files), reverse=True)
        for path in gone:
            (self.tree / path).unlink(missing_ok=True)
            for parent in Path(path).parents:
                if parent == Path(".") or not (self.tree / parent).is_dir() or os.listdir(self.tree / parent):
                    break
                (self.tree / parent).rmdir()
        changed = {p: entry for p, entry in files.items() if self.base.get(p) != entry and entry[0] != "160000"}
        if changed:
            index = {"GIT_INDEX_FILE": str(self.folder / "write"), "GIT_WORK_TREE": str(self.tree)}
            (self.folder / "write").unlink(missing_ok=True)
            self._fill_index(changed, index)
            self.template.git("checkout-index", "-a", "-f", objects=self.objects, **index)
        if self.owner is not None:
            _give(self.tree, self.owner)

    def put(self, data: bytes) -> str:
        """Store a blob; returns its id."""
        raw = b"blob %d\0" % len(data) + data
        name = hashlib.sha1(raw).hexdigest()
        path = self.objects / name[:2] / name[2:]
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(zlib.compress(raw, 1))
        return name

    def blob(self, name: str) -> bytes:
        """The content of a blob."""
        path = self.objects / name[:2] / name[2:]
        if path.exists():
            return zlib.decompress(path.read_bytes()).split(b"\0", 1)[1]
        return self.template.git("cat-file", "blob", name, objects=self.objects)

    def _size(self, name: str) -> int:
        return int(self.template.git("cat-file", "-s", name, objects=self.objects))

    def _fill_index(self, files: Files, index: dict[str, str]) -> None:
        lines = b"".join(f"{mode} {blob}\t".encode() + os.fsencode(path) + b"\0" for path, (mode, blob) in files.items())
        self.template.git("update-index", "-z", "--index-info", stdin=lines, objects=self.objects, **index)

    def _ignored(self, paths: list[str]) -> list[str]:
        """Which of these untracked paths the tree's .gitignore files exclude. Git sees copies of those files alone."""
        rules = [p for p, s in walk(self.tree) if os.path.basename(p) == ".gitignore" and stat.S_ISREG(s.st_mode)
                 and s.st_size <= LARGEST_NEW_FILE] if paths else []
        if not rules:
            return []
        folder = self.folder / "ignore"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in rules:
            with contextlib.suppress(OSError):  # a name too long
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(_read(self.tree / path))
        try:
            out = self.template.git("check-ignore", "--no-index", "-z", "--stdin", GIT_WORK_TREE=str(folder),
                                    stdin=b"".join(os.fsencode(p) + b"\0" for p in paths))
        except InfraError as error:
            if str(error).endswith("failed: "):  # exit 1 without a word: none is ignored
                return []
            raise
        return [os.fsdecode(p) for p in out.split(b"\0")[:-1]]


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Files and symlinks below root, with their lstat; no .git, whatever it is, no sockets, pipes and devices."""
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            entries = list(_scan(os.path.join(root, folder)))
        except OSError:  # too deep to be named: git could not hold it either
            continue
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if entry.name.lower() == ".git":
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_symlink() or entry.is_file(follow_symlinks=False):
                yield path, entry.stat(follow_symlinks=False)


def _scan(path: str) -> list[os.DirEntry]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except PermissionError:  # chmod 000 in the sandbox
        os.chmod(path, 0o700)
        with os.scandir(path) as entries:
            return list(entries)


def _read(path: Path) -> bytes:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except PermissionError:
        os.chmod(path, 0o600)
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with open(handle, "rb") as file:
        return file.read()


def _give(root: Path, owner: int) -> None:
    os.chown(root, owner, owner)
    for folder, directories, names in os.walk(root):
        for name in directories + names:
            os.lchown(os.path.join(folder, name), owner, owner)


def _is_text(data: bytes) -> bool:
    try:
        return "\0" not in data.decode("utf-8")
    except UnicodeDecodeError:
        return False


def _pattern(path: str) -> str:
    """A path as a quoted pattern of a gitattributes file."""
    out = ""
    for byte in os.fsencode(path):
        char = chr(byte)
        if char in "*?[]!#\\":
            out += "\\\\" + ("\\\\" if char == "\\" else char)
        elif char == '"' or byte < 32 or byte >= 127:
            out += f"\\{byte:03o}"
        else:
            out += char
    return out
