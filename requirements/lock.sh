#!/usr/bin/env bash
# Writes the lock files: `make lock` keeps the versions that they pin, `make lock UPGRADE=--upgrade` takes the newest,
# `UPGRADE="--upgrade-package peft"` that of one package. Commit what the tests pass with.
#
# build.lock: what building and torch need, installed before torch. base.lock: the rest of a run. dev.lock: the rest of
# `make install`. Each holds the hashes of all files of a version on the package index, for every platform. Torch itself
# is in none, because its CPU and CUDA builds have the same version and come from different indexes.
set -euo pipefail
cd "$(dirname "$0")/.."
torch=$1
shift
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check --quiet install uv

# torch as the installed CPU build describes itself; the one on PyPI would add gigabytes of CUDA packages
.venv/bin/python - >"$folder/uv.toml" <<'END'
import json
from importlib.metadata import requires, version

needs = [line for line in requires("torch") or [] if "extra ==" not in line]
assert not any(line.startswith("nvidia") for line in needs), "lock with the CPU build of torch"
print("[[dependency-metadata]]", 'name = "torch"', sep="\n")
print(f'version = "{version("torch").partition("+")[0]}"\nrequires-dist = {json.dumps(needs)}')
END

lock() {
    local out=$1 python=$2
    shift 2
    "$folder/venv/bin/uv" pip compile --quiet --config-file "$folder/uv.toml" --universal --python-version "$python" \
        --generate-hashes --no-annotate --no-emit-package torch --custom-compile-command "make lock" \
        --output-file "requirements/$out.lock" "$@"
}
# a package that is installed everywhere is in one file only; one with a marker may be needed elsewhere by a later file
not_those_of() { for one in "$@"; do sed -n 's/^\([a-z0-9._-]*\)==[^ ]* \\$/--no-emit-package=\1/p' "requirements/$one.lock"; done; }

printf '%s\n' "$torch" >"$folder/torch.in"
printf '%s\n' "setuptools>=69,<82" wheel ninja >"$folder/build.in"
lock build 3.10 "$folder/torch.in" "$folder/build.in" "$@"
# shellcheck disable=SC2046  # one option per line
lock base 3.10 pyproject.toml "$folder/torch.in" -c requirements/build.lock $(not_those_of build) "$@"
# shellcheck disable=SC2046
lock dev 3.11 pyproject.toml "$folder/torch.in" --extra dev --extra triton \
    -c requirements/build.lock -c requirements/base.lock $(not_those_of build base) "$@"
