// Epoch flags between ranks, the arrival of a rank's CTAs, abort words and the error record.
//
// Writer: payload of all CTAs -> arrive_is_last -> store_release_sys of the epoch by the last CTA.
// Reader: load_acquire_sys until flag >= epoch -> CTA barrier -> payload.
// A rank that met a fault goes silent: it sends no payload and raises no flag. It tells every member
// at once, by its abort word, so that they fail instead of waiting for their bound. Nothing traps;
// graphs finish.
#pragma once
#include "../layout/recv_buffer.cuh"
#include "../layout/step_params.cuh"
#include "../ptx/globaltimer.cuh"
#include "../ptx/ld_st.cuh"

namespace moe {

// Words of LocalRank::arrivals. The last is no counter: once this rank's error record is claimed, 1 + the
// rank that the fault is put down to. It stays set until the host clears it.
enum ArrivalWord { kDispatchSent = 0, kCombineSent = 1, kCombineDone = 2, kFaultClaimed = 7 };

// Words of LocalRank::epoch.
enum EpochWord { kThisStep = 0, kLastStep = 1 };

// Words of a rank in LocalRank::peer_totals, as in PeerStats.
enum PeerWord { kPeerRows = 0, kPeerWaited = 1, kPeerWaitedCombine = 2, kPeerWaitedTotal = 3, kPeerWords = 4 };

constexpr int kPollsPerClockRead = 64;

__device__ __forceinline__ bool has_fault(const LocalRank& me) {
    return ptx::load_relaxed_gpu(me.arrivals + kFaultClaimed) != 0;
}

// The first fault of a rank fills the record; later ones are dropped. True: it was the first.
__device__ __forceinline__ bool claim_error_record(const LocalRank& me, FaultCode code, FaultOp op,
                                                   int peer, uint64_t expected, uint64_t seen,
                                                   uint64_t waited_ns) {
    if (atomicCAS(me.arrivals + kFaultClaimed, 0u, 1u + static_cast<uint32_t>(peer)) != 0) {
        return false;
    }
    ErrorRecord* record = me.error;
    record->op = op;
    record->rank = static_cast<uint32_t>(me.rank);
    record->peer = static_cast<uint32_t>(peer);
    record->epoch_expected = expected;
    record->epoch_seen = seen;
    record->waited_ns = waited_ns;
    // why not always the word: a dispatch kernel of many CTAs writes it while others wait already
    record->epoch = op == kOpExperts ? me.epoch[kThisStep] : expected;
    ptx::store_release_sys(&record->code, static_cast<uint32_t>(code));
    return true;
}

// The lower half of an abort word: 1 + the generation of the fault. An older one means nothing. The upper
// half is 1 + the rank that the fault is put down to, 0 if the word is the host's.
__device__ __forceinline__ uint32_t abort_of(uint64_t epoch) {
    return static_cast<uint32_t>(epoch >> kGenerationShift) + 1;
}

// Of a rank that has a fault.
__device__ __forceinline__ void tell_peer(const StepParams& p, const LocalRank& me, int peer) {
    if (peer != me.rank && is_member(*me.members, peer)) {
        const uint64_t cause = ptx::load_relaxed_gpu(me.arrivals + kFaultClaimed);
        ptx::store_release_sys(symmetric_of(p, peer).abort_words() + me.rank,
                               cause << 32 | abort_of(me.epoch[kThisStep]));
    }
}

// A wait that failed: the record, and the peers, at once.
// why not inlined: it runs once in a rank's life and would cost every wait its registers
__device__ __noinline__ void fail_wait(const StepParams& p, const LocalRank& me, FaultCode code,
                                       FaultOp op, int peer, uint64_t expected, uint64_t seen,
                                       uint64_t waited_ns) {
    if (claim_error_record(me, code, op, peer, expected, seen, waited_ns)) {
        for (int r = 0; r < p.num_ranks; r++) {
            tell_peer(p, me, r);
        }
    }
}

__device__ __forceinline__ uint64_t bound_of(const StepParams& p, uint64_t epoch) {
    const bool first = (epoch & ((1ull << kGenerationShift) - 1)) == 1;
    return first ? p.first_timeout_ns : p.timeout_ns;
}

// The rank that a member's fault of this generation is put down to, or -1 if none has told of one. why not
// the member: it may be as healthy as this rank, and only have waited longer. A rank that others have given
// up names the one that did.
__device__ __forceinline__ int cause_of_abort(const StepParams& p, const LocalRank& me, uint64_t epoch) {
    const uint64_t* words = symmetric_of(p, me.rank).abort_words();
    const uint64_t members = *me.members;
    for (int r = 0; r < p.num_ranks; r++) {
        const uint64_t word = ptx::load_relaxed_sys(words + r);
        if (static_cast<uint32_t>(word) == abort_of(epoch) && is_member(members, r) && r != me.rank) {
            const int cause = static_cast<int>(word >> 32) - 1;
            return cause >= 0 && cause < p.num_ranks && cause != me.rank ? cause : r;
        }
    }
    return -1;
}

// Ends a wait that lasts: by its bound, by an abort of any member, or because another wait of this
// rank has failed. Asked every kPollsPerClockRead polls, since it costs more than a poll.
// why not inlined: as fail_wait
__device__ __noinline__ bool wait_is_over(const StepParams& p, const LocalRank& me, FaultOp op, int peer,
                                          uint64_t epoch, uint64_t seen, uint64_t start) {
    if (has_fault(me)) {
        return true;
    }
    const uint64_t waited = ptx::globaltimer_ns() - start;
    const int cause = cause_of_abort(p, me, epoch);
    if (cause >= 0) {
        fail_wait(p, me, kPeerAbort, op, cause, epoch, seen, waited);
        return true;
    }
    if (waited > bound_of(p, epoch)) {
        fail_wait(p, me, kTimeout, op, peer, epoch, seen, waited);
        return true;
    }
    return false;
}

// One thread waits for one peer. False: a fault, of this wait or of another on this rank.
__device__ __forceinline__ bool wait_for_peer(const uint64_t* flag, uint64_t epoch, int peer,
                                              const StepParams& p, const LocalRank& me, FaultOp op,
                                              uint64_t& waited_ns) {
    waited_ns = 0;
    if (has_fault(me)) {
        return false;  // why: a replay after a fault must not wait for its bound again
    }
    uint64_t seen = ptx::load_acquire_sys(flag);
    if (seen < epoch) {
        const uint64_t start = ptx::globaltimer_ns();
        int polls = 0;
        while (seen < epoch) {
            if (++polls == kPollsPerClockRead) {
                polls = 0;
                if (wait_is_over(p, me, op, peer, epoch, seen, start)) {
                    return false;
                }
            }
            seen = ptx::load_acquire_sys(flag);
        }
        waited_ns = ptx::globaltimer_ns() - start;
    }
    if (seen != epoch) {
        // A skipped step, a rank that the others went on without, or a foreign writer
        fail_wait(p, me, kEpochMismatch, op, peer, epoch, seen, waited_ns);
        return false;
    }
    return true;
}

// The whole CTA waits until all members' flags have reached the epoch; thread r polls rank r. CTA 0
// notes how long, in the given word of peer_totals.
__device__ __forceinline__ bool wait_for_all_peers(const uint64_t* flags, uint64_t epoch,
                                                   const StepParams& p, const LocalRank& me,
                                                   FaultOp op, PeerWord word) {
    bool arrived = true;
    const int peer = threadIdx.x;
    if (peer < p.num_ranks && is_member(*me.members, peer)) {
        uint64_t waited_ns;
        arrived = wait_for_peer(flags + peer, epoch, peer, p, me, op, waited_ns);
        if (blockIdx.x == 0) {
            me.peer_totals[peer * kPeerWords + word] = waited_ns;
            me.peer_totals[peer * kPeerWords + kPeerWaitedTotal] += waited_ns;
        }
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

// Thread r < R of the CTA that arrived last: the flag for rank r, or word of a fault.
__device__ __forceinline__ void signal_peer(const StepParams& p, const LocalRank& me, uint64_t* flag,
                                            int peer, bool silent) {
    if (silent) {
        tell_peer(p, me, peer);  // why again: a fault of the experts has told nobody yet
    } else {
        ptx::store_release_sys(flag, me.epoch[kThisStep]);
    }
}

}  // namespace moe
