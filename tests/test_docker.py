"""The Docker sandbox on a real engine: one attack for each promise of its docstring, and what a patch holds."""

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import docker_images
import pytest

from common import docker_engine as module
from common.bubblewrap import home
from common.docker_sandbox import DockerSandbox, Frames
from common.errors import InfraError, InputError, StageError
from common.sandbox import MEGABYTE, LocalSandbox, kind_of

ROOT = Path(__file__).parent.parent
engine = [pytest.mark.docker, pytest.mark.slow]
FILES = {
    "calc.py": "def add(a, b):\n    return a - b\n", "run.sh": "#!/bin/sh\necho run\n", "data/names.txt": "Ada\nGrace\n",
    ".gitignore": "*.log\nbuild/\n", "tests/test_calc.py": "import calc\n\n\ndef test_add():\n    assert calc.add(1, 2) == 3\n",
    "pkg/a.py": "A = 1\n", "pkg/b.py": "B = 1\n",
}  # fmt: skip
# What SWE-Gym's images look like: the repository's later history, the fix in it, is still there.
FUTURE = """echo 'return a + b' > /testbed/calc.py; git commit -qam fix; git rev-parse HEAD > /future; git branch later
git tag v2.0; git update-ref refs/remotes/origin/main HEAD; git symbolic-ref refs/remotes/origin/HEAD refs/remotes/origin/main
git reset -q --hard v1.0; git remote add origin https://example.invalid/x; git symbolic-ref refs/heads/alias refs/heads/later
echo '- x' >> calc.py; git stash -q; git repack -a -d -q; for p in .git/objects/pack/*.pack; do touch ${p%.pack}.keep; done"""


@pytest.fixture(scope="module")
def image():
    if docker_images.why_not():
        pytest.skip(docker_images.why_not())
    return docker_images.build("sandbox", FILES, then=FUTURE)


@pytest.fixture
def row(image):
    return {"instance_id": "toy-1", "base_commit": "0" * 40, "image": image}


@pytest.fixture
def box(row):
    with DockerSandbox(row) as opened:
        yield opened


def sh(box, command, **options) -> str:
    """The output of a command that succeeds."""
    result = box.run(command, **options)
    assert result.exit_code == 0, result.output
    return result.output


def alive(box) -> list[str]:
    """The processes in the container but its first, as the engine sees them; what is dead may wait for its first one."""
    found = [line[-1] for line in box.container.top()["Processes"]]
    return [command for command in found if "trap 'kill" not in command and not command.endswith("<defunct>")]


class EngineTests:
    pytestmark = engine


# ---------------------------------------------------------------------------------------------------------------------
# Without an engine

def test_frames_come_apart_wherever_they_are_cut():
    stream = b"".join(bytes([kind, 0, 0, 0]) + len(text).to_bytes(4, "big") + text
                      for kind, text in ((1, b"one"), (2, b""), (2, b"two\xff"), (1, b"x" * 300)))
    for size in (1, 3, 7, 8, 100, 1000):
        frames = Frames()
        parts = [frames.payload(stream[place : place + size]) for place in range(0, len(stream), size)]
        assert b"".join(parts) == b"onetwo\xff" + b"x" * 300


def test_where_a_row_runs():
    assert kind_of({"instance_id": "x", "local": {}, "image": "i"}) == "local"
    assert kind_of({"instance_id": "x", "image": "i"}) == kind_of({"instance_id": "x", "local": {}, "image": "i"}, "docker")
    for row, kind in (({}, "auto"), ({"local": {}}, "docker"), ({"image": "i"}, "local"), ({"image": ""}, "auto")):
        with pytest.raises(InputError, match="x: (neither|no field)"):
            kind_of({"instance_id": "x"} | row, kind)


def test_no_engine_is_one_line_and_exit_code_1(tmp_path):
    """A user without Docker, and one whom its socket refuses."""
    tasks = tmp_path / "t.jsonl"
    tasks.write_text('{"instance_id": "x", "repo": "r", "base_commit": "c", "problem_statement": "p", "patch": "",'
                     ' "test_patch": "", "FAIL_TO_PASS": [], "PASS_TO_PASS": [], "image": "i"}\n')
    argv = [sys.executable, "01_collect.py", "--tasks", str(tasks), "--teacher", "oracle", "--mix", "teacher",
            "--out", str(tmp_path / "out.jsonl")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"DOCKER_HOST": f"unix://{tmp_path}/no.sock"})
    assert done.returncode == 1 and not (tmp_path / "out.jsonl.part").exists()
    assert done.stderr.startswith("error: no Docker engine: ") and done.stderr.count("\n") == 1


