// Dispatch in one kernel: routing, rows, counts, offsets and row lists.
//
// moe_dispatch_local    one rank and no peer: rows go to their slots, nobody waits
// moe_dispatch_lines    several ranks, rows travel in lines (comm/lines.cuh): send, wait and unpack
// moe_dispatch_send_lines, moe_dispatch_recv_lines    the same in two, for work in between
//
// Most CTAs move rows, 512 bytes or four lines a warp at a time. The others read the ids: they sanitise
// the caller's, send and receive them, and build the lists, from one bit per (expert, slot) in shared
// memory, so in slot order and without a wait for another CTA. With peers that is the first CTA alone, so
// that a fault leaves either all lists or no row; without, the last ones share the experts.
// What is sent comes first, straight from one round of loads; all that only this rank needs is done while
// the lines travel.
// why all CTAs of a kernel that waits have to be resident: they wait for a peer, which may be in the
// same grid. The host keeps gridDim.x * ranks at the number of multiprocessors or below.
#include "../comm/lines.cuh"
#include "../comm/publish.cuh"
#include "../comm/signal.cuh"
#include "../layout/foreign.cuh"
#include "../ptx/grid_dependency.cuh"

namespace moe {

// Trace points, for measurements: clock of a warp's first lane.
#ifdef MOE_TRACE
constexpr int kTracePoints = 12;
__device__ long long g_trace[256][16][kTracePoints];
__device__ __forceinline__ void trace(int point) {
    if (threadIdx.x % 32 == 0) {
        g_trace[blockIdx.x][threadIdx.x / 32][point] = clock64();
    }
}
#else
__device__ __forceinline__ void trace(int) {}
#endif

constexpr int kFusedThreads = 512;
constexpr int kFusedWarps = kFusedThreads / 32;
constexpr int kListBits = 2048;      // words: (expert, 32 slots)
constexpr int kCachedEntries = 4096;
constexpr int kCachedLines = 128;    // of ids, of all sources
constexpr int kLocalExperts = 1024;  // most experts of a rank
constexpr int kPiecesInFlight = 4;   // of a warp
constexpr int kUnpackedAtOnce = 4;
constexpr int kEagerTokens = 128;    // whose rows are read before T is known

// What a dispatch kernel takes its tokens from: the caller's ids if it sanitises, else route's.
struct HomeTokens {
    const int32_t* ids;
    const float* weights;
    int asked;
    int count;
    bool sanitise;
    bool silent;  // after a fault
    uint64_t epoch;
    uint64_t members;
};

// One round of loads. why plain ones, for the fault word too: the warps of a CTA share them in L1, and
// whoever wrote them has ended.
template <bool kFused>
__device__ __forceinline__ HomeTokens home_tokens(const StepParams& p, const Here& me) {
    HomeTokens home;
    home.sanitise = kFused && p.routing_input == kTopK;
    home.ids = home.sanitise ? me.topk_ids : me.home_ids;
    home.weights = home.sanitise ? me.topk_weights : me.home_weights;
    home.asked = home.sanitise ? *me.token_count : *me.home_tokens;
    home.epoch = home.sanitise ? me.epoch[kLastStep] + 1 : me.epoch[kThisStep];
    home.members = *me.members;
    home.silent = me.arrivals[kFaultClaimed] != 0;
    home.count = clamp_tokens(home.asked, p.max_tokens);
    return home;
}

// ------------------------------------------------------------------------------------- rows

// A piece of a row: with peers four lines, which hold the weights before the columns; without 512 bytes.
template <bool kPeers>
struct RowPiece {
    int word;  // of the row's columns, two each; negative: a weight
    int byte;  // in the slot's lines
    bool tail;
    bool inside;

    __device__ __forceinline__ RowPiece(const StepParams& p, const Here& me, int piece) {
        if (kPeers) {
            const LanePart part(piece);
            word = part.word - header_words(p.top_k);
            byte = part.byte;
            tail = part.tail;
            // why by lines: the last line's epoch goes out although no column is left for its lane
            inside = byte < me.row_lines * kLineBytes;
        } else {
            word = (piece * 32 + static_cast<int>(threadIdx.x % 32)) * 4;
            byte = 0;
            tail = false;
            inside = word < p.hidden_pad / 2;
        }
    }
    __device__ __forceinline__ static const Divider& by(const Here& me) {
        return kPeers ? me.by_row_pieces : me.by_plain_pieces;
    }
};

// Whether rows can be taken as they are: bf16, in vectors, without pad columns.
__device__ __forceinline__ bool rows_are_whole(const StepParams& p, const Here& me) {
    return p.hidden_dtype == kBF16 && p.hidden == p.hidden_pad && rows_are_vectors(me.hidden, p.hidden, kBF16);
}

template <bool kPeers, bool kWhole>
__device__ __forceinline__ uint4 load_piece(const StepParams& p, const Here& me, const float* weights,
                                            int token, const RowPiece<kPeers>& piece) {
    const int64_t row = static_cast<int64_t>(token) * p.hidden;
    const bool vectors = kWhole || rows_are_vectors(me.hidden, p.hidden, p.hidden_dtype);
    if constexpr (!kPeers) {
        const int64_t at = row + 2 * piece.word;
        return kWhole ? *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(me.hidden) + at)
                      : load_8_as_bf16(me.hidden, at, p.hidden - 2 * piece.word, p.hidden_dtype, vectors);
    } else {
        uint2 half[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int word = piece.word + 2 * i;
            half[i] = make_uint2(0, 0);
            if (word < 0) {
                const int k = word + header_words(p.top_k);
                const float* at = weights + static_cast<int64_t>(token) * p.top_k + k;
                half[i].x = __float_as_uint(at[0]);
                half[i].y = k + 1 < p.top_k ? __float_as_uint(at[1]) : 0;
            } else if (word < p.hidden_pad / 2 && !(i == 1 && piece.tail)) {
                half[i] = kWhole ? *reinterpret_cast<const uint2*>(static_cast<const uint32_t*>(me.hidden) + row / 2 + word)
                                 : load_4_as_bf16(me.hidden, row + 2 * word, p.hidden - 2 * word, p.hidden_dtype, vectors);
            }
        }
        return make_uint4(half[0].x, half[0].y, half[1].x, half[1].y);
    }
}

