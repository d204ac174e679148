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
#include "../comm/trace.cuh"
#include "../layout/foreign.cuh"
#include "../ptx/grid_dependency.cuh"

namespace moe {

__device__ __forceinline__ void trace(int point) { trace_point(kTraceDispatch, point); }

constexpr int kFusedThreads = 512;
constexpr int kFusedWarps = kFusedThreads / 32;
constexpr int kListBits = 2048;      // words: (expert, 32 slots)
constexpr int kCachedEntries = 4096;
constexpr int kCachedLines = 128;    // of ids, of all sources
constexpr int kStagedRows = 4096;    // rows of all lists
constexpr int kFewRows = 256;        // which are not worth a barrier more
constexpr int kLocalExperts = 1024;  // most experts of a rank
constexpr int kPiecesInFlight = 1;   // of a warp that sends several
constexpr int kUnpackedAtOnce = 2;
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
    const int32_t* asked = ptx::global(home.sanitise ? me.token_count : me.home_tokens);
    const uint64_t* epoch = ptx::global(me.epoch + (home.sanitise ? kLastStep : kThisStep));
    const uint64_t* members = ptx::global(me.members);
    const uint32_t* fault = ptx::global(me.arrivals + kFaultClaimed);
    home.asked = *asked;
    home.epoch = *epoch + (home.sanitise ? 1 : 0);
    home.members = *members;
    home.silent = *fault != 0;
    home.count = clamp_tokens(home.asked, p.max_tokens);
    return home;
}

// ------------------------------------------------------------------------------------- rows

// The ranks that have an expert of a token; lane k holds its k-th id. The same in all lanes.
__device__ __forceinline__ uint64_t ranks_of(const StepParams& p, const Divider& by_experts, int id) {
    const bool in_range = static_cast<uint32_t>(id) < static_cast<uint32_t>(p.experts);
    const int rank = in_range ? by_experts.quotient(id) : 0;
    const uint32_t low = __reduce_or_sync(0xffffffffu, in_range && rank < 32 ? 1u << rank : 0);
    const uint32_t high =
        p.num_ranks <= 32 ? 0 : __reduce_or_sync(0xffffffffu, in_range && rank >= 32 ? 1u << (rank - 32) : 0);
    return static_cast<uint64_t>(high) << 32 | low;
}

// Whether rows can be taken as they are: bf16, in vectors, without pad columns.
__device__ __forceinline__ bool rows_are_whole(const StepParams& p, const Here& me) {
    return p.hidden_dtype == kBF16 && p.hidden == p.hidden_pad && rows_are_vectors(me.hidden, p.hidden, kBF16);
}

// One rank: rows to their slots, 512 bytes a warp and unit. The first are loaded before T is known.
template <bool kWhole>
__device__ __forceinline__ void keep_rows(const StepParams& p, const Here& me, int mover, int movers) {
    constexpr int kAtOnce = kWhole ? 4 : 1;
    const int lane = threadIdx.x % 32;
    const Divider by = me.by_plain_pieces;
    const Divider by_experts = me.by_experts;
    const int pieces = by.divisor;
    const bool caller = p.routing_input == kTopK;
    const int32_t* ids = ptx::global(caller ? me.topk_ids : me.home_ids);
    const uint16_t* hidden = ptx::global(static_cast<const uint16_t*>(me.hidden));
    __nv_bfloat16* slots = ptx::global(me.own(p).recv_row(0));
    __nv_bfloat16* home_rows = me.home_rows;
    const int rank = me.rank;
    ptx::wait_for_previous_grid();
    HomeTokens home;
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
                const int column = ((unit - token * pieces) * 32 + lane) * 8;
                id[i] = lane < p.top_k ? ids[static_cast<int64_t>(token) * p.top_k + lane] : -1;
                if (column < p.hidden_pad) {
                    const int64_t at = static_cast<int64_t>(token) * p.hidden + column;
                    words[i] = kWhole ? *reinterpret_cast<const uint4*>(hidden + at)
                                      : load_8_as_bf16(me.hidden, at, p.hidden - column, p.hidden_dtype,
                                                       rows_are_vectors(me.hidden, p.hidden, p.hidden_dtype));
                }
            }
        }
        if (first) {
            first = false;
            home = home_tokens<true>(p, me);
            units = home.silent ? 0 : home.count * pieces;
        }
        const int end = min(units, next);
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int unit = base + i * movers;
            if (unit >= end) {
                break;
            }
            const int token = by.quotient(unit);
            const int column = ((unit - token * pieces) * 32 + lane) * 8;
            const uint64_t ranks = ranks_of(p, by_experts, id[i]) & home.members;
            if (column < p.hidden_pad) {
                const int64_t at = static_cast<int64_t>(token) * p.hidden_pad + column;
                if (home_rows != nullptr) {
                    *reinterpret_cast<uint4*>(ptx::global(home_rows) + at) = words[i];
                }
                if (is_member(ranks, rank)) {
                    *reinterpret_cast<uint4*>(slots + static_cast<int64_t>(rank) * p.max_tokens * p.hidden_pad + at) = words[i];
                }
            }
        }
    }
}