def test_a_socket_that_may_not_be_used_is_named(monkeypatch):
    """Tests run as root, whom no socket refuses: this is what the package says to others."""
    import docker

    def refuse(**_):
        raise docker.errors.DockerException(
            "Error while fetching server API version: ('Connection aborted.', PermissionError(13, 'Permission denied'))")

    monkeypatch.setattr(docker, "from_env", refuse)
    with pytest.raises(StageError, match="no Docker engine: .*usermod -aG docker"):
        module.connect()


def test_whose_containers_are_dead():
    mine = module.labels()
    assert not module.dead(mine)
    owner = mine["swe-dagger.owner"]
    assert module.dead(mine | {"swe-dagger.owner": owner + "0"})  # the same number, but a later process
    assert module.dead(mine | {"swe-dagger.boot": "before"})
    assert not module.dead(mine | {"swe-dagger.owner": owner + "0", "swe-dagger.host": "elsewhere", "swe-dagger.boot": "b"})
    assert not module.dead(mine | {"swe-dagger.owner": owner + "0", "swe-dagger.pids": "pid:[1]"})
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert module.dead(mine | {"swe-dagger.owner": f"{ended.pid}:1"})


# ---------------------------------------------------------------------------------------------------------------------
# An ordinary day

class TestCommands(EngineTests):
    def test_start_fresh_in_testbed_and_files_stay(self, box):
        assert sh(box, "cd data && export X=1 && pwd && echo new > /tmp/kept") == "/testbed/data\n"
        assert sh(box, 'pwd; echo "X=$X"; cat /tmp/kept') == "/testbed\nX=\nnew\n"
        result = box.run("echo out; echo err >&2; echo out; exit 3")
        assert (result.exit_code, result.output, result.truncated, result.timed_out) == (3, "out\nerr\nout\n", False, False)
        assert box.run("kill -9 $$").exit_code == 137
        assert box.run("nosuchcommand").exit_code == 127
        assert "1 failed" in box.run("python3 -m pytest -q").output

    def test_output_that_comes_with_the_engines_first_words(self, box, monkeypatch):
        """Read together with the head of the engine's answer it was lost: `cat` printed nothing, a patch had no old side."""
        begin = http.client.HTTPResponse.begin
        monkeypatch.setattr(http.client.HTTPResponse, "begin", lambda response: (time.sleep(0.5), begin(response))[1])
        assert box.run("echo early; sleep 1; echo late").output == "early\nlate\n"
        assert box.run("head -c 3000 /dev/zero | tr '\\0' x").output == "x" * 3000

    def test_bytes_that_are_not_text(self, box):
        assert sh(box, r"printf 'a\xff\x00b'") == "a\ufffd\x00b"
        assert box.run("a\0b").exit_code == 126
        assert box.run("#" * 130_000).exit_code == 126

    def test_long_output_is_cut_in_the_middle(self, box):
        result = box.run("seq 100000")
        assert result.truncated and len(result.output) < 4100
        assert result.output.startswith("1\n2\n") and result.output.endswith("99999\n100000\n")

    def test_the_images_conda_environment_is_active(self):
        if docker_images.why_not():
            pytest.skip(docker_images.why_not())
        activate = 'conda() { echo a warning >&2; echo a word; export PATH=/opt/miniconda3/envs/$2/bin:$PATH CONDA_DEFAULT_ENV=$2; }'
        image = docker_images.build("conda", FILES, then=(
            "mkdir -p /opt/miniconda3/bin /opt/miniconda3/envs/testbed/bin\n"
            f"cat > /opt/miniconda3/bin/activate <<'X'\n{activate}\nX\n"
            "printf '#!/bin/sh\\necho its own python\\n' > /opt/miniconda3/envs/testbed/bin/python\n"
            "chmod +x /opt/miniconda3/envs/testbed/bin/python"))
        with DockerSandbox({"instance_id": "toy-1", "image": image}) as box:
            assert sh(box, "python; echo $CONDA_DEFAULT_ENV") == "its own python\ntestbed\n"


