// Dispatch in one kernel: routing, rows, counts, offsets and row lists.
//
// moe_dispatch_local    one rank and no peer: rows go to their slots, nobody waits
// moe_dispatch_lines    several ranks, rows travel in lines (comm/lines.cuh): send, wait and unpack
// moe_dispatch_send_lines, moe_dispatch_recv_lines    the same in two, for work in between
//
// Most CTAs move rows, 512 bytes or four lines a warp at a time. The last ones of a rank read the ids:
// they sanitise the caller's, send and receive them, and build the lists, from one bit per (expert,
// slot) in shared memory, so in slot order and without a wait for another CTA. With peers that is one
// CTA, so that a fault leaves either all lists or no row; without, several share the experts.
// why all CTAs of a kernel that waits have to be resident: they wait for a peer, which may be in the
// same grid. The host keeps gridDim.x * ranks at the number of multiprocessors or below.
#include "../comm/lines.cuh"
#include "../comm/publish.cuh"
#include "../comm/signal.cuh"
#include "../layout/foreign.cuh"
#include "../ptx/grid_dependency.cuh"

namespace moe {

constexpr int kFusedThreads = 512;
constexpr int kFusedWarps = kFusedThreads / 32;
constexpr int kListBits = 2048;      // words: (expert, 32 slots)
constexpr int kCachedEntries = 4096;
constexpr int kLocalExperts = 1024;  // most experts of a rank
constexpr int kPiecesInFlight = 4;   // of a warp
constexpr int kUnpackedAtOnce = 3;   // with ids and rows of each; four spill
constexpr int kEagerTokens = 8;      // read before T is known

struct IndexShared {
    uint16_t stage[kFusedWarps][kIdsPerLine];
    uint16_t entries[kCachedEntries];
    int32_t counts[kLocalExperts];
    int32_t offsets[kLocalExperts + 1];
    uint32_t bits[kListBits];
    int32_t rows_before[kListBits];
    int32_t tokens[kMaxRanks];
    int32_t warp_sums[kFusedWarps];
};

// What a dispatch kernel takes its tokens from: the caller's ids if it sanitises, else route's.
struct HomeTokens {
    const int32_t* ids;
    const float* weights;
    int count;
    bool sanitise;
    uint64_t epoch;
    uint64_t members;
};

template <bool kFused>
__device__ __forceinline__ HomeTokens home_tokens(const StepParams& p, const Here& me) {
    HomeTokens home;
    home.sanitise = kFused && p.routing_input == kTopK;
    home.ids = home.sanitise ? me.topk_ids : me.home_ids;
    home.weights = home.sanitise ? me.topk_weights : me.home_weights;
    home.count = home.sanitise ? clamp_tokens(*me.token_count, p.max_tokens) : *me.home_tokens;
    home.epoch = home.sanitise ? me.epoch[kLastStep] + 1 : me.epoch[kThisStep];
    home.members = *me.members;
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

    __device__ __forceinline__ RowPiece(const StepParams& p, int piece) {
        if (kPeers) {
            const LanePart part(piece);
            word = part.word - header_words(p.top_k);
            byte = part.byte;
            tail = part.tail;
            // why by lines: the last line's epoch goes out although no column is left for its lane
            inside = byte < dispatch_row_lines(p.hidden_pad, p.top_k) * kLineBytes;
        } else {
            word = (piece * 32 + static_cast<int>(threadIdx.x % 32)) * 4;
            byte = 0;
            tail = false;
            inside = word < p.hidden_pad / 2;
        }
    }
    __device__ __forceinline__ static int count(const StepParams& p) {
        return kPeers ? (dispatch_row_lines(p.hidden_pad, p.top_k) + kWarpLines - 1) / kWarpLines
                      : (p.hidden_pad / 2 + 127) / 128;
    }
};

template <bool kPeers>
__device__ __forceinline__ uint4 load_piece(const StepParams& p, const Here& me, const float* weights,
                                            int token, const RowPiece<kPeers>& piece, bool vectors) {
    const int64_t row = static_cast<int64_t>(token) * p.hidden;
    if constexpr (!kPeers) {
        return load_8_as_bf16(me.hidden, row + 2 * piece.word, p.hidden - 2 * piece.word, p.hidden_dtype, vectors);
    } else {
        uint2 half[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int word = piece.word + 2 * i;
            if (word < 0) {
                const int k = word + header_words(p.top_k);
                const float* at = weights + static_cast<int64_t>(token) * p.top_k + k;
                half[i] = make_uint2(__float_as_uint(at[0]), k + 1 < p.top_k ? __float_as_uint(at[1]) : 0);
            } else if (word < p.hidden_pad / 2) {
                half[i] = load_4_as_bf16(me.hidden, row + 2 * word, p.hidden - 2 * word, p.hidden_dtype, vectors);
            } else {
                half[i] = make_uint2(0, 0);
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
__device__ __forceinline__ uint64_t ranks_of(const StepParams& p, int id) {
    const bool in_range = id >= 0 && id < p.experts;
    const int rank = in_range ? id / p.experts_per_rank : 0;
    const uint32_t low = __reduce_or_sync(0xffffffffu, in_range && rank < 32 ? 1u << rank : 0);
    const uint32_t high =
        p.num_ranks <= 32 ? 0 : __reduce_or_sync(0xffffffffu, in_range && rank >= 32 ? 1u << (rank - 32) : 0);
    return static_cast<uint64_t>(high) << 32 | low;
}

// A rank's rows to the ranks of their experts: own slots plainly, others in lines. mover of movers warps.
template <bool kPeers, bool kFused>
__device__ __forceinline__ HomeTokens send_rows(const StepParams& p, const Here& me, int mover, int movers) {
    const int lane = threadIdx.x % 32;
    const int pieces = RowPiece<kPeers>::count(p);
    const bool vectors = rows_are_vectors(me.hidden, p.hidden, p.hidden_dtype);
    const bool caller = kFused && p.routing_input == kTopK;
    const int32_t* ids = caller ? me.topk_ids : me.home_ids;
    const float* weights = caller ? me.topk_weights : me.home_weights;
    uint4 words[kPiecesInFlight];
    int id[kPiecesInFlight];
    auto load = [&](int i, int unit) {
        const int token = unit / pieces;
        const RowPiece<kPeers> piece(p, unit - token * pieces);
        id[i] = lane < p.top_k ? ids[static_cast<int64_t>(token) * p.top_k + lane] : -1;
        words[i] = piece.inside ? load_piece<kPeers>(p, me, weights, token, piece, vectors) : make_uint4(0, 0, 0, 0);
    };

    // The first rows do not wait for T
    const int eager = min(kEagerTokens, p.max_tokens) * pieces;
#pragma unroll
    for (int i = 0; i < kPiecesInFlight; i++) {
        if (mover + i * movers < eager) {
            load(i, mover + i * movers);
        }
    }
    const HomeTokens home = home_tokens<kFused>(p, me);
    const bool silent = has_fault(me);
    const int units = silent ? 0 : home.count * pieces;
    for (int base = mover; base < units; base += kPiecesInFlight * movers) {
#pragma unroll
        for (int i = 0; i < kPiecesInFlight; i++) {
            const int unit = base + i * movers;
            if (unit < units && (base != mover || unit >= eager)) {
                load(i, unit);
            }
        }
#pragma unroll
        for (int i = 0; i < kPiecesInFlight; i++) {
            const int unit = base + i * movers;
            if (unit >= units) {
                continue;
            }
            const int token = unit / pieces;
            const RowPiece<kPeers> piece(p, unit - token * pieces);
            uint64_t ranks = ranks_of(p, id[i]) & home.members;
            if (kPeers) {
                const uint4 line = with_epoch(words[i], piece.tail, home.epoch);
                for (uint64_t left = ranks & ~(1ull << me.rank); left != 0; left &= left - 1) {
                    const int rank = __ffsll(static_cast<long long>(left)) - 1;
                    store_lines(Lines(p, me, rank).row(me.rank, token) + piece.byte, line, piece.inside);
                }
            }
            if (!piece.inside) {
                continue;
            }
            if (me.home_rows != nullptr) {
                store_piece<kPeers>(p, me.home_rows + static_cast<int64_t>(token) * p.hidden_pad, piece, words[i]);
            }
            if (is_member(ranks, me.rank)) {
                const Symmetric mine = me.own(p);
                store_piece<kPeers>(p, mine.recv_row(mine.slot(me.rank, token)), piece, words[i]);
            }
        }
    }
    return home;
}

// Entry h of a line of ids that a warp holds, lane by lane: calls use(entry, h) for this lane's.
template <class Use>
__device__ __forceinline__ void entries_of(uint4 v, Use use) {
    const int part = threadIdx.x % kLanesPerLine;
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int word = 4 * part + i;
        if (word >= 1 && word < kLineWords) {
            use(words[i] & 0xffff, 2 * (word - 1));
            use(words[i] >> 16, 2 * (word - 1) + 1);
        }
    }
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
    const int pieces = RowPiece<true>::count(p);
    const int peers = p.num_ranks - 1;
    if (peers == 0) {
        return;  // a layer of a group runs once over its own rank alone, when it opens
    }
    const int each = me.ids_per_line;
    const Symmetric mine = me.own(p);
    const Lines lines(p, me, me.rank);
    const bool tail = lane % kLanesPerLine == kLanesPerLine - 1;
    // Turns: units (token, piece) one after another, each for all peers
    const int per_peer = p.max_tokens * pieces;
    int idle = 0;
    for (int next = 0; next / peers * movers + mover < per_peer; next += kUnpackedAtOnce) {
        uint4 ids[kUnpackedAtOnce];
        uint4 words[kUnpackedAtOnce];
        int source[kUnpackedAtOnce];
        int token[kUnpackedAtOnce];
        int piece_of[kUnpackedAtOnce];
        uint32_t pending = 0;
#pragma unroll
        for (int i = 0; i < kUnpackedAtOnce; i++) {
            const int turn = (next + i) / peers;
            const int unit = mover + turn * movers;
            const int peer = next + i - turn * peers;
            source[i] = peer < me.rank ? peer : peer + 1;
            token[i] = unit / pieces;
            piece_of[i] = unit - token[i] * pieces;
            pending |= unit < per_peer && is_member(home.members, source[i]) ? 1u << i : 0;
        }
        bool live = false;
        LineWait wait(p, me, kOpDispatchRecv, home.epoch);
        while (pending != 0) {
#pragma unroll
            for (int i = 0; i < kUnpackedAtOnce; i++) {
                if (pending >> i & 1) {
                    const RowPiece<true> piece(p, piece_of[i]);
                    load_lines(ids[i], lines.ids(source[i], token[i] / each) + lane % kLanesPerLine * 16, true);
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
                const bool no_ids = tail && epoch_in(ids[i]) != home.epoch;
                uint64_t seen = epoch_in(ids[i]);
                bool missing = no_ids;
                if (!__any_sync(0xffffffffu, no_ids)) {
                    const int tokens = __shfl_sync(0xffffffffu, static_cast<int>(ids[i].x), 0);
                    const int from = token[i] % each * p.top_k;
                    bool named = false;
                    entries_of(ids[i], [&](uint32_t entry, int h) {
                        named |= h >= from && h < from + p.top_k && entry != kNoEntry;
                    });
                    live |= token[i] < tokens;
                    if (token[i] >= tokens || !__any_sync(0xffffffffu, named)) {
                        pending &= ~(1u << i);
                    } else {
                        const RowPiece<true> piece(p, piece_of[i]);
                        seen = epoch_in(words[i]);
                        missing = tail && piece.inside && seen != home.epoch;
                        if (!__any_sync(0xffffffffu, missing)) {
                            pending &= ~(1u << i);
                            if (piece.inside) {
                                keep_piece(p, mine, mine.slot(source[i], token[i]), piece, words[i]);
                            }
                        }
                    }
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

// ------------------------------------------------------------------------------------- ids and lists

// What is known of a slot's experts while the lists are built.
template <bool kPeers>
struct ListBuilder {
    IndexShared& shared;
    const StepParams& p;
    int words;         // of 32 slots, for each expert
    int begin;         // experts of this CTA
    int end;
    int batch;         // so many experts at once
    bool at_once;      // one batch: bits are set as ids come
    bool cached;       // entries of all slots fit

    __device__ __forceinline__ ListBuilder(IndexShared& shared, const StepParams& p, int tokens, int part, int parts)
        : shared(shared), p(p) {
        const int slots = kPeers ? p.num_ranks * p.max_tokens : tokens;
        words = max(1, (slots + 31) / 32);
        const int share = (p.experts_per_rank + parts - 1) / parts;
        begin = min(part * share, p.experts_per_rank);
        end = min(begin + share, p.experts_per_rank);
        batch = kListBits / words;
        at_once = end - begin <= batch;
        cached = slots * p.top_k <= kCachedEntries;
    }

    // With peers slots have fixed numbers, so that they are known before the peers' T.
    __device__ __forceinline__ int number(int source, int token) const {
        return kPeers ? source * p.max_tokens + token : token;
    }

    __device__ __forceinline__ void set_bit(int expert, int number) {
        atomicOr(shared.bits + (expert - begin_of_batch) * words + number / 32, 1u << number % 32);
    }

    // Entry k of a token: a local expert, kRepeated, or kNoEntry.
    __device__ __forceinline__ void add(int number, int k, uint32_t entry) {
        if (cached) {
            shared.entries[number * p.top_k + k] = static_cast<uint16_t>(entry);
        }
        if (entry == kNoEntry) {
            return;
        }
        const int expert = entry & kEntryId;
        if (!(entry & kRepeated)) {
            atomicAdd(shared.counts + expert, 1);
        }
        if (at_once && expert >= begin && expert < end) {
            set_bit(expert, number);
        }
    }

    // ids: as this CTA wrote them for what it received; without peers the home rank's, where another CTA
    // may be the one that writes.
    __device__ __forceinline__ int expert_of(const int32_t* ids, int64_t at, int number, int k) const {
        if (cached) {
            const uint32_t entry = shared.entries[number * p.top_k + k];
            return entry == kNoEntry ? -1 : static_cast<int>(entry & kEntryId);
        }
        const int id = ids[at];
        return id >= 0 && id < p.experts_per_rank ? id : -1;
    }

    int begin_of_batch = 0;
};

// A group of this rank's own tokens, as many as a line holds: sanitised if the ids are the
// caller's, kept as received from itself, counted, and told to every peer.
template <bool kPeers, bool kSend, bool kRecv>
__device__ __forceinline__ void own_group(const StepParams& p, const Here& me, const HomeTokens& home,
                                          ListBuilder<kPeers>& lists, int group, bool mine_to_write,
                                          uint32_t (&soft)[3]) {
    const int lane = threadIdx.x % 32;
    const int top_k = p.top_k;
    const int each = me.ids_per_line;
    const int in_group = each;  // why one line: more warps sanitise at once
    uint16_t* stage = lists.shared.stage[threadIdx.x / 32];
    const Symmetric own = me.own(p);
    if (kPeers && kSend) {
        for (int i = lane; i < in_group * top_k; i += 32) {
            stage[i] = kNoEntry;
        }
        __syncwarp();
    }
    const int per_pass = 32 / top_k;
    const int of_pass = lane / top_k;
    const int k = lane - of_pass * top_k;
    const int last = min(in_group, home.count - group * in_group);
    for (int first = 0; first < last; first += per_pass) {
        const int token = group * in_group + first + of_pass;
        const bool active = of_pass < per_pass && first + of_pass < last;
        const int64_t at = static_cast<int64_t>(token) * top_k + k;
        int id = active ? home.ids[at] : -1;
        const float weight = active ? home.weights[at] : 0.0f;
        const bool in_range = id >= 0 && id < p.experts;
        const bool drops = active && !in_range && id != -1;
        id = in_range ? id : -1;
        const int rank = in_range ? id / p.experts_per_rank : 0;
        bool repeat = false;
        uint64_t ranks = 0;
#pragma unroll 4
        for (int j = 0; j < top_k; j++) {
            const int from = (of_pass * top_k + j) & 31;
            const int other = __shfl_sync(0xffffffffu, id, from);
            const int other_rank = __shfl_sync(0xffffffffu, rank, from);
            repeat |= j < k && id >= 0 && other == id;
            ranks |= other >= 0 ? 1ull << other_rank : 0;
        }
        if (!active) {
            continue;
        }
        if (home.sanitise && mine_to_write) {
            me.home_ids[at] = id;
            me.home_weights[at] = weight;
            soft[0] += drops;
            soft[1] += repeat;
            if (k == 0) {
                me.home_mask[token] = ranks & home.members;
                soft[2] += __popcll(ranks & ~home.members);
            }
        }
        const bool here = id >= 0 && rank == me.rank;
        const int local = id - me.rank * p.experts_per_rank;
        if (kSend && mine_to_write) {
            const int64_t slot = own.slot(me.rank, token);
            own.recv_ids(slot)[k] = here ? local : -1;
            own.recv_weights(slot)[k] = weight;
        }
        if (kPeers && kSend) {
            stage[(first + of_pass) * top_k + k] =
                static_cast<uint16_t>(id < 0 ? kNoEntry : id | (repeat ? 0x8000 : 0));
        }
        if (kRecv) {
            lists.add(lists.number(me.rank, token), k,
                      here ? static_cast<uint32_t>(local) | (repeat ? kRepeated : 0) : kNoEntry);
        }
    }
    if (!(kPeers && kSend)) {
        return;
    }
    __syncwarp();
    const int part = lane % kLanesPerLine;
    const int line = group;
    const uint16_t* entries = stage;
    for (int rank = 0; rank < p.num_ranks; rank++) {
        if (rank == me.rank || !is_member(home.members, rank)) {
            continue;
        }
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t halves[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int h = 2 * (4 * part + i - 1) + j;
                const uint32_t entry = h >= 0 && h < each * top_k ? entries[h] : kNoEntry;
                const int local = static_cast<int>(entry & 0x7fff) - rank * p.experts_per_rank;
                halves[j] = entry != kNoEntry && local >= 0 && local < p.experts_per_rank
                                ? static_cast<uint32_t>(local) | (entry & 0x8000 ? kRepeated : 0)
                                : kNoEntry;
            }
            words[i] = halves[0] | halves[1] << 16;
        }
        if (part == 0) {
            words[0] = static_cast<uint32_t>(home.count);
        }
        store_lines(Lines(p, me, rank).ids(me.rank, line) + part * 16,
                    with_epoch(make_uint4(words[0], words[1], words[2], words[3]), part == kLanesPerLine - 1, home.epoch),
                    lane < kLanesPerLine);
    }
    __syncwarp();
}

// A group of a peer's tokens. False: its lines did not come.
__device__ __forceinline__ bool peer_group(const StepParams& p, const Here& me, const HomeTokens& home,
                                           ListBuilder<true>& lists, int source, int group) {
    const int lane = threadIdx.x % 32;
    const int top_k = p.top_k;
    const int each = me.ids_per_line;
    const int line = group * kWarpLines + lane / kLanesPerLine;
    const bool inside = line < me.id_line_count;
    const bool tail = lane % kLanesPerLine == kLanesPerLine - 1;
    const Symmetric mine = me.own(p);
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
    const int tokens = clamp_tokens(__shfl_sync(0xffffffffu, static_cast<int>(v.x), 0), p.max_tokens);
    if (group == 0 && lane == 0) {
        lists.shared.tokens[source] = tokens;
        const uint64_t waited = wait.waited_ns();
        me.peer_totals[source * kPeerWords + kPeerWaited] = waited;
        me.peer_totals[source * kPeerWords + kPeerWaitedTotal] += waited;
    }
    entries_of(v, [&](uint32_t entry, int h) {
        const int token = line * each + h / top_k;
        const int k = h % top_k;
        if (inside && h < each * top_k && token < tokens) {
            // why the check: a peer's id is data, and the lists are indexed by it
            const uint32_t known =
                (entry & kEntryId) < static_cast<uint32_t>(me.local_experts) ? entry : kNoEntry;
            mine.recv_ids(mine.slot(source, token))[k] =
                known == kNoEntry ? -1 : static_cast<int>(known & kEntryId);
            lists.add(lists.number(source, token), k, known);
        }
    });
    return true;
}

// Exclusive sums of counts over the experts, to offsets. Ends with a barrier.
__device__ __forceinline__ void sum_counts(IndexShared& shared, int experts) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int each = (experts + kFusedThreads - 1) / kFusedThreads;
    const int begin = min(static_cast<int>(threadIdx.x) * each, experts);
    const int end = min(begin + each, experts);
    int sum = 0;
    for (int e = begin; e < end; e++) {
        sum += shared.counts[e];
    }
    int scan = sum;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, scan, offset);
        scan += lane >= offset ? other : 0;
    }
    if (lane == 31) {
        shared.warp_sums[warp] = scan;
    }
    __syncthreads();
    const int of_warp = lane < kFusedWarps && lane < warp ? shared.warp_sums[lane] : 0;
    int before = scan - sum + __reduce_add_sync(0xffffffffu, of_warp);
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

template <bool kPeers>
__device__ __forceinline__ void write_lists(const StepParams& p, const Here& me, ListBuilder<kPeers>& lists,
                                            const int32_t* ids) {
    IndexShared& shared = lists.shared;
    const Symmetric mine = me.own(p);
    const int top_k = p.top_k;
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
            for (int source = 0; source < p.num_ranks; source++) {
                const int64_t at = mine.slot(source, 0) * top_k;
                for (int i = threadIdx.x; i < shared.tokens[source] * top_k; i += kFusedThreads) {
                    const int number = lists.number(source, i / top_k);
                    const int expert = lists.expert_of(ids, at + i, number, i % top_k);
                    if (expert >= begin && expert < end) {
                        lists.set_bit(expert, number);
                    }
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
        for (int source = 0; source < p.num_ranks; source++) {
            const int64_t first_slot = mine.slot(source, 0);
            for (int i = threadIdx.x; i < shared.tokens[source] * top_k; i += kFusedThreads) {
                const int token = i / top_k;
                const int number = lists.number(source, token);
                const int expert = lists.expert_of(ids, first_slot * top_k + i, number, i - token * top_k);
                if (expert >= begin && expert < end) {
                    const int word = (expert - begin) * lists.words + number / 32;
                    const int row = shared.rows_before[word] + __popc(shared.bits[word] & ((1u << number % 32) - 1));
                    me.expert_rows[row] = static_cast<int32_t>(first_slot + token);
                    me.packed_row_of[first_slot * top_k + i] = row;
                }
            }
        }
    }
}

// The ids of a rank: part of parts CTAs.
template <bool kPeers, bool kSend, bool kRecv>
__device__ __forceinline__ void index_ids(const StepParams& p, const Here& me, IndexShared& shared, int part,
                                          int parts) {
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const HomeTokens home = home_tokens<kSend && kRecv>(p, me);
    const bool silent = has_fault(me);
    if (part == 0 && threadIdx.x == 0 && home.sanitise) {
        *me.home_tokens = home.count;
        me.epoch[kThisStep] = home.epoch;
        if (*me.token_count > p.max_tokens) {
            add_total(me, kTotalOverCapacity, *me.token_count - p.max_tokens);
        }
    }
    if (silent) {
        if (kSend && part == 0 && threadIdx.x < p.num_ranks) {
            tell_peer(p, me, threadIdx.x);
        }
        if (kRecv) {
            write_no_rows(p, me, part, parts);
        }
        return;
    }

    ListBuilder<kPeers> lists(shared, p, home.count, part, parts);
    if (kRecv) {
        lists.begin_of_batch = lists.begin;
        for (int e = threadIdx.x; e < p.experts_per_rank; e += kFusedThreads) {
            shared.counts[e] = 0;
        }
        for (int i = threadIdx.x; lists.at_once && i < (lists.end - lists.begin) * lists.words; i += kFusedThreads) {
            shared.bits[i] = 0;
        }
        if (threadIdx.x < p.num_ranks) {
            shared.tokens[threadIdx.x] = threadIdx.x == me.rank ? home.count : 0;
        }
        __syncthreads();
    }

    // Own groups first: what is sent before anybody waits
    const int groups = (me.id_line_count + kWarpLines - 1) / kWarpLines;
    const int own_groups =
        kPeers && kSend ? me.id_line_count : (home.count + me.ids_per_line - 1) / me.ids_per_line;
    const int items = own_groups + (kPeers && kRecv ? (p.num_ranks - 1) * groups : 0);
    uint32_t soft[3] = {0, 0, 0};
    bool arrived = true;
    for (int item = warp; item < items; item += kFusedWarps) {
        if (item < own_groups) {
            own_group<kPeers, kSend, kRecv>(p, me, home, lists, item, item % parts == part, soft);
        } else if (kPeers && kRecv) {
            const int peer = (item - own_groups) / groups;
            const int source = peer < me.rank ? peer : peer + 1;
            if (is_member(home.members, source) && arrived) {
                arrived = peer_group(p, me, home, reinterpret_cast<ListBuilder<true>&>(lists), source,
                                     item - own_groups - peer * groups);
            }
        }
    }
    if (home.sanitise) {
        const TotalWord words[3] = {kTotalDropped, kTotalDuplicates, kTotalLostRows};
#pragma unroll
        for (int i = 0; i < 3; i++) {
            const uint32_t sum = __reduce_add_sync(0xffffffffu, soft[i]);
            if (lane == 0) {
                add_total(me, words[i], sum);
            }
        }
    }
    if (!kRecv) {
        if (threadIdx.x == 0) {
            me.own(p).recv_tokens()[me.rank] = home.count;
        }
        return;
    }
    if (!__syncthreads_and(arrived)) {
        write_no_rows(p, me, part, parts);
        return;
    }
    ptx::allow_next_grid();
    if (part == 0 && threadIdx.x < p.num_ranks) {
        me.own(p).recv_tokens()[threadIdx.x] = shared.tokens[threadIdx.x];
    }
    sum_counts(shared, p.experts_per_rank);
    const int32_t* ids = kPeers ? me.own(p).recv_ids(0) : home.ids;
    write_lists<kPeers>(p, me, lists, ids);
}

// CTAs that read ids: all but a few move rows. One where there are peers.
template <bool kPeers>
__device__ __forceinline__ int index_ctas(const StepParams& p) {
    if (kPeers) {
        return 1;
    }
    const int64_t words = (static_cast<int64_t>(p.max_tokens) + 31) / 32 * p.experts_per_rank;
    const int64_t wanted = (words + kListBits / 2 - 1) / (kListBits / 2);
    return static_cast<int>(min(wanted, static_cast<int64_t>((gridDim.x + 1) / 2)));
}

template <bool kPeers, bool kSend, bool kRecv>
__device__ __forceinline__ void dispatch(const StepParams& p, IndexShared& shared, Here& here) {
    load_here(here, p);
    const Here& me = here;
    ptx::wait_for_previous_grid();
    const int parts = index_ctas<kPeers>(p);
    const int first = static_cast<int>(gridDim.x) - parts;  // the first that reads ids
    const int rows_ctas = max(first, 1);
    const int mover = static_cast<int>(threadIdx.x) / 32 * rows_ctas + static_cast<int>(blockIdx.x);
    const int movers = rows_ctas * kFusedWarps;
    HomeTokens home;
    bool moves = static_cast<int>(blockIdx.x) < rows_ctas;
    if (moves && kSend) {
        home = send_rows<kPeers, kSend && kRecv>(p, me, mover, movers);
    } else if (moves) {
        home = home_tokens<false>(p, me);
    }
    if (static_cast<int>(blockIdx.x) >= first) {
        index_ids<kPeers, kSend, kRecv>(p, me, shared, static_cast<int>(blockIdx.x) - first, parts);
    }
    if (moves && kPeers && kRecv && !has_fault(me)) {
        unpack_rows(p, me, home, mover, movers);
    }
}

}  // namespace moe

extern "C" __global__ __launch_bounds__(moe::kFusedThreads, 1)
void moe_dispatch_local(const __grid_constant__ moe::StepParams p) {
    __shared__ moe::IndexShared shared;
    __shared__ moe::Here here;
    moe::dispatch<false, true, true>(p, shared, here);
}

extern "C" __global__ __launch_bounds__(moe::kFusedThreads, 1)
void moe_dispatch_lines(const __grid_constant__ moe::StepParams p) {
    __shared__ moe::IndexShared shared;
    __shared__ moe::Here here;
    moe::dispatch<true, true, true>(p, shared, here);
}

extern "C" __global__ __launch_bounds__(moe::kFusedThreads, 1)
void moe_dispatch_send_lines(const __grid_constant__ moe::StepParams p) {
    __shared__ moe::IndexShared shared;
    __shared__ moe::Here here;
    moe::dispatch<true, true, false>(p, shared, here);
}

extern "C" __global__ __launch_bounds__(moe::kFusedThreads, 1)
void moe_dispatch_recv_lines(const __grid_constant__ moe::StepParams p) {
    __shared__ moe::IndexShared shared;
    __shared__ moe::Here here;
    moe::dispatch<true, false, true>(p, shared, here);
}
