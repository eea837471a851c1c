"""common/setup.sh with an interpreter that only writes down what it is asked: when it installs, and when it must not."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INTERPRETER = """#!/bin/bash
if [ "$2" = venv ]; then
    mkdir -p .venv/bin; cp "$0" .venv/bin/python; printf '#!%s/.venv/bin/python\\n' "$(pwd -P)" > .venv/bin/pip
    chmod +x .venv/bin/pip
fi
echo "$@" >> said
"""


def set_up(home):
    """What the interpreter was asked, and what was said."""
    (home / "said").unlink(missing_ok=True)
    done = subprocess.run(["bash", "-euc", ". common/setup.sh"], cwd=home, capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"], "PYTHON_FOR_VENV": str(home.parent / "python")})  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = home / "said"
    return said.read_text() if said.exists() else "", done.stderr


def test_an_old_python_can_be_replaced_as_the_message_says(tmp_path):
    """Also where a first try has left a .venv that is of no use."""
    home = tmp_path / "here"
    (home / "common").mkdir(parents=True)
    for name in ("requirements.txt", "common/setup.sh", "common/embedded.py"):
        shutil.copy(ROOT / name, home / name)
    old = INTERPRETER.replace('echo "$@"', '[ "$1" != -c ] || { echo "Python 3.11 or newer is needed" >&2; exit 1; }\necho "$@"')
    for text, code in ((old, 1), (INTERPRETER, 0)):
        (tmp_path / "python").write_text(text)
        (tmp_path / "python").chmod(0o755)
        if code:
            (home / ".venv/bin").mkdir(parents=True)
            shutil.copy(tmp_path / "python", home / ".venv/bin/python")
        done = subprocess.run(["bash", "-euc", ". common/setup.sh"], cwd=home, capture_output=True, text=True,
                              env={"PATH": os.environ["PATH"], "PYTHON_FOR_VENV": str(tmp_path / "python")})  # fmt: skip
        assert done.returncode == code and (home / ".venv").exists() == (code == 0)
        assert ("Python 3.11 or newer is needed" in done.stderr) == (code == 1)


def test_it_installs_once_and_anew_where_the_directory_was_moved(tmp_path):
    """An hour of measurements once ran with a copied .venv: no sandbox found pytest, and the expert itself resolved 65 %."""
    (tmp_path / "python").write_text(INTERPRETER)
    (tmp_path / "python").chmod(0o755)
    home = tmp_path / "here"
    (home / "common").mkdir(parents=True)
    for name in ("requirements.txt", "common/setup.sh", "common/embedded.py"):
        shutil.copy(ROOT / name, home / name)
    asked, _ = set_up(home)
    assert "-m venv .venv" in asked and "-r requirements.txt" in asked
    assert set_up(home) == ("", "")
    home = home.rename(tmp_path / "there")
    asked, said = set_up(home)
    assert "was moved" in said and "-m venv .venv" in asked and "-r requirements.txt" in asked
    assert set_up(home) == ("", "")