# ---------------------------------------------------------------------------------------------------------------------
# Promises, attacked

class TestPromises(EngineTests):
    def test_timeout_kills_everything(self, box):
        started = time.monotonic()
        result = box.run("echo a; setsid nohup sleep 1001 & (sleep 1002 &); trap '' TERM INT HUP; sleep 1003", timeout=2)
        assert (result.exit_code, result.timed_out, result.output) == (124, True, "a\n")
        assert time.monotonic() - started < 30 and alive(box) == []
        assert sh(box, "echo still here") == "still here\n"

    def test_nothing_outlives_its_command(self, box):
        sh(box, "(setsid sleep 1001 >/dev/null 2>&1 &); sleep 1002 & echo done")
        assert alive(box) == []
        assert box.run("(setsid sleep 1001 &); kill -9 -1").exit_code == 137
        assert alive(box) == []

    @pytest.mark.parametrize("wreck", ["rm -rf /testbed", "rm -f /bin/bash /usr/bin/bash", "rm -rf /usr /bin /lib*",
                                       "for i in 1 2 3; do kill -USR1 1; kill -STOP 1; kill -KILL 1; done",
                                       "for i in $(seq 64); do kill -$i 1; done"])
    def test_who_wrecks_the_container_has_a_result_all_the_same(self, box, wreck):
        """That the agent's commands fail from then on is its own doing, and no failure of the machine."""
        box.run(wreck)
        result = box.run("echo still here")
        assert result.exit_code != 0 or result.output.endswith("still here\n")
        assert box.diff().count("deleted file") == (len(FILES) if wreck.endswith("testbed") else 0)

    @pytest.mark.parametrize("sign", ["TERM", "HUP", "KILL"])
    def test_what_outlives_its_wrapper_dies_too(self, box, sign):
        box.run(f"touch /tmp/alive; (setsid sh -c 'while :; do date >> /tmp/alive; sleep 0.1; done' >/dev/null 2>&1 </dev/null &); kill -{sign} $PPID")
        time.sleep(1.5)
        before = sh(box, "wc -l < /tmp/alive")
        time.sleep(0.5)
        assert sh(box, "wc -l < /tmp/alive") == before

    def test_no_zombies_stay(self, box):
        sh(box, "for i in $(seq 50); do (sleep 0.05 &); done; sleep 0.5")
        time.sleep(2.5)
        assert sh(box, "grep -l 'State:.Z' /proc/[0-9]*/status | wc -l") == "0\n"

    def test_no_network(self, box, row):
        assert sh(box, "ls /sys/class/net") == "lo\n"
        assert box.run("python3 -c 'import socket; socket.create_connection((\"1.1.1.1\", 53), 3)'").exit_code == 1
        with DockerSandbox(row, network=True) as other:
            assert "eth0" in sh(other, "ls /sys/class/net")

    def test_a_memory_bomb_dies_and_the_sandbox_lives(self, row):
        with DockerSandbox(row, memory=128 * MEGABYTE) as box:
            assert box.run("python3 -c 'x = bytearray(10**9)'").exit_code != 0
            assert sh(box, "echo still here") == "still here\n"

    def test_a_fork_bomb_dies_and_the_sandbox_lives(self, row):
        with DockerSandbox(row, processes=80) as box:
            assert box.run("f() { f | f & }; f; sleep 60", timeout=3).exit_code in (124, 254, 1, 0)
            time.sleep(1.5)
            assert alive(box) == []
            assert sh(box, "echo still here") == "still here\n"

    def test_endless_output_costs_neither_memory_nor_time(self, box):
        import resource

        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        result = box.run("yes", timeout=300)
        assert result.exit_code == 137 and "more than 64 MB of output" in result.output and result.truncated
        assert time.monotonic() - started < 60
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes

    def test_disk_is_bounded(self, row):
        with DockerSandbox(row, disk=40 * MEGABYTE) as box:
            assert "File size limit" in box.run("head -c 30M /dev/zero > big; echo $?").output
            result = box.run("for i in $(seq 1000); do head -c 10M /dev/zero > /tmp/$i; sleep 0.1; done", timeout=120)
            assert result.exit_code == 137 and "too much written" in result.output

    def test_it_is_root_without_root_s_powers(self, box):
        status = sh(box, "cat /proc/self/status")
        assert "NoNewPrivs:\t1" in status
        powers = int(next(line for line in status.splitlines() if line.startswith("CapBnd")).split()[1], 16)
        assert powers == sum(1 << bit for bit in (0, 1, 3, 5, 6, 7))  # CHOWN DAC_OVERRIDE FOWNER KILL SETGID SETUID
        for command in ("mknod /tmp/d b 8 0", "mount -t tmpfs x /mnt", "chroot /tmp true", "hostname x", "sysctl -w a=b"):
            assert box.run(command).exit_code != 0
        assert all(m["Type"] == "tmpfs" for m in box.container.attrs["Mounts"])

    def test_the_fix_is_nowhere_in_the_repository(self, box):
        future = sh(box, "cat /future").strip()
        assert box.run(f"git cat-file -e {future}").exit_code != 0
        assert sh(box, "git log --all --oneline --reflog").count("\n") == 1
        assert sh(box, "git tag; git remote; git describe --tags") == "v1.0\nv1.0\n"
        assert sh(box, "git fsck --unreachable --no-reflogs 2>/dev/null") == ""

    def test_so_too_in_the_second_container_of_an_image(self, row):
        with DockerSandbox(row) as one, DockerSandbox(row) as two:
            for box in (one, two):
                assert box.run("git cat-file -e $(cat /future)").exit_code != 0


