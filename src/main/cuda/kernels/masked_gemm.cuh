// The masked grouped GEMM with mma.sync: out[row] = epilogue(W[expert of row] . in[row]).
//
// Weights are the A operand (m16), tokens the B operand (n8). A CTA of 8 warps computes one tile of
// 128 outputs x up to 64 rows of one expert; warp w owns outputs 16w .. 16w + 15. A ring of 4 stages
// (16 KiB weights + up to 8 KiB token columns, by cp.async) runs on over the CTA's items, so the
// weight stream does not stop between experts. An item of few rows multiplies 8, 16 or 32 columns.
// Each output is one accumulator over ascending k, 16 at a time, whatever the block: a token's bits
// do not depend on its mates. Rows past the count are neither read nor written.
#pragma once
#include "../layout/weight_tiles.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/ldmatrix.cuh"
#include "../ptx/mma.cuh"
#include "../scheduler/masked.cuh"
#include "gemm_epilogue.cuh"

namespace moe {

constexpr int kGemmThreads = 256;
constexpr int kGemmStages = 4;
constexpr int kGemmStageBytes = kTileBytes + scheduler::kTokenBlock * kRowBytes;
constexpr int kGemmSharedBytes = kGemmStages * kGemmStageBytes;
static_assert(kGemmThreads == scheduler::kThreads, "the scheduler's scan uses every thread");
static_assert(kGemmThreads / 32 * 16 == kTileRows, "a warp owns 16 outputs of the tile");
static_assert(kGemmSharedBytes + sizeof(scheduler::Masked::Shared) <= 99 * 1024,
              "the ring fits the shared memory of a consumer GPU (sm_86, sm_89)");

// Where the loader stands: an item of the walk and a block of k.
struct LoadCursor {
    int item;
    int k_block;
    int columns;                   // 8, 16, 32 or 64 of B in this item
    const uint8_t* weights;        // tile of k block 0, this thread's first chunk
    const uint8_t* rows[2];        // the two token rows this thread copies, this thread's chunk
    bool row_valid[2];
};

__device__ __forceinline__ int columns_for(int rows) {
    return rows <= 8 ? 8 : (rows <= 16 ? 16 : (rows <= 32 ? 32 : 64));
}

__device__ __forceinline__ void aim(LoadCursor& cursor, const scheduler::Masked& walk,
                                    const GemmOperands& g) {
    if (cursor.item >= walk.items()) {
        return;
    }
    const scheduler::Work work = walk.find(cursor.item);
    cursor.columns = columns_for(work.rows);
    cursor.weights = reinterpret_cast<const uint8_t*>(
                         g.weights + tile_offset(work.expert, work.row_tile, 0, g.row_tiles, g.k_blocks)) +
                     threadIdx.x * 16;
    const int64_t first = g.first_row(work);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = threadIdx.x / 8 + 32 * i;
        cursor.row_valid[i] = row < work.rows;
        const int64_t packed = first + (cursor.row_valid[i] ? row : 0);
        const int64_t source = g.gather == nullptr ? packed : g.gather[packed];
        cursor.rows[i] = reinterpret_cast<const uint8_t*>(g.in + source * (g.k_blocks * kTileCols)) +
                         threadIdx.x % 8 * 16;
    }
}

// Starts the copy of one k block into a stage and steps on, to the CTA's next item after the last.
__device__ __forceinline__ void load_stage(uint32_t stage, LoadCursor& cursor,
                                           const scheduler::Masked& walk, const GemmOperands& g) {
    if (cursor.item < walk.items()) {
        const uint8_t* tile = cursor.weights + static_cast<int64_t>(cursor.k_block) * kTileBytes;
#pragma unroll
        for (int i = 0; i < kTileBytes / 16 / kGemmThreads; i++) {
            const int byte = i * kGemmThreads * 16;
            ptx::cp_async_16(stage + threadIdx.x * 16 + byte, tile + byte, true);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = threadIdx.x / 8 + 32 * i;
            if (row < cursor.columns) {
                ptx::cp_async_16(stage + kTileBytes + swizzled(row, threadIdx.x % 8),
                                 cursor.rows[i] + cursor.k_block * kRowBytes, cursor.row_valid[i]);
            }
        }
        if (++cursor.k_block == g.k_blocks) {
            cursor.k_block = 0;
            cursor.item += gridDim.x;
            aim(cursor, walk, g);
        }
    }
    ptx::cp_async_commit();  // why always: the waits count groups
}

