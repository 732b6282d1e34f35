#!/usr/bin/env bash
# Set up the environments, then check style and types and run the tests.
#
#   scripts/test.sh [pytest arguments]     such as -m 'not slow' or tests/core
#
# NPROC processes (default 2) share the tests out by file; --pdb and -s need NPROC=1.
#
# Two runs: all tests but those that need a host in .venv, and those marked "pinned", which need
# NeMo-Aligner, in .venv-aligner. The second is left out where the arguments name other tests only.
# Two more where a checkout is named:
#   NEMO_ALIGNER_GRPO_PATH=<NeMo-Aligner's branch llama-nemotron-dev>   the same against that branch
#   NEMO_RL_SRC=<NeMo-RL, main or v0.7.0>   the tests marked "nemo_rl" against it, in .venv-nemo_rl
#
# tests/slurm start a real Slurm on this machine: they need slurm-wlm, munge, libslurm-dev and a C
# compiler, or CI=1 and root to install them; some need CI=1 and root anyway, for network namespaces.
# They are skipped with the reason otherwise.
#
# The status is that of the tests, or 1 if they pass and another check does not.
set -euo pipefail

# shellcheck source=scripts/setup_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

# Sets host_arguments to the pytest arguments of the tests in a folder, empty if the arguments name
# other tests only.
choose_host_arguments() {
    local folder=$1 argument named=false paths=() others=()
    shift
    for argument in "$@"; do
        case $argument in
            "$folder"*) paths+=("$argument") ;;
            tests | tests/) paths+=("$folder") ;;
            tests/*) named=true ;;
            *) others+=("$argument") ;;
        esac
    done
    [[ $named == true || ${#paths[@]} -gt 0 ]] || paths=("$folder")
    host_arguments=()
    ((${#paths[@]} == 0)) || host_arguments=("${others[@]}" "${paths[@]}")
}

# Tests that need a host, which the variable named first promises them to have; pytest's status 5
# means that the arguments chose none of them.
run_promised() {
    local promise=$1 status=0
    shift
    env "$promise=1" "$@" || status=$?
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
choose_host_arguments tests/aligner "$@"
if ((${#host_arguments[@]} > 0)); then
    setup_venv aligner
    pinned=("$VENV/bin/python" -m pytest "${host_arguments[@]}")
    promise=NEMO_APO_ALIGNER_PINS
    echo "test.sh: against the released NeMo-Aligner" >&2
    run_promised $promise env -u NEMO_ALIGNER_GRPO_PATH "${pinned[@]}" || status=$?
    if [[ -n ${NEMO_ALIGNER_GRPO_PATH:-} ]]; then
        echo "test.sh: against the branch in $NEMO_ALIGNER_GRPO_PATH" >&2
        run_promised $promise "${pinned[@]}" || status=$?
    else
        echo "test.sh: NEMO_ALIGNER_GRPO_PATH is not set, the branch is not tested" >&2
    fi
fi
choose_host_arguments tests/nemo_rl "$@"
if ((${#host_arguments[@]} > 0)); then
    if [[ -n ${NEMO_RL_SRC:-} ]]; then
        setup_venv nemo_rl
        echo "test.sh: against NeMo-RL in $NEMO_RL_SRC" >&2
        run_promised NEMO_APO_NEMO_RL_PINS "$VENV/bin/python" -m pytest "${host_arguments[@]}" ||
            status=$?
    else
        echo "test.sh: NEMO_RL_SRC is not set, NeMo-RL itself is not tested" >&2
    fi
fi
if ((status == 0 && ${#failed[@]} > 0)); then
    status=1
fi
exit "$status"