# ---------------------------------------------------------------------------------------------------------------------
# Patches

CHANGES = [
    "sed -i 's/a - b/a + b/' calc.py",
    "echo new > new.txt; mkdir -p deep/er; echo x > deep/er/y.py; echo log > x.log; mkdir build; echo o > build/o.txt",
    "printf 'a\\000\\377' > binary.bin; head -c 1500000 /dev/zero > large.bin; chmod +x calc.py; chmod -x run.sh",
    "rm -rf pkg; rm data/names.txt",
    "rm -rf pkg; mkdir pkg; echo 'A = 2' > pkg/a.py",
    "mv pkg renamed",
    "rm -rf pkg; ln -s /etc pkg; ln -s ../../etc/passwd passwd; rm calc.py; ln -s run.sh calc.py",
    "rm -rf data; echo file > data; rm run.sh; mkdir run.sh; echo x > run.sh/x",
    "echo '!x.log' >> .gitignore; echo log > x.log; echo log > y.log",
    "git checkout -q -b mine; echo 'X = 1' >> calc.py; git add -A; git commit -qm mine; echo 'Y = 1' >> calc.py",
    "echo 'X = 1' >> calc.py; git stash -q",
    "echo 'X = 1' >> calc.py; rm -rf .git",
    "git init -q inner; echo x > inner/x.py; git -C inner add -A",
    "echo 'calc.py binary' > .gitattributes; echo 'X = 1' >> calc.py",
    "printf 'r\\xe9sum\\xe9\\n' > 'a name with \"quotes\" and \\\\.txt'; touch empty",
    "for i in $(seq 250); do echo $i > f$i.txt; done; echo 'X = 1' >> calc.py",
    "ln calc.py a_second_name.py; for i in $(seq 250); do echo $i > f$i.txt; done; echo 'X = 1' >> calc.py",
    "cp calc.py copy.py; touch calc.py; chmod 600 calc.py",
    "rm -rf /testbed/* /testbed/.gitignore",
]


