#!/usr/bin/env bash
# Set up .venv, then train the default run into runs/quickstart.
#
#   scripts/quickstart.sh [overrides]             such as objective=gspo run.steps=20
#   NPROC=4 scripts/quickstart.sh parallel=tp2    four ranks
#   PYTHON=python3.12 scripts/quickstart.sh       with this interpreter
set -euo pipefail

# shellcheck source=scripts/setup_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

nproc_wanted=${NPROC:-1}
[[ $nproc_wanted =~ ^[1-9][0-9]*$ ]] || fail "NPROC=$nproc_wanted: must be a whole number, at least 1"

setup_venv run
cd "$ROOT"

cores=$(getconf _NPROCESSORS_ONLN)
threads=$((cores / nproc_wanted))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

arguments=(train run.if_exists=overwrite "$@")
if ((nproc_wanted == 1)); then
    exec "$VENV/bin/nemo-apo" "${arguments[@]}"
fi
# A mistake in the overrides is told once here, before torchrun wraps it in reports of every rank.
WORLD_SIZE=$nproc_wanted "$VENV/bin/nemo-apo" "${arguments[@]}" run.dry_run=true >/dev/null
exec "$VENV/bin/torchrun" --standalone --nproc-per-node "$nproc_wanted" \
    -m nemo_apo "${arguments[@]}"
