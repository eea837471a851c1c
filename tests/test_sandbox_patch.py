"""What a patch of the local sandbox holds, whatever an agent did to the tree, its git and its clock."""

import os
import subprocess

from common.sandbox import LocalSandbox
from tests.test_sandbox import FILES, GIT, box, make_row, sh  # noqa: F401  box is a fixture


def applied(patch: str) -> dict[str, bytes]:
    """What a fresh checkout holds after `git apply` of this patch (without .git)."""
    with LocalSandbox(make_row()) as box:
        (box.checkout.tree / ".git" / "p").write_bytes(patch.encode())
        subprocess.run(["git", "apply", ".git/p"], cwd=box.checkout.tree, env=GIT | {"GIT_CEILING_DIRECTORIES": "/", "HOME": "/x",
                       "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}, check=True)
        return {str(p.relative_to(box.checkout.tree)): (os.readlink(p).encode() if p.is_symlink() else p.read_bytes())
                for p in sorted(box.checkout.tree.rglob("*"))
                if (p.is_symlink() or p.is_file()) and ".git" not in p.relative_to(box.checkout.tree).parts}


def test_patch_holds_edits_new_files_deletions_modes_and_links(box):
    sh(box, r"sed -i 's/-/+/' calc.py; rm data/names.txt; echo new > 'data/a file'; chmod +x calc.py; ln -s calc.py link;"
            r"printf '\0\1\2' > blob; printf 'caf\xe9\n' > latin; printf 'a\r\nb' > crlf; mkdir empty; mkfifo pipe;"
            r"echo x > x.log; mkdir build; echo x > build/y; head -c 1000001 /dev/zero > large; touch $'new\nline' $'\xff' '*?[x]'")
    patch = box.diff()
    assert patch == box.diff()
    files = applied(patch)
    assert files["calc.py"] == b"def add(a, b):\n    return a + b\n" and "data/names.txt" not in files
    assert files["data/a file"] == b"new\n" and files["link"] == b"calc.py"
    assert (files["blob"], files["latin"], files["crlf"]) == (b"\0\1\2", b"caf\xe9\n", b"a\r\nb")
    assert {"new\nline", os.fsdecode(b"\xff"), "*?[x]"} <= files.keys()
    assert not {"x.log", "build/y", "large", "pipe"} & files.keys()
    assert "old mode 100644\nnew mode 100755" in patch


def test_patch_is_the_same_whatever_the_agents_git_says(box):
    """Commits, a branch, a stash, another repository, no repository: what counts is what lies in /testbed."""
    sh(box, "sed -i 's/-/+/' calc.py; echo new > new.py")
    wanted = box.diff()
    assert "+    return a + b" in wanted and "+new" in wanted
    identity = "git -c user.name=x -c user.email=x@y"
    for trick in ("git add -A", f"{identity} commit -qam one", f"git checkout -qb other && {identity} commit -q --allow-empty -m two",
                  "git gc -q --prune=now", "rm -rf .git", f"git init -q && git add -A && {identity} commit -qm three",
                  "rm -rf .git && ln -s /etc .git", "rm .git && echo gitdir: /nowhere > .git"):
        sh(box, trick)
        assert box.diff() == wanted, trick


def test_stashed_work_is_not_in_the_patch(box):
    sh(box, "sed -i 's/-/+/' calc.py; git -c user.name=x -c user.email=x@y stash -q")
    assert box.diff() == ""


def test_hostile_git_configuration_runs_nothing(box):
    """diff() is the host's git: nothing in /testbed may make it run a program or hide a change."""
    sh(box, "git config core.fsmonitor 'touch /tmp/swe-dagger-pwned; echo'; git config diff.external 'touch /tmp/swe-dagger-pwned';"
            "git config filter.x.clean 'touch /tmp/swe-dagger-pwned'; git config core.hooksPath /testbed/hooks;"
            "git config core.excludesFile /testbed/all; echo '*' > all; echo '*' > .git/info/exclude;"
            "git config core.attributesFile /testbed/attr; mkdir hooks; printf '#!/bin/sh\ntouch /tmp/swe-dagger-pwned' > hooks/post-index-change;"
            "chmod +x hooks/*; printf '* filter=x diff=x -diff text eol=crlf ident working-tree-encoding=UTF-16\n' > .gitattributes;"
            "git config diff.x.textconv 'touch /tmp/swe-dagger-pwned'; sed -i 's/-/+/' calc.py; echo '$Id$' > new")
    patch = box.diff()
    assert "+    return a + b\n" in patch and "+$Id$\n" in patch and not os.path.exists("/tmp/swe-dagger-pwned")


def test_nested_repositories_are_plain_directories(box):
    sh(box, "git init -q data && git -C data config core.fsmonitor 'touch /tmp/swe-dagger-pwned'; echo Alan >> data/names.txt;"
            "mkdir -p vendor/lib && git init -q vendor/lib && echo code > vendor/lib/code.py; mkdir x; echo y > x/.GIT")
    patch = box.diff()
    assert "+Alan" in patch and "b/vendor/lib/code.py" in patch and ".GIT" not in patch and "Subproject" not in patch
    assert not os.path.exists("/tmp/swe-dagger-pwned")


def test_symlinks_do_not_lead_out(box):
    sh(box, "ln -s /etc/shadow shadow; ln -s / all; rm calc.py; ln -s /etc/passwd calc.py; rm -r data; ln -s /etc data;"
            "rm .gitignore; ln -s /etc/hosts .gitignore")
    patch = box.diff()
    assert "root:" not in patch and "localhost" not in patch and "+/etc/shadow" in patch and "b/data/passwd" not in patch
    assert applied(patch)["all"] == b"/"


def test_patch_of_a_wrecked_tree(box):
    sh(box, "echo secret > locked; mkdir d; echo inside > d/file; chmod 000 locked d calc.py; mkfifo .gitignore2;"
            "python -c \"import os\nfor _ in range(3000): os.mkdir('x'); os.chdir('x')\"; rm .gitignore; mkfifo .gitignore")
    patch = box.diff()
    assert "+secret" in patch and "+inside" in patch and "calc.py" not in patch
    folder = box.folder
    box.stop()
    assert not folder.exists()


def test_names_that_git_or_the_system_cannot_hold_are_left_out(box):
    """A link to a name that is not UTF-8, and a file that lies so deep that its path is too long for this machine."""
    sh(box, r"ln -s $'\xff' bad; ln -s calc.py good; echo new > new.py")
    deep = "import os\nfor _ in range(15): os.mkdir('d' * 250); os.chdir('d' * 250)\n"
    sh(box, f'python -c "{deep}for n in range(255): open(chr(120) * (n + 1), chr(119))"')
    patch = box.diff()
    assert "b/new.py" in patch and "b/good" in patch and "b/bad" not in patch and box.diff() == patch


def test_clock_games_do_not_hide_an_edit(box):
    """Same size, same modification time: the change time, which a program cannot set, tells."""
    sh(box, "cp -p calc.py /tmp/ref; sed -i 's/-/+/' calc.py; touch -r /tmp/ref calc.py")
    assert "+    return a + b" in box.diff()


def test_a_deleted_tree(box):
    sh(box, "rm -rf /testbed/* /testbed/.[a-z]*")
    assert box.diff().count("deleted file mode") == len(FILES)
    assert not [name for name in applied(box.diff())]