// A lane's part of the pieces of a row in lines: K weights, then columns. Words are of two columns.
struct RowLane {
    int word;    // of piece 0, without the header: a piece further on 120 more; negative: a weight
    int byte;    // in the slot's lines: a piece further on 512 more
    bool tail;
    int header;  // words
    int words;   // of the columns of a row
    int bytes;   // of the lines of a row

    __device__ __forceinline__ RowLane(const StepParams& p, const Here& me, int thread) {
        const LanePart part(0, thread);
        header = header_words(p.top_k);
        word = part.word - header;
        byte = part.byte;
        tail = part.tail;
        words = p.hidden_pad / 2;
        bytes = me.row_lines * kLineBytes;
    }
    // why by lines: the last line's epoch goes out although no column is left for its lane
    __device__ __forceinline__ bool inside(int piece) const { return byte + piece * kWarpLines * kLineBytes < bytes; }
    __device__ __forceinline__ int word_of(int piece) const { return word + piece * kWarpLines * kLineWords; }
    __device__ __forceinline__ int byte_of(int piece) const { return byte + piece * kWarpLines * kLineBytes; }

    __device__ __forceinline__ void store(__nv_bfloat16* row, int piece, uint4 v) const {
        const int w = word_of(piece);
        uint32_t* to = reinterpret_cast<uint32_t*>(ptx::global(row)) + w;
        if (w >= 0 && w < words) {
            *reinterpret_cast<uint2*>(to) = make_uint2(v.x, v.y);
        }
        if (!tail && w + 2 >= 0 && w + 2 < words) {
            *reinterpret_cast<uint2*>(to + 2) = make_uint2(v.z, v.w);
        }
    }
};

// What only the home rank needs to know of a token; lane k holds its k-th id and weight.
__device__ __forceinline__ void keep_home(const StepParams& p, const Here& me, const HomeTokens& home, int token,
                                          int id, float weight, uint64_t ranks) {
    const int lane = threadIdx.x % 32;
    const bool active = lane < p.top_k;
    const int64_t at = static_cast<int64_t>(token) * p.top_k + lane;
    float* own_weights = ptx::global(me.own(p).recv_weights(me.own(p).slot(me.rank, 0)));
    int32_t* home_ids = ptx::global(me.home_ids);
    float* home_weights = ptx::global(me.home_weights);
    uint64_t* home_mask = ptx::global(me.home_mask);
    if (active) {
        own_weights[at] = weight;
    }
    if (!home.sanitise) {
        return;
    }
    const bool in_range = static_cast<uint32_t>(id) < static_cast<uint32_t>(p.experts);
    if (active) {
        home_ids[at] = in_range ? id : -1;
        home_weights[at] = weight;
    }
    if (lane == 0) {
        home_mask[token] = ranks & home.members;
    }
    const uint32_t same = __match_any_sync(0xffffffffu, id);
    const uint32_t repeats = __ballot_sync(0xffffffffu, in_range && (same & ((1u << lane) - 1)) != 0);
    const uint32_t drops = __ballot_sync(0xffffffffu, active && !in_range && id != -1);
    if (lane == 0) {
        add_total(me, kTotalDropped, __popc(drops));
        add_total(me, kTotalDuplicates, __popc(repeats));
        add_total(me, kTotalLostRows, __popcll(ranks & ~home.members));
    }
}