class TestPatches(EngineTests):
    @pytest.mark.parametrize("change", CHANGES)
    def test_both_sandboxes_say_the_same_and_it_applies(self, row, change):
        with DockerSandbox(row) as box, LocalSandbox(row | {"local": {"source": FILES}}) as other:
            assert box.diff() == ""
            identity = "git config user.email a@b; git config user.name a; "
            box.run(identity + change)
            other.run(identity + change)
            patch = box.diff()
            assert patch == other.diff()
            assert (patch == "") == ("stash" in change)
            checkout = other.checkout
            assert checkout.apply(checkout.base, patch) == checkout.read()

    def test_a_submodule_stays_what_it_is(self):
        image = docker_images.build("module", FILES, then=(
            "git init -q /inner; cd /inner; git config user.email a@b; git config user.name a; echo 1 > x; git add x\n"
            "git commit -qm x; cd /testbed; git -c protocol.file.allow=always submodule add -q /inner sub; git commit -qm sub"))
        with DockerSandbox({"instance_id": "toy-1", "image": image}) as box:
            sh(box, "echo 2 > sub/x; echo 3 > sub/new; echo 'X = 1' >> calc.py")
            patch = box.diff()
            assert patch.count("diff --git") == 1 and "+X = 1" in patch

    def test_what_the_image_changed_already_is_no_part_of_it(self):
        """Images of SWE-bench edit files before the task starts (sphinx' tox.ini) and leave them so."""
        image = docker_images.build("dirty", FILES, then="echo '# edited' >> calc.py; echo built > built.txt")
        with DockerSandbox({"instance_id": "toy-1", "image": image}) as box:
            assert box.diff() == ""
            sh(box, "echo 'X = 1' >> calc.py")
            patch = box.diff()
            assert " # edited\n+X = 1\n" in patch and "built" not in patch

    def test_nothing_is_left_behind(self, row):
        with DockerSandbox(row) as box:
            sh(box, "echo x >> calc.py")
            box.diff()
        assert not [c for c in module.engine().containers.list(all=True, filters={"label": "swe-dagger"}, ignore_removed=True)
                    if c.labels["swe-dagger.owner"] == module.labels()["swe-dagger.owner"]]
        assert not list(home().glob("tmp*"))


# ---------------------------------------------------------------------------------------------------------------------
# Owners, images

HOLDER = """
import sys, time
from common.docker_sandbox import DockerSandbox
box = DockerSandbox({"instance_id": "toy-1", "image": sys.argv[1]})
box.start()
print(box.container.id, flush=True)
time.sleep(1000)
"""


class TestOwners(EngineTests):
    def hold(self, image) -> tuple[subprocess.Popen, str]:
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, image], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        return holder, holder.stdout.readline().strip()

    def test_killed_owners_containers_go_and_others_stay(self, image, box):
        import docker

        client = docker.from_env()
        (dead, gone), (living, kept) = self.hold(image), self.hold(image)
        try:
            dead.send_signal(signal.SIGKILL)
            dead.wait()
            assert client.containers.get(gone).status == "running"
            done = subprocess.run([sys.executable, "-m", "common.sandbox", "prune"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0 and done.stdout.count("removed container") == 1, done
            with pytest.raises(docker.errors.NotFound):
                client.containers.get(gone)
            assert client.containers.get(kept).status == client.containers.get(box.container.id).status == "running"
        finally:
            living.kill()
            living.wait()
            module.prune()

    def test_a_stopped_engine_is_an_infra_error(self, row):
        with DockerSandbox(row) as box:
            box.container.remove(force=True)
            with pytest.raises(InfraError, match="toy-1: the sandbox broke: .*No such container"):
                box.run("true")
            with pytest.raises(InfraError, match="toy-1: cannot take the patch"):
                box.diff()

    def test_a_container_that_ends_under_a_command_is_an_infra_error(self, row):
        with DockerSandbox(row) as box:
            threading.Timer(1.0, box.container.kill).start()
            with pytest.raises(InfraError, match="toy-1: "):
                box.run("sleep 20")

    def test_a_missing_image_is_an_infra_error_of_its_task(self, monkeypatch):
        monkeypatch.setattr("common.images.TRIES", 1)
        for _ in range(2):
            with pytest.raises(InfraError, match="toy-1: .*127.0.0.1:9/none"):
                DockerSandbox({"instance_id": "toy-1", "image": "127.0.0.1:9/none:latest"}).start()

    def test_an_image_without_a_repository_is_an_infra_error(self):
        with pytest.raises(InfraError, match="toy-1: image swe-dagger-test-base.*testbed"):
            DockerSandbox({"instance_id": "toy-1", "image": docker_images.BASE}).start()
