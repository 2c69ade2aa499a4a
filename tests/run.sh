#!/usr/bin/env bash
# Makes or reuses .venv, then runs the test suite; arguments go to pytest.
#   tests/run.sh                 the default suite, in two halves side by side
#   tests/run.sh -k NAME         the tests of that name
#   tests/run.sh --matrix        also every grid against every other (minutes)
#   tests/run.sh --slurm         also what waits on SLURM's own clocks (minutes)
#   tests/run.sh --mutations     instead: one-line mutations, and whether the default tests notice (minutes; names: only those)
#   tests/run.sh --fuzz          also ten thousand broken configurations (minutes)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

deselected=(matrix slurm_long fuzz)
arguments=()
for argument in "$@"; do
    case $argument in
    --matrix) deselected=("${deselected[@]/#matrix/}") ;;
    --slurm) deselected=("${deselected[@]/#slurm_long/}") ;;
    --fuzz) deselected=("${deselected[@]/#fuzz/}") ;;
    *) arguments+=("$argument") ;;
    esac
done
markers=
for name in "${deselected[@]}"; do
    if [ -n "$name" ]; then
        markers="${markers:+$markers and }not $name"
    fi
done

bash "$root/launch/install.sh"
cd "$root"

# ranks share few cores with each other: more threads than one each only get in each other's way
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# nothing in the default suite may reach a hub or a tracker
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline
if ! compgen -G "/dev/nvidia[0-9]*" >/dev/null; then
    export DS_ACCELERATOR=cpu
fi
if [ "${arguments[0]:-}" = --mutations ]; then
    exec .venv/bin/python -m tests.mutations "${arguments[@]:1}"
fi
pytest=(.venv/bin/python -m pytest -m "$markers")
if [ "${#arguments[@]}" -gt 0 ]; then
    exec "${pytest[@]}" "${arguments[@]}"
fi

# Two halves side by side: each leaves a core idle for much of its time. Tests that fork ranks come first in theirs,
# while their process has no threads yet.
first=(tests/ranks tests/unit/[a-d]*)
second=(tests "${first[@]/#/--ignore=}")
words=$(mktemp)
"${pytest[@]}" "${first[@]}" >"$words" 2>&1 &
other=$!
trap 'kill "$other" 2>/dev/null || true; rm -f "$words"' EXIT
status=0
"${pytest[@]}" "${second[@]}" || status=$?
wait "$other" || status=$?
cat "$words"
exit "$status"
