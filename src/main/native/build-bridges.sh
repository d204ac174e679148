#!/bin/sh
# Builds libraries that let JCublas 12.6 and JCudnn 11.7 run on CUDA 13 and cuDNN 9:
#   libcublas.so.12 -> libcublas.so.13        libcudnn.so.8 -> libcudnn.so.9
# Each exports exactly what the JNI library imports, under the version names it was linked with,
# and jumps to the newer library. And libmoe4j_nvtx.so, which makes NVTX ranges. Without gcc or objdump it says so and the build goes on.
#   build-bridges.sh SOURCE_DIR JNI_DIR OUTPUT_DIR
set -eu

source=$1 jni=$2 output=$3

for tool in gcc objdump awk; do
    if ! command -v "$tool" >/dev/null 2>&1; then
        echo "bridges: $tool is not installed, so JCublas and JCudnn will need CUDA 12 and cuDNN 8, and there are no NVTX ranges: install gcc and binutils to build the bridges"
        exit 0
    fi
done
case $(uname -s)-$(uname -m) in
    Linux-x86_64) ;;
    *) echo "bridges: only built on Linux x86_64"; exit 0 ;;
esac

work=$(mktemp -d "${TMPDIR:-/tmp}/moe4j-bridges.XXXXXX")
trap 'rm -rf "$work"' EXIT INT TERM
mkdir -p "$output"

# bridge JNI_LIBRARY OLD_SONAME NEW_SONAME NOT_SUPPORTED_CODE
bridge() {
    library=$1 old=$2 new=$3 code=$4
    if [ "$output/$old" -nt "$library" ] && [ "$output/$old" -nt "$source/bridge.c" ] \
        && [ "$output/$old" -nt "$source/build-bridges.sh" ]; then
        return 0
    fi
    objdump -T "$library" \
        | awk -v node="($old)" '$0 ~ /\*UND\*/ && $(NF - 1) == node { print $NF }' \
        | LC_ALL=C sort -u > "$work/symbols"
    count=$(wc -l < "$work/symbols")
    if [ "$count" -eq 0 ]; then
        echo "bridges: $library imports nothing from $old" >&2
        return 1
    fi

    # the jumps: the arguments stay where the caller put them
    awk '
        BEGIN { print ".text" }
        { printf ".globl %s\n.type %s,@function\n.p2align 4\n%s:\n  endbr64\n  jmp *moe4j_bridge_slots+%d(%%rip)\n.size %s,.-%s\n", $1, $1, $1, 8 * (NR - 1), $1, $1 }
        END {
            printf ".bss\n.p2align 3\n.globl moe4j_bridge_slots\n.hidden moe4j_bridge_slots\nmoe4j_bridge_slots:\n.zero %d\n", 8 * NR
            print ".section .note.GNU-stack,\"\",@progbits"
        }' "$work/symbols" > "$work/jumps.s"
    awk '
        BEGIN { print "#define HIDDEN __attribute__((visibility(\"hidden\")))\nHIDDEN const char *const moe4j_bridge_names[] = {" }
        { printf "    \"%s\",\n", $1 }
        END { printf "};\nHIDDEN const int moe4j_bridge_count = %d;\n", NR }' \
        "$work/symbols" > "$work/names.c"
    awk -v node="$old" '
        BEGIN { printf "%s {\n  global:\n", node }
        { printf "    %s;\n", $1 }
        END { print "  local: *;\n};" }' "$work/symbols" > "$work/versions"

    gcc -shared -fPIC -O2 -Wall -fvisibility=hidden \
        "-DMOE4J_TARGET=\"$new\"" "-DMOE4J_NOT_SUPPORTED=$code" \
        "-Wl,-soname,$old" "-Wl,--version-script=$work/versions" \
        -Wl,-z,now -Wl,-z,relro -Wl,--build-id=none -s \
        -o "$work/$old" "$source/bridge.c" "$work/names.c" "$work/jumps.s" -ldl
    mv "$work/$old" "$output/$old"
    echo "bridges: $old -> $new, $count symbols"
}

# Ranges for profilers: no header of NVTX is needed
if [ ! "$output/libmoe4j_nvtx.so" -nt "$source/nvtx.c" ]; then
    gcc -shared -fPIC -O2 -Wall -Wextra -fvisibility=hidden -Wl,-soname,libmoe4j_nvtx.so \
        -Wl,-z,now -Wl,-z,relro -Wl,--build-id=none -s \
        -o "$work/nvtx" "$source/nvtx.c" -ldl
    mv "$work/nvtx" "$output/libmoe4j_nvtx.so"
    echo "bridges: NVTX"
fi

bridge "$(ls "$jni"/libJCublas2-*-linux-x86_64.so)" libcublas.so.12 libcublas.so.13 15
bridge "$(ls "$jni"/libJCudnn-*-linux-x86_64.so)" libcudnn.so.8 libcudnn.so.9 9
