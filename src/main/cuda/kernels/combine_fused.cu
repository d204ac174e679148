// Combine in one kernel: the weighted rows of this rank's experts, and the sum of all ranks' at home.
//
// moe_combine_local     one rank and no peer
// moe_combine_lines     several ranks, rows travel in lines (comm/lines.cuh): send, wait and sum
// moe_combine_send_lines, moe_combine_recv_lines    the same in two, for work in between
//
// A warp computes four lines or 512 bytes of a row. With peers half of the warps send and half sum at home,
// whose own share they compute while rows travel. Which pieces a warp has does not depend on T, so that one
// round of loads fetches all that dispatch has written for the first. Sums and roundings are those of
// combine_send.cu and combine_recv.cu, bit for bit.
//
// The last CTA moves no row unless it is the only one. It raises the flags that say that this rank has
// read all that its peers sent in this step, tells the host of the step while rows travel, and waits for
// the peers' flags. Nothing comes after a CTA's last row: no arrival, no release.
//
// why loops over rows in shared memory: unrolled over registers it is no faster, and spills
#include "../comm/lines.cuh"
#include "../comm/publish.cuh"
#include "../comm/signal.cuh"
#include "../comm/trace.cuh"
#include "../layout/foreign.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/grid_dependency.cuh"

namespace moe {

// why 19 warps: those of an SM wait for each other's sums less than for memory, so more are faster, as long as
// nothing spills and a block's rows fit its shared memory
constexpr int kSumThreads = 608;
constexpr int kSumWarps = kSumThreads / 32;
constexpr int kRowsAtOnce = 4;  // of a slot's experts that a warp has in shared memory

// Divides units, which are below 2^32 / divisor, by a number that no step changes.
struct UnitDivider {
    uint32_t divisor;
    uint32_t factor;  // 2^32 / divisor, rounded up

    __device__ __forceinline__ explicit UnitDivider(int by)
        : divisor(by), factor(by == 1 ? 0 : 0xffffffffu / by + 1) {}
    __device__ __forceinline__ int quotient(int unit) const {
        return factor == 0 ? unit : static_cast<int>(__umulhi(unit, factor));
    }
};

template <bool kPeers>
struct ResultPiece {
    int word;
    int byte;
    bool tail;
    bool inside;

    __device__ __forceinline__ ResultPiece(const StepParams& p, int piece) {
        if (kPeers) {
            const LanePart part(piece);
            word = part.word;
            byte = part.byte;
            tail = part.tail;
            inside = byte < combine_row_lines(p.hidden_pad) * kLineBytes;
        } else {
            word = (piece * 32 + static_cast<int>(threadIdx.x % 32)) * 4;
            byte = 0;
            tail = false;
            inside = word < p.hidden_pad / 2;
        }
    }
    __device__ __forceinline__ static int count(const StepParams& p) {
        return kPeers ? (combine_row_lines(p.hidden_pad) + kWarpLines - 1) / kWarpLines
                      : (p.hidden_pad / 2 + 127) / 128;
    }
    __device__ __forceinline__ bool has_low(const StepParams& p) const { return inside && word < p.hidden_pad / 2; }
    __device__ __forceinline__ bool has_high(const StepParams& p) const {
        return inside && !tail && word + 2 < p.hidden_pad / 2;
    }
    // Four words of a bf16 row; past its end zero.
    __device__ __forceinline__ uint4 load(const StepParams& p, const __nv_bfloat16* row) const {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(row) + word;
        if (!kPeers) {
            return inside ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
        }
        const uint2 zero = make_uint2(0, 0);
        const uint2 low = has_low(p) ? *reinterpret_cast<const uint2*>(from) : zero;
        const uint2 high = has_high(p) ? *reinterpret_cast<const uint2*>(from + 2) : zero;
        return make_uint4(low.x, low.y, high.x, high.y);
    }
    // The bytes of a row that a piece stands for.
    static constexpr int kBytes = kPeers ? kWarpLines * kLineWords * 4 : 512;
    // This lane's words of them, in shared memory.
    __device__ __forceinline__ uint4 words_of(const uint8_t* staged) const {
        const int lane = threadIdx.x % 32;
        if (!kPeers) {
            return *reinterpret_cast<const uint4*>(staged + 16 * lane);
        }
        const uint2* at = reinterpret_cast<const uint2*>(staged + lane / kLanesPerLine * kLineWords * 4 +
                                                         lane % kLanesPerLine * 16);
        const uint2 low = at[0];
        const uint2 high = at[1];  // of the line's last lane it is the next line's, and not used
        return make_uint4(low.x, low.y, high.x, high.y);
    }
    __device__ __forceinline__ void store(const StepParams& p, __nv_bfloat16* row, uint4 v) const {
        uint32_t* to = reinterpret_cast<uint32_t*>(row) + word;
        if (!inside) {
            return;
        }
        if (!kPeers) {
            *reinterpret_cast<uint4*>(to) = v;
            return;
        }
        if (word < p.hidden_pad / 2) {
            *reinterpret_cast<uint2*>(to) = make_uint2(v.x, v.y);
        }
        if (!tail && word + 2 < p.hidden_pad / 2) {
            *reinterpret_cast<uint2*>(to + 2) = make_uint2(v.z, v.w);
        }
    }
};

// The same in all lanes, and the compiler knows it: else each shuffle and vote is a branch.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

__device__ __forceinline__ uint64_t uniform(uint64_t value) {
    return static_cast<uint64_t>(static_cast<uint32_t>(uniform(static_cast<int>(value >> 32)))) << 32 |
           static_cast<uint32_t>(uniform(static_cast<int>(value)));
}

// Lane k: entry k of a slot, as dispatch has left it.
struct SlotEntry {
    int id = -1;
    float weight = 0.0f;
    int row = 0;

