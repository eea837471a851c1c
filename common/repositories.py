"""How the repositories of SWE-bench and SWE-Gym are tested in their published images.

swebench 5 wants four fields of a row that plain rows lack: `image`, `log_parser`, `eval_type` and `eval_script`.
`complete` fills them in. The table below says per repository how its tests are run, how what they print is read, and
how the environment of the image is brought up to a patch; these are the benchmarks' own choices (swebench 4.1, the last
version that held them in code, and SWE-Gym's fork of swebench), for the lists FAIL_TO_PASS and PASS_TO_PASS were made
with them. Less was kept than is there: no commands that build an image, and no versions that neither set has tasks of.

What this does not do: it builds no images, and knows no repositories but these 23.
"""

import re
import shlex
from dataclasses import dataclass, replace

ADDED = ("image", "log_parser", "eval_type", "eval_script")

# Their spelling of an instance's image: (pattern, what stands for the two underscores of an id, in lower case)
SWE_BENCH_IMAGE = ("swebench/sweb.eval.x86_64.{}:latest", "_1776_")
SWE_GYM_IMAGE = ("xingyaoww/sweb.eval.x86_64.{}:latest", "_s_")


@dataclass(frozen=True)
class Repository:
    test: str
    """the test command; the files of the test patch are appended"""
    parser: str = "parse_log_pytest"
    """a parser of swebench's: turns what the tests print into outcomes"""
    install: str = "python -m pip install -e ."
    """brings the image's environment up to the patch: compiled parts, entry points, new requirements; where it fails
    (pip often wants the network) the installation of the image stays, which shows patched sources if it is editable"""
    setup: str = ""
    """run before that; exports stay for the tests"""


PYTEST = "pytest -rA"
SERIAL = "pytest -n0 -rA"  # in repositories that ask for pytest-xdist in their own settings

SWE_BENCH = {
    "astropy/astropy": Repository(PYTEST, "parse_log_astropy", "python -m pip install -e '.[test]'"),
    "django/django": Repository(
        "./tests/runtests.py --verbosity 2 --settings=test_sqlite --parallel 1", "parse_log_django"),
    "matplotlib/matplotlib": Repository(
        PYTEST, "parse_log_matplotlib", "python -m pip install --no-build-isolation -e '.[dev]'"),
    "mwaskom/seaborn": Repository("pytest --no-header -rA", "parse_log_seaborn", "python -m pip install -e '.[dev]'"),
    "pallets/flask": Repository(PYTEST, "parse_log_flask"),
    "psf/requests": Repository(PYTEST, "parse_log_requests", "python -m pip install ."),  # not editable in the image
    "pydata/xarray": Repository(PYTEST, "parse_log_xarray"),
    "pylint-dev/pylint": Repository(PYTEST, "parse_log_pylint"),
    "pytest-dev/pytest": Repository(PYTEST, "parse_log_pytest"),
    "scikit-learn/scikit-learn": Repository(
        PYTEST, "parse_log_scikit", "python -m pip install --no-use-pep517 --no-build-isolation -e ."),
    # The tox.ini of the images says `pytest -rA`; the name py39 is the same for every Python.
    "sphinx-doc/sphinx": Repository(
        "tox --current-env -epy39 -v --", "parse_log_sphinx", "python -m pip install -e '.[test]'"),
    "sympy/sympy": Repository(
        "PYTHONWARNINGS='ignore::UserWarning,ignore::SyntaxWarning' bin/test -C --verbose", "parse_log_sympy"),
}
# SWE-Gym reads all of them as pytest's short summary; its own parser for pydantic comes to the same.
SWE_GYM = {
    "Project-MONAI/MONAI": Repository(
        PYTEST,  # the line that goes installs MONAI itself
        install="sed -i '/^git+https:.*Project-MONAI/d' requirements-dev.txt; "
                "python -m pip install -r requirements-dev.txt; python setup.py develop"),
    "bokeh/bokeh": Repository(SERIAL),
    "conan-io/conan": Repository(  # never installed: its tests find it by PYTHONPATH
        SERIAL,
        install="echo 'cython<3' > /tmp/constraints.txt; PIP_CONSTRAINT=/tmp/constraints.txt python -m pip install "
                "-r conans/requirements.txt -r conans/requirements_server.txt -r conans/requirements_dev.txt",
        setup="export PYTHONPATH=${PYTHONPATH:-}:/testbed"),
    "dask/dask": Repository(f"{SERIAL} --color=no", install="python -m pip install --no-deps -e ."),
    "facebookresearch/hydra": Repository(f"{PYTEST} --tb=long"),
    "getmoto/moto": Repository(SERIAL, install="make init"),
    "iterative/dvc": Repository(PYTEST, install="python -m pip install -e '.[tests,dev,all_remotes,all,testing]'"),
    "modin-project/modin": Repository(SERIAL),
    "pandas-dev/pandas": Repository(
        f"{PYTEST} --tb=long", install="python -m pip install --no-build-isolation -e ."),
    "pydantic/pydantic": Repository(
        f"{PYTEST} --tb=short -vv -o console_output_style=classic --no-header",
        install="make install", setup='export PATH="$HOME/.local/bin:$PATH"'),  # there is pdm, which make install calls
    "python/mypy": Repository(
        SERIAL, install="python -m pip install -r test-requirements.txt; python -m pip install -e ."),
}
TABLE = SWE_BENCH | SWE_GYM