// Several ranks: rows to the ranks of their experts, own slots plainly, others in lines. mover of movers warps.
template <bool kFused, bool kWhole, int kAtOnce>
__device__ __forceinline__ void send_rows(const StepParams& p, const Here& me, int mover, int movers) {
    const int lane = threadIdx.x % 32;
    // why copies: behind a store the compiler has to read shared memory again
    const Divider by = me.by_row_pieces;
    const Divider by_experts = me.by_experts;
    const int pieces = by.divisor;
    const int top_k = p.top_k;
    const int my_rank = me.rank;
    const RowLane part(p, me, static_cast<int>(threadIdx.x));
    const bool caller = kFused && p.routing_input == kTopK;
    const int32_t* ids = ptx::global(caller ? me.topk_ids : me.home_ids);
    const float* weights = ptx::global(caller ? me.topk_weights : me.home_weights);
    const uint32_t* hidden = ptx::global(static_cast<const uint32_t*>(me.hidden));
    __nv_bfloat16* home_rows = me.home_rows;
    __nv_bfloat16* own_rows = me.own(p).recv_row(me.own(p).slot(my_rank, 0));
    const int64_t my_lines = Lines::row_offset(p, me, my_rank, 0);
    // The first rows do not wait for T: those past it are there, and are not used
    int units = min(p.max_tokens, kEagerTokens) * pieces;
    int base = mover;
    int token[kAtOnce];
    int piece[kAtOnce];
    const int32_t* id_at[kAtOnce];
    const uint32_t* row_at[kAtOnce];
    auto place = [&]() {
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int unit = base + i * movers;
            token[i] = by.quotient(unit);
            piece[i] = unit - token[i] * pieces;
            id_at[i] = ids + token[i] * top_k + lane;
            row_at[i] = hidden + static_cast<int64_t>(token[i]) * part.words + part.word_of(piece[i]);
        }
    };
    place();
    trace(10);
    ptx::wait_for_previous_grid();
    trace(0);
    HomeTokens home;
    bool first = true;
#pragma unroll 1
    while (true) {
        uint4 words[kAtOnce];
        int id[kAtOnce];
        float weight[kAtOnce];
        int next = base;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int unit = base + i * movers;
            if (unit >= units) {
                break;
            }
            next = unit + movers;
            id[i] = lane < top_k ? *id_at[i] : -1;
            weight[i] = 0.0f;
            const int word = part.word_of(piece[i]);
            if (!kWhole || piece[i] == 0) {
                const float* token_weights = weights + token[i] * top_k;
                weight[i] = piece[i] == 0 && lane < top_k ? token_weights[lane] : 0.0f;
                uint32_t w[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const bool of_header = word + j < 0;
                    const bool column = !of_header && word + j < part.words && !(part.tail && j >= 2);
                    w[j] = 0;
                    if (of_header && word + j + part.header < top_k) {
                        w[j] = __float_as_uint(token_weights[word + j + part.header]);
                    } else if (column && kWhole) {
                        w[j] = row_at[i][j];
                    } else if (column) {
                        w[j] = load_2_as_bf16(me.hidden, static_cast<int64_t>(token[i]) * p.hidden + 2 * (word + j),
                                              p.hidden - 2 * (word + j), p.hidden_dtype);
                    }
                }
                words[i] = make_uint4(w[0], w[1], w[2], w[3]);
            } else {
                uint2 half[2] = {make_uint2(0, 0), make_uint2(0, 0)};
                if (word < part.words) {
                    half[0] = *reinterpret_cast<const uint2*>(row_at[i]);
                }
                if (word + 2 < part.words && !part.tail) {
                    half[1] = *reinterpret_cast<const uint2*>(row_at[i] + 2);
                }
                words[i] = make_uint4(half[0].x, half[0].y, half[1].x, half[1].y);
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
            const bool inside = part.inside(piece[i]);
            const uint64_t named = ranks_of(p, by_experts, id[i]);
            const uint64_t ranks = named & home.members;
            const uint4 line = with_epoch(words[i], part.tail, home.epoch);
            const int64_t to = my_lines + static_cast<int64_t>(token[i]) * part.bytes + part.byte_of(piece[i]);
#pragma unroll 1
            for (int r = 1; r < p.num_ranks; r++) {
                const int rank = my_rank + r < p.num_ranks ? my_rank + r : my_rank + r - p.num_ranks;
                if (is_member(ranks, rank)) {
                    store_lines(me.regions[rank] + to, line, inside);
                }
            }
            trace(3);
            if (is_member(ranks, my_rank)) {
                part.store(own_rows + static_cast<int64_t>(token[i]) * p.hidden_pad, piece[i], words[i]);
            }
            if (home_rows != nullptr) {
                part.store(home_rows + static_cast<int64_t>(token[i]) * p.hidden_pad, piece[i], words[i]);
            }
            if (piece[i] == 0) {
                keep_home(p, me, home, token[i], id[i], weight[i], named);
            }
        }
        if (next >= units) {
            return;
        }
        base = next;
        place();
    }
}

