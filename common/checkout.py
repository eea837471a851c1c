"""One sandbox's copy of a repository: its patch, other patches applied to it, files written into it.

Git never runs on a tree that an agent has written: its .git, its config, hooks, attributes and nested repositories are
its own business. A changed tree is read by a plain walk, and from there on everything is a dict of path -> (mode, blob)
in a private git directory: the patch is the difference of two such dicts, and a patch is applied to such a dict.
"""

import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

from common.errors import InfraError
from common.repository import ATTRIBUTES, Files, Template, read_index

LARGEST_NEW_FILE = 1_000_000  # bytes; a larger file is no part of a patch
DEEPEST = 100  # directory levels; what lies deeper is no part of a patch


class PatchError(Exception):
    """A patch does not apply, or names a path outside the repository. Says what git said."""


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
        for path in self.ignored(new):
            del files[path]
        return files

    def diff(self) -> str:
        """The patch from the base to what is there now; deterministic, and UTF-8 (other text goes as binary)."""
        return self.compare(self.base, self.read())

    def compare(self, old: Files, new: Files) -> str:
        """The patch between two states. A link to a name that is not UTF-8 is no part of it: git has no form for that."""
        changed = sorted({p for p in old.keys() | new.keys() if old.get(p) != new.get(p)})
        changed = [p for p in changed if all(
            _is_text(self.blob(f[p][1])) for f in (old, new) if p in f and f[p][0] == "120000")]  # fmt: skip
        if not changed:
            return ""
        binary = [path for path in changed if not all(
            _is_text(self.blob(f[path][1])) for f in (old, new) if path in f and f[path][0] != "160000")]
        environment = {}
        if binary:  # a git directory with attributes of its own
            folder = self.folder / "compare"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.template.git_dir, folder, ignore=lambda *_: ["objects", "index"])
            (folder / "objects").mkdir()
            attributes = ATTRIBUTES + "".join(f'"/{_pattern(path)}" -diff\n' for path in binary)
            (folder / "info" / "attributes").write_text(attributes)
            environment = {"GIT_DIR": str(folder)}
        trees = [self.put_tree({path: files[path] for path in changed if path in files}) for files in (old, new)]
        patch = self.template.git("-c", "diff.algorithm=myers", "-c", "core.quotePath=true", "diff-tree", "-r", "-p",
                                  "--binary", "--full-index", "--no-renames", "--no-color", "--no-ext-diff",
                                  "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/", "-U3", *trees,
                                  objects=self.objects, **environment)
        return patch.decode("utf-8")

    def apply(self, files: Files, patch: str) -> Files:
        """The state after a patch. Raises PatchError: git refuses paths outside, in .git and beyond symlinks, too."""
        if not patch.strip():
            return dict(files)
        index = {"GIT_INDEX_FILE": str(self.folder / "apply")}
        (self.folder / "apply").unlink(missing_ok=True)
        self._fill_index(files, index)
        try:
            self.template.git("apply", "--cached", "--whitespace=nowarn", "-",
                              stdin=os.fsencode(patch), objects=self.objects, **index)
        except (InfraError, UnicodeEncodeError) as error:
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

    def put(self, data: bytes, kind: bytes = b"blob") -> str:
        """Store an object; returns its id."""
        raw = b"%s %d\0" % (kind, len(data)) + data
        name = hashlib.sha1(raw).hexdigest()
        path = self.objects / name[:2] / name[2:]
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(zlib.compress(raw, 1))
        return name

    def put_tree(self, files: Files) -> str:
        """Store a tree of these files; returns its id."""
        entries, folders = [], {}
        for path, (mode, blob) in files.items():
            folder, slash, rest = path.partition("/")
            if slash:
                folders.setdefault(folder, {})[rest] = (mode, blob)
            else:
                entries.append((os.fsencode(path), mode, blob))
        entries += [(os.fsencode(folder), "40000", self.put_tree(inside)) for folder, inside in folders.items()]
        entries.sort(key=lambda entry: entry[0] + b"/" * (entry[1] == "40000"))
        return self.put(b"".join(b"%s %s\0" % (m.encode(), n) + bytes.fromhex(b) for n, m, b in entries), b"tree")

    def blob(self, name: str) -> bytes:
        """The content of a blob."""
        for objects in (self.objects, self.template.git_dir / "objects"):
            path = objects / name[:2] / name[2:]
            if path.exists():
                return zlib.decompress(path.read_bytes()).split(b"\0", 1)[1]
        return self.template.git("cat-file", "blob", name, objects=self.objects)

    def _size(self, name: str) -> int:
        return int(self.template.git("cat-file", "-s", name, objects=self.objects))

    def _fill_index(self, files: Files, index: dict[str, str]) -> None:
        lines = b"".join(b"%s %s\t%s\0" % (mode.encode(), blob.encode(), os.fsencode(path))
                         for path, (mode, blob) in files.items())
        self.template.git("update-index", "-z", "--index-info", stdin=lines, objects=self.objects, **index)

    def ignored(self, paths: list[str]) -> list[str]:
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
                                    stdin=b"".join(b"./" + os.fsencode(p) + b"\0" for p in paths))  # ":x" is no path to git
        except InfraError as error:
            if str(error).endswith("failed: "):  # exit 1 without a word: none is ignored
                return []
            raise
        return [os.fsdecode(p.removeprefix(b"./")) for p in out.split(b"\0")[:-1]]


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
                if path.count("/") < DEEPEST:
                    folders.append(path)
            elif entry.is_symlink() or entry.is_file(follow_symlinks=False):
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:  # a path too long for the system to name
                    continue
                yield path, status


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
