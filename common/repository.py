"""A task's repository at base_commit, made once per process and copied for each sandbox (common/checkout.py).

`prepare(row)` builds a Template out of row["local"]["source"] (inline files, a directory, a tarball, or a git
repository checked out at row["base_commit"]): a work tree whose .git holds one commit and nothing else, the same for
everybody (author, date and branch are fixed), and a second, private git directory that never enters a sandbox.

Not done: submodules stay empty, Git LFS pointers stay pointers, file times are all the same fixed date.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import threading
import zlib
from collections import OrderedDict
from pathlib import Path

from common.errors import InfraError, InputError

Files = dict[str, tuple[str, str]]  # path -> (git mode, blob id); paths as os.fsdecode gives them

DATE = 1577836800  # 2020-01-01, of the commit and of every file
KEPT_TEMPLATES = 64

GIT_ENVIRONMENT = {
    "PATH": os.environ.get("PATH", os.defpath), "HOME": "/nonexistent", "LC_ALL": "C",
    "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_ATTR_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0",
    "GIT_AUTHOR_NAME": "swe-dagger", "GIT_AUTHOR_EMAIL": "swe-dagger@localhost", "GIT_AUTHOR_DATE": f"{DATE} +0000",
    "GIT_COMMITTER_NAME": "swe-dagger", "GIT_COMMITTER_EMAIL": "swe-dagger@localhost",
    "GIT_COMMITTER_DATE": f"{DATE} +0000",
}
# checkStat=minimal: the index of the template stays fresh in a copy, whose inodes and change times differ.
CONFIG = ("[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = false\n\tlogallrefupdates = false\n"
          "\tcheckStat = minimal\n\ttrustctime = false\n[gc]\n\tauto = 0\n")
# Of higher precedence than any .gitattributes: bytes stay what they are.
ATTRIBUTES = "* -text -ident !filter !working-tree-encoding !diff !merge\n"


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
            if key in _templates:
                _templates[key].users += 1
                _templates.move_to_end(key)
                return _templates[key]
        template = _build(row, folder / f"template-{hashlib.sha256(key.encode()).hexdigest()[:16]}")
        template.users = 1
        with _lock:
            _templates[key] = template
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
    (template.git_dir / "config").write_text(CONFIG)
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
        write_inline(template.tree, source, name)
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


def is_git(source: Path) -> bool:
    """Whether a directory is a git repository, bare or with a work tree."""
    return source.is_dir() and _git_directory(source) is not None


def _git_directory(source: Path) -> Path | None:
    for git_dir in (source / ".git", source):
        if git_dir.is_file() or (git_dir / "HEAD").is_file() and (git_dir / "objects").is_dir():
            return git_dir
    return None


def commit(source: Path, name: str = "HEAD") -> str | None:
    """The hash of a commit in a git repository, which `name` says in any of git's ways; None for what is no repository.
    A whole hash is taken as it is. Raises InputError where there is no such commit."""
    if not source.is_dir() or not name or (git_dir := _git_directory(source)) is None:
        return None
    if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", name):
        return name
    environment = GIT_ENVIRONMENT | {"GIT_DIR": str(git_dir)}
    words = ("-c", "safe.directory=*", "rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
    try:
        return _git(words, environment, source).decode().strip()
    except InfraError as error:
        raise InputError(f"{source} is a git repository without a commit {name} ({error}): commit something there, or fetch "
                         "it") from None  # fmt: skip


def write_inline(tree: Path, source: dict, name: str) -> None:
    """Write {path: text} below `tree`. Raises InputError, which begins with `name`, for a path that leads out of it."""
    for path, text in source.items():
        parts = Path(path).parts
        if not parts or Path(path).is_absolute() or ".." in parts or any(p.lower() == ".git" for p in parts):
            raise InputError(f"{name}: bad path {path!r}")
        target = tree / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8", newline="")
        target.chmod(0o755 if text.startswith("#!") else 0o644)


def _unpack(source: Path, folder: Path, name: str) -> Path:
    """Unpack a tarball into a new folder; a single top-level directory is stripped. A hostile one is an InputError.

    Files, directories and symlinks; the links are made last, so that nothing is written through one.
    """
    folder.mkdir()
    links = []
    try:
        with tarfile.open(source) as tar:
            for member in tar:
                path = os.path.normpath(member.name)
                if path.startswith(("/", "..")):
                    raise InputError(f"{name}: bad path {member.name!r} in the tarball")
                target = folder / path
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                if member.issym():
                    links.append((member.linkname, target))
                elif (content := tar.extractfile(member)) is not None:  # a hard link gives what it leads to
                    with content, open(target, "wb") as file:
                        shutil.copyfileobj(content, file)
                    target.chmod(0o755 if member.mode & 0o100 else 0o644)
        for link, target in links:
            target.symlink_to(link)
    except (tarfile.TarError, EOFError, KeyError, zlib.error) as error:
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
        # Above this threshold git writes one pack, not a file and a directory for each blob, which every copy pays for.
        template.git("-c", "core.bigFileThreshold=1", "add", "-A", *add, ".", **work)
    tree = template.git("write-tree").decode().strip()
    template.commit = template.git("commit-tree", "-m", "base", tree).decode().strip()
    (template.git_dir / "refs/heads/main").write_text(template.commit + "\n")
    template.files = read_index(template)
    inner = template.tree / ".git"
    shutil.copytree(template.git_dir, inner)
    shutil.rmtree(inner / "info")
    os.utime(template.tree, (DATE, DATE))


def read_index(template: Template, **environment: str) -> Files:
    """What a git index holds; without GIT_INDEX_FILE that of the base commit."""
    files = {}
    for entry in template.git("ls-files", "-s", "-z", **environment).split(b"\0")[:-1]:
        head, path = entry.split(b"\t", 1)
        mode, blob, _ = head.decode().split()
        files[os.fsdecode(path)] = (mode, blob)
    return files