EN_US = ("locale -a | grep -qix en_US.utf8 || { sed -i '/en_US.UTF-8/s/^# //' /etc/locale.gen; locale-gen; }; "
         "export LANG=en_US.UTF-8 LANGUAGE=en_US:en LC_ALL=en_US.UTF-8 PYTHONIOENCODING=utf8")

# What older versions need otherwise: (repository, the version from which on it is as in the table, the fields).
BEFORE = [
    # pytest 3 lists passed tests only when it is verbose
    ("astropy/astropy", (3, 0), {"test": "pytest -rA -vv -o console_output_style=classic --tb=no"}),
    ("django/django", (4, 0), {"setup": EN_US}),  # Python up to 3.6 takes the encoding of files from the locale
    ("django/django", (3, 0), {"install": "python setup.py install"}),  # tests run on the copy in site-packages
    ("django/django", (1, 10), {"test": "./tests/runtests.py --verbosity 2"}),
    ("matplotlib/matplotlib", (3, 8), {"install": "python -m pip install -e ."}),
    ("mwaskom/seaborn", (0, 12), {"install": "python -m pip install -e ."}),
    # what newer releases of these packages broke
    ("iterative/dvc", (3, 4), {"install": SWE_GYM["iterative/dvc"].install + " 'numpy<=1.20' 'pytest<8'"}),
    ("modin-project/modin", (0, 20), {"install": "python -m pip install -e . numpy==1.23.1 protobuf==3.20.1"}),
    ("pandas-dev/pandas", (2, 2), {"install": "python -m pip install --no-build-isolation -e . 'numpy<2'"}),
]

# Files of a test patch with these endings are data, not tests (swebench's list). Other data files are passed on, as the
# lists of tests were made that way.
DATA = (".json", ".png", "csv", ".txt", ".md", ".jpg", ".jpeg", ".pkl", ".yml", ".yaml", ".toml")


def complete(row: dict) -> dict:
    """The row with those of ADDED that it lacks, if its repository is in TABLE and it has no `local`; else as it is.

    What the row already says is kept, so a row of swebench's 5.x format stays as it is.
    """
    if row.get("local") is not None or row["repo"] not in TABLE or all(row.get(field) for field in ADDED):
        return row
    pattern, underscores = SWE_BENCH_IMAGE if row["repo"] in SWE_BENCH else SWE_GYM_IMAGE
    added = {
        "image": pattern.format(row["instance_id"].lower().replace("__", underscores)),
        "log_parser": TABLE[row["repo"]].parser,
        "eval_type": "pass_and_fail",
        "eval_script": eval_script(row),
    }
    return row | {field: value for field, value in added.items() if not row.get(field)}


def repository(row: dict) -> Repository:
    """How the row's repository is tested at the row's version (without one: as its newest)."""
    found = TABLE[row["repo"]]
    version = tuple(int(number) for number in re.findall(r"\d+", str(row.get("version") or "")))
    for name, first, changes in BEFORE:
        if name == row["repo"] and version and version < first:
            found = replace(found, **changes)
    return found