template <bool kPeers>
__device__ __forceinline__ void store_piece(const StepParams& p, __nv_bfloat16* row,
                                            const RowPiece<kPeers>& piece, uint4 words) {
    uint32_t* to = reinterpret_cast<uint32_t*>(row) + piece.word;
    if (!kPeers) {
        *reinterpret_cast<uint4*>(to) = words;
        return;
    }
    if (piece.word >= 0 && piece.word < p.hidden_pad / 2) {
        *reinterpret_cast<uint2*>(to) = make_uint2(words.x, words.y);
    }
    if (!piece.tail && piece.word + 2 >= 0 && piece.word + 2 < p.hidden_pad / 2) {
        *reinterpret_cast<uint2*>(to + 2) = make_uint2(words.z, words.w);
    }
}

// The ranks that have an expert of a token; lane k holds its k-th id. The same in all lanes.
__device__ __forceinline__ uint64_t ranks_of(const StepParams& p, const Here& me, int id) {
    const bool in_range = static_cast<uint32_t>(id) < static_cast<uint32_t>(p.experts);
    const int rank = in_range ? me.by_experts.quotient(id) : 0;
    const uint32_t low = __reduce_or_sync(0xffffffffu, in_range && rank < 32 ? 1u << rank : 0);
    const uint32_t high =
        p.num_ranks <= 32 ? 0 : __reduce_or_sync(0xffffffffu, in_range && rank >= 32 ? 1u << (rank - 32) : 0);
    return static_cast<uint64_t>(high) << 32 | low;
}

// A rank's rows to the ranks of their experts: own slots plainly, others in lines. mover of movers warps.
template <bool kPeers, bool kFused, bool kWhole>
__device__ __forceinline__ HomeTokens send_rows(const StepParams& p, const Here& me, int mover, int movers) {
    constexpr int kAtOnce = kWhole ? kPiecesInFlight : 1;
    const int lane = threadIdx.x % 32;
    const Divider by = RowPiece<kPeers>::by(me);
    const int pieces = by.divisor;
    const bool caller = kFused && p.routing_input == kTopK;
    const int32_t* ids = caller ? me.topk_ids : me.home_ids;
    const float* weights = caller ? me.topk_weights : me.home_weights;
    const Symmetric mine = me.own(p);
    HomeTokens home;
    // The first rows do not wait for T: those past it are there, and are not used
    int units = min(p.max_tokens, kEagerTokens) * pieces;
    bool first = true;
    int next = mover;
#pragma unroll 1
    while (first || next < units) {
        uint4 words[kAtOnce];
        int id[kAtOnce];
        const int base = next;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int unit = base + i * movers;
            if (unit < units) {
                next = unit + movers;
                const int token = by.quotient(unit);
                const RowPiece<kPeers> piece(p, me, unit - token * pieces);
                id[i] = lane < p.top_k ? ids[static_cast<int64_t>(token) * p.top_k + lane] : -1;
                words[i] = make_uint4(0, 0, 0, 0);
                if (piece.inside) {
                    words[i] = load_piece<kPeers, kWhole>(p, me, weights, token, piece);
                }
            }
        }
        if (first) {
            first = false;
            home = home_tokens<kFused>(p, me);
            units = home.silent ? 0 : home.count * pieces;
            trace(1);
        }
        const int end = min(units, next);
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int unit = base + i * movers;
            if (unit >= end) {
                break;
            }
            const int token = by.quotient(unit);
            const RowPiece<kPeers> piece(p, me, unit - token * pieces);
            const uint64_t ranks = ranks_of(p, me, id[i]) & home.members;
            if (kPeers) {
                const uint4 line = with_epoch(words[i], piece.tail, home.epoch);
                const int64_t to = Lines::row_offset(p, me, me.rank, token) + piece.byte;
                for (uint64_t left = ranks & ~(1ull << me.rank); left != 0; left &= left - 1) {
                    const int rank = __ffsll(static_cast<long long>(left)) - 1;
                    store_lines(me.regions[rank] + to, line, piece.inside);
                }
            }
            if (!piece.inside) {
                continue;
            }
            if (me.home_rows != nullptr) {
                store_piece<kPeers>(p, me.home_rows + static_cast<int64_t>(token) * p.hidden_pad, piece, words[i]);
            }
            if (is_member(ranks, me.rank)) {
                store_piece<kPeers>(p, mine.recv_row(mine.slot(me.rank, token)), piece, words[i]);
            }
        }
    }
    return home;
}

template <bool kPeers, bool kFused>
__device__ __forceinline__ HomeTokens send_rows(const StepParams& p, const Here& me, int mover, int movers) {
    return rows_are_whole(p, me) ? send_rows<kPeers, kFused, true>(p, me, mover, movers)
                                 : send_rows<kPeers, kFused, false>(p, me, mover, movers);
}

// A piece that has come: columns to the slot's row, weights to its header.
__device__ __forceinline__ void keep_piece(const StepParams& p, const Symmetric& mine, int64_t slot,
                                           const RowPiece<true>& piece, uint4 words) {
    store_piece<true>(p, mine.recv_row(slot), piece, words);
    if (piece.word < 0) {
        const uint32_t weights[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int k = piece.word + j + header_words(p.top_k);
            if (k < p.top_k && !(piece.tail && j >= 2)) {
                mine.recv_weights(slot)[k] = __uint_as_float(weights[j]);
            }
        }
    }
}

