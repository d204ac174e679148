#!/usr/bin/env python3
"""Writes wgmma.cuh: one overload for each number of columns. Run it here after changing the list."""

COLUMNS = list(range(8, 153, 8)) + [176, 224]

HEAD = """// Warpgroup matrix products (PTX ISA 9.7.15). Written by generate_wgmma.py.
#pragma once
#include <cstdint>

namespace moe::ptx {

// Orders register and shared memory accesses before the wgmmas that follow.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending of the newest groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// K-major tile with the 128-byte swizzle: groups of 8 rows lie 1024 bytes apart, the address is a
// multiple of 1024. 16 columns of k further on add 32 bytes, 2 in the descriptor.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t shared_address) {
    return static_cast<uint64_t>((shared_address & 0x3ffff) >> 4) | (1ull << 16) |
           (static_cast<uint64_t>(1024 >> 4) << 32) | (1ull << 62);
}

// As wgmma_descriptor, of every second group of 8 rows.
__device__ __forceinline__ uint64_t wgmma_descriptor_of_alternate_rows(uint32_t shared_address) {
    return static_cast<uint64_t>((shared_address & 0x3ffff) >> 4) | (1ull << 16) |
           (static_cast<uint64_t>(2048 >> 4) << 32) | (1ull << 62);
}

template <int kColumns>
struct Columns {};

// d[64][n] = a[64][16] * b[16][n] + (add ? d : 0), bf16 in shared memory, f32 accumulators, in the first
// columns of d. d[j] is the lane's part of columns 8j .. 8j + 7, as in mma_m16n8k16_bf16; warp w of the
// warpgroup has rows 16w .. 16w + 15.
"""


def overload(n):
    regs = n // 2
    lines = []
    for start in range(0, regs, 8):
        names = ", ".join(f"%{i}" for i in range(start, min(start + 8, regs)))
        lines.append(f'        "{names}{", " if start + 8 < regs else ""}"')
    outs = []
    for j in range(n // 8):
        outs.append(", ".join(f'"+f"(d[{j}][{i}])' for i in range(4)))
    joined = ",\n          ".join(outs)
    text = "template <int kBlocks>\n"
    text += f"__device__ __forceinline__ void wgmma_k16(Columns<{n}>, float (&d)[kBlocks][4], uint64_t a, uint64_t b,\n"
    text += "                                          int add) {\n"
    text += "    asm volatile(\n"
    text += f'        "{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{regs + 2}, 0;\\n"\n'
    text += f'        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{"\n'
    text += "\n".join(lines) + "\n"
    text += f'        "}}, %{regs}, %{regs + 1}, add, 1, 1, 0, 0;\\n}}\\n"\n'
    text += f"        : {joined}\n"
    text += '        : "l"(a), "l"(b), "r"(add));\n}\n'
    return text


if __name__ == "__main__":
    import os

    folder = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(folder, "wgmma.cuh"), "w") as out:
        out.write(HEAD)
        out.write("\n".join(map(overload, COLUMNS)))
        out.write("\n}  // namespace moe::ptx\n")