    __device__ __forceinline__ SlotEntry() {}
    __device__ __forceinline__ SlotEntry(const StepParams& p, const Here& me, const Symmetric& mine, int source,
                                         int token, bool wanted) {
        const int lane = threadIdx.x % 32;
        if (wanted && lane < p.top_k) {
            const int64_t at = mine.slot(source, token) * p.top_k + lane;
            id = mine.recv_ids(0)[at];
            weight = mine.recv_weights(0)[at];
            row = me.packed_row_of[at];
        }
    }
};

// Pieces of rows that a warp waits for.
using StagedRows = uint4[kRowsAtOnce][32];

// The experts' rows of a slot, weighted and summed in k order in float32, as bf16: asked for by ask, computed
// by take, so that what comes between does not wait for them.
template <bool kPeers>
struct WeightedPiece {
    const StepParams& p;
    const Here& me;
    StagedRows& staged;
    float weight;
    int row;
    uint32_t left;   // bit k: the slot's k-th expert is on this rank
    uint32_t unasked;

    __device__ __forceinline__ WeightedPiece(const StepParams& p, const Here& me, StagedRows& staged)
        : p(p), me(me), staged(staged) {}

    __device__ __forceinline__ void copy_rows(int at) {
        const int lane = threadIdx.x % 32;
        const uint32_t row_bytes = 2 * p.hidden_pad;
        const uint32_t offset = at * ResultPiece<kPeers>::kBytes + 16 * lane;
        const bool valid = 16 * lane < ResultPiece<kPeers>::kBytes && offset < row_bytes;
        const uint8_t* base = reinterpret_cast<const uint8_t*>(me.expert_out) + offset;
        uint32_t to = ptx::shared_address(&staged[0][lane]);
#pragma unroll 1
        for (int i = 0; i < kRowsAtOnce && unasked != 0; i++) {
            const uint32_t packed = __shfl_sync(0xffffffffu, row, __ffs(unasked) - 1);
            ptx::cp_async_16(to, base + static_cast<uint64_t>(packed) * row_bytes, valid);
            unasked &= unasked - 1;
            to += sizeof staged[0];
        }
        ptx::cp_async_commit();
    }
    __device__ __forceinline__ void ask(const SlotEntry& entry, int at) {
        weight = entry.weight;
        row = entry.row;
        left = __ballot_sync(0xffffffffu, static_cast<uint32_t>(entry.id) < static_cast<uint32_t>(me.local_experts));
        unasked = left;
        copy_rows(at);
    }
    // False: the slot has no expert here.
    __device__ __forceinline__ bool take(const ResultPiece<kPeers>& piece, int at, uint4& result) {
        const bool any = left != 0;
        float sum[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            sum[j] = -0.0f;  // the number that adding to changes nothing, not even the sign of zero
        }
        while (true) {
            ptx::cp_async_wait<0>();
            __syncwarp();  // other lanes have copied what this one reads
            const uint8_t* from = reinterpret_cast<const uint8_t*>(staged);
#pragma unroll 1
            for (; left != unasked; left &= left - 1, from += sizeof staged[0]) {
                const float factor = __shfl_sync(0xffffffffu, weight, __ffs(left) - 1);
                float v[8];
                unpack_bf16(v, piece.words_of(from));
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    sum[j] = __fadd_rn(sum[j], __fmul_rn(factor, v[j]));
                }
            }
            __syncwarp();  // and may write again
            if (left == 0) {
                break;
            }
            copy_rows(at);
        }
        result = pack_bf16(sum);
        return any;
    }
};

