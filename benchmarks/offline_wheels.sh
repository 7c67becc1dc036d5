#!/usr/bin/env bash
# Collects into DIR the wheels that benchmarks/gpu.sh wants on a GPU machine without network. The machine brings Python,
# torch, triton, transformers and what these need; run this on one with network, of any Python and processor:
#   [UNSLOTH=1] [CUDA=130] benchmarks/offline_wheels.sh DIR [PYTHON=3.12] [more packages ...]
# then copy DIR there and run  WHEELS=DIR benchmarks/gpu.sh  (it installs into a folder of its own). 11 MB; with
# Unsloth 20 MB, and the machine then also needs torchvision, pyarrow, pandas, sentencepiece and protobuf.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$1
python=${2:-3.12}
shift $(($# > 2 ? 2 : $#))
here=${PYTHON:-python3}
mkdir -p "$folder"

# what torch and transformers depend on themselves (fsspec, jinja2, pyyaml, safetensors, ...) is there already
needed=(
    'peft==0.21.2' 'accelerate>=1.10' psutil 'xxhash>=3.4'
    'typer>=0.29' annotated-doc click shellingham 'rich>=13' markdown-it-py mdurl pygments
    'pydantic==2.14.3' 'pydantic-core==2.50.4' annotated-types typing-inspection 'typing-extensions>=4.14'
    hjson msgpack py-cpuinfo ninja einops
)
peers=('liger-kernel==0.8.5')
[ -z "${UNSLOTH:-}" ] || peers+=(
    unsloth unsloth-zoo 'trl<=1.15' 'datasets>=4.6,<5' dill multiprocess tyro docstring-parser msgspec bitsandbytes
    cut-cross-entropy
)

# pip matches a platform's number exactly, so every glibc from 2.17 to 2.34 that wheels are built for is named
target=(--python-version "$python" --implementation cp --platform manylinux2014_x86_64)
for minor in 17 24 27 28 31 34; do target+=(--platform "manylinux_2_${minor}_x86_64"); done
# --no-deps: a dependency would bring torch along; what is needed is named above
"$here" -m pip --disable-pip-version-check --quiet download --no-deps --only-binary=:all: "${target[@]}" \
    --dest "$folder" "${needed[@]}" "${peers[@]}" "$@"

# DeepSpeed is published as source; without operators built ahead its wheel is plain Python and fits every machine
compgen -G "$folder/deepspeed-*.whl" >/dev/null || {
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT
    "$here" -m venv "$build/venv"
    pip=("$build/venv/bin/python" -m pip --disable-pip-version-check --quiet)
    "${pip[@]}" install 'setuptools>=69,<82' wheel packaging
    DS_BUILD_OPS=0 "${pip[@]}" wheel --no-deps --no-build-isolation --wheel-dir "$folder" 'deepspeed>=0.19,<0.20'
}

# large parts that a training step does not use: Unsloth's web application, bitsandbytes for other chips and CUDAs
"$here" - "$folder" "${CUDA:-130}" <<'PROGRAM'
import re, sys, zipfile
from pathlib import Path

UNUSED = {"unsloth": r"studio/", "bitsandbytes": rf"bitsandbytes/lib\w+_((cuda(?!{sys.argv[2]}\b)|rocm|xpu)\w+)\.so"}
for path in Path(sys.argv[1]).glob("*.whl"):
    unused = UNUSED.get(path.name.partition("-")[0])
    if not unused:
        continue
    smaller = path.with_suffix(".part")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as rest:
        for item in whole.infolist():
            if re.match(unused, item.filename):
                continue
            data = whole.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                data = b"".join(line for line in data.splitlines(True) if not re.match(unused, line.decode()))
            rest.writestr(item, data)
    smaller.replace(path)
PROGRAM
du -sh "$folder"
