// Parameters of the kernels outside a step: packing and filling weights, the test of lines when a group
// opens, the gate of a test.
#pragma once
#include "step_params.cuh"

namespace moe {

// One expert. gate_up: first = gate [rows][cols], second = up; rows = I, cols = H. down: first =
// down [rows][cols]; rows = H, cols = I. row_tiles and column_blocks are those of the packed form.
struct PackParams {
    const void* first;        // row-major, dtype
    const void* second;       // gate_up only
    const float* first_bias;  // [rows] or null
    const float* second_bias; // gate_up only, or null
    __nv_bfloat16* packed;    // this expert's tiles
    float* packed_bias;       // this expert's [row_tiles * 128] or null; pad entries become zero
    int32_t dtype;            // DType
    int32_t rows;
    int32_t cols;
    int32_t row_tiles;
    int32_t column_blocks;
    int32_t pad0;
};
static_assert(sizeof(PackParams) == 72, "Java twin");

// Uniform values in [-scale, scale) by a hash of (seed, position); pad rows and columns are zero.
struct FillParams {
    __nv_bfloat16* packed;
    uint64_t seed;
    int32_t experts;
    int32_t rows;             // I for gate_up, H for down
    int32_t cols;             // H for gate_up, I for down
    int32_t row_tiles;
    int32_t column_blocks;
    int32_t gate_up;          // 1: gate_up, 0: down
    float scale;
    int32_t pad0;
};
static_assert(sizeof(FillParams) == 48, "Java twin");

struct GateParams {
    const uint32_t* word;     // mapped host word; the gate opens when it is nonzero
    uint64_t timeout_ns;
};
static_assert(sizeof(GateParams) == 16, "Java twin");

// What a rank has seen of a peer's lines: kernels/line_test.cu.
struct LineFinding {
    uint64_t torn;     // lines that held an epoch and not its payload
    uint64_t missing;  // lines whose last epoch did not come in time
    uint64_t epochs;   // how often a line was seen to change
    uint64_t pad0;
};
static_assert(sizeof(LineFinding) == 32, "Java twin");

struct LineTestParams {
    const RankView* ranks;    // [R]
    LineFinding* findings;    // [R]
    uint64_t off_tiles;       // the self-test's tiles in a region, one for each source, cleared
    uint64_t hammer_ns;       // how long to write
    uint64_t timeout_ns;      // bound of the whole
    int32_t num_ranks;
    int32_t rank;
    int32_t halves;           // for tests, LineForm: lines of these forms are stored in two transactions
    int32_t pad0;
};
static_assert(sizeof(LineTestParams) == 56, "Java twin");

}  // namespace moe