// What has come from the peers, to the slots of this rank. A warp looks at the ids of a token and at a
// piece of its row together; a token without an expert here has no row.
__device__ __forceinline__ void unpack_rows(const StepParams& p, const Here& me, const HomeTokens& home,
                                            int mover, int movers) {
    const int lane = threadIdx.x % 32;
    const Divider by = me.by_row_pieces;
    const int pieces = by.divisor;
    const int peers = p.num_ranks - 1;
    if (peers == 0) {
        return;  // a layer of a group runs once over its own rank alone, when it opens
    }
    const int each = me.ids_per_line;
    const Symmetric mine = me.own(p);
    const Lines lines(p, me, me.rank);
    const uint32_t first_expert = me.rank * p.experts_per_rank;
    const uint32_t local_experts = me.local_experts;
    // Units (token, piece) one after another, each for all peers
    const int per_peer = p.max_tokens * pieces;
    int unit_next = mover;
    int peer_next = 0;
    int idle = 0;
    while (unit_next < per_peer) {
        const uint8_t* ids_at[kUnpackedAtOnce];
        uint32_t ids[kUnpackedAtOnce];  // a word of the line in each lane
        uint4 words[kUnpackedAtOnce];
        int source[kUnpackedAtOnce];
        int token[kUnpackedAtOnce];
        int piece_of[kUnpackedAtOnce];
        int from[kUnpackedAtOnce];  // the token's first entry in its line
        uint32_t pending = 0;
#pragma unroll
        for (int i = 0; i < kUnpackedAtOnce; i++) {
            source[i] = peer_next < me.rank ? peer_next : peer_next + 1;
            token[i] = by.quotient(unit_next);
            piece_of[i] = unit_next - token[i] * pieces;
            const int line = me.by_ids_per_line.quotient(token[i]);
            from[i] = (token[i] - line * each) * p.top_k;
            ids_at[i] = lines.ids(source[i], line) + lane * 4;
            pending |= unit_next < per_peer && is_member(home.members, source[i]) ? 1u << i : 0;
            peer_next++;
            if (peer_next == peers) {
                peer_next = 0;
                unit_next += movers;
            }
        }
        bool live = false;
        LineWait wait(p, me, kOpDispatchRecv, home.epoch);
        while (pending != 0) {
#pragma unroll
            for (int i = 0; i < kUnpackedAtOnce; i++) {
                if (pending >> i & 1) {
                    const RowPiece<true> piece(p, me, piece_of[i]);
                    __syncwarp();
                    ids[i] = ptx::load_line_word_sys(ids_at[i]);
                    load_lines(words[i], lines.row(source[i], token[i]) + piece.byte, piece.inside);
                }
            }
            bool late = false;
            int late_peer = 0;
            uint64_t late_seen = 0;
#pragma unroll
            for (int i = 0; i < kUnpackedAtOnce; i++) {
                if (!(pending >> i & 1)) {
                    continue;
                }
                const RowPiece<true> piece(p, me, piece_of[i]);
                bool missing = piece.tail && piece.inside && epoch_in(words[i]) != home.epoch;
                uint64_t seen = epoch_in(words[i]);
                if (!__any_sync(0xffffffffu, missing)) {
                    // why without a look at the ids: a row of this step was sent in this step
                    pending &= ~(1u << i);
                    live = true;
                    if (piece.inside) {
                        keep_piece(p, mine, mine.slot(source[i], token[i]), piece, words[i]);
                    }
                    continue;
                }
                const uint64_t ids_epoch =
                    static_cast<uint64_t>(__shfl_sync(0xffffffffu, ids[i], 31)) << 32 | __shfl_sync(0xffffffffu, ids[i], 30);
                if (ids_epoch == home.epoch) {
                    const int tokens = static_cast<int>(__shfl_sync(0xffffffffu, ids[i], 0));
                    const int h = 2 * (lane - 1) - from[i];  // of the token's entries
                    const bool named =
                        lane >= 1 && lane < kLineWords &&
                        ((h >= 0 && h < p.top_k && (ids[i] & 0xffff) - first_expert < local_experts) ||
                         (h + 1 >= 0 && h + 1 < p.top_k && (ids[i] >> 16) - first_expert < local_experts));
                    live |= token[i] < tokens;
                    if (token[i] >= tokens || !__any_sync(0xffffffffu, named)) {
                        pending &= ~(1u << i);
                        missing = false;
                    }
                } else {
                    missing = lane == 0;
                    seen = ids_epoch;
                }
                if (missing) {
                    late = true;
                    late_peer = source[i];
                    late_seen = seen;
                }
            }
            if (pending != 0 && !wait.again(late, late_peer, late_seen)) {
                return;
            }
        }
        // Tokens ascend: when no peer had one, none has a later one
        idle = live ? 0 : idle + kUnpackedAtOnce;
        if (idle >= peers) {
            return;
        }
    }
}

// ------------------------------------------------------------------------------- lists, one rank

struct IndexShared {
    uint16_t entries[kCachedEntries];
    int32_t counts[kLocalExperts];
    int32_t offsets[kLocalExperts + 1];
    uint32_t bits[kListBits];
    int32_t rows_before[kListBits];
    int32_t warp_sums[kFusedWarps];
    int32_t rows;
};

constexpr uint32_t kRepeated = 0x4000;  // the token has named this expert before
constexpr uint32_t kEntryId = 0x3fff;

// What is known of the tokens' experts while the lists are built.
struct ListBuilder {
    IndexShared& shared;
    const StepParams& p;
    const Here& me;
    int tokens;
    int words;         // of 32 tokens, for each expert
    int begin;         // experts of this CTA
    int end;
    int batch;         // so many experts at once
    int begin_of_batch;
    bool at_once;      // one batch: bits are set as ids come
    bool cached;       // entries of all tokens fit

    __device__ __forceinline__ ListBuilder(IndexShared& shared, const StepParams& p, const Here& me, int tokens,
                                           int part, int parts)
        : shared(shared), p(p), me(me), tokens(tokens) {
        words = max(1, (tokens + 31) / 32);
        const int share = (p.experts_per_rank + parts - 1) / parts;
        begin = min(part * share, p.experts_per_rank);
        end = min(begin + share, p.experts_per_rank);
        begin_of_batch = begin;
        batch = kListBits / words;
        at_once = end - begin <= batch;
        cached = tokens * p.top_k <= kCachedEntries;
    }

    __device__ __forceinline__ void set_bit(int expert, int token) {
        atomicOr(shared.bits + (expert - begin_of_batch) * words + token / 32, 1u << token % 32);
    }