// What has come from the peers, to the slots of this rank. A warp looks at the ids of a token and at a
// piece of its row together; a token without an expert here has no row.
template <int kAtOnce>
__device__ __forceinline__ void unpack_rows(const StepParams& p, const Here& me, const HomeTokens& home) {
    // why hidden from the compiler: what it has found out to send rows it would hold in registers until here
    int thread = static_cast<int>(threadIdx.x);
    int ctas = static_cast<int>(gridDim.x);
    asm volatile("" : "+r"(thread), "+r"(ctas));
    const int lane = thread % 32;
    const int rows_ctas = max(ctas - 1, 1);
    const int mover = thread / 32 * rows_ctas + max(static_cast<int>(blockIdx.x) - 1, 0);
    const int movers = rows_ctas * kFusedWarps;
    const int pieces = me.by_row_pieces.divisor;
    const int my_rank = me.rank;
    const int top_k = p.top_k;
    const int peers = p.num_ranks - 1;
    if (peers == 0) {
        return;  // a layer of a group runs once over its own rank alone, when it opens
    }
    const RowLane part(p, me, thread);
    const Symmetric mine = me.own(p);
    // Places are numbers of lines. why not addresses: those take two registers each
    const uint8_t* lines = me.regions[my_rank] + p.off_dispatch_lines;
    const int source_lines = me.id_line_count + p.max_tokens * me.row_lines;
    __nv_bfloat16* rows = mine.recv_row(0);
    const uint32_t first_expert = my_rank * p.experts_per_rank;
    const uint32_t local_experts = me.local_experts;
    // Units (token, piece) one after another, each for all peers
    const int per_peer = p.max_tokens * pieces;
    int unit_next = mover;
    int peer_next = 0;
    int idle = 0;
#pragma unroll 1
    while (unit_next < per_peer) {
        uint32_t ids[kAtOnce];  // a word of the line in each lane
        uint4 words[kAtOnce];
        int ids_line[kAtOnce];
        int row_line[kAtOnce];
        int source[kAtOnce];
        int token[kAtOnce];
        int piece[kAtOnce];
        uint32_t pending = 0;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            source[i] = peer_next < my_rank ? peer_next : peer_next + 1;
            token[i] = me.by_row_pieces.quotient(unit_next);
            piece[i] = unit_next - token[i] * pieces;
            ids_line[i] = source[i] * source_lines + me.by_ids_per_line.quotient(token[i]);
            row_line[i] = source[i] * source_lines + me.id_line_count + token[i] * me.row_lines + piece[i] * kWarpLines;
            pending |= unit_next < per_peer && is_member(home.members, source[i]) ? 1u << i : 0;
            peer_next++;
            if (peer_next == peers) {
                peer_next = 0;
                unit_next += movers;
            }
        }
        bool live = false;
        LineWait wait(p, me, kOpDispatchRecv, home.epoch);
#pragma unroll 1
        while (pending != 0) {
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                if (pending >> i & 1) {
                    __syncwarp();
                    ids[i] = ptx::load_line_word_sys(lines + static_cast<int64_t>(ids_line[i]) * kLineBytes + lane * 4);
                    load_lines(words[i], lines + static_cast<int64_t>(row_line[i]) * kLineBytes + part.byte,
                               part.inside(piece[i]));
                }
            }
            bool late = false;
            int late_peer = 0;
            uint64_t late_seen = 0;
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                if (!(pending >> i & 1)) {
                    continue;
                }
                uint64_t seen = epoch_in(words[i]);
                bool missing = part.tail && part.inside(piece[i]) && seen != home.epoch;
                if (!__any_sync(0xffffffffu, missing)) {
                    // why without a look at the ids: a row of this step was sent in this step
                    trace(4);
                    pending &= ~(1u << i);
                    live = true;
                    const int64_t slot = mine.slot(source[i], token[i]);
                    if (part.inside(piece[i])) {
                        part.store(rows + slot * p.hidden_pad, piece[i], words[i]);
                    }
                    if (piece[i] == 0 && part.word < 0) {
                        float* weights = ptx::global(mine.recv_weights(0));
                        const uint32_t header[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            const int k = part.word + part.header + j;
                            if (k < top_k && !(part.tail && j >= 2)) {
                                weights[slot * top_k + k] = __uint_as_float(header[j]);
                            }
                        }
                    }
                    continue;
                }
                const uint64_t ids_epoch =
                    static_cast<uint64_t>(__shfl_sync(0xffffffffu, ids[i], 31)) << 32 | __shfl_sync(0xffffffffu, ids[i], 30);
                if (ids_epoch == home.epoch) {
                    const int tokens = static_cast<int>(__shfl_sync(0xffffffffu, ids[i], 0));
                    const int first = (token[i] - me.by_ids_per_line.quotient(token[i]) * me.ids_per_line) * top_k;
                    const int h = 2 * (lane - 1) - first;  // of the token's entries
                    const bool named =
                        lane >= 1 && lane < kLineWords &&
                        ((h >= 0 && h < top_k && (ids[i] & 0xffff) - first_expert < local_experts) ||
                         (h + 1 >= 0 && h + 1 < top_k && (ids[i] >> 16) - first_expert < local_experts));
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
        idle = live ? 0 : idle + kAtOnce;
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

// Reads the ids of a rank alone: part of parts CTAs.
__device__ __forceinline__ void index_local(const StepParams& p, const Here& me, IndexShared& shared, int part,
                                            int parts) {
    const int warp = threadIdx.x / 32;
    ptx::wait_for_previous_grid();
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
}

// ------------------------------------------------------------------------- lists, ids in lines

struct LinesShared {
    uint32_t words[kCachedLines * 32];  // lines of all sources
    uint32_t bits[kListBits];   // [32 slots][expert]
    uint16_t before[kListBits]; // rows of the expert before those of a word
    uint16_t rows[kStagedRows]; // the row lists, if they are long
    int32_t offsets[kFusedThreads + 1];
    int32_t tokens[kMaxRanks];
    uint64_t waited[kMaxRanks];  // ns, for the first line
    int32_t warp_sums[kFusedWarps];
};

// How the lists of a rank are built; no step changes it.
struct ListPlan {
    // Words of 32 slots, for each expert.
    __device__ __forceinline__ static int words_of(const StepParams& p) {
        return (p.num_ranks * p.max_tokens + 31) / 32;
    }
    int batch;     // so many experts at once, a thread each
    bool at_once;  // all of them, with all lines in shared memory

    __device__ __forceinline__ ListPlan(const StepParams& p, int id_line_count) {
        const int words = words_of(p);
        at_once = p.experts_per_rank <= kFusedThreads && p.experts_per_rank * words <= kListBits &&
                  p.num_ranks * id_line_count <= kCachedLines;
        batch = p.experts_per_rank;
        if (!at_once) {
            batch = min(kFusedThreads, kListBits / words);
        }
    }
};

// A warp's view of lines of ids, a word a lane: two entries, of the same places in every line.
struct IdLane {
    int lane;
    int in_line;     // entries of a line
    int each;        // tokens of a line
    int line_count;
    int top_k;
    int max_tokens;
    int h;           // of the first entry, the other behind it
    bool has[2];
    int token[2];    // in the line
    uint32_t first_expert;
    uint32_t local_experts;
    int32_t* recv_ids;

    __device__ __forceinline__ IdLane(const StepParams& p, const Here& me) {
        lane = threadIdx.x % 32;
        top_k = p.top_k;
        max_tokens = p.max_tokens;
        each = me.ids_per_line;
        in_line = each * top_k;
        line_count = me.id_line_count;
        h = 2 * (lane - 1);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            has[j] = lane >= 1 && h + j < in_line;
            token[j] = me.by_top_k.quotient(max(h + j, 0));
        }
        first_expert = me.rank * p.experts_per_rank;
        local_experts = me.local_experts;
        recv_ids = ptx::global(me.own(p).recv_ids(0));
    }

    // Entries of this rank's own line.
    __device__ __forceinline__ uint32_t own(const int32_t* ids, int line, uint32_t experts) const {
        uint32_t entry[2];
        const int at = line * in_line + h;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const bool there = has[j] && at + j < max_tokens * top_k;
            const uint32_t id = there ? static_cast<uint32_t>(ids[at + j]) : kNoEntry;
            entry[j] = id < experts ? id : kNoEntry;
        }
        return entry[0] | entry[1] << 16;
    }

    // use(place, slot, local, known) for the entries of tokens below T. place: of the entry among those of all
    // slots; local: its expert here, if known.
    template <class Use>
    __device__ __forceinline__ void entries(int source, int line, uint32_t word, int tokens, Use use) const {
        const int first = source * max_tokens + line * each;
        tokens -= line * each;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (has[j] && token[j] < tokens) {
                // why the check: a peer's id is data, and the lists are indexed by it
                const uint32_t local = (j == 0 ? word & 0xffff : word >> 16) - first_expert;
                use(first * top_k + h + j, first + token[j], local, local < local_experts);
            }
        }
    }

    // A line that has come: ids to their slots, a bit for each expert of this rank.
    __device__ __forceinline__ void add(LinesShared& shared, const ListPlan& plan, int source, int line,
                                        uint32_t word, int tokens) const {
        if (plan.at_once) {
            shared.words[(source * line_count + line) * 32 + lane] = word;
        }
        entries(source, line, word, tokens, [&](int place, int slot, uint32_t local, bool known) {
            recv_ids[place] = known ? static_cast<int>(local) : -1;
            if (known && plan.at_once) {
                atomicOr(shared.bits + (slot >> 5) * plan.batch + local, 1u << (slot & 31));
            }
        });
    }
};

