// The masked grouped GEMM with mma.sync: out[row] = epilogue(W[expert of row] . in[row]).
//
// Weights are the A operand (m16), tokens the B operand (n8). A CTA of 8 warps computes one tile of
// 128 outputs x up to 64 rows of one expert; warp w owns outputs 16w .. 16w + 15. A ring of 4 stages
// (16 KiB weights + up to 8 KiB token columns, by cp.async) runs on over the CTA's items, so the
// weight stream does not stop between experts. An item of few rows multiplies 8, 16 or 32 columns.
// Each output is one accumulator over ascending k, 16 at a time, whatever the block: a token's bits
// do not depend on its mates. Rows past the count are neither read nor written.
#pragma once
#include "../common/math.cuh"
#include "../layout/weight_tiles.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/ldmatrix.cuh"
#include "../ptx/mma.cuh"
#include "../scheduler/masked.cuh"

namespace moe {

constexpr int kGemmThreads = 256;
constexpr int kGemmStages = 4;
constexpr int kGemmStageBytes = kTileBytes + scheduler::kTokenBlock * kRowBytes;
constexpr int kGemmSharedBytes = kGemmStages * kGemmStageBytes;
static_assert(kGemmThreads == scheduler::kThreads, "the scheduler's scan uses every thread");
static_assert(kGemmThreads / 32 * 16 == kTileRows, "a warp owns 16 outputs of the tile");
static_assert(kGemmSharedBytes + sizeof(scheduler::Masked::Shared) <= 99 * 1024,
              "the ring fits the shared memory of a consumer GPU (sm_86, sm_89)");

// One GEMM over the experts of a rank.
struct GemmOperands {
    const int32_t* counts;         // [experts] rows of each
    const int32_t* offsets;        // [experts] first packed row, null: 0 (one expert)
    const int32_t* gather;         // input row of each packed row, null: the packed row itself
    const __nv_bfloat16* weights;  // packed
    const float* bias;             // packed order or null
    const __nv_bfloat16* in;       // [.][64 * k_blocks]
    __nv_bfloat16* out;            // [.][out_pitch]
    int experts;
    int row_tiles;
    int k_blocks;
    int out_pitch;
    int features;                  // outputs past these are pad and written as zero
};

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

__device__ __forceinline__ int64_t first_row(const GemmOperands& g, const scheduler::Work& work) {
    return (g.offsets == nullptr ? 0 : g.offsets[work.expert]) +
           static_cast<int64_t>(work.token_block) * scheduler::kTokenBlock;
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
    const int64_t first = first_row(g, work);
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

// A lane's part of an 8 features x 8 tokens matrix, turned so that four lanes store the 16 bytes of
// one token.
__device__ __forceinline__ void store_8x8(__nv_bfloat16* out, int64_t row0, int row_in_item, int rows,
                                          int pitch, int feature0, uint32_t pair) {
    const int lane = threadIdx.x % 32;
    const uint32_t turned = ptx::movmatrix_transposed(pair);
    const int row = row_in_item + lane / 4;
    if (row < rows) {
        *reinterpret_cast<uint32_t*>(out + (row0 + row) * pitch + feature0 + lane % 4 * 2) = turned;
    }
}

// Bias, activation, bf16. Lane: feature lane / 4 of the warp's 8, gate in acc[.][0..1], up in [2..3].
struct GateUpEpilogue {
    int32_t activation;
    float alpha;
    float limit;

    template <int kColumns>
    __device__ __forceinline__ void store(const GemmOperands& g, const scheduler::Work& work,
                                          const float (&acc)[8][4]) const {
        const int lane = threadIdx.x % 32;
        const int warp = threadIdx.x / 32;
        const int packed = work.row_tile * kTileRows + warp * 16 + lane / 4;
        const int feature0 = work.row_tile * (kTileRows / 2) + warp * 8;
        const bool real = feature0 + lane / 4 < g.features;
        float gate_bias = 0.0f;
        float up_bias = 0.0f;
        if (g.bias != nullptr) {
            const float* bias = g.bias + static_cast<int64_t>(work.expert) * g.row_tiles * kTileRows;
            gate_bias = bias[packed];
            up_bias = bias[packed + 8];
        }
        const int64_t row0 = first_row(g, work);
#pragma unroll
        for (int j = 0; j < kColumns / 8; j++) {
            float v[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float gate = acc[j][i];
                float up = acc[j][i + 2];
                if (g.bias != nullptr) {
                    gate = __fadd_rn(gate, gate_bias);
                    up = __fadd_rn(up, up_bias);
                }
                // why: a token with an Inf would leave NaN, not zero, in the pad
                v[i] = real ? activate(gate, up, activation, alpha, limit) : 0.0f;
            }
            store_8x8(g.out, row0, 8 * j, work.rows, g.out_pitch, feature0, pack_bf16(v[0], v[1]));
        }
    }
};

// Bias, bf16. Lane: feature lane / 4 of the warp's 16 in acc[.][0..1], feature lane / 4 + 8 in [2..3].
struct DownEpilogue {
    template <int kColumns>
    __device__ __forceinline__ void store(const GemmOperands& g, const scheduler::Work& work,
                                          const float (&acc)[8][4]) const {
        const int lane = threadIdx.x % 32;
        const int feature0 = work.row_tile * kTileRows + threadIdx.x / 32 * 16;
        if (feature0 >= g.out_pitch) {
            return;  // the last tile may overhang the rows by 64
        }
        const int64_t row0 = first_row(g, work);
        const float* bias =
            g.bias == nullptr
                ? nullptr
                : g.bias + static_cast<int64_t>(work.expert) * g.row_tiles * kTileRows + feature0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int feature = feature0 + 8 * half + lane / 4;
            const float add = bias == nullptr ? 0.0f : bias[8 * half + lane / 4];
#pragma unroll
            for (int j = 0; j < kColumns / 8; j++) {
                float v[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float sum = acc[j][2 * half + i];
                    v[i] = feature >= g.features ? 0.0f
                                                 : (bias == nullptr ? sum : __fadd_rn(sum, add));
                }
                store_8x8(g.out, row0, 8 * j, work.rows, g.out_pitch, feature0 + 8 * half,
                          pack_bf16(v[0], v[1]));
            }
        }
    }
};

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
