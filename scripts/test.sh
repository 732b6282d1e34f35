#!/usr/bin/env bash
# Set up .venv, then check style and types and run the tests.
#
#   scripts/test.sh [pytest arguments]     such as -m 'not slow' or tests/core
#
# The status is that of the tests, or 1 if they pass and another check does not.
set -euo pipefail

# shellcheck source=scripts/setup_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
setup_venv test
cd "$ROOT"

failed=()
"$VENV/bin/ruff" check --quiet . || failed+=("ruff check")
"$VENV/bin/ruff" format --check --quiet . || failed+=("ruff format")
"$VENV/bin/mypy" --no-error-summary || failed+=("mypy")
((${#failed[@]} == 0)) || printf 'test.sh: %s failed, see above\n' "${failed[@]}" >&2

status=0
"$VENV/bin/python" -m pytest "$@" || status=$?
if ((status == 0 && ${#failed[@]} > 0)); then
    status=1
fi
exit "$status"
