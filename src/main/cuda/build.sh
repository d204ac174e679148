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
trap 'rm -f "$log" "$log".*' EXIT

check() {  # target, log of ptxas -v
    awk -v target="$1" -f "$source/check_ptxas.awk" "$source/kernels.def" "$2" ||
        { echo "kernels: $1 failed the check above" >&2; exit 1; }
}

# What launch_sizes.cuh is compared with
awk '$0 !~ /^#/ && NF > 0 {
    printf "static_assert(%s.threads == %s, \"threads of %s in kernels.def\");\n", $1, $3, $1
    printf "static_assert(%s.shared == %s, \"dynamic shared memory of %s in kernels.def\");\n", $1, $4, $1
}' "$source/kernels.def" > "$log.checks"
flags="$flags -DMOE_LAUNCH_CHECKS=\"$log.checks\""

# Four compilations at once: the machine code of Hopper takes as long as the others together
compile() {  # name of the log, options of nvcc
    name=$1
    shift
    if ! "$nvcc" $flags "$@" "$source/moe4j.cu" > "$log.$name" 2>&1; then
        cat "$log.$name" >&2
        return 1
    fi
}

# Hopper: machine code, and PTX of the same target for a driver that wants to compile it itself
compile sm_90a -gencode arch=compute_90a,code=sm_90a -cubin -Xptxas -v -o "$out/moe4j-sm_90a.cubin" &
hopper=$!
# Everything else from Ampere on: PTX, checked as machine code for sm_80
compile sm_80 -gencode arch=compute_80,code=sm_80 -cubin -Xptxas -v -o "$log.cubin" &
ampere=$!
compile compute_80 -gencode arch=compute_80,code=compute_80 -ptx -o "$out/moe4j-compute_80.ptx"
compile compute_90a -gencode arch=compute_90a,code=compute_90a -ptx -o "$out/moe4j-compute_90a.ptx"
wait $ampere
wait $hopper
check sm_90a "$log.sm_90a"
check sm_80 "$log.sm_80"

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
