// How a matrix kernel that computes both products waits for rows of activated.
#pragma once
#include "../comm/signal.cuh"

namespace moe {

// Waits until an expert has been counted so often, with acquire. Ends with a fault after the step's bound.
__device__ __forceinline__ void await_rows(const uint32_t* done, uint32_t items, const StepParams& p,
                                           const LocalRank& me) {
    if (ptx::load_acquire_gpu(done) == items) {
        return;
    }
    const uint64_t start = ptx::globaltimer_ns();
    int polls = 0;
    uint32_t seen;
    while ((seen = ptx::load_acquire_gpu(done)) != items) {
        if (++polls == kPollsPerClockRead) {
            polls = 0;
            const uint64_t waited = ptx::globaltimer_ns() - start;
            if (waited > p.timeout_ns) {
                claim_error_record(me, kInternal, kOpExperts, me.rank, items, seen, waited);
                return;
            }
        }
    }
}

}  // namespace moe
