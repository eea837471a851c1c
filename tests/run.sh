#!/usr/bin/env bash
# Set up and run the tests.   tests/run.sh [--slow] [pytest arguments]     --slow: everything, minutes more
set -euo pipefail
. "$(dirname "$0")/../common/setup.sh"
marks=(-m "not slow")
[ "${1:-}" = --slow ] && { marks=(); shift; }
if [ $# = 0 ]; then
    set -- tests
    # Three at once, for they wait a good deal. One thread each: two programs that both want every core slow torch down tenfold.
    [ ${#marks[@]} = 0 ] || { export OMP_NUM_THREADS=1; set -- -n 3 --dist worksteal tests; }
fi
exec "$PYTHON" -m pytest -c tests/pytest.ini "${marks[@]}" "$@"
