"""Images for the tests that need a Docker engine (tests/engine.sh makes the base): a repository at /testbed."""

import functools
import io
import tarfile

BASE = "swe-dagger-test-base"
NAME = "swe-dagger-test"
COMMIT = """cd /testbed && git init -q -b main && git config user.email a@b && git config user.name a && git add -A
git commit -q -m base && git tag v1.0"""


@functools.cache
def why_not() -> str | None:
    """Why the tests marked `docker` cannot run here; None if they can."""
    import docker

    try:
        docker.from_env().images.get(BASE)
    except docker.errors.ImageNotFound:
        return f"no image {BASE}: tests/engine.sh"
    except docker.errors.DockerException as error:
        return f"no Docker engine: tests/engine.sh ({str(error)[:80]})"
    return None


def build(name: str, files: dict[str, str], *, then: str = "true", end: str = "") -> str:
    """An image with these files committed at /testbed. then: a command run after that; end: more of the Dockerfile."""
    import docker

    def add(tar: tarfile.TarFile, path: str, text: str) -> None:
        member = tarfile.TarInfo(path)
        member.size, member.mode = len(text.encode()), 0o755 if text.startswith("#!") else 0o644
        tar.addfile(member, io.BytesIO(text.encode()))

    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        add(tar, "Dockerfile", f"FROM {BASE}\nCOPY testbed /testbed\nCOPY make /make\nRUN bash -e /make && rm /make\n{end}\n")
        add(tar, "make", f"{COMMIT}\n{then}\n")
        for path, text in files.items():
            add(tar, f"testbed/{path}", text)
    context.seek(0)
    tag = f"{NAME}-{name}:latest"
    docker.from_env().images.build(fileobj=context, custom_context=True, tag=tag, rm=True, network_mode="none")
    return tag


def toy_rows(spec: str) -> list[dict]:
    """The tasks of a toy spec as rows with an image instead of `local`, and what SWE-bench's harness needs."""
    from common import repositories, tasks

    rows = []
    for row in tasks.load(spec):
        row = dict(row)
        row["image"] = build(row["instance_id"].lower(), row.pop("local")["source"], end="ENV COLUMNS=160\nSTOPSIGNAL SIGKILL")
        how = repositories.Repository("python3 -m pytest -rA -v -o addopts= tests", install="true")
        repositories.TABLE[row["repo"]] = how
        row["eval_script"] = repositories.eval_script(row | {"base_commit": "v1.0"})
        row |= {"log_parser": how.parser, "eval_type": "pass_and_fail"}
        del repositories.TABLE[row["repo"]]
        rows.append(row)
    return rows
