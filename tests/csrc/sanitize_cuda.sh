#!/usr/bin/env bash
# The CUDA kernels, run by emulation/, without sanitizers, under those of addresses and undefined behaviour, and under that of threads:
# sanitize_cuda.sh [ROUNDS]; without ThreadSanitizer, which is slow, four times as many.
# Needs g++ or clang++ (CXX) with their sanitizers. Exits with a failure at the first report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cxx=${CXX:-c++} rounds=${1:-300}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Neither the emulation, which must not be, nor the caller, whose own loops would only be slower, is instrumented.
for file in emulation/emulation random_cuda_calls; do
    "$cxx" -std=c++17 -O2 -g -c "tests/csrc/$file.cpp" -o "$scratch/$(basename "$file").o" &
done
wait

# group_norm takes as long as the others together
compile() {
    for file in "$@"; do
        "$cxx" -std=c++17 -O0 -g -fno-strict-aliasing -fno-omit-frame-pointer -w -Itests/csrc/emulation $flags \
            -x c++ -c "csrc/cuda/$file.cu" -o "$scratch/$file.o"
    done
}

for sanitizers in none address,undefined thread; do
    flags=
    [[ $sanitizers == none ]] || flags="-fsanitize=$sanitizers -fno-sanitize-recover=all"
    compile group_norm &
    compile head library residual step
    wait $!
    "$cxx" $flags "$scratch"/*.o -o "$scratch/calls" -pthread
    echo "== $sanitizers"
    if [[ $sanitizers == thread ]]; then
        "$scratch/calls" "$rounds" small
    else
        "$scratch/calls" $((4 * rounds))
    fi
done