// T of every source, lane by lane, 0 if it is no member.
struct SourceTokens {
    int low = 0;
    int high = 0;

    __device__ __forceinline__ SourceTokens(const StepParams& p, const int32_t* tokens) {
        const int lane = threadIdx.x % 32;
        low = tokens != nullptr && lane < p.num_ranks ? tokens[lane] : 0;
        high = tokens != nullptr && lane + 32 < p.num_ranks ? tokens[lane + 32] : 0;
    }
    __device__ __forceinline__ void keep(uint64_t members) {
        const int lane = threadIdx.x % 32;
        low = is_member(members, lane) ? low : 0;
        high = is_member(members, lane + 32) ? high : 0;
    }
    __device__ __forceinline__ int most() const { return __reduce_max_sync(0xffffffffu, max(low, high)); }
    __device__ __forceinline__ int of(int source) const {
        return __shfl_sync(0xffffffffu, source < 32 ? low : high, source % 32);
    }
};

// sigmoid(shared_gate . hidden[token]) by one warp, in the order of shared_scale in combine_recv.cu: that
// of a CTA of 256 threads.
__device__ __forceinline__ float shared_scale_of_warp(const StepParams& p, const Here& me, int token,
                                                      bool vectors) {
    const int lane = threadIdx.x % 32;
    double all = 0.0;
    for (int w = 0; w < kRowChunk / 8 / 32; w++) {
        double sum = 0.0;
        for (int column = (w * 32 + lane) * 8; column < p.hidden; column += kRowChunk) {
            float x[8];
            load_8(x, me.hidden, static_cast<int64_t>(token) * p.hidden + column, p.hidden - column,
                   p.hidden_dtype, vectors);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (column + i < p.hidden) {
                    sum = __fma_rn(static_cast<double>(x[i]), static_cast<double>(p.shared_gate[column + i]), sum);
                }
            }
        }
        sum = warp_sum(sum);
        all = w == 0 ? sum : __dadd_rn(all, sum);
    }
    return sigmoid(__double2float_rn(all));
}

__device__ __forceinline__ void add_8(float (&sum)[8], uint4 row, bool any) {
    float v[8];
    unpack_bf16(v, row);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        sum[i] = any ? __fadd_rn(sum[i], v[i]) : v[i];
    }
}

__device__ __forceinline__ void store_4(void* base, int64_t index, float a, float b, float c, float d, int valid,
                                        int32_t dtype, bool vectors) {
    if (vectors && valid >= 4) {
        if (dtype == kF32) {
            *reinterpret_cast<float4*>(static_cast<float*>(base) + index) = make_float4(a, b, c, d);
            return;
        }
        if (dtype == kBF16) {
            *reinterpret_cast<uint2*>(static_cast<uint16_t*>(base) + index) =
                make_uint2(pack_bf16(a, b), pack_bf16(c, d));
            return;
        }
    }
    const float v[4] = {a, b, c, d};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (i < valid) {
            store_element(base, index + i, v[i], dtype);
        }
    }
}

