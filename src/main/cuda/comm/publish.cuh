// What a step tells the host: its epoch, soft counters, figures of each peer, and the rows that every
// expert received. Plain stores to pinned memory that order nothing: a host reads them exact once the
// stream has ended the step (docs/ordering.md).
#pragma once
#include "../layout/recv_buffer.cuh"
#include "signal.cuh"
#include <cstddef>

namespace moe {

// Words of LocalRank::totals, in the order of SoftCounters.
enum TotalWord {
    kTotalSteps = 0,
    kTotalDropped = 1,
    kTotalDuplicates = 2,
    kTotalOverCapacity = 3,
    kTotalLostRows = 4
};

static_assert(offsetof(SoftCounters, steps) == 8 * kTotalSteps && offsetof(SoftCounters, lost_rows) == 8 * kTotalLostRows,
              "copied word by word");

__device__ __forceinline__ void add_total(const LocalRank& me, TotalWord word, uint64_t count) {
    if (count != 0) {
        atomicAdd(reinterpret_cast<unsigned long long*>(ptx::global(me.totals + word)), count);
    }
}

// A warp: word by word of what is known of each rank; rows_received comes from elsewhere.
__device__ __forceinline__ void publish_peers(const StepParams& p, const LocalRank& me) {
    for (int i = threadIdx.x % 32; i < p.num_ranks * kPeerWords; i += 32) {
        if (i % kPeerWords != kPeerRows) {
            reinterpret_cast<uint64_t*>(me.stats + i / kPeerWords)[i % kPeerWords] = me.peer_totals[i];
        }
    }
}

// A warp. why no release: the host takes an epoch for valid only if no fault says otherwise, and reads it
// after the stream has ended the step
__device__ __forceinline__ void publish_counters(const LocalRank& me, uint64_t epoch) {
    const int word = threadIdx.x % 32;
    if (word == 31) {
        ptx::store_relaxed_sys(&me.error->valid_epoch, epoch);
    }
    if (word <= kTotalLostRows) {
        uint64_t total = me.totals[word];
        if (word == kTotalSteps) {
            me.totals[word] = ++total;
        }
        reinterpret_cast<uint64_t*>(me.counters)[word] = total;
    }
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

// A warp: a source's tokens with an expert here.
__device__ __forceinline__ void publish_rows(const StepParams& p, const LocalRank& me, const Symmetric& mine,
                                             int source, bool member) {
    const int tokens = member ? mine.recv_tokens()[source] : 0;
    const int32_t* ids = mine.recv_ids(mine.slot(source, 0));
    int rows = 0;
#pragma unroll 2
    for (int token = threadIdx.x % 32; token < tokens; token += 32) {
        bool any = false;
#pragma unroll 4
        for (int k = 0; k < p.top_k; k++) {
            any |= ids[token * p.top_k + k] >= 0;
        }
        rows += any;
    }
    rows = __reduce_add_sync(0xffffffffu, rows);
    if (threadIdx.x % 32 == 0) {
        me.peer_totals[source * kPeerWords + kPeerRows] = rows;
        me.stats[source].rows_received = rows;
    }
}

}  // namespace moe
