#!/usr/bin/env bash
# Set up and run the tests.   tests/run.sh [--slow] [pytest arguments]     --slow: everything, minutes more
set -euo pipefail
. "$(dirname "$0")/../common/setup.sh"
marks=(-m "not slow")
[ "${1:-}" = --slow ] && { marks=(); shift; }
[ $# -gt 0 ] || set -- tests
exec "$PYTHON" -m pytest -c tests/pytest.ini "${marks[@]}" "$@"