    // Entry k of a token: a local expert, kRepeated, or kNoEntry.
    __device__ __forceinline__ void add(int token, int k, uint32_t entry) {
        if (cached) {
            shared.entries[token * p.top_k + k] = static_cast<uint16_t>(entry);
        }
        if (entry == kNoEntry) {
            return;
        }
        const int expert = entry & kEntryId;
        if (!(entry & kRepeated)) {
            atomicAdd(shared.counts + expert, 1);
        }
        if (at_once && expert >= begin && expert < end) {
            set_bit(expert, token);
        }
    }

    // ids: the home rank's, where another CTA may be the one that writes.
    __device__ __forceinline__ int expert_of(const int32_t* ids, int64_t at) const {
        if (cached) {
            const uint32_t entry = shared.entries[at];
            return entry == kNoEntry ? -1 : static_cast<int>(entry & kEntryId);
        }
        const int id = ids[at];
        return id >= 0 && id < p.experts_per_rank ? id : -1;
    }
};

// Where lane stands in a pass over tokens, 32 / K of them at once, an entry each.
struct EntryLane {
    int per_pass;
    int of_pass;
    int k;

    __device__ __forceinline__ EntryLane(const StepParams& p, const Here& me) {
        const int lane = threadIdx.x % 32;
        per_pass = me.by_top_k.quotient(32);
        of_pass = me.by_top_k.quotient(lane);
        k = lane - of_pass * p.top_k;
    }
};

// An entry of this rank's own tokens, sanitised: what home_* and the counters of a step are made of.
struct OwnEntry {
    int id;  // -1: none
    int rank;
    float weight;
    bool repeat;
    uint64_t ranks;  // of the token
};

// Of a pass of tokens first, first + 1, ..; an entry a lane, active lanes' tokens are below T. soft: dropped,
// duplicates, lost rows.
__device__ __forceinline__ OwnEntry own_entry(const StepParams& p, const Here& me, const HomeTokens& home,
                                              const EntryLane& at_lane, int token, bool active,
                                              bool mine_to_write, uint32_t (&soft)[3]) {
    const int top_k = p.top_k;
    const int k = at_lane.k;
    const int64_t at = static_cast<int64_t>(token) * top_k + k;
    OwnEntry e;
    const int id = active ? home.ids[at] : -1;
    e.weight = active ? home.weights[at] : 0.0f;
    const bool in_range = static_cast<uint32_t>(id) < static_cast<uint32_t>(p.experts);
    const bool drops = !in_range && id != -1;
    e.id = in_range ? id : -1;
    e.rank = in_range ? me.by_experts.quotient(id) : 0;
    const uint32_t low = in_range && e.rank < 32 ? 1u << e.rank : 0;
    const uint32_t high = in_range && e.rank >= 32 ? 1u << (e.rank - 32) : 0;
    uint32_t low_of = 0;
    uint32_t high_of = 0;
    e.repeat = false;
#pragma unroll 4
    for (int j = 0; j < top_k; j++) {
        const int from = (at_lane.of_pass * top_k + j) & 31;
        const int other = __shfl_sync(0xffffffffu, e.id, from);
        low_of |= __shfl_sync(0xffffffffu, low, from);
        if (p.num_ranks > 32) {
            high_of |= __shfl_sync(0xffffffffu, high, from);
        }
        e.repeat |= j < k && e.id >= 0 && other == e.id;
    }
    e.ranks = static_cast<uint64_t>(high_of) << 32 | low_of;
    if (active && home.sanitise && mine_to_write) {
        me.home_ids[at] = e.id;
        me.home_weights[at] = e.weight;
        soft[0] += drops;
        soft[1] += e.repeat;
        if (k == 0) {
            me.home_mask[token] = e.ranks & home.members;
            soft[2] += __popcll(e.ranks & ~home.members);
        }
    }
    return e;
}

__device__ __forceinline__ void add_soft(const Here& me, const HomeTokens& home, const uint32_t (&soft)[3]) {
    if (!home.sanitise) {
        return;
    }
    const TotalWord words[3] = {kTotalDropped, kTotalDuplicates, kTotalLostRows};
#pragma unroll
    for (int i = 0; i < 3; i++) {
        const uint32_t sum = __reduce_add_sync(0xffffffffu, soft[i]);
        if (threadIdx.x % 32 == 0) {
            add_total(me, words[i], sum);
        }
    }
}

// What one thread of a rank notes of the step.
__device__ __forceinline__ void note_step(const StepParams& p, const Here& me, const HomeTokens& home) {
    if (home.sanitise) {
        *me.home_tokens = home.count;
        me.epoch[kThisStep] = home.epoch;
        if (home.asked > p.max_tokens) {
            add_total(me, kTotalOverCapacity, home.asked - p.max_tokens);
        }
    }
}

// Exclusive sum of a number of each thread over the CTA. Holds a barrier.
__device__ __forceinline__ int sum_before(int32_t* warp_sums, int value) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    int scan = value;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, scan, offset);
        scan += lane >= offset ? other : 0;
    }
    if (lane == 31) {
        warp_sums[warp] = scan;
    }
    __syncthreads();
    const int of_warp = lane < kFusedWarps && lane < warp ? warp_sums[lane] : 0;
    return scan - value + __reduce_add_sync(0xffffffffu, of_warp);
}

// Exclusive sums of counts over the experts, to offsets. Ends with a barrier.
__device__ __forceinline__ void sum_counts(IndexShared& shared, int experts) {
    const int each = (experts + kFusedThreads - 1) / kFusedThreads;
    const int begin = min(static_cast<int>(threadIdx.x) * each, experts);
    const int end = min(begin + each, experts);
    int sum = 0;
    for (int e = begin; e < end; e++) {
        sum += shared.counts[e];
    }
    int before = sum_before(shared.warp_sums, sum);
    for (int e = begin; e < end; e++) {
        shared.offsets[e] = before;
        before += shared.counts[e];
    }
    if (end == experts && begin < end) {
        shared.offsets[experts] = before;
    }
    __syncthreads();
}

