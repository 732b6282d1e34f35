# Sourced by the other scripts: virtual environments that match requirements/.
#
#   setup_venv run       .venv: what training needs                  (requirements/run.txt)
#   setup_venv test      .venv: the checks as well                   (requirements/test.txt)
#   setup_venv aligner   .venv-aligner: the tests against NeMo-Aligner, with this package's wheel
#                        (requirements/aligner.txt, aligner-host.txt)
#   setup_venv nemo_rl   .venv-nemo_rl: the same against NeMo-RL
#                        (requirements/nemo_rl.txt, nemo_rl-host.txt)
#
# Sets ROOT (the repository) and VENV. An environment whose pins have not changed is reused as is.
# PYTHON=... chooses its interpreter.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
MAIN_VENV=$ROOT/.venv
NEEDED_KB=$((3 * 1024 * 1024))

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

setup_venv() {
    local kind=$1
    local python
    VENV=$MAIN_VENV
    ! is_host "$kind" || VENV=$ROOT/.venv-$kind
    python=${PYTHON:-$(usual_python)}
    check_python "$python"
    # A lock on a file that is always there: no second process touches .venv until this one is done.
    # Where flock is missing (macOS), two first calls at the same time are not kept apart.
    exec 9<"$ROOT/scripts/setup_venv.sh"
    if command -v flock >/dev/null; then
        flock -n 9 || { echo "waiting for another set-up of .venv" >&2 && flock 9; }
    fi
    local stamp=$VENV/.stamp-$kind
    local pins
    pins=$(pins_of "$kind" "$python")
    if [[ ! -f $stamp || $(<"$stamp") != "$pins" ]]; then
        install_venv "$kind" "$python"
        echo "$pins" >"$stamp"
    fi
    ! is_host "$kind" || install_wheel
    exec 9<&-
}

# Whether an environment is a host's: of its own, with what its tests need, and our wheel beside it.
is_host() {
    [[ -f $ROOT/requirements/$1-host.txt ]]
}

# The interpreter of a finished .venv, so that one made with PYTHON=... is kept, else python3.
usual_python() {
    if compgen -G "$MAIN_VENV/.stamp-*" >/dev/null && [[ -x $MAIN_VENV/bin/python ]]; then
        echo "$MAIN_VENV/bin/python"
    else
        echo python3
    fi
}

check_python() {
    local python=$1
    command -v "$python" >/dev/null ||
        fail "$python was not found; install Python 3.10 or newer, or name one with PYTHON=..."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$python" --version 2>&1) is too old; name a Python 3.10 or newer with PYTHON=..."
}

# What the environment depends on, as one line: the interpreter and the contents of the pins.
pins_of() {
    local kind=$1 python=$2
    "$python" - "$kind" "$ROOT" <<'PY'
import hashlib, pathlib, sys

kind, root = sys.argv[1], pathlib.Path(sys.argv[2])
files = {
    "run": ["run.txt", "cuda.txt", "../pyproject.toml"],
    "test": ["run.txt", "cuda.txt", "../pyproject.toml", "test.txt"],
    "aligner": ["aligner.txt", "aligner-host.txt", "cuda.txt"],
    "nemo_rl": ["nemo_rl.txt", "nemo_rl-host.txt", "cuda.txt"],
}
contents = b"".join((root / "requirements" / name).read_bytes() for name in files[kind])
print(sys.version.split()[0], sys.base_prefix, root, hashlib.sha256(contents).hexdigest())
PY
}

install_venv() {
    local kind=$1 python=$2
    make_venv "$python"
    check_space
    local name log=$VENV/install.log
    name=$(basename "$VENV")
    echo "installing requirements/$kind.txt into $name (some minutes; log: $name/install.log)" >&2
    if ! { install_pins "$kind"; } >"$log" 2>&1; then
        grep -i 'error' "$log" | tail -n 3 >&2 || true
        fail "pip could not install requirements/$kind.txt (network or disk?); all of it: $log"
    fi
}

install_pins() {
    "$VENV/bin/python" -m pip install -r "$ROOT/requirements/$1.txt" || return
    if is_host "$1"; then
        "$VENV/bin/python" -m pip install --no-deps -r "$ROOT/requirements/$1-host.txt"
    else
        # The package itself is a link to this folder; the pins hold its build backend already.
        "$VENV/bin/python" -m pip install --no-deps --no-build-isolation -e "$ROOT"
    fi
}

# Builds this package's wheel and installs it as one would in a NeMo container: nothing that is
# there already may change.
install_wheel() {
    local before after folder log=$VENV/wheel.log
    folder=$(mktemp -d)
    before=$(other_packages)
    if ! {
        "$VENV/bin/python" -m pip wheel --no-deps --no-build-isolation -w "$folder" "$ROOT" &&
            "$VENV/bin/python" -m pip install --no-deps --force-reinstall "$folder"/*.whl
    } >"$log" 2>&1; then
        fail "the wheel could not be built or installed; all of it: $log"
    fi
    rm -r "$folder"
    after=$(other_packages)
    [[ $before == "$after" ]] ||
        fail "installing the wheel changed other packages: $(diff <(echo "$before") <(echo "$after"))"
}

other_packages() {
    "$VENV/bin/python" -m pip list --format=freeze --disable-pip-version-check 2>/dev/null |
        grep -v '^nemo_apo=='
}

# Makes the environment anew unless it works and belongs to this interpreter.
make_venv() {
    local python=$1
    local version='import sys; print(sys.version)'
    local wanted found=none
    wanted=$("$python" -c "$version")
    [[ ! -x $VENV/bin/python ]] || found=$("$VENV/bin/python" -c "$version" 2>&1) || found=broken
    [[ "$found" != "$wanted" ]] || return 0
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "Python's venv module is missing; on Debian or Ubuntu: apt-get install python3-venv"
    check_space
    "$python" -m venv --clear "$VENV" || fail "could not make $VENV"
}

check_space() {
    # Pinned packages that are there already need no room again.
    [[ -d $VENV/lib ]] && compgen -G "$VENV/lib/python*/site-packages/torch" >/dev/null && return
    local free_kb
    free_kb=$(df -Pk "$ROOT" | awk 'NR == 2 {print $4}')
    ((free_kb >= NEEDED_KB)) ||
        fail "about 3 GB must be free for $(basename "$VENV") (more for a torch with CUDA), $ROOT has" \
            "$((free_kb / 1024)) MB"
}
