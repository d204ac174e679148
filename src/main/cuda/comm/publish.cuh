// What a step tells the host: soft counters, figures of each peer, and the epoch of the last valid step.
#pragma once
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
        atomicAdd(reinterpret_cast<unsigned long long*>(ptx::global(me.totals + word)), count);
    }
}

// Thread r: what is known of rank r. Plain stores to pinned memory.
__device__ __forceinline__ void publish_peer(const LocalRank& me, int peer) {
    const uint64_t* from = me.peer_totals + peer * kPeerWords;
    PeerStats* to = me.stats + peer;
    to->rows_received = from[kPeerRows];
    to->waited_ns = from[kPeerWaited];
    to->waited_ns_combine = from[kPeerWaitedCombine];
    to->waited_total_ns = from[kPeerWaitedTotal];
}

__device__ __forceinline__ void publish_step(const LocalRank& me) {
    me.totals[kTotalSteps] += 1;
    // why first: a release waits for what this thread has stored before it, a microsecond to the host
    ptx::store_release_sys(&me.error->valid_epoch, me.epoch[kThisStep]);
    me.counters->steps = me.totals[kTotalSteps];
    me.counters->dropped_ids = me.totals[kTotalDropped];
    me.counters->duplicate_ids = me.totals[kTotalDuplicates];
    me.counters->over_capacity_tokens = me.totals[kTotalOverCapacity];
    me.counters->lost_rows = me.totals[kTotalLostRows];
}

}  // namespace moe