// After a fault no expert gets a row.
__device__ __forceinline__ void write_no_rows(const StepParams& p, const Here& me, int part, int parts) {
    for (int e = part * kFusedThreads + threadIdx.x; e <= p.experts_per_rank; e += parts * kFusedThreads) {
        me.expert_offsets[e] = 0;
        if (e < p.experts_per_rank) {
            me.expert_counts[e] = 0;
        }
    }
}

__device__ __forceinline__ void write_lists(const StepParams& p, const Here& me, ListBuilder& lists,
                                            const int32_t* ids) {
    IndexShared& shared = lists.shared;
    const int entries = lists.tokens * p.top_k;
    for (int e = lists.begin + threadIdx.x; e < lists.end; e += kFusedThreads) {
        me.expert_counts[e] = shared.counts[e];
        me.expert_offsets[e] = shared.offsets[e];
        if (e == p.experts_per_rank - 1) {
            me.expert_offsets[e + 1] = shared.offsets[e + 1];
        }
    }
    for (int begin = lists.begin; begin < lists.end; begin += lists.batch) {
        const int end = min(begin + lists.batch, lists.end);
        if (!lists.at_once) {
            lists.begin_of_batch = begin;
            __syncthreads();
            for (int i = threadIdx.x; i < kListBits; i += kFusedThreads) {
                shared.bits[i] = 0;
            }
            __syncthreads();
            for (int i = threadIdx.x; i < entries; i += kFusedThreads) {
                const int expert = lists.expert_of(ids, i);
                if (expert >= begin && expert < end) {
                    lists.set_bit(expert, me.by_top_k.quotient(i));
                }
            }
            __syncthreads();
        }
        for (int e = begin + threadIdx.x; e < end; e += kFusedThreads) {
            int row = shared.offsets[e];
            const int first = (e - begin) * lists.words;
            for (int w = 0; w < lists.words; w++) {
                shared.rows_before[first + w] = row;
                row += __popc(shared.bits[first + w]);
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < entries; i += kFusedThreads) {
            const int token = me.by_top_k.quotient(i);
            const int expert = lists.expert_of(ids, i);
            if (expert >= begin && expert < end) {
                const int word = (expert - begin) * lists.words + token / 32;
                const int row = shared.rows_before[word] + __popc(shared.bits[word] & ((1u << token % 32) - 1));
                me.expert_rows[row] = token;
                me.packed_row_of[i] = row;
            }
        }
    }
}

#ifndef MOE_NO_FIGURES
// Rows of each source, and of each local expert of it, for what is published at the end of a step.
// expert(source, token, k): the k-th local expert of a token, negative if it is not here.
template <class Expert>
__device__ __forceinline__ void count_received(const StepParams& p, const Here& me, const int32_t* tokens,
                                               uint32_t* rows, Expert expert) {
    __syncthreads();
    for (int i = threadIdx.x; i < p.num_ranks * p.experts_per_rank; i += kFusedThreads) {
        me.received[i] = 0;
    }
    if (threadIdx.x < p.num_ranks) {
        rows[threadIdx.x] = 0;
    }
    __syncthreads();
    for (int source = 0; source < p.num_ranks; source++) {
        for (int token = threadIdx.x; token < tokens[source]; token += kFusedThreads) {
            bool any = false;
            for (int k = 0; k < p.top_k; k++) {
                const int id = expert(source, token, k);
                bool repeat = false;
                for (int j = 0; j < k; j++) {
                    repeat |= expert(source, token, j) == id;
                }
                any |= id >= 0;
                if (id >= 0 && !repeat) {
                    atomicAdd(me.received + source * p.experts_per_rank + id, 1);
                }
            }
            if (any) {
                atomicAdd(rows + source, 1);
            }
        }
    }
    __syncthreads();
    if (threadIdx.x < p.num_ranks) {
        me.peer_totals[threadIdx.x * kPeerWords + kPeerRows] = rows[threadIdx.x];
    }
}
#endif

// Reads the ids of a rank alone: part of parts CTAs.
__device__ __forceinline__ void index_local(const StepParams& p, const Here& me, IndexShared& shared, int part,
                                            int parts) {
    const int warp = threadIdx.x / 32;
    const HomeTokens home = home_tokens<true>(p, me);
    if (part == 0 && threadIdx.x == 0) {
        note_step(p, me, home);
    }
    if (home.silent) {
        write_no_rows(p, me, part, parts);
        return;
    }
    ListBuilder lists(shared, p, me, home.count, part, parts);
    for (int e = threadIdx.x; e < p.experts_per_rank; e += kFusedThreads) {
        shared.counts[e] = 0;
    }
    for (int i = threadIdx.x; lists.at_once && i < (lists.end - lists.begin) * lists.words; i += kFusedThreads) {
        shared.bits[i] = 0;
    }
    __syncthreads();

    uint32_t soft[3] = {0, 0, 0};
    const EntryLane at_lane(p, me);
    const Symmetric own = me.own(p);
    const int passes = (home.count + at_lane.per_pass - 1) / at_lane.per_pass;
    for (int pass = warp; pass < passes; pass += kFusedWarps) {
        const int token = pass * at_lane.per_pass + at_lane.of_pass;
        const bool active = at_lane.of_pass < at_lane.per_pass && token < home.count;
        const bool mine_to_write = pass % parts == part;
        const OwnEntry e = own_entry(p, me, home, at_lane, token, active, mine_to_write, soft);
        if (!active) {
            continue;
        }
        if (mine_to_write) {
            own.recv_ids(token)[at_lane.k] = e.id;
            own.recv_weights(token)[at_lane.k] = e.weight;
        }
        lists.add(token, at_lane.k, e.id >= 0 ? static_cast<uint32_t>(e.id) | (e.repeat ? kRepeated : 0) : kNoEntry);
    }
    add_soft(me, home, soft);
    __syncthreads();
    ptx::allow_next_grid();
    if (part == 0 && threadIdx.x == 0) {
        own.recv_tokens()[0] = home.count;
    }
    sum_counts(shared, p.experts_per_rank);
    write_lists(p, me, lists, home.ids);
#ifndef MOE_NO_FIGURES
    if (part == 0) {
        __syncthreads();
        shared.warp_sums[0] = home.count;  // the same of all threads
        count_received(p, me, shared.warp_sums, shared.bits,
                       [&](int, int token, int k) { return lists.expert_of(home.ids, token * p.top_k + k); });
    }
#endif
}

// ------------------------------------------------------------------------- lists, ids in lines

struct LinesShared {
    uint4 lines[kCachedLines * kLanesPerLine];
    uint32_t bits[kListBits];   // [32 slots][expert]
    uint16_t before[kListBits]; // rows of the expert before those of a word
    int32_t offsets[kFusedThreads];
    int32_t tokens[kMaxRanks];
    int32_t warp_sums[kFusedWarps];
};

// How the lists of a rank are built; no step changes it.
struct ListPlan {
    int words;     // of 32 slots, for each expert
    int batch;     // so many experts at once, a thread each
    bool at_once;  // all of them, with all lines in shared memory

    __device__ __forceinline__ ListPlan(const StepParams& p, int id_line_count) {
        words = (p.num_ranks * p.max_tokens + 31) / 32;
        at_once = p.experts_per_rank <= kFusedThreads && p.experts_per_rank * words <= kListBits &&
                  p.num_ranks * id_line_count <= kCachedLines;
        batch = at_once ? p.experts_per_rank : min(kFusedThreads, kListBits / words);
    }
};

// The part of a line of this rank's ids that this lane sends, but for T and the epoch.
__device__ __forceinline__ uint4 own_ids(const StepParams& p, const Here& me, const int32_t* ids, int line) {
    const int part = threadIdx.x % kLanesPerLine;
    const int in_line = me.ids_per_line * p.top_k;
    const int64_t first = static_cast<int64_t>(line) * in_line;
    const int left = min(in_line, p.max_tokens * p.top_k - static_cast<int>(first));
    const int h = 8 * part - 2;
    uint32_t entries[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const int id = h + j >= 0 && h + j < left ? ids[first + h + j] : -1;
        entries[j] = static_cast<uint32_t>(id) < static_cast<uint32_t>(p.experts) ? id : kNoEntry;
    }
    return make_uint4(entries[0] | entries[1] << 16, entries[2] | entries[3] << 16, entries[4] | entries[5] << 16,
                      entries[6] | entries[7] << 16);
}

// The entries that a lane holds of a line of ids, of those whose token is below T: use(h, token, local) with
// the expert's number here, or none (false).
template <class Use>
__device__ __forceinline__ void entries_of(const StepParams& p, const Here& me, uint4 v, int line, int tokens,
                                           Use use) {
    const int part = threadIdx.x % kLanesPerLine;
    const int first_token = line * me.ids_per_line;
    const int end = min(me.ids_per_line, tokens - first_token) * p.top_k;
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const int h = 8 * part - 2 + j;
        if (h >= 0 && h < end) {
            const uint32_t entry = j % 2 == 0 ? words[j / 2] & 0xffff : words[j / 2] >> 16;
            // why the check: a peer's id is data, and the lists are indexed by it
            const uint32_t local = entry - static_cast<uint32_t>(me.rank * p.experts_per_rank);
            use(h, first_token + me.by_top_k.quotient(h), local, local < static_cast<uint32_t>(me.local_experts));
        }
    }
}