// Lines of the peers' ids, dealt to the warps. False: one did not come.
template <int kAtOnce>
__device__ __forceinline__ bool peer_lines(const StepParams& p, const Here& me, const HomeTokens& home,
                                           LinesShared& shared, const ListPlan& plan, const IdLane& ids) {
    const int my_rank = me.rank;
    const int peers = p.num_ranks - 1;
    const int64_t source_bytes = me.source_bytes;
    const uint8_t* lines = me.regions[my_rank] + p.off_dispatch_lines + ids.lane * 4;
    const int all = peers * ids.line_count;
    // Warps behind those that had own lines
    const int own = ids.line_count % kFusedWarps;
    int next = static_cast<int>(threadIdx.x / 32) - own;
    next += next < 0 ? kFusedWarps : 0;
#pragma unroll 1
    for (; next < all; next += kAtOnce * kFusedWarps) {
        uint32_t words[kAtOnce];
        int source[kAtOnce];
        int line[kAtOnce];
        uint32_t pending = 0;
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int item = next + i * kFusedWarps;
            const int peer = me.by_id_lines.quotient(item);
            source[i] = peer < my_rank ? peer : peer + 1;
            line[i] = item - peer * ids.line_count;
            pending |= item < all && is_member(home.members, source[i]) ? 1u << i : 0;
        }
        LineWait wait(p, me, kOpDispatchRecv, home.epoch);
#pragma unroll 1
        while (pending != 0) {
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                if (pending >> i & 1) {
                    __syncwarp();
                    words[i] = ptx::load_line_word_sys(lines + source[i] * source_bytes + line[i] * kLineBytes);
                }
            }
            bool late = false;
            int late_peer = 0;
            uint64_t late_seen = 0;
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                if (!(pending >> i & 1)) {
                    continue;
                }
                const uint64_t seen = static_cast<uint64_t>(__shfl_sync(0xffffffffu, words[i], 31)) << 32 |
                                      __shfl_sync(0xffffffffu, words[i], 30);
                if (seen != home.epoch) {
                    late = true;
                    late_peer = source[i];
                    late_seen = seen;
                    continue;
                }
                trace(4);
                pending &= ~(1u << i);
                const int tokens = clamp_tokens(static_cast<int>(__shfl_sync(0xffffffffu, words[i], 0)), p.max_tokens);
                ids.add(shared, plan, source[i], line[i], words[i], tokens);
                if (line[i] == 0 && ids.lane == 0) {
                    shared.tokens[source[i]] = tokens;
                    shared.waited[source[i]] = wait.waited_ns();
                }
            }
            if (pending != 0 && !wait.again(late, late_peer, late_seen)) {
                return false;
            }
        }
    }
    return true;
}

