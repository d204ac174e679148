// Rows and headers to the static slots of every rank, then one flag per destination.
//
// A CTA moves chunks of 2048 columns, 8 a thread: converted to bf16 once, stored once to each
// distinct destination rank (and to home_rows for the shared expert). The CTA of a token's first
// chunk writes its header to every member, so that no header of an older step survives.
// Reads hidden, home_*. Writes recv_rows, recv_ids, recv_weights of all ranks, home_rows; then
// recv_tokens and, with release, dispatch_flags.
#include "../comm/signal.cuh"
#include "../layout/foreign.cuh"
#include "../layout/recv_buffer.cuh"

namespace moe {

constexpr int kSendThreads = kRowChunk / 8;

__device__ __forceinline__ void send_header(const StepParams& p, const LocalRank& me, int token,
                                            uint64_t members) {
    for (int i = threadIdx.x; i < p.num_ranks * p.top_k; i += kSendThreads) {
        const int rank = i / p.top_k;
        const int k = i % p.top_k;
        if (!is_member(members, rank)) {
            continue;
        }
        const int id = me.home_ids[static_cast<int64_t>(token) * p.top_k + k];
        const int local = id - rank * p.experts_per_rank;
        const bool here = id >= 0 && local >= 0 && local < p.experts_per_rank;
        const Symmetric to = symmetric_of(p, rank);
        const int64_t slot = to.slot(me.rank, token);
        to.recv_ids(slot)[k] = here ? local : -1;
        to.recv_weights(slot)[k] = me.home_weights[static_cast<int64_t>(token) * p.top_k + k];
    }
}

__device__ __forceinline__ void send_row_chunk(const StepParams& p, const LocalRank& me, int token,
                                               int column, bool vectors) {
    if (column >= p.hidden_pad) {
        return;
    }
    const uint4 eight = load_8_as_bf16(me.hidden, static_cast<int64_t>(token) * p.hidden + column,
                                       p.hidden - column, p.hidden_dtype, vectors);
    if (me.home_rows != nullptr) {
        *reinterpret_cast<uint4*>(me.home_rows + static_cast<int64_t>(token) * p.hidden_pad + column) =
            eight;
    }
    for (uint64_t mask = me.home_mask[token]; mask != 0; mask &= mask - 1) {
        const Symmetric to = symmetric_of(p, __ffsll(static_cast<long long>(mask)) - 1);
        *reinterpret_cast<uint4*>(to.recv_row(to.slot(me.rank, token)) + column) = eight;
    }
}

}  // namespace moe

extern "C" __global__ __launch_bounds__(moe::kSendThreads, 4)
void moe_dispatch_send(const __grid_constant__ moe::StepParams p) {
    using namespace moe;
    const LocalRank& me = p.locals[blockIdx.y];
    const bool silent = has_fault(me);
    const uint64_t members = *me.members;
    const int num_tokens = *me.home_tokens;
    const int chunks = row_chunks(p);
    const int64_t items = static_cast<int64_t>(num_tokens) * chunks;
    const uint32_t arriving = ctas_with_items(items);
    if (blockIdx.x >= arriving) {
        return;
    }

    if (!silent) {
        const bool vectors = rows_are_vectors(me.hidden, p.hidden, p.hidden_dtype);
        for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
            const int token = static_cast<int>(item / chunks);
            const int chunk = static_cast<int>(item % chunks);
            if (chunk == 0) {
                send_header(p, me, token, members);
            }
            send_row_chunk(p, me, token, chunk * kRowChunk + threadIdx.x * 8, vectors);
        }
    }

    // Every member gets the flag in every step, also with no tokens
    if (arrive_is_last(me.arrivals + kDispatchSent, arriving) && threadIdx.x < p.num_ranks &&
        is_member(members, threadIdx.x)) {
        const Symmetric to = symmetric_of(p, threadIdx.x);
        if (!silent) {
            to.recv_tokens()[me.rank] = num_tokens;
        }
        signal_peer(p, me, to.dispatch_flags() + me.rank, threadIdx.x, silent);
    }
}
