// Shares the work of a masked GEMM out over CTAs by estimated time, in runs of neighbouring items
// (expert, row tile, token block; token blocks innermost, so a weight tile is fetched from memory
// once). All CTAs compute the same cuts from the counts on the device. A cut may lie inside an item:
// its first k blocks are then the giver's first piece, the rest is the taker's last, which goes on
// from the giver's partial sums. So nobody waits, and each output stays one chain over ascending k.
// An item is cut at most once. Where every CTA has many items, they are dealt out in turn instead: then
// the CTAs work on few experts at a time, whose tokens and weights stay in the L2 cache.
#pragma once
#include "../layout/weight_tiles.cuh"
#include "masked.cuh"

namespace moe::scheduler {

// An expert's rows in blocks of equal size.
struct TokenBlocks {
    int count;  // blocks
    int rows;   // of each but perhaps the last
};

template <int kMaxColumns>
__device__ __forceinline__ TokenBlocks token_blocks(int rows) {
    if (rows <= kMaxColumns) {
        return {rows > 0 ? 1 : 0, (rows + 7) / 8 * 8};
    }
    const int count = (rows + kMaxColumns - 1) / kMaxColumns;
    return {count, ((rows + count - 1) / count + 7) / 8 * 8};
}

struct Piece {
    Work work;  // first_row: packed row
    int k_begin;
    int k_end;
    bool takes_over;  // goes on from the partial sums of the CTA before
    bool hands_over;  // leaves them to the CTA after
    bool once;        // its weights are multiplied by no other item
    bool last;        // of the CTA; set by who lists the pieces
};

// A place in the order of items: between items, or after k blocks of one.
struct Cut {
    int expert;
    int row;   // first packed row of the expert
    int item;  // of the expert
    int k;
};

// Counts of the experts in shared memory: roles walk them item by item.
struct Counts {
    int32_t rows[kMaxExperts];

    // A barrier of the threads must follow.
    // why past L1: a grid that started early may have read what stood there before
    __device__ __forceinline__ void load(const int32_t* counts, int experts, int thread, int threads) {
        for (int expert = thread; expert < experts; expert += threads) {
            rows[expert] = __ldcg(counts + expert);
        }
    }
};

// The pieces of this CTA. Each role steps its own copy.
template <class Shape>
class Shares {
   public:
    // One warp, converged. Bounded for any counts, so that it may also run on those of the step before.
    __device__ __forceinline__ Shares(const Counts& counts, int experts, int row_tiles, int k_blocks,
                                      bool may_cut)
        : counts_(counts.rows), experts_(experts), row_tiles_(row_tiles), k_blocks_(k_blocks) {
        const int lane = threadIdx.x % 32;
        const int each_lane = (experts + 31) / 32;
        const int begin = min(lane * each_lane, experts);
        const int end = min(begin + each_lane, experts);

        // The work of the lane's experts
        int narrow = 0, wide = 0, items = 0, tiles = 0, largest = 0, rows = 0;
#pragma unroll 1
        for (int expert = begin; expert < end; expert++) {
            const int count = counts_[expert];
            const TokenBlocks blocks = token_blocks<Shape::Columns::kMost>(count);
            const int products = products_of(blocks);
            const bool is_wide = products > kStreamed;
            const int expert_items = blocks.count * row_tiles;
            narrow += is_wide ? 0 : expert_items;
            wide += is_wide ? expert_items * products : 0;
            items += expert_items;
            tiles += count > 0 ? row_tiles : 0;
            largest = max(largest, count > 0 ? products : 0);
            rows += count;
        }
        const int streamed = streamed_cost(__reduce_add_sync(kAll, narrow), __reduce_add_sync(kAll, wide),
                                           __reduce_add_sync(kAll, tiles));
        const int all_items = __reduce_add_sync(kAll, items);
        largest = max(streamed, __reduce_max_sync(kAll, largest));
        const int all_wide = __reduce_max_sync(kAll, wide);
        int cost = wide + narrow * streamed;
        const int own_cost = cost;
        const int own_rows = rows;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const int other_cost = __shfl_up_sync(kAll, cost, offset);
            const int other_rows = __shfl_up_sync(kAll, rows, offset);
            cost += lane >= offset ? other_cost : 0;
            rows += lane >= offset ? other_rows : 0;
        }
        const int total = __shfl_sync(kAll, cost, 31);
        const int grid = gridDim.x;

        if (total >= kRoundsToDeal * static_cast<int64_t>(largest) * grid &&
            2ll * largest * all_items <= 3ll * total && total > 0) {
            low_ = {0, 0, static_cast<int>(blockIdx.x), 0};
            high_ = {experts, 0, 0, 0};
            step_ = grid;
        } else {
            // Whole items where they fill the last round, or nearly
            const int rounds = (all_items + grid - 1) / grid;
            may_cut = may_cut && (all_wide > 0 || 10ll * rounds * grid > 11ll * all_items);
            low_ = high_ = {experts, 0, 0, 0};
            const int share_cost = total / grid;
            const int rest = total % grid;
            const int from = share_cost * blockIdx.x + rest * blockIdx.x / grid;
            const int to = share_cost * (blockIdx.x + 1) + rest * (blockIdx.x + 1) / grid;
            bool has_low = false, has_high = false;
            int before = cost - own_cost;
            int row = rows - own_rows;
#pragma unroll 1
            for (int expert = begin; expert < end; expert++) {
                const int count = counts_[expert];
                const TokenBlocks blocks = token_blocks<Shape::Columns::kMost>(count);
                const int item = item_cost(blocks, streamed);
                const int after = before + blocks.count * row_tiles * item;
                if (from >= before && from < after) {
                    has_low = true;
                    low_ = cut_at(expert, row, from - before, item,
                                  blockIdx.x > 0 ? share_cost : 0, may_cut);
                }
                if (to >= before && to < after) {
                    has_high = true;
                    high_ = cut_at(expert, row, to - before, item, share_cost, may_cut);
                }
                before = after;
                row += count;
            }
            broadcast(low_, has_low);
            broadcast(high_, has_high);
        }
        expert_ = low_.expert;
        row_ = low_.row;
        item_ = low_.item + (low_.k > 0);
    }