def eval_script(row: dict) -> str:
    """The bash script that tests what lies in /testbed, with a patch applied, against the row's tests.

    Every file of the test patch is put back to base_commit first, whatever the patch made of it, new ones removed. If
    that or the test patch fails, the script ends before the marker of the test output, which swebench grades as a run
    that did not happen. swebench puts `set -uxo pipefail` in front, asks for the exit code of the test command right
    before the end marker, and reads what stands between the markers, which `set -x` prints. So no patch is printed
    before them: it could hold markers of its own. Raises KeyError for a repository that is not in TABLE.
    """
    how = repository(row)
    old, new = changed_files(row["test_patch"])
    reset = []
    if old or new:
        reset.append("rm -rf -- " + shlex.join(dict.fromkeys(old + new)))
    if old:
        reset.append(f"git checkout {shlex.quote(row['base_commit'])} -- {shlex.join(old)} || exit 1")
    lines = [
        "#!/bin/bash",
        "set -uxo pipefail",
        "exec 2>&1",  # markers and test output in one stream, in order
        "cd /testbed || exit 1",
        "set +ux",  # conda's scripts use unset variables
        "if [ -f /opt/miniconda3/bin/activate ]; then . /opt/miniconda3/bin/activate; conda activate testbed; fi",
        "set -x",
        "git config --global --add safe.directory /testbed",
        *([how.setup] if how.setup else []),
        how.install,
        *reset,
    ]
    if row["test_patch"].strip():
        patch = row["test_patch"] + ("" if row["test_patch"].endswith("\n") else "\n")
        lines.append(f"git apply -v - <<'END_OF_TEST_PATCH' || exit 1\n{patch}END_OF_TEST_PATCH")
    lines += [": '>>>>> Start Test Output'", f"{how.test} {test_arguments(row)}".rstrip(), ": '>>>>> End Test Output'"]
    return "\n".join(lines + reset) + "\n"


def test_arguments(row: dict) -> str:
    """What the test command is called with: the files of the test patch that can be tests, or their like."""
    files = [path for path in changed_files(row["test_patch"])[1] if not path.endswith(DATA)]
    if row["repo"] == "django/django":
        files = [path.removeprefix("tests/").removesuffix(".py").replace("/", ".") for path in files]
    if row["repo"] == "python/mypy":
        # mypy's cases stand in data files and are chosen by name. Where the test patch holds none, SWE-Gym runs all
        # tests; those files that hold a listed one are enough.
        if cases := dict.fromkeys(re.findall(r"\[case ([^\]]+)\]", row["test_patch"])):
            return "-k " + shlex.quote(" or ".join(cases))
        files = []
    listed = [name.split("::")[0] for kind in ("FAIL_TO_PASS", "PASS_TO_PASS") for name in row[kind] if "::" in name]
    return shlex.join(files or dict.fromkeys(listed))


def changed_files(patch: str) -> tuple[list[str], list[str]]:
    """The paths of a git patch, in its order: (those that were there before it, those that are there after it).

    A changed file is in both, a new one in the second, a deleted one in the first, a renamed one under both its names.
    """
    old, new = [], []
    for section in re.split(r"^diff --git ", patch, flags=re.M)[1:]:
        first, *header = section.split("\n@@")[0].splitlines()
        same = re.fullmatch(r'("?)a/(.+)\1 \1b/\2\1', first)
        before = after = _path(same[1] + same[2] + same[1]) if same else None
        for line in header:
            if line.startswith(("--- ", "rename from ")):
                before = _path(line.removeprefix("--- ").removeprefix("rename from "), "a/" * line.startswith("-"))
            elif line.startswith(("+++ ", "rename to ", "copy to ")):
                after = _path(re.sub(r"^(\+\+\+|\w+ to) ", "", line), "b/" * line.startswith("+"))
            elif line.startswith("new file mode "):
                before = None
            elif line.startswith("deleted file mode "):
                after = None
        old += [before] if before else []
        new += [after] if after else []
    return old, new


def _path(text: str, prefix: str = "") -> str | None:
    """A path as git writes it in a patch: quoted with octal bytes if it is unusual; None for /dev/null."""
    text = text.removesuffix("\t")  # there if the name has a space
    if text.startswith('"') and text.endswith('"'):
        octal = text[1:-1].encode("latin-1", "replace").decode("unicode_escape")
        text = octal.encode("latin-1").decode(errors="replace")
    return None if text == "/dev/null" else text.removeprefix(prefix)