// A line of a source's ids that has come: ids to their slots, a bit for each expert of this rank.
__device__ __forceinline__ void add_line(const StepParams& p, const Here& me, LinesShared& shared,
                                         const ListPlan& plan, int source, int line, uint4 v, int tokens) {
    if (plan.at_once) {
        shared.lines[(source * me.id_line_count + line) * kLanesPerLine + threadIdx.x % kLanesPerLine] = v;
    }
    int32_t* to = me.own(p).recv_ids(me.own(p).slot(source, line * me.ids_per_line));
    entries_of(p, me, v, line, tokens, [&](int h, int token, uint32_t local, bool known) {
        to[h] = known ? static_cast<int>(local) : -1;
        if (known && plan.at_once) {
            const int number = source * p.max_tokens + token;
            atomicOr(shared.bits + number / 32 * plan.batch + local, 1u << number % 32);
        }
    });
}

// Four lines of a peer's ids. False: they did not come.
__device__ __forceinline__ bool peer_lines(const StepParams& p, const Here& me, const HomeTokens& home,
                                           LinesShared& shared, const ListPlan& plan, int source, int first_line) {
    const int lane = threadIdx.x % 32;
    const int line = first_line + lane / kLanesPerLine;
    const bool inside = line < me.id_line_count;
    const bool tail = lane % kLanesPerLine == kLanesPerLine - 1;
    const uint8_t* from = Lines(p, me, me.rank).ids(source, line) + lane % kLanesPerLine * 16;
    LineWait wait(p, me, kOpDispatchRecv, home.epoch);
    uint4 v = make_uint4(0, 0, 0, 0);
    while (true) {
        load_lines(v, from, inside);
        const bool late = inside && tail && epoch_in(v) != home.epoch;
        if (!__any_sync(0xffffffffu, late)) {
            break;
        }
        if (!wait.again(late, source, epoch_in(v))) {
            return false;
        }
    }
    trace(4);
    const int tokens = clamp_tokens(__shfl_sync(0xffffffffu, static_cast<int>(v.x), 0), p.max_tokens);
    if (inside) {
        add_line(p, me, shared, plan, source, line, v, tokens);
    }
    if (first_line == 0 && lane == 0) {
        shared.tokens[source] = tokens;
        const uint64_t waited = wait.waited_ns();
        uint64_t* totals = me.peer_totals + source * kPeerWords;
        totals[kPeerWaited] = waited;
        // why an atomic: nothing waits for what it adds to
        atomicAdd(reinterpret_cast<unsigned long long*>(totals + kPeerWaitedTotal), waited);
    }
    return true;
}

