#!/usr/bin/env bash
# Random calls of the CPU kernels under the address and undefined-behaviour sanitizers, then under the thread sanitizer:
#     sanitize.sh [ROUNDS]
# Needs g++ or clang++ (CXX) with their sanitizers. Fails at the first report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cxx=${CXX:-c++} rounds=${1:-300}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

declare -A flags=([avx2]="-mavx2 -mfma -mf16c")
flags[avx2_vnni]="${flags[avx2]} -mavxvnni"
flags[avx512]="${flags[avx2]} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
flags[avx512_bf16]="${flags[avx512]} -mavx512bf16 -mavx512vnni"
portable=() x86=()
for path in csrc/cpu/*.cpp; do
    file=$(basename "$path" .cpp)
    if [[ $file == avx* ]]; then x86+=("$file"); else portable+=("$file"); fi
done
files=("${portable[@]}")
[[ $(uname -m) == x86_64 ]] && files+=("${x86[@]}")

for sanitizers in address,undefined thread; do
    common=(-std=c++17 -O0 -g -ffp-contract=off -fno-math-errno -w)
    common+=("-fsanitize=$sanitizers" -fno-sanitize-recover=all -fno-omit-frame-pointer)
    # a race is one whatever the instruction set
    [[ $sanitizers == thread ]] && files=("${portable[@]}") && common+=(-DCF_PORTABLE_ONLY)
    for file in "${files[@]}"; do
        "$cxx" "${common[@]}" ${flags[$file]-} -c "csrc/cpu/$file.cpp" -o "$scratch/$file.o" &
    done
    wait
    objects=$(printf "$scratch/%s.o " "${files[@]}")
    "$cxx" "${common[@]}" tests/csrc/random_calls.cpp $objects -o "$scratch/random_calls" -pthread
    echo "== $sanitizers"
    "$scratch/random_calls" "$rounds"
done
