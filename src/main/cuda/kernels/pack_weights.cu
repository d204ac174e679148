// Row-major weights of one expert -> packed bf16 tiles and reordered biases (moe_pack_gate_up,
// moe_pack_down); random packed weights for benches (moe_fill_random). Run when a layer opens.
// A thread writes one 16-byte chunk at a time: 8 columns of one packed row, pad as zero.
#include "../common/math.cuh"
#include "../layout/foreign.cuh"
#include "../layout/pack_params.cuh"
#include "../layout/weight_tiles.cuh"

namespace moe {

constexpr int kPackThreads = 256;

// The packed row and first column of the c-th chunk of an expert, counted in memory order.
struct ChunkPlace {
    int row;
    int column;
};

__device__ __forceinline__ ChunkPlace place_of(int64_t chunk, int column_blocks) {
    const int64_t tile = chunk / (kTileBytes / 16);
    const int within = static_cast<int>(chunk % (kTileBytes / 16));
    const int row = within / 8;
    return {static_cast<int>(tile / column_blocks) * kTileRows + row,
            static_cast<int>(tile % column_blocks) * kTileCols + ((within % 8) ^ (row & 7)) * 8};
}

template <bool kGateUp>
__device__ __forceinline__ void pack(const PackParams& p) {
    const int64_t chunks = static_cast<int64_t>(p.row_tiles) * p.column_blocks * (kTileBytes / 16);
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kPackThreads;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
    const bool first_vectors = rows_are_vectors(p.first, p.cols, p.dtype);
    const bool second_vectors = kGateUp && rows_are_vectors(p.second, p.cols, p.dtype);
    uint4* packed = reinterpret_cast<uint4*>(p.packed);
    for (int64_t c = thread; c < chunks; c += threads) {
        const ChunkPlace at = place_of(c, p.column_blocks);
        const bool second = kGateUp && (at.row & 8) != 0;
        const int row = kGateUp ? gate_up_feature(at.row) : at.row;
        uint4 eight = make_uint4(0, 0, 0, 0);
        if (row < p.rows && at.column < p.cols) {
            eight = load_8_as_bf16(second ? p.second : p.first,
                                   static_cast<int64_t>(row) * p.cols + at.column,
                                   p.cols - at.column, p.dtype,
                                   second ? second_vectors : first_vectors);
        }
        packed[c] = eight;
    }
    if (p.packed_bias != nullptr) {
        for (int64_t r = thread; r < static_cast<int64_t>(p.row_tiles) * kTileRows; r += threads) {
            const bool second = kGateUp && (r & 8) != 0;
            const int row = kGateUp ? gate_up_feature(static_cast<int>(r)) : static_cast<int>(r);
            const float* bias = second ? p.second_bias : p.first_bias;
            p.packed_bias[r] = row < p.rows && bias != nullptr ? bias[row] : 0.0f;
        }
    }
}

// splitmix64's finaliser
__device__ __forceinline__ uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

}  // namespace moe

extern "C" __global__ __launch_bounds__(moe::kPackThreads)
void moe_pack_gate_up(const __grid_constant__ moe::PackParams p) {
    moe::pack<true>(p);
}

extern "C" __global__ __launch_bounds__(moe::kPackThreads)
void moe_pack_down(const __grid_constant__ moe::PackParams p) {
    moe::pack<false>(p);
}

extern "C" __global__ __launch_bounds__(moe::kPackThreads)
void moe_fill_random(const __grid_constant__ moe::FillParams p) {
    using namespace moe;
    const int64_t per_expert = static_cast<int64_t>(p.row_tiles) * p.column_blocks * (kTileBytes / 16);
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kPackThreads;
    uint4* packed = reinterpret_cast<uint4*>(p.packed);
    for (int64_t c = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
         c < per_expert * p.experts; c += threads) {
        const ChunkPlace at = place_of(c % per_expert, p.column_blocks);
        const int row = p.gate_up != 0 ? gate_up_feature(at.row) : at.row;
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint64_t bits = mix(p.seed + 0x9e3779b97f4a7c15ull * static_cast<uint64_t>(8 * c + i));
            const float unit = static_cast<float>(static_cast<int32_t>(bits >> 40)) * 0x1p-23f - 1.0f;
            v[i] = row < p.rows && at.column + i < p.cols ? unit * p.scale : 0.0f;
        }
        packed[c] = pack_bf16(v);
    }
}