// Sums of a batch of experts, from their bits: rows before each word, counts, and offsets from first_row on.
// Ends with a barrier.
__device__ __forceinline__ void sum_bits(const Here& me, LinesShared& shared, const ListPlan& plan, int begin,
                                        int experts, int first_row) {
    const int e = threadIdx.x;
    int count = 0;
    if (e < experts) {
        for (int w = 0; w < plan.words; w++) {
            shared.before[w * plan.batch + e] = static_cast<uint16_t>(count);
            count += __popc(shared.bits[w * plan.batch + e]);
        }
    }
    const int row = first_row + sum_before(shared.warp_sums, count);
    if (e < experts) {
        shared.offsets[e] = row;
        me.expert_counts[begin + e] = count;
        me.expert_offsets[begin + e] = row;
    }
    if (e == experts - 1) {
        me.expert_offsets[begin + experts] = row + count;
    }
    __syncthreads();
}

// An entry of a slot: its row, and the slot into the row of its expert's list.
__device__ __forceinline__ void write_entry(const Here& me, const LinesShared& shared, const ListPlan& plan,
                                            int number, int local, int64_t at) {
    const int word = number / 32 * plan.batch + local;
    const int row = shared.offsets[local] + shared.before[word] + __popc(shared.bits[word] & ((1u << number % 32) - 1));
    me.expert_rows[row] = number;
    me.packed_row_of[at] = row;
}

// Lists of more experts or slots than fit at once, from ids in their slots.
__device__ __forceinline__ void write_lists_in_batches(const StepParams& p, const Here& me, LinesShared& shared,
                                                       const ListPlan& plan) {
    const int32_t* ids = me.own(p).recv_ids(0);
    int rows = 0;
    for (int begin = 0; begin < p.experts_per_rank; begin += plan.batch) {
        const int experts = min(plan.batch, p.experts_per_rank - begin);
        for (int i = threadIdx.x; i < plan.words * plan.batch; i += kFusedThreads) {
            shared.bits[i] = 0;
        }
        __syncthreads();
        auto each_entry = [&](auto use) {
            for (int source = 0; source < p.num_ranks; source++) {
                for (int i = threadIdx.x; i < shared.tokens[source] * p.top_k; i += kFusedThreads) {
                    const int number = source * p.max_tokens + me.by_top_k.quotient(i);
                    const int64_t at = static_cast<int64_t>(source) * p.max_tokens * p.top_k + i;
                    const int local = ids[at] - begin;
                    if (local >= 0 && local < experts) {
                        use(number, local, at);
                    }
                }
            }
        };
        each_entry([&](int number, int local, int64_t) {
            atomicOr(shared.bits + number / 32 * plan.batch + local, 1u << number % 32);
        });
        __syncthreads();
        sum_bits(me, shared, plan, begin, experts, rows);
        each_entry([&](int number, int local, int64_t at) { write_entry(me, shared, plan, number, local, at); });
        rows = me.expert_offsets[begin + experts];
        __syncthreads();
    }
}


// Before the wait for the kernel before: shared memory is this kernel's own.
__device__ __forceinline__ void clear_lists(LinesShared& shared) {
    uint4* bits = reinterpret_cast<uint4*>(shared.bits);
    for (int i = threadIdx.x; i < kListBits / 4; i += kFusedThreads) {
        bits[i] = make_uint4(0, 0, 0, 0);
    }
    if (threadIdx.x < kMaxRanks) {
        shared.tokens[threadIdx.x] = 0;
    }
}

// The ids of a rank and of its peers, by one CTA.
template <bool kSend, bool kRecv>
__device__ __forceinline__ void index_lines(const StepParams& p, const Here& me, LinesShared& shared) {
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int part = lane % kLanesPerLine;
    const int quads = (me.id_line_count + kWarpLines - 1) / kWarpLines;  // of a source
    const ListPlan plan(p, me.id_line_count);
    const int32_t* ids = kSend && kRecv && p.routing_input == kTopK ? me.topk_ids : me.home_ids;

    // First what others wait for
    const int first_own = warp * kWarpLines + lane / kLanesPerLine;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (warp < quads) {
        v = own_ids(p, me, ids, min(first_own, me.id_line_count - 1));
    }
    const HomeTokens home = home_tokens<kSend && kRecv>(p, me);
    trace(1);
    if (home.silent) {
        if (threadIdx.x == 0) {
            note_step(p, me, home);
        }
        if (kSend && threadIdx.x < p.num_ranks) {
            tell_peer(p, me, threadIdx.x);
        }
        if (kRecv) {
            write_no_rows(p, me, 0, 1);
        }
        return;
    }
    for (int quad = warp; quad < quads; quad += kFusedWarps) {
        const int line = quad * kWarpLines + lane / kLanesPerLine;
        const bool inside = line < me.id_line_count;
        if (quad != warp) {
            v = own_ids(p, me, ids, min(line, me.id_line_count - 1));
        }
        v.x = part == 0 ? static_cast<uint32_t>(home.count) : v.x;
        v = with_epoch(v, part == kLanesPerLine - 1, home.epoch);
        if (kSend) {
            for (uint64_t left = home.members & ~(1ull << me.rank); left != 0; left &= left - 1) {
                const int rank = __ffsll(static_cast<long long>(left)) - 1;
                if (rank < p.num_ranks) {
                    store_lines(Lines(p, me, rank).ids(me.rank, line) + part * 16, v, inside);
                }
            }
        }
        if (kRecv && inside) {
            add_line(p, me, shared, plan, me.rank, line, v, home.count);
        }
    }
    trace(2);

    // What only this rank needs, while lines travel; the last warps first, since they have no line
    if (threadIdx.x == kFusedThreads - 1) {
        note_step(p, me, home);
        shared.tokens[me.rank] = home.count;
        if (kSend && !kRecv) {
            me.own(p).recv_tokens()[me.rank] = home.count;
        }
    }
    if (kSend) {
        uint32_t soft[3] = {0, 0, 0};
        const EntryLane at_lane(p, me);
        const Symmetric own = me.own(p);
        const int passes = (home.count + at_lane.per_pass - 1) / at_lane.per_pass;
        for (int pass = kFusedWarps - 1 - warp; pass < passes; pass += kFusedWarps) {
            const int token = pass * at_lane.per_pass + at_lane.of_pass;
            const bool active = at_lane.of_pass < at_lane.per_pass && token < home.count;
            const OwnEntry e = own_entry(p, me, home, at_lane, token, active, true, soft);
            if (active) {
                own.recv_weights(own.slot(me.rank, token))[at_lane.k] = e.weight;
            }
        }
        if (kFusedWarps - 1 - warp < passes) {
            add_soft(me, home, soft);
        }
    }
    if (!kRecv) {
        return;
    }
    trace(3);

    // Peers' lines, by the warps after those that had own ones
    bool arrived = true;
    int quad = (warp - quads) & (kFusedWarps - 1);
    for (int source = 0; source < p.num_ranks; source++) {
        if (source == me.rank) {
            continue;
        }
        for (; quad < quads; quad += kFusedWarps) {
            if (is_member(home.members, source) && arrived) {
                arrived = peer_lines(p, me, home, shared, plan, source, quad * kWarpLines);
            }
        }
        quad -= quads;
    }
    trace(5);
    if (!__syncthreads_and(arrived)) {
        write_no_rows(p, me, 0, 1);
        return;
    }
    ptx::allow_next_grid();
    trace(6);
    if (threadIdx.x < p.num_ranks) {
        me.own(p).recv_tokens()[threadIdx.x] = shared.tokens[threadIdx.x];
    }
    if (plan.at_once) {
        sum_bits(me, shared, plan, 0, p.experts_per_rank, 0);
        trace(7);
        const int lines = me.id_line_count;
        const int per_source = p.max_tokens * p.top_k;
        for (int source = 0; source < p.num_ranks; source++) {
            const int tokens = shared.tokens[source];
            for (int line = threadIdx.x / kLanesPerLine; line * me.ids_per_line < tokens;
                 line += kFusedThreads / kLanesPerLine) {
                const int64_t first = static_cast<int64_t>(source) * per_source + line * me.ids_per_line * p.top_k;
                entries_of(p, me, shared.lines[(source * lines + line) * kLanesPerLine + part], line, tokens,
                           [&](int h, int token, uint32_t local, bool known) {
                               if (known) {
                                   write_entry(me, shared, plan, source * p.max_tokens + token, local, first + h);
                               }
                           });
            }
        }
    } else {
        write_lists_in_batches(p, me, shared, plan);
    }
    trace(8);
#ifndef MOE_NO_FIGURES
    const Symmetric mine = me.own(p);
    count_received(p, me, shared.tokens, shared.bits,
                   [&](int source, int token, int k) { return mine.recv_ids(mine.slot(source, token))[k]; });
#endif
}

