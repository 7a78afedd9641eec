#!/usr/bin/env bash
# The tests on the oldest versions that pyproject.toml allows, on the newest, and in between, each in a fresh environment:
#     tests/versions.sh [ARGUMENTS OF PYTEST]         prints a line per version; status 1 if any fails
# The interpreters are python3.10, python3.12 and python3, or $OLD, $MIDDLE and $NEW; logs stay in $WORK, by default a
# new folder below $TMPDIR, where each environment takes 6 GB while it is needed. Needs the network.
set -u
cd "$(dirname "$0")/.."
work=${WORK:-$(mktemp -d)}
mkdir -p "$work"
failed=0

try() { # NAME INTERPRETER PACKAGES...
    name=$1 python=$2
    shift 2
    rm -rf "${work:?}/$name"
    begin=$SECONDS
    "$python" -m venv "$work/$name" && "$work/$name/bin/pip" install -q "$@" -e ".[test]" > "$work/$name.log" 2>&1
    installed=$((SECONDS - begin))
    begin=$SECONDS
    "$work/$name/bin/python" -m pytest -q "${arguments[@]}" >> "$work/$name.log" 2>&1 || { failed=1; found=FAILED; }
    versions=$("$work/$name/bin/python" -c "import sys, torch, torchvision as v
print(f'Python {sys.version.split()[0]}, torch {torch.__version__}, torchvision {v.__version__}')" 2> /dev/null)
    echo "$name: ${versions:-not installed}; installed in $installed s; ${found:-passed} in $((SECONDS - begin)) s:" \
        "$(tail -n 1 "$work/$name.log")"
    unset found
    rm -rf "${work:?}/$name"
}

arguments=("$@")
echo "logs and environments: $work"
try oldest "${OLD:-python3.10}" "torch==2.6.*" "torchvision==0.21.*"
try middle "${MIDDLE:-python3.12}" "torch==2.9.*" "torchvision==0.24.*"
try newest "${NEW:-python3}" --upgrade torch torchvision
exit $failed