// A warp's piece of the sum of a token's ranks, as a value: what adds to it is called.
struct PieceSum {
    float v[8];
};

// Shared expert, accumulation and outputs other than whole vectors of bf16.
// why not inlined: most layers have none of it, and a kernel's instructions are fetched anew in each step
template <bool kPeers>
__device__ __noinline__ void finish_piece(const StepParams& p, const Here& me, int token, int at, PieceSum sum) {
    const ResultPiece<kPeers> piece(p, at);
    const bool in_vectors = rows_are_vectors(me.hidden, p.hidden, p.hidden_dtype);
    const bool out_vectors = rows_are_vectors(me.out, p.hidden, p.out_dtype);
    const bool gated = me.shared_out != nullptr && p.shared_gate != nullptr;
    const float scale = gated ? shared_scale_of_warp(p, me, token, in_vectors) : 1.0f;
    const int column = 2 * piece.word;
    const int valid = p.hidden - column;
    if (!piece.inside || valid <= 0) {
        return;
    }
    if (me.shared_out != nullptr) {
        float v[8];
        unpack_bf16(v, piece.load(p, me.shared_out + static_cast<int64_t>(token) * p.hidden_pad));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum.v[i] = __fadd_rn(sum.v[i], __fmul_rn(scale, v[i]));
        }
    }
    const int64_t to = static_cast<int64_t>(token) * p.hidden + column;
    const int mine_of_8 = min(valid, piece.tail ? 4 : 8);
    if (me.accumulate != 0) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i < mine_of_8) {
                sum.v[i] = __fadd_rn(sum.v[i], load_element(me.out, to + i, p.out_dtype));
            }
        }
    }
    if (!kPeers) {
        store_8(me.out, to, sum.v, valid, p.out_dtype, out_vectors);
    } else {
        store_4(me.out, to, sum.v[0], sum.v[1], sum.v[2], sum.v[3], mine_of_8, p.out_dtype, out_vectors);
        store_4(me.out, to + 4, sum.v[4], sum.v[5], sum.v[6], sum.v[7], mine_of_8 - 4, p.out_dtype, out_vectors);
    }
}

// Asks for the lines of the first peer of a token's ranks.
__device__ __forceinline__ uint4 ask_first(const StepParams& p, const Here& me, int token,
                                           const ResultPiece<true>& piece, uint64_t ranks) {
    const uint64_t peers = ranks & ~(1ull << me.rank);
    uint4 v = make_uint4(0, 0, 0, 0);
    if (peers != 0) {
        const int rank = __ffsll(static_cast<long long>(peers)) - 1;
        load_lines(v, Lines(p, me, me.rank).result(rank, token) + piece.byte, piece.inside);
    }
    return v;
}

// Adds the rows of a token's ranks in rank order. ahead: the first peer's lines as they were when they were
// asked for. False: a peer's lines did not come.
template <bool kPeers, bool kSend>
__device__ __forceinline__ bool add_ranks(const StepParams& p, const Here& me, int token,
                                          const ResultPiece<kPeers>& piece, uint64_t epoch, uint64_t ranks,
                                          uint4 own, uint4 ahead, float (&sum)[8]) {
    if constexpr (!kPeers) {
        if (ranks != 0) {
            add_8(sum, own, false);
        }
        return true;
    } else {
        const Lines lines(p, me, me.rank);
        uint64_t peers = ranks & ~(1ull << me.rank);
        auto ask = [&](uint4& v, int rank) { load_lines(v, lines.result(rank, token) + piece.byte, piece.inside); };
        bool any = false;
        for (uint64_t left = ranks; left != 0; left &= left - 1) {
            const int rank = __ffsll(static_cast<long long>(left)) - 1;
            uint4 row = own;
            if (rank != me.rank) {
                row = ahead;
                // The next peer's lines are asked for before this one's are waited for
                peers &= peers - 1;
                if (peers != 0) {
                    ask(ahead, __ffsll(static_cast<long long>(peers)) - 1);
                }
                LineWait wait(p, me, kOpCombineRecv, epoch);
                while (true) {
                    const bool missing = piece.inside && piece.tail && epoch_in(row) != epoch;
                    if (!__any_sync(0xffffffffu, missing)) {
                        break;
                    }
                    if (!wait.again(missing, rank, epoch_in(row))) {
                        return false;
                    }
                    ask(row, rank);
                }
                if (!kSend) {  // for inspection
                    const Symmetric mine = me.own(p);
                    piece.store(p, mine.combine_row(mine.slot(rank, token)), row);
                }
            }
            add_8(sum, row, any);
            any = true;
        }
        return true;
    }
}

