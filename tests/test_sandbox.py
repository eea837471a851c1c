"""The local sandbox: one attack for each promise of its docstring. What a patch holds: test_sandbox_patch.py."""

import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from common import bubblewrap, limits, seccomp
from common.errors import InfraError, InputError
from common.sandbox import MEGABYTE, LocalSandbox, open_sandbox

ROOT = Path(__file__).parent.parent
FILES = {
    "calc.py": "def add(a, b):\n    return a - b\n", "run.sh": "#!/bin/sh\necho run\n", "data/names.txt": "Ada\nGrace\n",
    ".gitignore": "*.log\nbuild/\n", "tests/test_calc.py": "import calc\n\n\ndef test_add():\n    assert calc.add(1, 2) == 3\n",
}
GIT = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
       "GIT_CONFIG_GLOBAL": "/dev/null", "PATH": os.environ["PATH"]}


def make_row(**local) -> dict:
    return {"instance_id": "toy-1", "base_commit": "0" * 40, "local": {"source": FILES} | local}


@pytest.fixture
def box():
    with LocalSandbox(make_row()) as opened:
        yield opened


def sh(box, command, **options) -> str:
    """The output of a command that succeeds."""
    result = box.run(command, **options)
    assert result.exit_code == 0, result.output
    return result.output


def host_processes(word: str) -> list[int]:
    """Processes with this in their command line, as the host sees them."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
        except OSError:
            pass
    return found


# ---------------------------------------------------------------------------------------------------------------------
# An ordinary day

def test_commands_start_fresh_in_testbed_and_files_stay(box):
    assert sh(box, "cd data && export X=1 && pwd && echo new > /tmp/kept && echo $HOME") == "/testbed/data\n/tmp/home\n"
    assert sh(box, "pwd; echo \"X=$X\"; cat /tmp/kept") == "/testbed\nX=\nnew\n"
    result = box.run("echo out; echo err >&2; exit 3")
    assert (result.exit_code, result.output, result.truncated, result.timed_out) == (3, "out\nerr\n", False, False)
    assert box.run("kill -9 $$").exit_code == 137
    assert box.run("nosuchcommand").exit_code == 127


def test_the_tasks_python_and_pytest_work(box):
    assert sh(box, "python -c 'import sys; print(sys.version_info[:2])'") == f"{sys.version_info[:2]}\n"
    assert "1 failed" in box.run("python -m pytest -q").output
    sh(box, "sed -i 's/a - b/a + b/' calc.py")
    assert "1 passed" in sh(box, "pytest -q 2>&1 || python -m pytest -q")


def test_an_interpreter_anywhere(tmp_path):
    """A virtual environment below /tmp, in directories that are closed to others."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    (tmp_path / "venv" / "pyvenv.cfg").write_text(f"home = {os.path.dirname(os.path.realpath(sys.executable))}\n")
    (tmp_path / "neighbour").write_text("hidden")
    with LocalSandbox(make_row(python=str(tmp_path / "venv" / "bin" / "python"))) as box:
        assert sh(box, "python -c 'import sys; print(sys.prefix)'") == f"{tmp_path}/venv\n"
        assert sh(box, f"ls {tmp_path}") == "venv\n"
        assert box.run(f"touch {tmp_path}/venv/x").exit_code != 0


def test_links_on_the_way_to_an_interpreter_bring_no_more_than_their_directory(tmp_path):
    """/etc/alternatives/python and ~/.local/bin/python are such links: all of /etc or ~/.local would be too much."""
    for place in ("venv/bin", "etc/alternatives"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "etc/passwd").write_text("hidden")
    (tmp_path / "etc/alternatives/python").symlink_to(os.path.realpath(sys.executable))
    (tmp_path / "venv/bin/python").symlink_to(tmp_path / "etc/alternatives/python")
    (tmp_path / "venv/pyvenv.cfg").write_text(f"home = {os.path.dirname(os.path.realpath(sys.executable))}\n")
    with LocalSandbox(make_row(python=str(tmp_path / "venv/bin/python"))) as box:
        assert sh(box, "python -c 'import sys; print(sys.prefix)'") == f"{tmp_path}/venv\n"
        assert sh(box, f"ls {tmp_path}/etc") == "alternatives\n"