    // The CTA's pieces in order; false after the last. Any threads.
    __device__ __forceinline__ bool next(Piece& piece) {
        if (stage_ == 0) {
            stage_ = 1;
            if (high_.k > 0) {
                piece = piece_at(high_.expert, high_.row, high_.item, 0, high_.k);
                piece.hands_over = true;
                return true;
            }
        }
        if (stage_ == 1) {
            if (find_next()) {
                piece = piece_at(expert_, row_, item_, 0, k_blocks_);
                item_ += step_;
                return true;
            }
            stage_ = 2;
            if (low_.k > 0) {
                piece = piece_at(low_.expert, low_.row, low_.item, low_.k, k_blocks_);
                piece.takes_over = true;
                return true;
            }
        }
        return false;
    }

   private:
    static constexpr unsigned kAll = 0xffffffffu;

    // Times of a k block on an H200, in steps of 16 clocks. With its weights there: its products, or
    // its bytes from the L2 cache.
    __device__ static int products_of(TokenBlocks blocks) {
        const int columns = Shape::Columns::columns_for(blocks.rows);
        return max(4 * columns + Shape::kOverhead, (kTileBytes + columns * kRowBytes) / 36) / 16;
    }
    static constexpr int kStreamed = Shape::kStreamed / 16;  // least, with its weights from memory
    static constexpr int kMemory = 880 / 16;  // a weight tile's share of the memory's time, times the SMs

    // Items that stream weights may do so faster the fewer they are, as long as the whole takes the
    // memory's time: they get the rest of the CTAs.
    __device__ static int streamed_cost(int narrow, int wide, int tiles) {
        return narrow == 0 ? kStreamed : min(max((kMemory * tiles - wide) / narrow, kStreamed), kMemory);
    }

    __device__ static int item_cost(TokenBlocks blocks, int streamed) {
        const int products = products_of(blocks);
        return products > kStreamed ? products : streamed;
    }

    // The cut at a place, counted from the expert's first item. share_before: cost of the share that ends here,
    // 0: there is none.
    __device__ __forceinline__ Cut cut_at(int expert, int row, int place, int item, int share_before,
                                          bool may_cut) const {
        Cut cut = {expert, row, place / item, 0};
        const int within = place - cut.item * item;
        cut.k = may_cut ? (2 * within * k_blocks_ + item) / (2 * item) : (2 * within >= item ? k_blocks_ : 0);
        if (cut.k > 0 && cut.k < k_blocks_ && share_before > 0 && within > share_before + 1) {
            cut.k = k_blocks_;  // the share before has cut this item
        }
        // why: a hand-over costs as much as a few k blocks
        cut.k = cut.k < kMinCut ? 0 : (cut.k > k_blocks_ - kMinCut ? k_blocks_ : cut.k);
        if (cut.k == k_blocks_) {
            cut.item++;
            cut.k = 0;
        }
        return cut;
    }

    __device__ __forceinline__ static void broadcast(Cut& cut, bool mine) {
        const unsigned owner = __ballot_sync(kAll, mine);
        const int lane = owner == 0 ? 0 : __ffs(owner) - 1;
        cut.expert = __shfl_sync(kAll, cut.expert, lane);
        cut.row = __shfl_sync(kAll, cut.row, lane);
        cut.item = __shfl_sync(kAll, cut.item, lane);
        cut.k = __shfl_sync(kAll, cut.k, lane);
    }

    // Steps over experts without rows; false when the next whole item is past this share.
    __device__ __forceinline__ bool find_next() {
        while (expert_ < experts_ && expert_ <= high_.expert) {
            if (expert_ == high_.expert && item_ >= high_.item) {
                return false;
            }
            const int count = counts_[expert_];
            const int items = token_blocks<Shape::Columns::kMost>(count).count * row_tiles_;
            if (item_ < items) {
                return true;
            }
            expert_++;
            row_ += count;
            item_ = step_ == 1 ? 0 : item_ - items;
        }
        return false;
    }

    __device__ __forceinline__ Piece piece_at(int expert, int row, int item, int k_begin, int k_end) const {
        const int rows = counts_[expert];
        const TokenBlocks blocks = token_blocks<Shape::Columns::kMost>(rows);
        Piece piece;
        piece.work.expert = expert;
        piece.work.row_tile = blocks.count == 1 ? item : item / blocks.count;
        const int first = (item - piece.work.row_tile * blocks.count) * blocks.rows;
        piece.work.first_row = row + first;
        piece.work.rows = min(blocks.rows, rows - first);
        piece.k_begin = k_begin;
        piece.k_end = k_end;
        piece.takes_over = piece.hands_over = piece.last = false;
        piece.once = blocks.count == 1;
        return piece;
    }

    static constexpr int kMinCut = 2;
    static constexpr int kRoundsToDeal = 8;

    const int32_t* counts_;  // shared memory
    int experts_;
    int row_tiles_;
    int k_blocks_;
    Cut low_;
    Cut high_;
    int step_ = 1;   // from one whole item to the next
    int stage_ = 0;  // of next(): the head, whole items, the tail
    int expert_;     // of the next whole item
    int row_;
    int item_;
};

}  // namespace moe::scheduler