// How pieces of out are stored.
enum OutForm {
    kOutOther,  // finish_piece does
    kOutBF16,   // whole vectors, nothing to add
    kOutF32
};

__device__ __forceinline__ OutForm out_form(const StepParams& p, const Here& me) {
    if (me.shared_out != nullptr || me.accumulate != 0 || !rows_are_vectors(me.out, p.hidden, p.out_dtype)) {
        return kOutOther;
    }
    return p.out_dtype == kBF16 ? kOutBF16 : p.out_dtype == kF32 ? kOutF32 : kOutOther;
}

// A piece of out, from the sum over the ranks.
template <bool kPeers>
__device__ __forceinline__ void store_out(const StepParams& p, const Here& me, int token, int at,
                                          const ResultPiece<kPeers>& piece, const PieceSum& sum, OutForm form) {
    if (form == kOutOther) {
        finish_piece<kPeers>(p, me, token, at, sum);
        return;
    }
    // why only where a vector begins: a row of whole vectors ends with one
    const int column = 2 * piece.word;
    if (!piece.inside || column >= p.hidden) {
        return;
    }
    const int64_t index = static_cast<int64_t>(token) * p.hidden + column;
    const bool both = !piece.tail && column + 4 < p.hidden;
    if (form == kOutF32) {
        float4* to = reinterpret_cast<float4*>(static_cast<float*>(me.out) + index);
        to[0] = make_float4(sum.v[0], sum.v[1], sum.v[2], sum.v[3]);
        if (both) {
            to[1] = make_float4(sum.v[4], sum.v[5], sum.v[6], sum.v[7]);
        }
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(me.out) + index;
    const uint4 v = pack_bf16(sum.v);
    if (!kPeers) {
        *reinterpret_cast<uint4*>(to) = v;
        return;
    }
    *reinterpret_cast<uint2*>(to) = make_uint2(v.x, v.y);
    if (both) {
        *reinterpret_cast<uint2*>(to + 4) = make_uint2(v.z, v.w);
    }
}

// One warp waits until every member has said that it has read what this rank sent. The flags left their
// ranks before the rows did, and no payload stands behind them.
__device__ __forceinline__ void wait_for_flags(const StepParams& p, const Here& me, uint64_t epoch, uint64_t members) {
    for (int peer = threadIdx.x % 32; peer < p.num_ranks; peer += 32) {
        if (is_member(members, peer)) {
            uint64_t waited_ns;
            wait_for_peer(me.own(p).combine_flags() + peer, epoch, peer, p, me, kOpCombineRecv, waited_ns);
            me.peer_totals[peer * kPeerWords + kPeerWaitedCombine] = waited_ns;
            me.peer_totals[peer * kPeerWords + kPeerWaitedTotal] += waited_ns;
        }
    }
}

// What the last CTA does, each warp its own: flags for the peers and the wait for theirs, and everything that
// the host reads. The step may still fail: what becomes of valid_epoch and steps then is the host's
// (docs/ordering.md).
template <bool kPeers, bool kSend, bool kRecv>
__device__ __noinline__ void tell_of_step(const StepParams& p, const Here& me) {
    constexpr int kFirstOfExperts = 3;
    constexpr int kFirstOfSources = 11;
    const int warp = static_cast<int>(threadIdx.x / 32);
    const int lane = static_cast<int>(threadIdx.x % 32);
    const Symmetric mine = me.own(p);
    const uint64_t epoch = me.epoch[kThisStep];
    const uint64_t members = *me.members;
    const bool silent = has_fault(me);
    if (kPeers && kSend && warp == 0) {
        // What the peers sent was copied by the dispatch kernel, which has ended
        for (int rank = lane; rank < p.num_ranks; rank += 32) {
            if (silent) {
                tell_peer(p, me, rank);
            } else if (is_member(members, rank)) {
                ptx::store_relaxed_sys(me.of(p, rank).combine_flags() + me.rank, epoch);
            }
        }
    }
    if (kRecv && warp == 0) {
        if (!silent) {
            publish_peers(p, me);
        }
        if (kPeers) {
            wait_for_flags(p, me, epoch, members);
        }
        __syncwarp();
    } else if (kRecv && warp == 1) {
        if (!silent) {
            publish_counters(me, epoch);
        }
    } else if (kRecv && warp == 2) {
        if (lane == 0) {
            me.epoch[kLastStep] = epoch;
        }
    } else if (kRecv && warp < kFirstOfSources) {
        if (!silent) {
            add_received(p, me, mine, static_cast<int>(threadIdx.x) - kFirstOfExperts * 32,
                         (kFirstOfSources - kFirstOfExperts) * 32);
        }
    } else if (kRecv && !silent) {
        for (int source = warp - kFirstOfSources; source < p.num_ranks; source += kSumWarps - kFirstOfSources) {
            publish_rows(p, me, mine, source, is_member(members, source));
        }
    }
}

struct CombineShared {
    StagedRows staged[kSumWarps];
    Here here;
};

template <bool kPeers, bool kSend, bool kRecv>
__device__ __forceinline__ void combine(const StepParams& p, CombineShared& shared) {
    constexpr bool kSends = kPeers && kSend;
    auto trace = [](int point) { trace_point(kTraceCombine, point); };
    trace_start(kTraceCombine);
    trace(11);
    // why here: the next step's dispatch needs a microsecond before it can use what this one frees. It is the
    // host that knows whether its blocks could keep out a kernel that a peer waits for.
    if (kSend && kRecv && p.early_next != 0) {
        ptx::allow_next_grid();
    }
    load_here(shared.here, p);
    const Here& me = shared.here;
    const Symmetric mine = me.own(p);

    // Units in the order of tokens: of sends (token, source, piece), of sums (token, piece).
    // why a warp has one kind: a sum waits for peers, and no peer may wait for what this warp has not sent
    const int warp_of_cta = uniform(static_cast<int>(threadIdx.x / 32));
    const int moving = static_cast<int>(gridDim.x > 1 ? gridDim.x - 1 : gridDim.x);
    const int warps = moving * kSumWarps;
    const int pieces = ResultPiece<kPeers>::count(p);
    // why fewer than half where warps have several units: the wire limits those that send
    const int sending = p.max_tokens * pieces > warps / 2 ? warps * 3 / 8 : warps / 2;
    const int senders = !kSends ? 0 : kRecv ? sending : warps;
    const int warp = warp_of_cta * moving + static_cast<int>(blockIdx.x);
    const bool sends = kSends && warp < senders;
    const int stride = sends ? senders : warps - senders;
    const int sources = !sends ? 1 : kRecv ? p.num_ranks - 1 : p.num_ranks;
    const UnitDivider by_sources(max(sources, 1));
    const UnitDivider by_pieces(pieces);
    auto locate = [&](int unit, int& token, int& source, int& at) {
        const int row = by_pieces.quotient(unit);
        at = unit - row * pieces;
        token = by_sources.quotient(row);
        source = me.rank;
        if (sends) {
            source = row - token * sources;
            source += kRecv && source >= me.rank ? 1 : 0;
        }
    };
    int unit = sends ? warp : warp - senders;
    int token, source, at;
    locate(unit, token, source, at);
    const OutForm form = out_form(p, me);
    trace(10);
    ptx::wait_for_previous_grid();
    trace(0);
    if (blockIdx.x == gridDim.x - 1) {
        tell_of_step<kPeers, kSend, kRecv>(p, me);
        trace(9);
        if (gridDim.x > 1) {
            return;
        }
    }

    // One round of loads, none of which depends on another
    const bool fault = has_fault(me);
    const uint64_t epoch = me.epoch[kThisStep];
    const uint64_t members = *me.members;
    SourceTokens tokens(p, sends ? mine.recv_tokens() : nullptr);
    const int home_tokens = *me.home_tokens;
    const bool inside = sources > 0 && token < p.max_tokens;
    SlotEntry entry(p, me, mine, source, token, kSend && inside);
    uint64_t ranks = !sends && inside ? me.home_mask[token] : 0;
    tokens.keep(members);
    if (__any_sync(0xffffffffu, fault)) {
        return;
    }
    trace(1);
    const int units = (sends ? min(tokens.most(), p.max_tokens) : uniform(home_tokens)) * sources * pieces;
    WeightedPiece<kPeers> weighted(p, me, shared.staged[warp_of_cta]);
    if (kSend && unit < units) {
        entry.id = !sends || token < tokens.of(source) ? entry.id : -1;
        weighted.ask(entry, at);
    }
    for (; unit < units; unit += stride) {
        const bool another = unit + stride < units;
        int next_token, next_source, next_at;
        locate(unit + stride, next_token, next_source, next_at);
        SlotEntry next(p, me, mine, next_source, next_token, kSend && another);
        const uint64_t next_ranks = another && !sends ? me.home_mask[next_token] : 0;

        const ResultPiece<kPeers> piece(p, at);
        uint4 row = make_uint4(0, 0, 0, 0);
        uint4 lines = make_uint4(0, 0, 0, 0);
        if constexpr (kPeers && kRecv) {
            if (!sends) {
                ranks = uniform(ranks);
                lines = ask_first(p, me, token, piece, ranks);
            }
        }
        bool has = false;
        if (kSend) {
            has = weighted.take(piece, at, row);
        } else if (is_member(ranks, me.rank)) {
            row = piece.load(p, mine.combine_row(mine.slot(me.rank, token)));
        }
        trace(3);
        if (unit < stride) trace(sends ? 5 : 6);
        // The next unit's rows come while this one's are sent or waited for
        if (kSend && another) {
            next.id = !sends || next_token < tokens.of(next_source) ? next.id : -1;
            weighted.ask(next, next_at);
        }
        if (sends) {
            if (has && !kRecv && source == me.rank) {  // the kernel that sums takes it from there
                piece.store(p, mine.combine_row(mine.slot(source, token)), row);
            } else if (has) {
                store_lines(Lines(p, me, source).result(me.rank, token) + piece.byte,
                            with_epoch(row, piece.tail, epoch), piece.inside);
                trace(2);
            }
        } else if (kRecv) {
            PieceSum sum = {{0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f}};
            if (!add_ranks<kPeers, kSend>(p, me, token, piece, epoch, uniform(ranks), row, lines, sum.v)) {
                return;
            }
            trace(4);
            store_out<kPeers>(p, me, token, at, piece, sum, form);
        }
        ranks = next_ranks, token = next_token, source = next_source, at = next_at;
    }
    trace(9);
}

}  // namespace moe

extern "C" __global__ __launch_bounds__(moe::kSumThreads, 1)
void moe_combine_local(const __grid_constant__ moe::StepParams p) {
    __shared__ moe::CombineShared shared;
    moe::combine<false, true, true>(p, shared);
}

extern "C" __global__ __launch_bounds__(moe::kSumThreads, 1)
void moe_combine_lines(const __grid_constant__ moe::StepParams p) {
    __shared__ moe::CombineShared shared;
    moe::combine<true, true, true>(p, shared);
}

extern "C" __global__ __launch_bounds__(moe::kSumThreads, 1)
void moe_combine_send_lines(const __grid_constant__ moe::StepParams p) {
    __shared__ moe::CombineShared shared;
    moe::combine<true, true, false>(p, shared);
}

extern "C" __global__ __launch_bounds__(moe::kSumThreads, 1)
void moe_combine_recv_lines(const __grid_constant__ moe::StepParams p) {
    __shared__ moe::CombineShared shared;
    moe::combine<true, false, true>(p, shared);
}