// ------------------------------------------------------------------------------------- kernels

__device__ __forceinline__ void dispatch_local(const StepParams& p, IndexShared& shared, Here& here) {
    load_here(here, p);
    const Here& me = here;
    ptx::wait_for_previous_grid();
    // CTAs that read ids: all but a few move rows
    const int64_t words = (static_cast<int64_t>(p.max_tokens) + 31) / 32 * p.experts_per_rank;
    const int64_t wanted = (words + kListBits / 2 - 1) / (kListBits / 2);
    const int parts = static_cast<int>(min(wanted, static_cast<int64_t>((gridDim.x + 1) / 2)));
    const int first = static_cast<int>(gridDim.x) - parts;  // the first that reads ids
    const int rows_ctas = max(first, 1);
    if (static_cast<int>(blockIdx.x) < rows_ctas) {
        const int mover = static_cast<int>(threadIdx.x) / 32 * rows_ctas + static_cast<int>(blockIdx.x);
        send_rows<false, true>(p, me, mover, rows_ctas * kFusedWarps);
    }
    if (static_cast<int>(blockIdx.x) >= first) {
        index_local(p, me, shared, static_cast<int>(blockIdx.x) - first, parts);
    }
}

template <bool kSend, bool kRecv>
__device__ __forceinline__ void dispatch_lines(const StepParams& p, LinesShared& shared, Here& here) {
#ifdef MOE_TRIGGER_EARLY
    ptx::allow_next_grid();
#endif
    const bool reads_ids = blockIdx.x == 0;
    const bool moves = blockIdx.x != 0 || gridDim.x == 1;
    if (kRecv && reads_ids) {
        clear_lists(shared);
    }
    load_here(here, p);
    const Here& me = here;
    const int rows_ctas = max(static_cast<int>(gridDim.x) - 1, 1);
    const int mover = static_cast<int>(threadIdx.x) / 32 * rows_ctas + max(static_cast<int>(blockIdx.x) - 1, 0);
    const int movers = rows_ctas * kFusedWarps;
    ptx::wait_for_previous_grid();
    trace(0);
    HomeTokens home;
    if (moves && kSend) {
        home = send_rows<true, kSend && kRecv>(p, me, mover, movers);
        trace(reads_ids ? 10 : 2);
    } else if (moves) {
        home = home_tokens<false>(p, me);
    }
    if (reads_ids) {
        index_lines<kSend, kRecv>(p, me, shared);
    }
    if (moves && kRecv && !home.silent) {
        unpack_rows(p, me, home, mover, movers);
    }
    trace(9);
}

}  // namespace moe

extern "C" __global__ __launch_bounds__(moe::kFusedThreads, 1)
void moe_dispatch_local(const __grid_constant__ moe::StepParams p) {
    __shared__ moe::IndexShared shared;
    __shared__ moe::Here here;
    moe::dispatch_local(p, shared, here);
}

extern "C" __global__ __launch_bounds__(moe::kFusedThreads, 1)
void moe_dispatch_lines(const __grid_constant__ moe::StepParams p) {
    __shared__ moe::LinesShared shared;
    __shared__ moe::Here here;
    moe::dispatch_lines<true, true>(p, shared, here);
}

extern "C" __global__ __launch_bounds__(moe::kFusedThreads, 1)
void moe_dispatch_send_lines(const __grid_constant__ moe::StepParams p) {
    __shared__ moe::LinesShared shared;
    __shared__ moe::Here here;
    moe::dispatch_lines<true, false>(p, shared, here);
}

extern "C" __global__ __launch_bounds__(moe::kFusedThreads, 1)
void moe_dispatch_recv_lines(const __grid_constant__ moe::StepParams p) {
    __shared__ moe::LinesShared shared;
    __shared__ moe::Here here;
    moe::dispatch_lines<false, true>(p, shared, here);
}
