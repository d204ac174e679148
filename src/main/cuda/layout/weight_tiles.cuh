// Addresses in packed weights and in tiles with the 128-byte swizzle; see step_params.cuh.
#pragma once
#include "step_params.cuh"

namespace moe {

constexpr int kTileElements = kTileRows * kTileCols;
constexpr int kRowBytes = kTileCols * 2;  // of a tile row, and of 64 columns of a token
static_assert(kRowBytes == 128, "the swizzle permutes the 8 chunks of 16 bytes of a 128-byte row");

__host__ __device__ constexpr int gate_up_row_tiles(int intermediate_pad) {
    return 2 * intermediate_pad / kTileRows;
}

__host__ __device__ constexpr int down_row_tiles(int hidden_pad) {
    return (hidden_pad + kTileRows - 1) / kTileRows;
}

// Elements before the tile (expert, row tile, column block).
// why: 64-bit, an expert's tiles times 256 experts pass 2^31 elements
__host__ __device__ constexpr int64_t tile_offset(int64_t expert, int row_tile, int column_block,
                                                  int row_tiles, int column_blocks) {
    return ((expert * row_tiles + row_tile) * column_blocks + column_block) * kTileElements;
}

// Byte of chunk c of row r within a tile.
__host__ __device__ constexpr uint32_t swizzled(uint32_t row, uint32_t chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Packed gate/up row p holds this feature, of gate if (p & 8) == 0, else of up.
__host__ __device__ constexpr int gate_up_feature(int packed_row) {
    return packed_row / 16 * 8 + packed_row % 8;
}

}  // namespace moe
