#!/bin/sh
# Builds moe4j.cu for every target into the folder $1, with kernels.def and a manifest. $2: nvcc.
# Without nvcc it says so and succeeds: the library then runs on its CPU backend.
set -eu
out=$1
nvcc=${2:-nvcc}
source=$(dirname "$0")
if ! command -v "$nvcc" > /dev/null 2>&1; then
    echo "kernels: no nvcc found, so no GPU kernels are built; the CPU backend is complete without them"
    exit 0
fi
mkdir -p "$out"
version=$("$nvcc" --version | sed -n 's/.*release [0-9.]*, V\([0-9.]*\).*/\1/p')
flags="-std=c++17 -O3 -Werror all-warnings"
log=$(mktemp)
trap 'rm -f "$log"' EXIT

check() {  # target, log of ptxas -v
    awk -v target="$1" -f "$source/check_ptxas.awk" "$source/kernels.def" "$2" ||
        { echo "kernels: $1 failed the check above" >&2; exit 1; }
}

# Hopper: machine code, and PTX of the same target for a driver that wants to compile it itself
"$nvcc" $flags -gencode arch=compute_90a,code=sm_90a -cubin -Xptxas -v \
    -o "$out/moe4j-sm_90a.cubin" "$source/moe4j.cu" > "$log" 2>&1 || { cat "$log" >&2; exit 1; }
check sm_90a "$log"
"$nvcc" $flags -gencode arch=compute_90a,code=compute_90a -ptx \
    -o "$out/moe4j-compute_90a.ptx" "$source/moe4j.cu"

# Everything else from Ampere on: PTX, checked as machine code for sm_80
"$nvcc" $flags -gencode arch=compute_80,code=compute_80 -ptx \
    -o "$out/moe4j-compute_80.ptx" "$source/moe4j.cu"
"$nvcc" $flags -gencode arch=compute_80,code=sm_80 -cubin -Xptxas -v \
    -o "$log.cubin" "$source/moe4j.cu" > "$log" 2>&1 || { cat "$log" >&2; exit 1; }
rm -f "$log.cubin"
check sm_80 "$log"

cp "$source/kernels.def" "$out/kernels.def"
sha() { sha256sum "$1" | cut -d' ' -f1; }
entry() {  # file, kind, architecture, how an architecture matches, minimum CUDA version of the driver
    printf '    {"file": "%s", "kind": "%s", "architecture": "%s", "match": "%s", "min_cuda": %s, "sha256": "%s"}' \
        "$1" "$2" "$3" "$4" "$5" "$(sha "$out/$1")"
}
# why 13000: PTX needs a driver that knows its ISA version, a cubin a driver of the CUDA major version
# that built it (driver 580 for CUDA 13)
{
    printf '{\n  "nvcc": "%s",\n  "modules": [\n' "$version"
    entry moe4j-sm_90a.cubin cubin 90 exact 13000; printf ',\n'
    entry moe4j-compute_90a.ptx ptx 90 exact 13000; printf ',\n'
    entry moe4j-compute_80.ptx ptx 80 at_least 13000; printf '\n'
    printf '  ]\n}\n'
} > "$out/manifest.json"
echo "kernels: $(grep -vc '^#' "$source/kernels.def") kernels for sm_90a, compute_90a, compute_80; no spills, no stack (nvcc $version)"