// Sums of a batch of experts, from their bits: rows before each word, counts, and offsets from first_row on.
// Ends with a barrier.
__device__ __forceinline__ void sum_bits(const StepParams& p, const Here& me, LinesShared& shared, const ListPlan& plan, int begin,
                                        int experts, int first_row) {
    const int e = threadIdx.x;
    int32_t* counts = ptx::global(me.expert_counts + begin);
    int32_t* offsets = ptx::global(me.expert_offsets + begin);
    int count = 0;
    if (e < experts) {
        const int words = ListPlan::words_of(p);
#pragma unroll 4
        for (int w = 0; w < words; w++) {
            shared.before[w * plan.batch + e] = static_cast<uint16_t>(count);
            count += __popc(shared.bits[w * plan.batch + e]);
        }
    }
    const int row = first_row + sum_before(shared.warp_sums, count);
    if (e < experts) {
        shared.offsets[e] = row;
        counts[e] = count;
        offsets[e] = row;
        if (e == experts - 1) {
            offsets[experts] = row + count;
            shared.offsets[experts] = row + count;
        }
    }
    __syncthreads();
}

// An entry of a slot: its row, and the slot into the row of its expert's list.
template <class Row>
__device__ __forceinline__ void write_entry(Row* expert_rows, int32_t* packed_row_of, const LinesShared& shared,
                                            const ListPlan& plan, int slot, int local, int64_t at) {
    const int word = (slot >> 5) * plan.batch + local;
    const int row = shared.offsets[local] + shared.before[word] + __popc(shared.bits[word] & ((1u << (slot & 31)) - 1));
    expert_rows[row] = static_cast<Row>(slot);
    packed_row_of[at] = row;
}

