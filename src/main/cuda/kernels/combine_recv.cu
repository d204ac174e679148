// out[t] = sum over ranks of combine_rows[rank][t] (+ shared expert) (+ out[t]), then the step's
// counters.
//
// A CTA handles chunks of 2048 columns of a token, 8 a thread; rows are added in rank order and
// ranks without an expert of the token are skipped. The shared expert's gate, a dot product over H,
// is summed in float64 by a fixed tree in each CTA that needs it. After a fault nothing is written
// and valid_epoch stays; the last CTA tells the host of the step.
// Reads combine_flags, combine_rows, home_mask, hidden, shared_out. Writes out rows < T, counters.
#include "../comm/publish.cuh"
#include "../comm/signal.cuh"
#include "../common/math.cuh"
#include "../layout/foreign.cuh"
#include "../layout/recv_buffer.cuh"

namespace moe {

constexpr int kOutThreads = kRowChunk / 8;

// sigmoid(shared_gate . hidden[token]), the same in all threads. Two barriers.
__device__ __forceinline__ float shared_scale(const StepParams& p, const LocalRank& me, int token,
                                              bool vectors, double* warp_sums) {
    double sum = 0.0;
    for (int column = threadIdx.x * 8; column < p.hidden; column += kRowChunk) {
        float x[8];
        load_8(x, me.hidden, static_cast<int64_t>(token) * p.hidden + column, p.hidden - column,
               p.hidden_dtype, vectors);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (column + i < p.hidden) {
                sum = __fma_rn(static_cast<double>(x[i]),
                               static_cast<double>(p.shared_gate[column + i]), sum);
            }
        }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
        warp_sums[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    sum = warp_sums[0];
#pragma unroll
    for (int w = 1; w < kOutThreads / 32; w++) {
        sum = __dadd_rn(sum, warp_sums[w]);
    }
    __syncthreads();  // why: the next token overwrites warp_sums
    return sigmoid(__double2float_rn(sum));
}

__device__ __forceinline__ void combine_token(const StepParams& p, const LocalRank& me,
                                              const Symmetric& mine, int token, int column,
                                              float scale, bool vectors) {
    float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    bool any = false;
    for (uint64_t mask = me.home_mask[token]; mask != 0; mask &= mask - 1) {
        const int rank = __ffsll(static_cast<long long>(mask)) - 1;
        float v[8];
        unpack_bf16(v, *reinterpret_cast<const uint4*>(mine.combine_row(mine.slot(rank, token)) +
                                                       column));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum[i] = any ? __fadd_rn(sum[i], v[i]) : v[i];
        }
        any = true;
    }

    if (me.shared_out != nullptr) {
        float v[8];
        unpack_bf16(v, *reinterpret_cast<const uint4*>(
                           me.shared_out + static_cast<int64_t>(token) * p.hidden_pad + column));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum[i] = __fadd_rn(sum[i], __fmul_rn(scale, v[i]));
        }
    }
    const int64_t at = static_cast<int64_t>(token) * p.hidden + column;
    const int valid = p.hidden - column;
    if (me.accumulate != 0) {
        float v[8];
        load_8(v, me.out, at, valid, p.out_dtype, vectors);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum[i] = __fadd_rn(sum[i], v[i]);
        }
    }
    store_8(me.out, at, sum, valid, p.out_dtype, vectors);
}

// What the last CTA tells the host. why not inlined: it would cost the rows their registers
__device__ __noinline__ void tell_of_whole_step(const StepParams& p, const LocalRank& me) {
    if (threadIdx.x < 32) {
        publish_peers(p, me);
    } else if (threadIdx.x < 64) {
        publish_counters(me, me.epoch[kThisStep]);
    }
    for (int peer = threadIdx.x; peer < p.num_ranks; peer += kOutThreads) {
        me.stats[peer].rows_received = me.peer_totals[peer * kPeerWords + kPeerRows];
    }
    for (int i = threadIdx.x; i < p.num_ranks * p.experts_per_rank; i += kOutThreads) {
        me.received_rows[i] = me.received_totals[i];
    }
}

}  // namespace moe

extern "C" __global__ __launch_bounds__(moe::kOutThreads)
void moe_combine_recv(const __grid_constant__ moe::StepParams p) {
    using namespace moe;
    __shared__ double warp_sums[kOutThreads / 32];
    const LocalRank& me = p.locals[blockIdx.y];
    const Symmetric mine = symmetric_of(p, me.rank);
    const int chunks = row_chunks(p);
    const int64_t items = static_cast<int64_t>(*me.home_tokens) * chunks;
    const uint32_t arriving = ctas_with_items(items);
    if (blockIdx.x >= arriving) {
        return;
    }

    if (wait_for_all_peers(mine.combine_flags(), me.epoch[kThisStep], p, me, kOpCombineRecv,
                           kPeerWaitedCombine)) {
        const bool in_vectors = rows_are_vectors(me.hidden, p.hidden, p.hidden_dtype);
        const bool out_vectors = rows_are_vectors(me.out, p.hidden, p.out_dtype);
        const bool gated = me.shared_out != nullptr && p.shared_gate != nullptr;
        for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
            const int token = static_cast<int>(item / chunks);
            const int column = static_cast<int>(item % chunks) * kRowChunk + threadIdx.x * 8;
            const float scale = gated ? shared_scale(p, me, token, in_vectors, warp_sums) : 1.0f;
            if (column < p.hidden) {
                combine_token(p, me, mine, token, column, scale, out_vectors);
            }
        }
    }

    if (arrive_is_last(me.arrivals + kCombineDone, arriving)) {
        if (!has_fault(me)) {
            tell_of_whole_step(p, me);
        }
        if (threadIdx.x == 0) {
            me.epoch[kLastStep] = me.epoch[kThisStep];
        }
    }
}
