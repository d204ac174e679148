// Rows in lines that carry the epoch of their step: no flag, no fence. A line is 128 bytes, 30 words of
// payload and the whole epoch, written by eight lanes of a warp with one store instruction each 16
// bytes, and read the same way: who sees the epoch has the payload, as long as 128 aligned bytes of one
// store travel whole (docs/ordering.md says what that rests on).
//
// dispatch_lines of a rank, for each source: the ids of all M tokens, then M rows.
//   ids    line i: word 0 the source's T, then 16-bit entries of tokens i*each .. , K each, as the caller
//          gave them: global expert id, kNoEntry if it is none; past T anything. The same for every
//          destination, so that they can leave before anything is known of them
//   rows   K weights (an even number of words), then Hp bf16
// combine_lines of a rank, for each expert rank: M rows of Hp bf16.
// All id lines are sent in every step, rows where the token has an expert of the rank.
#pragma once
#include "../common/math.cuh"
#include "../layout/foreign.cuh"
#include "signal.cuh"

namespace moe {

constexpr int kLineBytes = 128;
constexpr int kLineWords = 30;
constexpr int kLanesPerLine = 8;
constexpr int kWarpLines = 32 / kLanesPerLine;  // a warp moves so many lines at once: a piece
constexpr int kIdsPerLine = 2 * (kLineWords - 1);
constexpr uint32_t kNoEntry = 0xffff;

// Words of a token's row that stand before its columns.
__host__ __device__ constexpr int header_words(int top_k) { return (top_k + 1) / 2 * 2; }

__host__ __device__ constexpr int tokens_per_id_line(int top_k) { return kIdsPerLine / top_k; }

__host__ __device__ constexpr int id_lines(int max_tokens, int top_k) {
    return (max_tokens + tokens_per_id_line(top_k) - 1) / tokens_per_id_line(top_k);
}

__host__ __device__ constexpr int lines_of_words(int words) {
    return (words + kLineWords - 1) / kLineWords;
}

__host__ __device__ constexpr int dispatch_row_lines(int hidden_pad, int top_k) {
    return lines_of_words(header_words(top_k) + hidden_pad / 2);
}

__host__ __device__ constexpr int combine_row_lines(int hidden_pad) {
    return lines_of_words(hidden_pad / 2);
}

// Lines of one source.
__host__ __device__ constexpr int64_t dispatch_lines_of(int max_tokens, int hidden_pad, int top_k) {
    return id_lines(max_tokens, top_k) +
           static_cast<int64_t>(max_tokens) * dispatch_row_lines(hidden_pad, top_k);
}

// A local rank and the regions of all ranks, in shared memory: what bind wrote and no step changes, so
// that a kernel may read it before the one before it has ended.
struct Here : LocalRank {
    uint8_t* regions[kMaxRanks];
    int64_t source_bytes;      // dispatch lines of a source
    int32_t ids_per_line;      // tokens of an id line
    int32_t id_line_count;
    int32_t row_lines;         // of a dispatched row
    int32_t result_lines;      // of a combined row
    Divider by_top_k;
    Divider by_experts;        // of a rank
    Divider by_ids_per_line;
    Divider by_id_lines;       // of a source
    Divider by_row_pieces;     // of a row in lines
    Divider by_plain_pieces;   // of 512 bytes

    __device__ __forceinline__ Symmetric of(const StepParams& p, int rank) const {
        return Symmetric{regions[rank], p};
    }
    __device__ __forceinline__ Symmetric own(const StepParams& p) const { return of(p, this->rank); }
};

// Ends with a barrier. meanwhile: called while memory is read.
template <class Meanwhile>
__device__ __forceinline__ void load_here(Here& here, const StepParams& p, Meanwhile meanwhile) {
    static_assert(sizeof(LocalRank) % 8 == 0 && sizeof(LocalRank) / 8 <= 64, "a thread for each word of 8 bytes");
    const int thread = threadIdx.x;
    const int rank = thread - 64;
    uint64_t word = 0;
    uint8_t* region = nullptr;
    if (thread < static_cast<int>(sizeof(LocalRank) / 8)) {
        word = reinterpret_cast<const uint64_t*>(ptx::global(p.locals + blockIdx.y))[thread];
    } else if (rank >= 0 && rank < p.num_ranks) {
        region = ptx::global(p.ranks)[rank].symmetric;
    }
    meanwhile();
    // Numbers of the configuration, a divisor a thread
    const int which = thread - 32 * 6;
    if (which >= 0 && which < 6) {
        const int each = Divider::of(p.top_k).quotient(kIdsPerLine);
        const int lines = Divider::of(each).quotient(p.max_tokens + each - 1);
        const int row_lines = dispatch_row_lines(p.hidden_pad, p.top_k);
        int divisor = (p.hidden_pad / 2 + 127) / 128;
        divisor = which == 0 ? p.top_k : divisor;
        divisor = which == 1 ? p.experts_per_rank : divisor;
        divisor = which == 2 ? each : divisor;
        divisor = which == 3 ? lines : divisor;
        divisor = which == 4 ? (row_lines + kWarpLines - 1) / kWarpLines : divisor;
        (&here.by_top_k)[which] = Divider::of(divisor);
        if (which == 0) {
            here.ids_per_line = each;
            here.id_line_count = lines;
            here.row_lines = row_lines;
            here.result_lines = combine_row_lines(p.hidden_pad);
            here.source_bytes = (lines + static_cast<int64_t>(p.max_tokens) * row_lines) * kLineBytes;
        }
    }
    if (thread < static_cast<int>(sizeof(LocalRank) / 8)) {
        reinterpret_cast<uint64_t*>(static_cast<LocalRank*>(&here))[thread] = word;
    } else if (region != nullptr) {
        here.regions[rank] = region;
    }
    __syncthreads();
}

__device__ __forceinline__ void load_here(Here& here, const StepParams& p) {
    load_here(here, p, [] {});
}

// A warp's lines, all lanes together. why the barrier: only a warp that is converged stores or loads a
// line in one transaction; in two, a reader may see the epoch and half of the payload of an older step.
__device__ __forceinline__ void store_lines(uint8_t* address, uint4 value, bool active) {
    __syncwarp();
    if (active) {
        ptx::store_line_sys(address, value);
    }
}

__device__ __forceinline__ void load_lines(uint4& value, const uint8_t* address, bool active) {
    __syncwarp();
    if (active) {
        value = ptx::load_line_sys(address);
    }
}

struct Lines {
    uint8_t* base;
    const StepParams& p;
    const Here& here;