// Lists of more experts or slots than fit at once, from ids in their slots.
__device__ __forceinline__ void write_lists_in_batches(const StepParams& p, const Here& me, LinesShared& shared,
                                                       const ListPlan& plan) {
    const int32_t* ids = me.own(p).recv_ids(0);
    int rows = 0;
    for (int begin = 0; begin < p.experts_per_rank; begin += plan.batch) {
        const int experts = min(plan.batch, p.experts_per_rank - begin);
        for (int i = threadIdx.x; i < ListPlan::words_of(p) * plan.batch; i += kFusedThreads) {
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
        sum_bits(p, me, shared, plan, begin, experts, rows);
        each_entry([&](int slot, int local, int64_t at) {
            write_entry(me.expert_rows, me.packed_row_of, shared, plan, slot, local, at);
        });
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

// Waits for the peers' lines and builds the lists of all.
__device__ __forceinline__ void build_lists(const StepParams& p, const Here& me, const HomeTokens& home,
                                            LinesShared& shared, const ListPlan& plan, const IdLane& lane) {
    const int warp = threadIdx.x / 32;
    trace(3);
    const bool arrived = (p.num_ranks - 1) * lane.line_count <= kFusedWarps
                             ? peer_lines<1>(p, me, home, shared, plan, lane)
                             : peer_lines<2>(p, me, home, shared, plan, lane);
    trace(5);
    if (!__syncthreads_and(arrived)) {
        write_no_rows(p, me, 0, 1);
        return;
    }
    trace(6);
    ptx::allow_next_grid();
    const int my_rank = me.rank;
    if (plan.at_once) {
        sum_bits(p, me, shared, plan, 0, plan.batch, 0);
        trace(7);
        int32_t* expert_rows = ptx::global(me.expert_rows);
        int32_t* packed_row_of = ptx::global(me.packed_row_of);
        // why staged: stores to rows far apart take a cycle each, of all warps one after another
        const int rows = shared.offsets[plan.batch];
        const bool staged = rows > kFewRows && rows <= kStagedRows;
        // Each warp the lines that it has put there: own ones, then the peers'
        const Divider by = me.by_id_lines;
#pragma unroll 1
        for (int item = warp; item < p.num_ranks * lane.line_count; item += kFusedWarps) {
            const int place = by.quotient(item);
            const int line = item - place * lane.line_count;
            const int source = place == 0 ? my_rank : (place <= my_rank ? place - 1 : place);
            const uint32_t word = shared.words[(source * lane.line_count + line) * 32 + lane.lane];
            lane.entries(source, line, word, shared.tokens[source], [&](int place_of, int slot, uint32_t local, bool known) {
                if (known && staged) {
                    write_entry(shared.rows, packed_row_of, shared, plan, slot, local, place_of);
                } else if (known) {
                    write_entry(expert_rows, packed_row_of, shared, plan, slot, local, place_of);
                }
            });
        }
        if (staged) {
            __syncthreads();
            for (int i = threadIdx.x; i < rows; i += kFusedThreads) {
                expert_rows[i] = shared.rows[i];
            }
        }
        trace(8);
    } else {
        write_lists_in_batches(p, me, shared, plan);
    }
    if (threadIdx.x < p.num_ranks) {
        const int source = threadIdx.x;
        int32_t* recv_tokens = ptx::global(me.own(p).recv_tokens());
        recv_tokens[source] = shared.tokens[source];
        if (source != my_rank && is_member(home.members, source)) {
            uint64_t* totals = ptx::global(me.peer_totals + source * kPeerWords);
            totals[kPeerWaited] = shared.waited[source];
            // why an atomic: nothing waits for what it adds to
            atomicAdd(reinterpret_cast<unsigned long long*>(totals + kPeerWaitedTotal),
                      static_cast<unsigned long long>(shared.waited[source]));
        }
    }
}

// The ids of a rank and of its peers, by one CTA.
template <bool kSend, bool kRecv>
__device__ __forceinline__ void index_lines(const StepParams& p, const Here& me, LinesShared& shared) {
    constexpr int kOwnAtOnce = 2;
    const int warp = threadIdx.x / 32;
    const ListPlan plan(p, me.id_line_count);
    const IdLane lane(p, me);
    const int my_rank = me.rank;
    const int32_t* ids = ptx::global(kSend && kRecv && p.routing_input == kTopK ? me.topk_ids : me.home_ids);
    const int64_t my_lines = p.off_dispatch_lines + my_rank * me.source_bytes + lane.lane * 4;
    trace(10);
    ptx::wait_for_previous_grid();
    trace(0);

    // Own lines: first to the peers, which wait for them
    HomeTokens home;
    bool first = true;
#pragma unroll 1
    for (int base = warp; first || base < lane.line_count; base += kOwnAtOnce * kFusedWarps) {
        uint32_t words[kOwnAtOnce];
#pragma unroll
        for (int i = 0; i < kOwnAtOnce; i++) {
            const int line = base + i * kFusedWarps;
            words[i] = line < lane.line_count ? lane.own(ids, line, p.experts) : 0;
        }
        if (first) {
            first = false;
            home = home_tokens<kSend && kRecv>(p, me);
            trace(1);
            if (home.silent) {
                break;
            }
        }
#pragma unroll
        for (int i = 0; i < kOwnAtOnce; i++) {
            const int line = base + i * kFusedWarps;
            if (line >= lane.line_count) {
                break;
            }
            words[i] = lane.lane == 0 ? static_cast<uint32_t>(home.count) : words[i];
            words[i] = lane.lane == kLineWords ? static_cast<uint32_t>(home.epoch) : words[i];
            words[i] = lane.lane == kLineWords + 1 ? static_cast<uint32_t>(home.epoch >> 32) : words[i];
            if (kSend) {
#pragma unroll 1
                for (int r = 1; r < p.num_ranks; r++) {
                    const int rank = my_rank + r < p.num_ranks ? my_rank + r : my_rank + r - p.num_ranks;
                    if (is_member(home.members, rank)) {
                        __syncwarp();
                        ptx::store_line_word_sys(me.regions[rank] + my_lines + line * kLineBytes, words[i]);
                        trace(14);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kOwnAtOnce; i++) {
            const int line = base + i * kFusedWarps;
            if (kRecv && line < lane.line_count) {
                lane.add(shared, plan, my_rank, line, words[i], home.count);
            }
        }
    }
    trace(2);
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
    if (threadIdx.x == kFusedThreads - 1) {
        note_step(p, me, home);
        shared.tokens[my_rank] = home.count;
        if (kSend && !kRecv) {
            me.own(p).recv_tokens()[my_rank] = home.count;
        }
    }
    if constexpr (kRecv) {
        build_lists(p, me, home, shared, plan, lane);
    }
}

// ------------------------------------------------------------------------------------- kernels

__device__ __forceinline__ void dispatch_local(const StepParams& p, IndexShared& shared, Here& here) {
    load_here(here, p);
    const Here& me = here;
    // CTAs that read ids: all but a few move rows
    const int64_t words = (static_cast<int64_t>(p.max_tokens) + 31) / 32 * p.experts_per_rank;
    const int64_t wanted = (words + kListBits / 2 - 1) / (kListBits / 2);
    const int parts = static_cast<int>(min(wanted, static_cast<int64_t>((gridDim.x + 1) / 2)));
    const int first = static_cast<int>(gridDim.x) - parts;  // the first that reads ids
    const int rows_ctas = max(first, 1);
    if (static_cast<int>(blockIdx.x) < rows_ctas) {
        const int mover = static_cast<int>(threadIdx.x) / 32 * rows_ctas + static_cast<int>(blockIdx.x);
        if (rows_are_whole(p, me)) {
            keep_rows<true>(p, me, mover, rows_ctas * kFusedWarps);
        } else {
            keep_rows<false>(p, me, mover, rows_ctas * kFusedWarps);
        }
    }
    if (static_cast<int>(blockIdx.x) >= first) {
        index_local(p, me, shared, static_cast<int>(blockIdx.x) - first, parts);
    }
}

template <bool kSend, bool kRecv>
__device__ __forceinline__ void dispatch_lines(const StepParams& p, LinesShared& shared, Here& here) {
    // why so early: the CTA of ids holds the next kernel back until every peer's ids have come. Rows that are
    // still on their way then were sent by CTAs that run beside the one that sent the ids, and need nothing of
    // this GPU any more.
    if (kSend && kRecv && blockIdx.x != 0) {
        ptx::allow_next_grid();
    }
    trace_start(kTraceDispatch);
    trace(11);
    const bool reads_ids = blockIdx.x == 0;
    const bool moves = blockIdx.x != 0 || gridDim.x == 1;
    load_here(here, p, [&] {
        trace(12);
        if (kRecv && reads_ids) {
            clear_lists(shared);
        }
    });
    trace(13);
    const Here& me = here;
    const int rows_ctas = max(static_cast<int>(gridDim.x) - 1, 1);
    const int mover = static_cast<int>(threadIdx.x) / 32 * rows_ctas + max(static_cast<int>(blockIdx.x) - 1, 0);
    const int movers = rows_ctas * kFusedWarps;
    // Each waits for the kernel before it once it knows what it will do
    if (moves && kSend) {
        if (!rows_are_whole(p, me)) {
            send_rows<kSend && kRecv, false, 1>(p, me, mover, movers);
        } else {
            send_rows<kSend && kRecv, true, kPiecesInFlight>(p, me, mover, movers);
        }
        trace(2);
    } else if (moves) {
        ptx::wait_for_previous_grid();
    }
    if (reads_ids) {
        index_lines<kSend, kRecv>(p, me, shared);
    }
    if (moves && kRecv) {
        // why read again: rows are still on their way, and held until here it would cost registers
        const HomeTokens home = home_tokens<kSend && kRecv>(p, me);
        if (!home.silent) {
            unpack_rows<kUnpackedAtOnce>(p, me, home);
        }
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
