#!/usr/bin/env bash
# Makes .venv beside this repository's setup.py from launch/constraints.txt. Idempotent: when neither setup.py, the
# constraints, the interpreter nor the checkout's place changed since the last success it returns at once.
#   bash launch/install.sh            PYTHON=/path/to/python3 chooses the interpreter of a new .venv
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/.bd3-installed

fail() {
    echo "install: error: $*" >&2
    exit 2
}

usable() { # is $1 a Python this package supports, with venv?
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

choose_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python3.12 python3.13 python3.10; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python >= 3.10 with the venv module was found; install one (Debian: python3 python3-venv) or set PYTHON."
}

fingerprint() {
    {
        echo "$root"
        "$venv/bin/python" -c 'import sys; print(sys.version)'
        cat "$root/setup.py" "$root/launch/constraints.txt"
    } | sha256sum | cut -d ' ' -f 1
}

up_to_date() {
    [ -f "$stamp" ] && [ -x "$venv/bin/bd3" ] && [ "$(cat "$stamp")" = "$(fingerprint 2>/dev/null)" ]
}

install_all() {
    local pip=("$venv/bin/python" -m pip install -qq --disable-pip-version-check -c "$root/launch/constraints.txt")
    echo "install: making $venv (some minutes the first time)"
    # a .venv whose interpreter is gone or that was copied from elsewhere cannot be mended, only remade
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$(choose_python)" -m venv --clear "$venv"
    rm -f "$stamp"
    # torch first, so that nothing else pulls another build of it; setuptools because the build below is not isolated
    "${pip[@]}" setuptools torch
    # DeepSpeed comes as source: DS_BUILD_OPS=0 compiles nothing. Not isolated: its setup asks torch for its version.
    # The tests evaluate through lm-evaluation-harness itself and read what TensorBoard would, hence their extras.
    DS_BUILD_OPS=0 "${pip[@]}" --no-build-isolation -e "${root}[test,eval,tensorboard]"
    fingerprint >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

main() {
    if up_to_date; then
        return
    fi
    mkdir -p "$venv"
    # two installations at once into one folder would tear it
    exec 9>"$venv.lock"
    flock 9
    up_to_date || install_all
    exec 9>&-
}

main
