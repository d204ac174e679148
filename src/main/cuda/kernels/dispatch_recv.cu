// Waits for all ranks' rows and headers, then builds counts (moe_dispatch_recv), offsets and row
// lists (moe_dispatch_index), all in slot order and without atomics.
//
// One CTA per local expert, striding. A thread looks at one received token at a time: all K ids of
// its header at once, so an expert named twice by a token gives one row, which both mentions share.
// why two kernels: an expert's first row needs the counts of all experts before it.
// Reads recv_tokens, recv_ids. Writes expert_counts; expert_offsets, expert_rows, packed_row_of,
// received_totals, and the rows of each source in peer_totals.
#include "../comm/signal.cuh"
#include "../layout/recv_buffer.cuh"

namespace moe {

constexpr int kIndexThreads = 256;
constexpr int kIndexWarps = kIndexThreads / 32;

// Bit k: header entry k of the slot names the expert. An id out of range matches no expert.
__device__ __forceinline__ uint32_t mentions(const Symmetric& mine, int64_t slot, int expert) {
    const int32_t* ids = mine.recv_ids(slot);
    const int top_k = mine.p.top_k;
    uint32_t mask = 0;
    if (top_k % 4 == 0) {
        for (int k = 0; k < top_k; k += 4) {
            const int4 four = *reinterpret_cast<const int4*>(ids + k);
            mask |= (four.x == expert ? 1u : 0u) << k | (four.y == expert ? 2u : 0u) << k |
                    (four.z == expert ? 4u : 0u) << k | (four.w == expert ? 8u : 0u) << k;
        }
    } else {
        for (int k = 0; k < top_k; k++) {
            mask |= (ids[k] == expert ? 1u : 0u) << k;
        }
    }
    return mask;
}

// Sum over the CTA, the same in every thread. Ends with a barrier.
__device__ __forceinline__ int cta_sum(int value, int32_t* warp_sums) {
    const int warp_total = __reduce_add_sync(0xffffffffu, value);
    if (threadIdx.x % 32 == 0) {
        warp_sums[threadIdx.x / 32] = warp_total;
    }
    __syncthreads();
    int sum = 0;
#pragma unroll
    for (int w = 0; w < kIndexWarps; w++) {
        sum += warp_sums[w];
    }
    __syncthreads();
    return sum;
}

// The rows of each source, for PeerStats: CTA c looks at sources c, c + gridDim.x, ..
__device__ __forceinline__ void count_source_rows(const LocalRank& me, const Symmetric& mine,
                                                  const int32_t* first, int32_t* sum) {
    const int top_k = mine.p.top_k;
    for (int source = blockIdx.x; source < mine.p.num_ranks; source += gridDim.x) {
        if (threadIdx.x == 0) {
            *sum = 0;
        }
        __syncthreads();
        int rows = 0;
        for (int token = threadIdx.x; token < first[source + 1] - first[source]; token += kIndexThreads) {
            const int32_t* ids = mine.recv_ids(mine.slot(source, token));
            bool any = false;
            for (int k = 0; k < top_k; k++) {
                any |= static_cast<uint32_t>(ids[k]) < static_cast<uint32_t>(me.local_experts);
            }
            rows += any;
        }
        rows = __reduce_add_sync(0xffffffffu, rows);
        if (threadIdx.x % 32 == 0) {
            atomicAdd(sum, rows);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            me.peer_totals[source * kPeerWords + kPeerRows] = *sum;
        }
        __syncthreads();
    }
}

}  // namespace moe

