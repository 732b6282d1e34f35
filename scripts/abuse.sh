#!/usr/bin/env bash
# Set up .venv, then run the tests of abuse in their long form: hundreds of kills, damaged files, full
# disks, lost ranks, graders that misbehave, jobs stopped at every moment. Takes more than an hour;
# docs/reliability.md, docs/grading.md and docs/cluster.md hold the figures. tests/slurm needs Slurm's
# packages, or CI=1 to install them.
#
#   scripts/abuse.sh [pytest arguments]     such as tests/abuse/test_damage.py
set -euo pipefail

# shellcheck source=scripts/setup_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

setup_venv test
cd "$ROOT"
(($# > 0)) || set -- tests/abuse tests/grading tests/slurm
NEMO_APO_ABUSE=long exec "$VENV/bin/python" -m pytest -s "$@"
