// Combine in one kernel: the weighted rows of this rank's experts, and the sum of all ranks' at home.
//
// moe_combine_local     one rank and no peer
// moe_combine_lines     several ranks, rows travel in lines (comm/lines.cuh): send, wait and sum
// moe_combine_send_lines, moe_combine_recv_lines    the same in two, for work in between
//
// A warp computes four lines or 512 bytes of a row. Rows for peers go out first; a rank's rows for itself
// go from registers into its sum. Sums and roundings are those of combine_send.cu and combine_recv.cu,
// bit for bit. Flags say that this rank has read all that its peers sent in this step: they go out first,
// with no payload behind them, and one CTA waits for the peers'.
#include "../comm/lines.cuh"
#include "../comm/publish.cuh"
#include "../comm/signal.cuh"
#include "../layout/foreign.cuh"
#include "../ptx/grid_dependency.cuh"

namespace moe {

constexpr int kSumThreads = 512;
constexpr int kSumWarps = kSumThreads / 32;
template <bool kPeers>
constexpr int kRowsAtOnce = kPeers ? 4 : 8;  // of a slot's experts; more would spill
constexpr int kRanksAtOnce = 4;  // whose lines a warp waits for together

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
    // Four words of a bf16 row; past its end zero.
    __device__ __forceinline__ uint4 load(const StepParams& p, const __nv_bfloat16* row) const {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(row) + word;
        if (!kPeers) {
            return inside ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
        }
        const uint2 zero = make_uint2(0, 0);
        const uint2 low = inside && word < p.hidden_pad / 2 ? *reinterpret_cast<const uint2*>(from) : zero;
        const uint2 high = inside && !tail && word + 2 < p.hidden_pad / 2
                               ? *reinterpret_cast<const uint2*>(from + 2)
                               : zero;
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

// The experts' rows of a slot, weighted and summed in k order in float32, as bf16. False: it has none.
template <bool kPeers>
__device__ __forceinline__ bool weighted_piece(const StepParams& p, const Here& me, const Symmetric& mine,
                                               int64_t slot, const ResultPiece<kPeers>& piece, uint4& result) {
    const int lane = threadIdx.x % 32;
    int id = -1;
    int row = 0;
    float weight = 0.0f;
    if (lane < p.top_k) {
        id = mine.recv_ids(slot)[lane];
        weight = mine.recv_weights(slot)[lane];
        row = me.packed_row_of[slot * p.top_k + lane];
    }
    uint32_t left = __ballot_sync(0xffffffffu, static_cast<uint32_t>(id) < static_cast<uint32_t>(me.local_experts));
    if (left == 0) {
        return false;
    }
    float sum[8];
    bool any = false;
    while (left != 0) {
        uint4 rows[kRowsAtOnce<kPeers>];
        float weights[kRowsAtOnce<kPeers>];
        bool here[kRowsAtOnce<kPeers>];
#pragma unroll
        for (int i = 0; i < kRowsAtOnce<kPeers>; i++) {
            here[i] = left != 0;
            if (here[i]) {
                const int k = __ffs(left) - 1;
                left &= left - 1;
                weights[i] = __shfl_sync(0xffffffffu, weight, k);
                const int64_t packed = __shfl_sync(0xffffffffu, row, k);
                rows[i] = piece.load(p, me.expert_out + packed * p.hidden_pad);
            }
        }
#pragma unroll
        for (int i = 0; i < kRowsAtOnce<kPeers>; i++) {
            if (!here[i]) {
                continue;
            }
            float v[8];
            unpack_bf16(v, rows[i]);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float term = __fmul_rn(weights[i], v[j]);
                sum[j] = any ? __fadd_rn(sum[j], term) : term;
            }
            any = true;
        }
    }
    result = pack_bf16(sum);
    return true;
}

// Rows for other ranks, in lines; if somebody else sums, also the own, in place.
template <bool kRecv>
__device__ __forceinline__ void send_results(const StepParams& p, const Here& me, uint64_t epoch,
                                             uint64_t members, int mover, int movers) {
    const Symmetric mine = me.own(p);
    const int pieces = ResultPiece<true>::count(p);
    const int sources = kRecv ? p.num_ranks - 1 : p.num_ranks;
    int most = 0;
    for (int s = static_cast<int>(threadIdx.x) % 32; s < p.num_ranks; s += 32) {
        most = max(most, is_member(members, s) ? mine.recv_tokens()[s] : 0);
    }
    most = min(__reduce_max_sync(0xffffffffu, most), p.max_tokens);
    for (int unit = mover; unit < most * pieces; unit += movers) {
        const int token = unit / pieces;
        const ResultPiece<true> piece(p, unit - token * pieces);
        for (int i = 0; i < sources; i++) {
            const int source = kRecv && i >= me.rank ? i + 1 : i;
            if (!is_member(members, source) || token >= mine.recv_tokens()[source]) {
                continue;
            }
            uint4 v;
            if (!weighted_piece<true>(p, me, mine, mine.slot(source, token), piece, v)) {
                continue;
            }
            if (source == me.rank) {
                piece.store(p, mine.combine_row(mine.slot(source, token)), v);
            } else {
                store_lines(Lines(p, me, source).result(me.rank, token) + piece.byte,
                            with_epoch(v, piece.tail, epoch), piece.inside);
            }
        }
    }
}

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

// The sum of a token's ranks. False: a peer's lines did not come.
template <bool kPeers, bool kSend>
__device__ __forceinline__ bool sum_piece(const StepParams& p, const Here& me, const Symmetric& mine, int token,
                                          const ResultPiece<kPeers>& piece, uint64_t epoch, float (&sum)[8]) {
    uint64_t ranks = me.home_mask[token];
    uint4 own = make_uint4(0, 0, 0, 0);
    if (is_member(ranks, me.rank)) {
        const int64_t slot = mine.slot(me.rank, token);
        if (kSend) {
            weighted_piece<kPeers>(p, me, mine, slot, piece, own);
        } else {
            own = piece.load(p, mine.combine_row(slot));
        }
    }
    if constexpr (!kPeers) {
        if (ranks != 0) {
            add_8(sum, own, false);
        }
        return true;
    } else {
        const Lines lines(p, me, me.rank);
        bool any = false;
        while (ranks != 0) {
            uint4 rows[kRanksAtOnce];
            int from[kRanksAtOnce];
            uint32_t pending = 0;
            int count = 0;
#pragma unroll
            for (int i = 0; i < kRanksAtOnce; i++) {
                from[i] = -1;
                if (ranks != 0) {
                    from[i] = __ffsll(static_cast<long long>(ranks)) - 1;
                    ranks &= ranks - 1;
                    rows[i] = own;
                    pending |= from[i] != me.rank ? 1u << i : 0;
                    count++;
                }
            }
            LineWait wait(p, me, kOpCombineRecv, epoch);
            while (pending != 0) {
#pragma unroll
                for (int i = 0; i < kRanksAtOnce; i++) {
                    if (pending >> i & 1) {
                        load_lines(rows[i], lines.result(from[i], token) + piece.byte, piece.inside);
                    }
                }
                bool late = false;
                int late_peer = 0;
                uint64_t late_seen = 0;
#pragma unroll
                for (int i = 0; i < kRanksAtOnce; i++) {
                    if (!(pending >> i & 1)) {
                        continue;
                    }
                    const bool missing = piece.inside && piece.tail && epoch_in(rows[i]) != epoch;
                    if (missing) {
                        late = true;
                        late_peer = from[i];
                        late_seen = epoch_in(rows[i]);
                    }
                    if (!__any_sync(0xffffffffu, missing)) {
                        pending &= ~(1u << i);
                    }
                }
                if (pending != 0 && !wait.again(late, late_peer, late_seen)) {
                    return false;
                }
            }
#pragma unroll
            for (int i = 0; i < kRanksAtOnce; i++) {
                if (i < count) {
                    if (!kSend && from[i] != me.rank) {
                        piece.store(p, mine.combine_row(mine.slot(from[i], token)), rows[i]);  // for inspection
                    }
                    add_8(sum, rows[i], any);
                    any = true;
                }
            }
        }
        return true;
    }
}

template <bool kPeers, bool kSend>
__device__ __forceinline__ void sum_tokens(const StepParams& p, const Here& me, uint64_t epoch, int mover,
                                           int movers) {
    const Symmetric mine = me.own(p);
    const int pieces = ResultPiece<kPeers>::count(p);
    const int units = *me.home_tokens * pieces;
    const bool in_vectors = rows_are_vectors(me.hidden, p.hidden, p.hidden_dtype);
    const bool out_vectors = rows_are_vectors(me.out, p.hidden, p.out_dtype);
    const bool gated = me.shared_out != nullptr && p.shared_gate != nullptr;
    for (int unit = mover; unit < units; unit += movers) {
        const int token = unit / pieces;
        const ResultPiece<kPeers> piece(p, unit - token * pieces);
        float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        if (!sum_piece<kPeers, kSend>(p, me, mine, token, piece, epoch, sum)) {
            return;
        }
        const float scale = gated ? shared_scale_of_warp(p, me, token, in_vectors) : 1.0f;
        const int column = 2 * piece.word;
        const int valid = p.hidden - column;
        if (!piece.inside || valid <= 0) {
            continue;
        }
        if (me.shared_out != nullptr) {
            float v[8];
            unpack_bf16(v, piece.load(p, me.shared_out + static_cast<int64_t>(token) * p.hidden_pad));
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sum[i] = __fadd_rn(sum[i], __fmul_rn(scale, v[i]));
            }
        }
        const int64_t at = static_cast<int64_t>(token) * p.hidden + column;
        const int mine_of_8 = min(valid, piece.tail ? 4 : 8);
        if (me.accumulate != 0) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (i < mine_of_8) {
                    sum[i] = __fadd_rn(sum[i], load_element(me.out, at + i, p.out_dtype));
                }
            }
        }
        if (!kPeers) {
            store_8(me.out, at, sum, valid, p.out_dtype, out_vectors);
        } else {
            store_4(me.out, at, sum[0], sum[1], sum[2], sum[3], mine_of_8, p.out_dtype, out_vectors);
            store_4(me.out, at + 4, sum[4], sum[5], sum[6], sum[7], mine_of_8 - 4, p.out_dtype, out_vectors);
        }
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
    __syncwarp();
}

