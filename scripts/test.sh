#!/usr/bin/env bash
# Set up the environments, then check style and types and run the tests.
#
#   scripts/test.sh [pytest arguments]     such as -m 'not slow' or tests/core
#
# NPROC processes (default 2) share the tests out by file; --pdb and -s need NPROC=1.
#
# Two runs: all tests but those marked "pinned" in .venv, and those, which need NeMo-Aligner, in
# .venv-aligner. The second is left out where the arguments name other tests only. With
# NEMO_ALIGNER_GRPO_PATH=<checkout of NeMo-Aligner's branch llama-nemotron-dev> a third run tests
# against that branch.
#
# tests/slurm start a real Slurm on this machine: they need slurm-wlm, munge, libslurm-dev and a C
# compiler, or CI=1 and root to install them, and are skipped with the reason otherwise.
#
# The status is that of the tests, or 1 if they pass and another check does not.
set -euo pipefail

# shellcheck source=scripts/setup_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

# Sets aligner_arguments to the pytest arguments of the NeMo-Aligner tests, empty if the arguments
# name other tests only.
choose_aligner_arguments() {
    local argument named=false paths=() others=()
    for argument in "$@"; do
        case $argument in
            tests/aligner*) paths+=("$argument") ;;
            tests | tests/) paths+=(tests/aligner) ;;
            tests/*) named=true ;;
            *) others+=("$argument") ;;
        esac
    done
    [[ $named == true || ${#paths[@]} -gt 0 ]] || paths=(tests/aligner)
    aligner_arguments=()
    ((${#paths[@]} == 0)) || aligner_arguments=("${others[@]}" "${paths[@]}")
}

# The tests that need NeMo-Aligner; pytest's status 5 means that the arguments chose none of them.
run_pinned() {
    local status=0
    NEMO_APO_ALIGNER_PINS=1 "$@" || status=$?
    ((status == 5)) || return "$status"
}

setup_venv test
cd "$ROOT"
failed=()
"$VENV/bin/ruff" check --quiet . || failed+=("ruff check")
"$VENV/bin/ruff" format --check --quiet . || failed+=("ruff format")
"$VENV/bin/mypy" --no-error-summary || failed+=("mypy")
((${#failed[@]} == 0)) || printf 'test.sh: %s failed, see above\n' "${failed[@]}" >&2

# In the order of collection: files with few and long tests would come last otherwise.
processes=(-n "${NPROC:-2}" --dist loadfile --no-loadscope-reorder)
[[ ${NPROC:-2} != 1 ]] || processes=()
status=0
"$VENV/bin/python" -m pytest "${processes[@]}" "$@" || status=$?
choose_aligner_arguments "$@"
if ((${#aligner_arguments[@]} > 0)); then
    setup_venv aligner
    pinned=("$VENV/bin/python" -m pytest "${aligner_arguments[@]}")
    echo "test.sh: against the released NeMo-Aligner" >&2
    run_pinned env -u NEMO_ALIGNER_GRPO_PATH "${pinned[@]}" || status=$?
    if [[ -n ${NEMO_ALIGNER_GRPO_PATH:-} ]]; then
        echo "test.sh: against the branch in $NEMO_ALIGNER_GRPO_PATH" >&2
        run_pinned "${pinned[@]}" || status=$?
    else
        echo "test.sh: NEMO_ALIGNER_GRPO_PATH is not set, the branch is not tested" >&2
    fi
fi
if ((status == 0 && ${#failed[@]} > 0)); then
    status=1
fi
exit "$status"
