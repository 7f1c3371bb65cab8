#!/usr/bin/env bash
# Runs the tests of diffusers' networks and pipelines with the oldest diffusers that `accelerate` supports them of, and
# with the newest. Each version comes into a virtual environment of its own, in front of the packages of $PYTHON, which
# has the rest (torch, pytest, this package) and is left as it is.
#
#     tests/diffusers_versions.sh [options of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python}
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PIP_DISABLE_PIP_VERSION_CHECK=1
failed=0

# NAME, then what pip installs
check() {
    local venv=$scratch/$1
    "$python" -m venv "$venv"
    echo "import site; site.addsitedir('$packages')" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
    # the package itself asks for a later diffusers, which loads folders safely; pip says so
    "$venv/bin/python" -m pip install -q "${@:2}" 2> >(grep -v -e 'coalescer.fast' -e 'dependency resolver' >&2)
    "$venv/bin/python" -c 'import diffusers, transformers; print("=== diffusers", diffusers.__version__, "transformers", transformers.__version__)'
    "$venv/bin/python" -m pytest -q tests/runtime/native/test_diffusers_networks.py tests/test_diffusers_pipelines.py \
        "${options[@]}" || failed=1
}

options=("$@")
# transformers 5 and huggingface_hub 1 came later
check oldest 'diffusers==0.35.2' 'transformers==4.57.3' 'huggingface_hub==0.36.0' 'peft==0.17.1'
check newest --upgrade diffusers transformers peft
exit $failed
