// What a step tells the host: its epoch, soft counters, figures of each peer, and the rows that every
// expert received. Plain stores to pinned memory that order nothing: a host reads them exact once the
// stream has ended the step (docs/ordering.md).
#pragma once
#include "../layout/recv_buffer.cuh"
#include "signal.cuh"

namespace moe {

// Words of LocalRank::totals, in the order of SoftCounters.
enum TotalWord {
    kTotalSteps = 0,
    kTotalDropped = 1,
    kTotalDuplicates = 2,
    kTotalOverCapacity = 3,
    kTotalLostRows = 4
};

__device__ __forceinline__ void add_total(const LocalRank& me, TotalWord word, uint64_t count) {
    if (count != 0) {
        atomicAdd(reinterpret_cast<unsigned long long*>(me.totals + word), count);
    }
}

// Thread r: what is known of rank r.
__device__ __forceinline__ void publish_peer(const LocalRank& me, int peer, uint64_t rows) {
    const uint64_t* from = me.peer_totals + peer * kPeerWords;
    PeerStats* to = me.stats + peer;
    to->rows_received = rows;
    to->waited_ns = from[kPeerWaited];
    to->waited_ns_combine = from[kPeerWaitedCombine];
    to->waited_total_ns = from[kPeerWaitedTotal];
}

// One thread. why no release: the host takes an epoch for valid only if no fault says otherwise, and reads
// it after the stream has ended the step
__device__ __forceinline__ void publish_counters(const LocalRank& me, uint64_t epoch) {
    const uint64_t steps = me.totals[kTotalSteps] + 1;
    ptx::store_relaxed_sys(&me.error->valid_epoch, epoch);
    me.totals[kTotalSteps] = steps;
    me.counters->steps = steps;
    me.counters->dropped_ids = me.totals[kTotalDropped];
    me.counters->duplicate_ids = me.totals[kTotalDuplicates];
    me.counters->over_capacity_tokens = me.totals[kTotalOverCapacity];
    me.counters->lost_rows = me.totals[kTotalLostRows];
}

// The first of the ascending slots [from, to) that is not below.
__device__ __forceinline__ int first_row(const int32_t* slots, int from, int to, int64_t slot) {
    while (from < to) {
        const int middle = (from + to) / 2;
        if (slots[middle] < slot) {
            from = middle + 1;
        } else {
            to = middle;
        }
    }
    return from;
}

// Rows of each source and expert, from the row lists, are added to the totals and told. An expert without a
// row costs nothing.
__device__ __forceinline__ void add_received(const StepParams& p, const LocalRank& me, const Symmetric& mine,
                                                 int thread, int threads) {
    for (int expert = thread; expert < me.local_experts; expert += threads) {
        int at = me.expert_offsets[expert];
        const int to = me.expert_offsets[expert + 1];
        for (int source = 0; at < to; source++) {
            const int end = source == p.num_ranks - 1
                                ? to
                                : first_row(me.expert_rows, at, to, mine.slot(source + 1, 0));
            if (end > at) {
                const int64_t word = static_cast<int64_t>(source) * p.experts_per_rank + expert;
                const uint64_t rows = me.received_totals[word] + (end - at);
                me.received_totals[word] = rows;
                me.received_rows[word] = rows;
                at = end;
            }
        }
    }
}

// A whole CTA tells of the step, from what dispatch has left. rows: [R] zeros in shared memory. The step may
// still fail: what becomes of valid_epoch and steps then is the host's (docs/ordering.md).
// why not inlined: one CTA of a grid calls it, and the others need not fetch it
__device__ __noinline__ void publish_step(const StepParams& p, const LocalRank& me, uint64_t members,
                                          int32_t* rows, uint64_t epoch) {
    const Symmetric mine = symmetric_of(p, me.rank);
    const int threads = static_cast<int>(blockDim.x);
    const int lane = threadIdx.x % 32;
    if (threadIdx.x == 32) {
        publish_counters(me, epoch);
    }
    add_received(p, me, mine, threadIdx.x, threads);

    // Tokens of each source with an expert here
    const int slots = p.num_ranks * p.max_tokens;
    for (int slot = threadIdx.x; slot < slots; slot += threads) {
        const int source = slot / p.max_tokens;
        bool any = false;
        if (is_member(members, source) && slot - source * p.max_tokens < mine.recv_tokens()[source]) {
            const int32_t* ids = mine.recv_ids(slot);
#pragma unroll 8
            for (int k = 0; k < p.top_k; k++) {
                any |= ids[k] >= 0;
            }
        }
        const uint32_t lanes = __activemask();
        const uint32_t same = __match_any_sync(lanes, source) & __ballot_sync(lanes, any);
        if (any && lane == __ffs(same) - 1) {
            atomicAdd(rows + source, __popc(same));
        }
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        for (int peer = lane; peer < p.num_ranks; peer += 32) {
            publish_peer(me, peer, rows[peer]);
        }
    }
}

}  // namespace moe