def test_names_that_look_like_gits_pathspecs_are_names(tmp_path):
    """`git check-ignore` would read ":(" as magic and fail, and take ":wq" for wq."""
    with LocalSandbox(make_row()) as box:
        sh(box, "for name in ':(' ':wq' ':!x' '-x'; do echo new > \"./$name\"; done; echo log > a.log")
        patch = box.diff()
    assert [f"+++ b/{name}" in patch for name in (":(", ":wq", ":!x", "-x", "a.log")] == [True] * 4 + [False]


def test_one_commit_and_nothing_of_the_past(tmp_path):
    """A git repository is handed over at base_commit; what came later, other branches and remotes are not there."""
    def git(*args):
        return subprocess.run(["git", *args], cwd=tmp_path / "repo", env=GIT, check=True, capture_output=True,
                              text=True).stdout.strip()
    (tmp_path / "repo").mkdir()
    git("init", "-q", "-b", "trunk")
    git("remote", "add", "origin", "https://example.org/x")
    for text in ("first", "second", "the fix"):
        (tmp_path / "repo" / "a.txt").write_text(text)
        (tmp_path / "repo" / ".gitattributes").write_text("* text eol=crlf\na.txt export-ignore\n")
        git("add", "-A"), git("commit", "-q", "-m", text), git("tag", text.replace(" ", "-"))
    base = git("rev-parse", "second")
    subprocess.run(["git", "clone", "-q", "--bare", "repo", "bare.git"], cwd=tmp_path, env=GIT, check=True)
    seen = set()
    for source in (tmp_path / "repo", tmp_path / "bare.git"):
        with LocalSandbox(make_row(source=str(source)) | {"base_commit": base}) as box:
            assert sh(box, "cat a.txt; git log --format=%s; git branch -a; git tag; git remote; git status --porcelain") \
                == "secondbase\n* main\n"
            objects = sh(box, "git cat-file --batch-all-objects --batch-check | cut -d' ' -f2 | sort | uniq -c")
            assert objects.split() == ["2", "blob", "1", "commit", "1", "tree"]
            seen.add(sh(box, "git rev-parse HEAD"))
            assert box.diff() == ""
    assert len(seen) == 1
    with pytest.raises(InputError, match="toy-1: repository .*repo has no commit 1234567"):
        LocalSandbox(make_row(source=str(tmp_path / "repo")) | {"base_commit": "1234567"}).start()


def test_sources(tmp_path):
    """A directory, and a tarball whose single top-level directory is stripped, give the commit that inline files give."""
    folder = tmp_path / "calc-1.0"
    for path, text in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    (folder / "run.sh").chmod(0o755)
    with tarfile.open(tmp_path / "calc.tar.gz", "w:gz") as tar:
        tar.add(folder, "calc-1.0")
    commits = set()
    for source in (FILES, str(folder), str(tmp_path / "calc.tar.gz")):
        with LocalSandbox(make_row(source=source)) as box:
            assert sh(box, "./run.sh; git status --porcelain") == "run\n"
            commits.add(sh(box, "git rev-parse HEAD"))
    assert len(commits) == 1


def test_a_hostile_tarball_writes_nothing_outside(tmp_path):
    for number, names in enumerate((["../outside"], [str(tmp_path / "outside")], ["top/link", "top/link/outside"])):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                if name == "top/link":
                    info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path)
                tar.addfile(info)
        with pytest.raises(InputError, match=f"toy-1: repository .*{number}.tar: "):
            LocalSandbox(make_row(source=str(tmp_path / f"{number}.tar"))).start()
    assert not (tmp_path / "outside").exists()


def test_set_up_commands_run_once_and_are_no_part_of_the_patch():
    row = make_row(setup=["echo generated > made.txt", "echo more >> data/names.txt"], env={"COLOUR": "red"})
    with LocalSandbox(row) as box:
        assert sh(box, "cat made.txt; echo $COLOUR") == "generated\nred\n"
        assert box.diff() == ""
        sh(box, "echo mine >> made.txt")
        assert "+mine" in box.diff() and "names.txt" not in box.diff()
    with pytest.raises(InfraError, match="(?s)toy-1: set-up command 'echo no; false' ended with 1: no"):
        LocalSandbox(make_row(setup=["echo no; false"])).start()


# ---------------------------------------------------------------------------------------------------------------------
# Isolation

def test_no_network(box):
    code = "import socket; s = socket.socket(); s.settimeout(3); s.connect(('1.1.1.1', 53))"
    assert "Network is unreachable" in box.run(f'python -c "{code}"').output
    import socket
    with socket.create_server(("127.0.0.1", 0)) as server:  # the host's loopback is another one
        code = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 3)"
        assert "Connection refused" in box.run(f'python -c "{code}"').output
    assert sh(box, "ls /sys/class/net 2>/dev/null; tail -n +3 /proc/net/dev | cut -d: -f1").split() == ["lo"]


