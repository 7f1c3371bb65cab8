#!/usr/bin/env bash
# One wheel beside several versions of torch: other_torch.sh VERSION [VERSION ...]
# Builds the wheel once, installs it unchanged beside each version in a fresh virtual environment, and checks the native ops there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1

COALESCER_FAST_BUILD=require python3 -m pip wheel -q --no-deps -w "$scratch" .
wheel=$(ls "$scratch"/*.whl)
echo "$(basename "$wheel")"
for version in "$@"; do
    python3 -m venv "$scratch/$version"
    "$scratch/$version/bin/pip" install -q "torch==$version" numpy
    "$scratch/$version/bin/pip" install -q --no-deps "$wheel"
    (cd "$scratch" && "$scratch/$version/bin/python" - <<'EOF'
import hashlib
import torch
from coalescer_fast import ops
from coalescer_fast.ops import native_library

x, w = torch.randn(2, 24, 9, 7).to(memory_format=torch.channels_last), torch.randn(24)
heads = torch.randn(4, 24, 3, 3), torch.randn(4), torch.randn(24), torch.randn(1)
calls = {
    "group_norm_silu": (x, 4, w, w),
    "bias_residual": (x, w, x),
    "dual_head": (x, *heads),
    "coalesce_step": (x, x, torch.rand(2)),
}
for op, args in calls.items():
    results = [getattr(ops, op)(*args, backend=backend) for backend in ("cpu", "reference")]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    torch.library.opcheck(getattr(torch.ops.coalescer_fast, op).default, args, {"backend": "cpu"})
digest = hashlib.sha256((native_library.FOLDER / "libcoalescer_fast_cpu.so").read_bytes()).hexdigest()[:16]
print(f"torch {torch.__version__}: all ops agree on {native_library.isa()}, library {digest}")
EOF
    )
    rm -rf "${scratch:?}/$version"
done
