// The results of a slot's local experts, weighted and summed in k order in float32, as one bf16 row
// to the slot's home rank; then one flag per member, also with no rows.
//
// A CTA handles chunks of 2048 columns of a received token, 8 a thread. Tokens without an expert
// here are skipped: the home rank knows by its mask. The flag also tells the peer that this rank has
// read all of the step's receive buffer, which it may then overwrite.
// Reads recv_tokens, recv_ids, recv_weights, packed_row_of, expert_out. Writes combine_rows of all
// ranks, then, with release, combine_flags.
#include "../comm/signal.cuh"
#include "../common/math.cuh"
#include "../layout/recv_buffer.cuh"

namespace moe {

constexpr int kCombineThreads = kRowChunk / 8;
constexpr int kRowsInFlight = 4;

__device__ __forceinline__ void combine_slot(const StepParams& p, const LocalRank& me,
                                             const Symmetric& mine, int source, int token,
                                             int column) {
    const int64_t slot = mine.slot(source, token);
    const int32_t* ids = mine.recv_ids(slot);
    const float* weights = mine.recv_weights(slot);
    float sum[8];
    bool any = false;
    for (int k0 = 0; k0 < p.top_k; k0 += kRowsInFlight) {
        // Ask for several rows before adding the first
        uint4 rows[kRowsInFlight];
        bool here[kRowsInFlight];
#pragma unroll
        for (int i = 0; i < kRowsInFlight; i++) {
            const int k = k0 + i;
            here[i] = k < p.top_k && static_cast<uint32_t>(ids[k]) <
                                         static_cast<uint32_t>(me.local_experts);
            rows[i] = make_uint4(0, 0, 0, 0);
            if (here[i]) {
                const int64_t row = me.packed_row_of[slot * p.top_k + k];
                rows[i] = *reinterpret_cast<const uint4*>(me.expert_out + row * p.hidden_pad + column);
            }
        }
#pragma unroll
        for (int i = 0; i < kRowsInFlight; i++) {
            if (!here[i]) {
                continue;  // why: skipped, not multiplied by zero, which would spread NaN and Inf
            }
            float v[8];
            unpack_bf16(v, rows[i]);
            const float weight = weights[k0 + i];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float term = __fmul_rn(weight, v[j]);
                sum[j] = any ? __fadd_rn(sum[j], term) : term;
            }
            any = true;
        }
    }
    if (any) {
        const Symmetric home = symmetric_of(p, source);
        *reinterpret_cast<uint4*>(home.combine_row(home.slot(me.rank, token)) + column) =
            pack_bf16(sum);
    }
}

}  // namespace moe

extern "C" __global__ __launch_bounds__(moe::kCombineThreads)
void moe_combine_send(const __grid_constant__ moe::StepParams p) {
    using namespace moe;
    __shared__ int32_t first[kMaxRanks + 1];
    const LocalRank& me = p.locals[blockIdx.y];
    const bool silent = has_fault(me);  // why the same in all CTAs: only receivers claim a fault
    const uint64_t members = *me.members;
    const int chunks = row_chunks(p);
    // why packed rows, not received tokens: a CTA that does not arrive may start after the flag is
    // out, when a peer may already write recv_tokens of the next step; this count is local
    const int64_t packed_rows = silent ? 0 : me.expert_offsets[p.experts_per_rank];
    const uint32_t arriving = ctas_with_items(packed_rows * chunks);
    if (blockIdx.x >= arriving) {
        return;
    }

    if (!silent) {
        const Symmetric mine = symmetric_of(p, me.rank);
        number_received_tokens(first, mine, members);
        const int64_t items = static_cast<int64_t>(first[p.num_ranks]) * chunks;
        ReceivedTokens received{first};
        for (int64_t item = blockIdx.x; item < items; item += arriving) {
            const int token = received.locate(static_cast<int>(item / chunks));
            const int column = static_cast<int>(item % chunks) * kRowChunk + threadIdx.x * 8;
            if (column < p.hidden_pad) {
                combine_slot(p, me, mine, received.source, token, column);
            }
        }
    }

    if (arrive_is_last(me.arrivals + kCombineSent, arriving) && threadIdx.x < p.num_ranks &&
        is_member(members, threadIdx.x)) {
        const Symmetric to = symmetric_of(p, threadIdx.x);
        signal_peer(p, me, to.combine_flags() + me.rank, threadIdx.x, silent);
    }
}