def test_nothing_else_is_writable(box):
    places = "/ /etc /usr /usr/bin /dev /proc/sys /run /root /home /var /testbed/.. " + str(Path(sys.prefix)) + "/bin"
    output = sh(box, f"for d in {places}; do touch $d/x 2>/dev/null && echo $d; done; echo done")
    assert output == "done\n"
    assert sh(box, "find / -xdev -writable -type d 2>/dev/null; touch /testbed/x /tmp/x /dev/shm/x && echo ok") \
        .splitlines()[-1] == "ok"
    assert box.run("mount -t tmpfs x /tmp").exit_code != 0
    assert box.run("unshare -r true").exit_code != 0


def test_nothing_of_the_hosts_environment(box, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hush-hush")
    with LocalSandbox(make_row()) as inside:
        assert "hush-hush" not in sh(inside, "env; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'; true")
        names = {line.split("=")[0] for line in sh(inside, "env").splitlines()}
    assert names == {"PATH", "HOME", "LANG", "TERM", "PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED",
                     "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "PWD", "SHLVL", "_"}
    # nor of the command line that started it, where the host's paths are
    assert "swe-dagger" not in sh(inside := box, "cat /proc/*/cmdline | tr '\\0' ' '") and inside


def test_nothing_of_the_hosts_files_and_processes(box, tmp_path):
    (tmp_path / "host.txt").write_text("host")
    for path in (tmp_path / "host.txt", ROOT / "common" / "sandbox.py", "/etc/shadow", "/var/log", "/boot", "/etc/hostname",
                 os.path.expanduser("~/.bashrc"), os.path.expanduser("~/.ssh")):
        assert box.run(f"ls -d {path}").exit_code != 0, path
    assert sh(box, "ls -A /home 2>/dev/null || true") == ""
    assert int(sh(box, "ls -d /proc/[0-9]* | wc -l")) <= 6  # its own: as many of them as there are at that moment
    assert sh(box, "hostname; whoami; ls -l calc.py | cut -d' ' -f3,4") == "sandbox\nagent\nagent agent\n"
    # /proc/1/root and open handles lead nowhere either
    assert box.run(f"cat /proc/1/root{tmp_path}/host.txt").exit_code != 0
    handles = sh(box, "for p in self 1; do for f in /proc/$p/fd/*; do readlink $f; done; done 2>/dev/null; true")
    assert all(line.startswith(("/dev/null", "pipe:", "anon_inode", "/proc", "/testbed")) for line in handles.splitlines())


def test_two_sandboxes_do_not_meet(box):
    with LocalSandbox(make_row()) as other:
        sh(box, "echo mine > /tmp/a; echo mine > a")
        assert other.run("cat /tmp/a a").exit_code == 1


# ---------------------------------------------------------------------------------------------------------------------
# Limits

def test_timeout_kills_the_whole_tree(box):
    result = box.run("echo begun; sleep 7654321 & setsid sleep 7654321 & nohup sleep 7654321 & trap '' TERM; sleep 7654321",
                     timeout=0.7)
    assert result.timed_out and result.exit_code == 124 and result.output == "begun\n" and 0.6 < result.seconds < 5
    assert not host_processes("7654321")
    assert sh(box, "echo on") == "on\n"


def test_children_die_with_the_command(box):
    daemon = ("import os, time\nif os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\n"
              "os.closerange(0, 64)\ntime.sleep(7654322)\nopen('/testbed/late', 'w')")
    result = box.run(f"sleep 7654322 & setsid sleep 7654322 >/dev/null 2>&1 & python -c \"{daemon}\"; echo x")
    assert result.output == "x\n" and result.seconds < 5
    assert not host_processes("7654322")


def test_closed_output_does_not_end_the_wait(box):
    assert box.run("exec >&- 2>&-; sleep 0.5; exit 5").exit_code == 5
    result = box.run("exec >&- 2>&-; sleep 100", timeout=0.5)
    assert result.timed_out and result.seconds < 5


def test_nothing_outlives_a_killed_program():
    code = ("import os, sys; sys.path.insert(0, %r)\nfrom common.bubblewrap import home\nfrom common.sandbox import LocalSandbox\n"
            "box = LocalSandbox({'instance_id': 'x', 'local': {'source': {'a': 'b'}}}); box.start()\n"
            "print(home(), flush=True)\nbox.run('sleep 7654323 & setsid sleep 7654323 & sleep 7654323', timeout=100)")
    victim = subprocess.Popen([sys.executable, "-c", code % str(ROOT)], stdout=subprocess.PIPE, text=True)
    folder = Path(victim.stdout.readline().strip())
    wait_for(lambda: len(host_processes("sleep\x007654323")) == 3)
    assert folder not in bubblewrap.prune()  # its owner lives
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    wait_for(lambda: not host_processes("sleep\x007654323"))
    assert folder.exists() and folder in bubblewrap.prune() and not folder.exists()


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_memory_of_one_process():
    with LocalSandbox(make_row(), memory=200 * MEGABYTE) as box:
        assert "MemoryError" in box.run("python -c 'x = bytearray(1 << 30)'").output
        result = box.run("python -c \"import time; x = b'x' * (400 << 20); time.sleep(60)\"", timeout=60)
        assert result.exit_code == 137 and not result.timed_out
        result = box.run("python -c \"import mmap; m = mmap.mmap(-1, 1 << 30); [m.write(b'x' * (1 << 20)) for _ in range(1024)]\"")
        assert result.exit_code != 0  # shared memory is no process's data, and the watcher's
        assert sh(box, "echo on") == "on\n"


def test_memory_of_all_processes_together():
    code = "import time; x = b'x' * (90 << 20); time.sleep(60)"
    with LocalSandbox(make_row(), memory=200 * MEGABYTE) as box:
        result = box.run(f"for i in 1 2 3 4; do python -c \"{code}\" & done; wait")
        assert (result.exit_code, result.output) == (137, "(killed: more than 200 MB of memory)\n")
        assert not result.timed_out and result.seconds < 20
        # what a fork shares with its parent counts once
        code = ("import os, time\nx = b'x' * (90 << 20)\n"
                "for _ in range(4):\n  if not os.fork(): time.sleep(0.5); os._exit(0)\nfor _ in range(4): os.wait()")
        assert box.run(f"python -c \"{code}\"").exit_code == 0


@pytest.mark.skipif(not seccomp.program(), reason="no system call filter for this machine")
def test_memory_of_no_process(box):
    assert "Function not implemented" in box.run("python -c \"import os; os.memfd_create('x')\"").output
    code = "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True); print(libc.semget(0, 1, 0o600), os.strerror(ctypes.get_errno()))"
    assert sh(box, f'python -c "{code}"') == "-1 Function not implemented\n"


@pytest.mark.skipif(not seccomp.program(), reason="no system call filter for this machine")
def test_sockets_that_no_network_namespace_holds(box):
    """vsock reaches the hypervisor of a virtual machine, whatever the namespace; ordinary families are there."""
    code = "import socket; socket.socketpair(); [socket.socket(f) for f in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)]"
    sh(box, f"python -c '{code}'")
    for family in (40, 38, 17):  # vsock, the kernel's cryptography, raw packets
        made = box.run(f"python -c 'import socket; socket.socket({family}, socket.SOCK_STREAM)'")
        assert made.exit_code == 1 and "Address family not supported" in made.output


def test_fork_bomb():
    with LocalSandbox(make_row(), processes=100) as box:
        began = time.monotonic()
        result = box.run(":(){ :|:& };:; sleep 20", timeout=5.0)
        assert result.exit_code in (124, 137) and time.monotonic() - began < 15
        code = ("import os, time\nn = 0\ntry:\n  while True:\n    if not os.fork(): time.sleep(30)\n    n += 1\n"
                "except OSError: print(n)")
        result = box.run(f'python -c "{code}"', timeout=10.0)
        assert result.exit_code == 137 or int(result.output) < 100  # the watcher, or the kernel
        assert sh(box, "echo on") == "on\n"


def test_endless_output(box):
    import resource
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = box.run("echo head; yes 0123456789", timeout=60.0)
    assert result.exit_code == 137 and "(killed: more than 64 MB of output)" in result.output
    assert result.truncated and len(result.output) < 5000 and result.output.startswith("head\n0123456789\n")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB
    result = box.run("while true; do echo x; sleep 0.01; done", timeout=0.5)
    assert result.timed_out and result.output.startswith("x\n")


def test_long_output_keeps_head_and_tail():
    with LocalSandbox(make_row(), output_limit=100) as box:
        result = box.run("seq 1000")
        assert result.truncated
        head, note, tail = result.output.partition("\n[... 3793 characters cut ...]\n")
        text = "".join(f"{i}\n" for i in range(1, 1001))
        assert note and head == text[:50] and tail == text[-50:] and len(text) == 100 + 3793
        result = box.run("printf '%0100d' 7")
        assert not result.truncated and len(result.output) == 100


def test_big_file_and_full_disk():
    with LocalSandbox(make_row(), disk=30 * MEGABYTE) as box:
        assert "File size limit exceeded" in box.run("head -c 20M /dev/zero > big").output
        assert os.path.getsize(box.checkout.tree / "big") == 15 * MEGABYTE
        sh(box, "rm big")
        result = box.run("for i in $(seq 100); do head -c 10M /dev/zero > part$i; sleep 0.02; done")
        assert result.exit_code == 137 and "(killed: too much written to /testbed and /tmp)" in result.output
        assert sum(f.stat().st_size for f in box.checkout.tree.glob("part*")) < 300 * MEGABYTE
        sh(box, "rm part*; echo room > again")
        result = box.run("for i in $(seq 100); do head -c 10M /dev/zero > /tmp/part$i; sleep 0.02; done")
        assert result.exit_code == 137


def test_what_others_give_back_is_no_room(tmp_path, monkeypatch):
    """200 MB of another sandbox went away meanwhile: 150 MB of ours are still more than 64."""
    free = iter([(1000 << 20, 10**6), (1200 << 20, 10**6), (1050 << 20, 10**6)])
    monkeypatch.setattr(limits.DiskMeter, "_free", lambda self: next(free))
    monkeypatch.setattr(limits, "_usage", lambda folders: 150 << 20)
    meter = limits.DiskMeter([tmp_path], 64 << 20)
    assert (meter.over(), meter.over()) == (False, True)


def test_output_that_is_not_utf8(box):
    assert sh(box, r"printf 'a\xff\xfeb \xc3\xa9 \xe2\x82'") == "a\ufffd\ufffdb \u00e9 \ufffd"


def test_odd_commands(box):
    assert box.run("echo a\0b").exit_code == 126
    assert box.run("echo " + "x" * 200_000).exit_code == 126
    assert sh(box, "cat <<'EOF'\n$HOME `x` \"'\nEOF") == "$HOME `x` \"'\n"
    assert sh(box, "") == ""
    assert sh(box, "echo \ud800") == "?\n"
    assert sh(box, "read line; echo \"<$line>\"; [ -t 0 ] || echo no terminal") == "<>\nno terminal\n"


def test_many_at_once():
    """Threads share the template, the watcher and the locks; every sandbox sees itself alone."""
    results = {}

    def work(number):
        with LocalSandbox(make_row()) as box:
            box.run(f"echo {number} > mine; sleep 0.1")
            results[number] = box.run("cat mine").output, box.diff()
    threads = [threading.Thread(target=work, args=(n,)) for n in range(32)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert {n: output for n, (output, _) in results.items()} == {n: f"{n}\n" for n in range(32)}
    assert all(f"+{n}\n" in patch for n, (_, patch) in results.items())


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"toy-1: repository /no/such does not exist"):
        LocalSandbox(make_row(source="/no/such")).start()
    (tmp_path / "text").write_text("no tarball")
    with pytest.raises(InputError, match="toy-1: repository .*text is no directory, no git repository and no tarball"):
        LocalSandbox(make_row(source=str(tmp_path / "text"))).start()
    for path in ("/etc/x", "../x", ".git/config", "a/.git/hooks/x"):
        with pytest.raises(InputError, match="bad path"):
            LocalSandbox(make_row(source={path: ""})).start()
    with pytest.raises(InputError, match="neither `local`, for the local sandbox, nor `image`"):
        open_sandbox({"instance_id": "x"}, "auto", 30.0)
    with pytest.raises(InputError, match="interpreter /no/python"):
        LocalSandbox(make_row(python="/no/python")).start()
    with pytest.raises(InputError, match="unknown sandbox"):
        open_sandbox(make_row(), "podman", 30.0)
    bubblewrap.bubblewrap.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="apt-get install bubblewrap.*Docker"):
        LocalSandbox(make_row()).start()
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(InputError, match="apt-get install bubblewrap.*No permissions"):
        LocalSandbox(make_row()).start()


def test_a_broken_engine_is_an_infra_error(box, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: out of luck'; exit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    box.bubblewrap = str(tmp_path / "bwrap")
    with pytest.raises(InfraError, match="toy-1: bubblewrap failed: bwrap: out of luck"):
        box.run("true")