extern "C" __global__ __launch_bounds__(moe::kIndexThreads)
void moe_dispatch_recv(const __grid_constant__ moe::StepParams p) {
    using namespace moe;
    __shared__ int32_t first[kMaxRanks + 1];
    __shared__ int32_t warp_sums[kIndexWarps];
    const LocalRank& me = p.locals[blockIdx.y];
    const Symmetric mine = symmetric_of(p, me.rank);
    if (!wait_for_all_peers(mine.dispatch_flags(), me.epoch[kThisStep], p, me, kOpDispatchRecv,
                            kPeerWaited)) {
        return;  // moe_dispatch_index sees the fault and leaves no work to the experts
    }

    number_received_tokens(first, mine, *me.members);
    const int tokens = first[p.num_ranks];
    for (int expert = blockIdx.x; expert < p.experts_per_rank; expert += gridDim.x) {
        ReceivedTokens received{first};
        int count = 0;
        for (int i = threadIdx.x; expert < me.local_experts && i < tokens; i += kIndexThreads) {
            const int token = received.locate(i);
            count += mentions(mine, mine.slot(received.source, token), expert) != 0;
        }
        count = cta_sum(count, warp_sums);
        if (threadIdx.x == 0) {
            me.expert_counts[expert] = count;
        }
    }
}

extern "C" __global__ __launch_bounds__(moe::kIndexThreads)
void moe_dispatch_index(const __grid_constant__ moe::StepParams p) {
    using namespace moe;
    __shared__ int32_t first[kMaxRanks + 1];
    __shared__ int32_t warp_sums[kIndexWarps];
    __shared__ int32_t by_source[kMaxRanks];
    const LocalRank& me = p.locals[blockIdx.y];
    const Symmetric mine = symmetric_of(p, me.rank);
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;

    // After a fault the headers may be of any step: no expert gets a row
    if (has_fault(me)) {
        for (int e = blockIdx.x * kIndexThreads + threadIdx.x; e <= p.experts_per_rank;
             e += gridDim.x * kIndexThreads) {
            me.expert_offsets[e] = 0;
            if (e < p.experts_per_rank) {
                me.expert_counts[e] = 0;
            }
        }
        return;
    }

    number_received_tokens(first, mine, *me.members);
    const int tokens = first[p.num_ranks];
    for (int expert = blockIdx.x; expert < p.experts_per_rank; expert += gridDim.x) {
        // The rows of all experts before this one
        int before = 0;
        for (int e = threadIdx.x; e < expert; e += kIndexThreads) {
            before += me.expert_counts[e];
        }
        const int offset = cta_sum(before, warp_sums);
        const int count = me.expert_counts[expert];
        if (threadIdx.x == 0) {
            me.expert_offsets[expert] = offset;
            if (expert == p.experts_per_rank - 1) {
                me.expert_offsets[expert + 1] = offset + count;
            }
        }

        // Rows in slot order: 256 tokens at a time, numbered by ballots
        ReceivedTokens received{first};
        int row = offset;
        for (int source = threadIdx.x; source < p.num_ranks; source += kIndexThreads) {
            by_source[source] = 0;
        }
        __syncthreads();
        for (int base = 0; base < tokens && row < offset + count; base += kIndexThreads) {
            const int i = base + threadIdx.x;
            int64_t slot = 0;
            uint32_t named = 0;
            if (i < tokens) {
                const int token = received.locate(i);
                slot = mine.slot(received.source, token);
                named = mentions(mine, slot, expert);
            }
            const uint32_t rows = __ballot_sync(0xffffffffu, named != 0);
            if (lane == 0) {
                warp_sums[warp] = __popc(rows);
            }
            __syncthreads();
            int mine_row = row + __popc(rows & ((1u << lane) - 1));
#pragma unroll
            for (int w = 0; w < kIndexWarps; w++) {
                mine_row += w < warp ? warp_sums[w] : 0;
                row += warp_sums[w];
            }
            __syncthreads();
            if (named != 0) {
                atomicAdd(by_source + received.source, 1);
                me.expert_rows[mine_row] = static_cast<int32_t>(slot);
                for (uint32_t left = named; left != 0; left &= left - 1) {
                    me.packed_row_of[slot * p.top_k + __ffs(left) - 1] = mine_row;
                }
            }
        }
        __syncthreads();
        for (int source = threadIdx.x; source < p.num_ranks; source += kIndexThreads) {
            me.received_totals[source * p.experts_per_rank + expert] += by_source[source];
        }
        __syncthreads();
    }
    count_source_rows(me, mine, first, by_source);
}
