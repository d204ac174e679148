// Epoch flags between ranks, the arrival of a rank's CTAs, and the error record.
//
// Writer: payload of all CTAs -> arrive_is_last -> store_release_sys of the epoch by the last CTA.
// Reader: load_acquire_sys until flag >= epoch -> CTA barrier -> payload.
// A rank that met a fault goes silent: it sends no payload and raises its flags to kAbortEpoch, so
// that its peers fail at once instead of waiting for their bound. Nothing traps; graphs finish.
#pragma once
#include "../layout/step_params.cuh"
#include "../ptx/globaltimer.cuh"
#include "../ptx/ld_st.cuh"

namespace moe {

constexpr uint64_t kAbortEpoch = ~0ull;

// Words of LocalRank::arrivals. The last is no counter: 1 once this rank's error record is claimed.
// It stays set until the host clears it.
enum ArrivalWord { kDispatchSent = 0, kCombineSent = 1, kCombineDone = 2, kFaultClaimed = 7 };

constexpr int kPollsPerClockRead = 64;

__device__ __forceinline__ bool has_fault(const LocalRank& me) {
    return ptx::load_relaxed_gpu(me.arrivals + kFaultClaimed) != 0;
}

// The first fault of a rank fills the record; later ones are dropped.
__device__ __forceinline__ void claim_error_record(const LocalRank& me, FaultCode code, FaultOp op,
                                                   int peer, uint64_t expected, uint64_t seen,
                                                   uint64_t waited_ns) {
    if (atomicCAS(me.arrivals + kFaultClaimed, 0u, 1u) != 0) {
        return;
    }
    ErrorRecord* record = me.error;
    record->op = op;
    record->rank = static_cast<uint32_t>(me.rank);
    record->peer = static_cast<uint32_t>(peer);
    record->epoch_expected = expected;
    record->epoch_seen = seen;
    record->waited_ns = waited_ns;
    ptx::store_release_sys(&record->code, static_cast<uint32_t>(code));
}

// One thread waits for one peer. False: a fault, of this wait or of another on this rank.
__device__ __forceinline__ bool wait_for_peer(const uint64_t* flag, uint64_t epoch, int peer,
                                              const StepParams& p, const LocalRank& me, FaultOp op) {
    if (has_fault(me)) {
        return false;  // why: a replay after a fault must not wait for its bound again
    }
    uint64_t seen = ptx::load_acquire_sys(flag);
    if (seen < epoch) {
        const uint64_t start = ptx::globaltimer_ns();
        int polls = 0;
        while (seen < epoch) {
            // why: reading the clock costs more than a poll
            if (++polls == kPollsPerClockRead) {
                polls = 0;
                const uint64_t waited = ptx::globaltimer_ns() - start;
                if (waited > p.timeout_ns) {
                    claim_error_record(me, kTimeout, op, peer, epoch, seen, waited);
                    return false;
                }
                if (has_fault(me)) {
                    return false;
                }
            }
            seen = ptx::load_acquire_sys(flag);
        }
    }
    if (seen == kAbortEpoch) {
        claim_error_record(me, kPeerAbort, op, peer, epoch, seen, 0);
        return false;
    }
    return true;
}

// The whole CTA waits until all ranks' flags have reached the epoch; thread r polls rank r.
__device__ __forceinline__ bool wait_for_all_peers(const uint64_t* flags, uint64_t epoch,
                                                   const StepParams& p, const LocalRank& me,
                                                   FaultOp op) {
    bool arrived = true;
    if (threadIdx.x < p.num_ranks) {
        arrived = wait_for_peer(flags + threadIdx.x, epoch, threadIdx.x, p, me, op);
    }
    // why: the barrier orders the pollers' acquires before every thread's reads of the payload
    return __syncthreads_and(arrived);
}

// CTAs of this rank that have an item, at least one. The others leave at once: arriving costs an
// atomic on one address each, and grids are sized for the largest step.
__device__ __forceinline__ uint32_t ctas_with_items(int64_t items) {
    return static_cast<uint32_t>(items < 1 ? 1 : (items < gridDim.x ? items : gridDim.x));
}

// True in the CTA of this rank (blockIdx.y) that arrives last of the first `arriving` CTAs, with the
// writes of all others ordered before what it does next. The counter is zero again afterwards.
//
// Each CTA: writes -> barrier -> fence.sys by thread 0 -> atomic add. Fences are cumulative, so
// thread 0's fence covers what the barrier ordered before it, at system scope as peers need it. The
// last adder reads the other adds, fences, and its barrier passes the order to all its threads; a
// release store by any of them then carries every CTA's writes.
__device__ __forceinline__ bool arrive_is_last(uint32_t* counter, uint32_t arriving) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::fence_acq_rel_sys();
        last = atomicAdd(counter, 1u) == arriving - 1;
        ptx::fence_acq_rel_sys();
        if (last) {
            *counter = 0;
        }
    }
    __syncthreads();
    return last;
}

}  // namespace moe