// acc[j] += weights . tokens 8j .. 8j + 7 over the 64 columns of a stage, kColumns / 8 of them.
template <int kColumns>
__device__ __forceinline__ void multiply_stage(float (&acc)[8][4], uint32_t stage) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t a_row = threadIdx.x / 32 * 16 + lane % 16;
    const uint32_t tokens = stage + kTileBytes;
    uint32_t a[4][4];
#pragma unroll
    for (int step = 0; step < 4; step++) {
        ptx::ldmatrix_x4(a[step], stage + swizzled(a_row, 2 * step + lane / 16));
    }
    if constexpr (kColumns == 8) {
        // One load brings the eight tokens' fragments of two k steps
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            uint32_t b[4];
            ptx::ldmatrix_x4(b, tokens + swizzled(lane % 8, 4 * pair + lane / 8));
            ptx::mma_m16n8k16_bf16(acc[0], a[2 * pair], b[0], b[1]);
            ptx::mma_m16n8k16_bf16(acc[0], a[2 * pair + 1], b[2], b[3]);
        }
    } else {
#pragma unroll
        for (int step = 0; step < 4; step++) {
#pragma unroll
            for (int j = 0; j < kColumns / 8; j += 2) {
                uint32_t b[4];
                ptx::ldmatrix_x4(b, tokens + swizzled(8 * j + lane / 16 * 8 + lane % 8,
                                                      2 * step + lane / 8 % 2));
                ptx::mma_m16n8k16_bf16(acc[j], a[step], b[0], b[1]);
                ptx::mma_m16n8k16_bf16(acc[j + 1], a[step], b[2], b[3]);
            }
        }
    }
}

template <int kColumns, class Epilogue>
__device__ __forceinline__ void multiply_item(uint32_t ring, int& stage, LoadCursor& loader,
                                              const scheduler::Masked& walk, const GemmOperands& g,
                                              const scheduler::Work& work, const Epilogue& epilogue) {
    float acc[8][4];
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            acc[j][i] = 0.0f;
        }
    }
    for (int k_block = 0; k_block < g.k_blocks; k_block++) {
        ptx::cp_async_wait<kGemmStages - 2>();
        // why one barrier: it shows this stage's bytes of all threads, and that all have left the
        // stage which is refilled next
        __syncthreads();
        const int refill = (stage + kGemmStages - 1) % kGemmStages;
        load_stage(ring + refill * kGemmStageBytes, loader, walk, g);
        multiply_stage<kColumns>(acc, ring + stage * kGemmStageBytes);
        stage = (stage + 1) % kGemmStages;
    }
    epilogue.template store<kColumns>(g, work, acc);
}

template <class Epilogue>
__device__ __forceinline__ void masked_gemm(const GemmOperands& g, const Epilogue& epilogue) {
    extern __shared__ __align__(128) uint8_t ring_bytes[];
    __shared__ scheduler::Masked::Shared shared;
    const scheduler::Masked walk(shared, g.counts, g.experts, g.row_tiles);
    const uint32_t ring = ptx::shared_address(ring_bytes);

    // Fill the ring but for one stage
    LoadCursor loader;
    loader.item = blockIdx.x;
    loader.k_block = 0;
    aim(loader, walk, g);
    for (int s = 0; s < kGemmStages - 1; s++) {
        load_stage(ring + s * kGemmStageBytes, loader, walk, g);
    }

    int stage = 0;
    for (int item = blockIdx.x; item < walk.items(); item += gridDim.x) {
        const scheduler::Work work = walk.find(item);
        switch (columns_for(work.rows)) {
            case 8: multiply_item<8>(ring, stage, loader, walk, g, work, epilogue); break;
            case 16: multiply_item<16>(ring, stage, loader, walk, g, work, epilogue); break;
            case 32: multiply_item<32>(ring, stage, loader, walk, g, work, epilogue); break;
            default: multiply_item<64>(ring, stage, loader, walk, g, work, epilogue);
        }
    }
    ptx::cp_async_wait<0>();
}

}  // namespace moe