// Asks for what dispatch has written for this warp's first pieces, while the experts still run.
// why that is safe: a kernel that starts before the experts end starts after they have seen dispatch end
template <bool kPeers>
__device__ __forceinline__ void prefetch_first_tokens(const StepParams& p, const Here& me, int mover) {
    const int lane = threadIdx.x % 32;
    const Symmetric mine = me.own(p);
    const int token = mover / ResultPiece<kPeers>::count(p);
    if (token >= p.max_tokens) {
        return;
    }
    if (lane == 0) {
        ptx::prefetch_l1(me.home_tokens);
        ptx::prefetch_l1(me.home_mask + token);
        ptx::prefetch_l1(mine.recv_tokens());
    }
    for (int rank = lane / 4; rank < p.num_ranks; rank += 8) {
        const int64_t slot = mine.slot(rank, token);
        if (lane % 4 == 0) {
            ptx::prefetch_l1(mine.recv_ids(slot));
        } else if (lane % 4 == 1) {
            ptx::prefetch_l1(mine.recv_weights(slot));
        } else if (lane % 4 == 2) {
            ptx::prefetch_l1(me.packed_row_of + slot * p.top_k);
        }
    }
}

template <bool kPeers, bool kSend, bool kRecv>
__device__ __forceinline__ void combine(const StepParams& p, Here& here) {
    load_here(here, p);
    const Here& me = here;
    const int mover = static_cast<int>(threadIdx.x / 32 * gridDim.x + blockIdx.x);
    const int movers = static_cast<int>(gridDim.x) * kSumWarps;
    const uint64_t epoch = me.epoch[kThisStep];
    const uint64_t members = *me.members;
    if (kSend) {
        prefetch_first_tokens<kPeers>(p, me, mover);
    }
    ptx::wait_for_previous_grid();
    const bool silent = has_fault(me);
    if (kPeers && kSend && blockIdx.x == 0 && threadIdx.x < p.num_ranks) {
        // What the peers sent was copied by the dispatch kernel, which has ended
        if (silent) {
            tell_peer(p, me, threadIdx.x);
        } else if (is_member(members, threadIdx.x)) {
            ptx::store_relaxed_sys(me.of(p, threadIdx.x).combine_flags() + me.rank, epoch);
        }
    }
    if (kPeers && kSend && !silent) {
        send_results<kRecv>(p, me, epoch, members, mover, movers);
    }
    if (!kRecv) {
        return;
    }
    if (kPeers && blockIdx.x == 0 && threadIdx.x / 32 == kSumWarps - 1) {
        wait_for_flags(p, me, epoch, members);
    }
    if (!silent) {
        sum_tokens<kPeers, kSend>(p, me, epoch, mover, movers);
    }
    __shared__ bool last;
    __syncthreads();
    ptx::allow_next_grid();
    if (threadIdx.x == 0) {
        last = ptx::add_acq_rel_gpu(me.arrivals + kCombineDone, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) {
        return;
    }
    const bool valid = !has_fault(me);
    if (valid && threadIdx.x == 0) {
        publish_step(me);
    }
    if (valid && threadIdx.x >= 32 && threadIdx.x < 32 + p.num_ranks) {
        publish_peer(me, threadIdx.x - 32);
    }
    if (threadIdx.x == 0) {
        me.arrivals[kCombineDone] = 0;
        me.epoch[kLastStep] = epoch;
    }
}

}  // namespace moe

extern "C" __global__ __launch_bounds__(moe::kSumThreads, 1)
void moe_combine_local(const __grid_constant__ moe::StepParams p) {
    __shared__ moe::Here here;
    moe::combine<false, true, true>(p, here);
}

extern "C" __global__ __launch_bounds__(moe::kSumThreads, 1)
void moe_combine_lines(const __grid_constant__ moe::StepParams p) {
    __shared__ moe::Here here;
    moe::combine<true, true, true>(p, here);
}

extern "C" __global__ __launch_bounds__(moe::kSumThreads, 1)
void moe_combine_send_lines(const __grid_constant__ moe::StepParams p) {
    __shared__ moe::Here here;
    moe::combine<true, true, false>(p, here);
}

extern "C" __global__ __launch_bounds__(moe::kSumThreads, 1)
void moe_combine_recv_lines(const __grid_constant__ moe::StepParams p) {
    __shared__ moe::Here here;
    moe::combine<true, false, true>(p, here);
}
