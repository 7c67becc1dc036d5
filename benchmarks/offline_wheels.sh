#!/usr/bin/env bash
# Collects into DIR the wheels that benchmarks/gpu.sh wants on a GPU machine without network. The machine brings Python,
# torch, triton, transformers and what these need; run this on one with network, of any Python and processor:
#   benchmarks/offline_wheels.sh DIR [PYTHON=3.12] [more packages ...]
# then copy DIR there and run  WHEELS=DIR benchmarks/gpu.sh  (it installs into a folder of its own).
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$1
python=${2:-3.12}
shift $(($# > 2 ? 2 : $#))
pip=("${PYTHON:-python3}" -m pip --disable-pip-version-check --quiet)
mkdir -p "$folder"

# pip matches a platform's number exactly, so every glibc from 2.17 to 2.34 that wheels are built for is named
target=(--python-version "$python" --implementation cp --platform manylinux2014_x86_64)
for minor in 17 24 27 28 31 34; do target+=(--platform "manylinux_2_${minor}_x86_64"); done
# what torch and transformers depend on themselves (fsspec, jinja2, pyyaml, safetensors, ...) is there already
needed=(
    'peft==0.21.2' 'accelerate>=1.10' psutil 'xxhash>=3.4'
    'typer>=0.29' annotated-doc click shellingham 'rich>=13' markdown-it-py mdurl pygments
    'pydantic==2.14.3' 'pydantic-core==2.50.4' annotated-types typing-inspection 'typing-extensions>=4.14'
    hjson msgpack py-cpuinfo ninja einops
)
peers=('liger-kernel==0.8.5')

# --no-deps: a dependency would bring torch along; what is needed is named above
"${pip[@]}" download --no-deps --only-binary=:all: "${target[@]}" --dest "$folder" "${needed[@]}" "${peers[@]}" "$@"
# DeepSpeed is published as source; without operators built ahead its wheel is plain Python and fits every machine
compgen -G "$folder/deepspeed-*.whl" >/dev/null || {
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT
    "${PYTHON:-python3}" -m venv "$build/venv"
    "$build/venv/bin/python" -m pip --disable-pip-version-check --quiet install 'setuptools>=69,<82' wheel packaging
    DS_BUILD_OPS=0 "$build/venv/bin/python" -m pip --disable-pip-version-check --quiet wheel --no-deps --no-build-isolation \
        --wheel-dir "$folder" 'deepspeed>=0.19,<0.20'
}
du -sh "$folder"