    __device__ __forceinline__ Lines(const StepParams& p, const Here& here, int rank)
        : base(here.regions[rank]), p(p), here(here) {}

    __device__ __forceinline__ uint8_t* ids(int source, int line) const {
        return base + p.off_dispatch_lines + source * here.source_bytes + line * kLineBytes;
    }
    // In every region.
    __device__ __forceinline__ static int64_t row_offset(const StepParams& p, const Here& here, int source, int token) {
        return p.off_dispatch_lines + source * here.source_bytes +
               (here.id_line_count + static_cast<int64_t>(token) * here.row_lines) * kLineBytes;
    }
    __device__ __forceinline__ uint8_t* row(int source, int token) const {
        return base + row_offset(p, here, source, token);
    }
    __device__ __forceinline__ uint8_t* result(int rank, int token) const {
        return base + p.off_combine_lines +
               (static_cast<int64_t>(rank) * p.max_tokens + token) * here.result_lines * kLineBytes;
    }
};

// This lane's part of a piece: 16 bytes of a line, whose first word is `word` of what the lines hold.
struct LanePart {
    int byte;  // in the slot
    int word;
    bool tail;  // the last of the line: two words and the epoch

    __device__ __forceinline__ explicit LanePart(int piece) : LanePart(piece, static_cast<int>(threadIdx.x)) {}
    __device__ __forceinline__ LanePart(int piece, int thread) {
        const int lane = thread % 32;
        const int line = piece * kWarpLines + lane / kLanesPerLine;
        const int part = lane % kLanesPerLine;
        byte = line * kLineBytes + part * 16;
        word = line * kLineWords + part * 4;
        tail = part == kLanesPerLine - 1;
    }
};

__device__ __forceinline__ uint4 with_epoch(uint4 v, bool tail, uint64_t epoch) {
    if (tail) {
        v.z = static_cast<uint32_t>(epoch);
        v.w = static_cast<uint32_t>(epoch >> 32);
    }
    return v;
}

__device__ __forceinline__ uint64_t epoch_in(uint4 v) { return static_cast<uint64_t>(v.w) << 32 | v.z; }

// A warp's bounded wait for lines. One for all lines that it waits for together.
struct LineWait {
    const StepParams& p;
    const LocalRank& me;
    FaultOp op;
    uint64_t epoch;
    uint64_t start = 0;
    int polls = 0;

    __device__ __forceinline__ LineWait(const StepParams& p, const LocalRank& me, FaultOp op, uint64_t epoch)
        : p(p), me(me), op(op), epoch(epoch) {}

    // After a poll that missed something; the same in all lanes. late: this lane holds the epoch of a line
    // that is not there, from peer. False: give up.
    __device__ __forceinline__ bool again(bool late, int peer, uint64_t seen) {
        if (polls == 0 && start == 0) {
            start = ptx::globaltimer_ns();
        }
        if (++polls < kPollsPerClockRead) {
            return true;
        }
        polls = 0;
        const uint32_t who = __ballot_sync(0xffffffffu, late);
        bool over = false;
        if (who != 0 && threadIdx.x % 32 == __ffs(who) - 1) {
            if (seen > epoch) {
                fail_wait(p, me, kEpochMismatch, op, peer, epoch, seen, ptx::globaltimer_ns() - start);
                over = true;
            } else {
                over = wait_is_over(p, me, op, peer, epoch, seen, start);
            }
        }
        return !__any_sync(0xffffffffu, over);
    }

    __device__ __forceinline__ uint64_t waited_ns() const {
        return start == 0 ? 0 : ptx::globaltimer_ns() - start;
    }
};

// Elements index and index + 1 as a word of bf16, those from valid on zero and not read.
__device__ __forceinline__ uint32_t load_2_as_bf16(const void* base, int64_t index, int valid, int32_t dtype) {
    if (dtype == kBF16) {
        const uint16_t* from = static_cast<const uint16_t*>(base) + index;
        const uint32_t low = valid > 0 ? from[0] : 0;
        return low | (valid > 1 ? static_cast<uint32_t>(from[1]) << 16 : 0);
    }
    return pack_bf16(valid > 0 ? load_element(base, index, dtype) : 0.0f,
                     valid > 1 ? load_element(base, index + 1, dtype) : 0.0f);
}

}  // namespace moe
