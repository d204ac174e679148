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
    Work work;
    int k_begin;
    int k_end;
    bool takes_over;   // goes on from the partial sums of the CTA before
    bool hands_over;   // leaves them to the CTA after
    bool last;         // of the CTA; set by who lists the pieces
};

// A place in the order of items: between items, or after k blocks of one.
struct Cut {
    int expert;
    int item;  // of the expert
    int k;
};

template <class Shape>
class Shares {
   public:
    static constexpr int kGroups = kMaxExperts / 32;  // of 32 experts
    static_assert(kGroups == 32, "one warp scans them");

    struct Shared {
        int32_t group_cost[kGroups];
        int32_t group_items[kGroups];
        int32_t group_largest[kGroups];  // cost of one item
        Cut cuts[2];
        int32_t step;  // from one whole item to the next
        const int32_t* counts;
        int32_t experts;
        int32_t row_tiles;
        int32_t k_blocks;
    };

    // All threads of the CTA, of which the first 256 work; ends with a barrier.
    // why so few lines: every instruction of a kernel's start is fetched from memory
    __device__ Shares(Shared& shared, const int32_t* counts, int experts, int row_tiles, int k_blocks,
                      bool may_cut)
        : shared_(shared) {
        if (threadIdx.x < kThreads) {
            if (threadIdx.x == 0) {
                shared.counts = counts, shared.experts = experts;
                shared.row_tiles = row_tiles, shared.k_blocks = k_blocks;
            }
#pragma unroll 1
            for (int expert = threadIdx.x; expert < kMaxExperts; expert += kThreads) {
                const int rows = expert < experts ? counts[expert] : 0;
                const TokenBlocks blocks = token_blocks<Shape::kMaxColumns>(rows);
                const int items = blocks.count * row_tiles;
                const int cost = __reduce_add_sync(0xffffffffu, items * item_cost(blocks));
                const int all_items = __reduce_add_sync(0xffffffffu, items);
                const int largest = __reduce_max_sync(0xffffffffu, items > 0 ? item_cost(blocks) : 0);
                if (threadIdx.x % 32 == 0) {
                    shared.group_cost[expert / 32] = cost;
                    shared.group_items[expert / 32] = all_items;
                    shared.group_largest[expert / 32] = largest;
                }
            }
        }
        __syncthreads();
        if (threadIdx.x < 64) {
            find_cut(shared, threadIdx.x / 32, may_cut);
        }
        __syncthreads();
        expert_ = shared.cuts[0].expert;
        item_ = shared.cuts[0].item + (shared.cuts[0].k > 0);
    }

    // The CTA's pieces in order; false after the last. No barrier: each role steps its own copy.
    __device__ bool next(Piece& piece) {
        const Cut& low = shared_.cuts[0];
        const Cut& high = shared_.cuts[1];
        if (stage_ == 0) {
            stage_ = 1;
            if (high.k > 0) {
                piece = {work_at(high.expert, high.item), 0, high.k, false, true, false};
                return true;
            }
        }
        if (stage_ == 1) {
            if (find_next()) {
                piece = {work_at(expert_, item_), 0, shared_.k_blocks, false, false, false};
                item_ += shared_.step;
                return true;
            }
            stage_ = 2;
            if (low.k > 0) {
                piece = {work_at(low.expert, low.item), low.k, shared_.k_blocks, true, false, false};
                return true;
            }
        }
        return false;
    }

   private:
    // Time of a k block of an item on an H200, in steps of 16 clocks: its products, or its bytes from
    // the L2 cache, or, where weights are used for few rows, from memory.
    __device__ static int item_cost(TokenBlocks blocks) {
        const int columns = Shape::columns_for(blocks.rows);
        const int products = 4 * columns + 64;
        const int bytes = (kTileBytes + columns * kRowBytes) / 36;
        const int memory = columns <= 64 ? 1200 : 0;
        return max(max(products, bytes), memory) / 16;
    }

    __device__ static int inclusive_scan(int value) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, value, offset);
            value += lane >= offset ? other : 0;
        }
        return value;
    }

    // One warp finds where this CTA's share begins (which = 0) or ends (1).
    __device__ static void find_cut(Shared& shared, int which, bool may_cut) {
        const int lane = threadIdx.x % 32;
        const int group_cost = shared.group_cost[lane];
        const int group_scan = inclusive_scan(group_cost);
        const int total = __shfl_sync(0xffffffffu, group_scan, 31);
        const int all_items = __reduce_add_sync(0xffffffffu, shared.group_items[lane]);
        const int largest = __reduce_max_sync(0xffffffffu, shared.group_largest[lane]);
        const int grid = gridDim.x;
        const int64_t round = static_cast<int64_t>(largest) * grid;
        const bool alike = 2ll * largest * all_items <= 3ll * total;
        if (total >= kRoundsToDeal * round && alike && total > 0) {
            if (lane == 0) {
                const int first = static_cast<int>(blockIdx.x);
                shared.cuts[which] = which == 0 ? Cut{0, first, 0} : Cut{shared.experts, 0, 0};
                shared.step = grid;
            }
            return;
        }
        if (lane == 0) {
            shared.step = 1;
        }
        // Whole items where they fill the last round, or nearly
        const int rounds = (all_items + grid - 1) / grid;
        const bool fill = total == largest * all_items && 10ll * rounds * grid <= 11ll * all_items;
        may_cut = may_cut && !fill;

        const int share = blockIdx.x + which;
        const int each = total / grid;
        const int rest = total % grid;
        const int place = each * share + rest * share / grid;
        const int place_before = place - each - 1;  // of the share before, or one less

        const unsigned groups = __ballot_sync(0xffffffffu, place < group_scan);
        if (groups == 0) {
            if (lane == 0) {
                shared.cuts[which] = {shared.experts, 0, 0};
            }
            return;
        }
        const int group = __ffs(groups) - 1;
        const int before_group = __shfl_sync(0xffffffffu, group_scan - group_cost, group);
        const int expert = 32 * group + lane;
        const TokenBlocks blocks = token_blocks<Shape::kMaxColumns>(
            expert < shared.experts ? shared.counts[expert] : 0);
        const int cost = item_cost(blocks);
        const int all = blocks.count * shared.row_tiles * cost;
        const int end = before_group + inclusive_scan(all);
        if (lane != __ffs(__ballot_sync(0xffffffffu, place < end)) - 1) {
            return;
        }
        const int k_blocks = shared.k_blocks;
        Cut cut;
        cut.expert = expert;
        cut.item = (place - (end - all)) / cost;
        const int within = place - (end - all) - cut.item * cost;
        cut.k = (2 * within * k_blocks + cost) / (2 * cost);
        if (!may_cut) {
            cut.k = 2 * within >= cost ? k_blocks : 0;
        }
        if (cut.k > 0 && cut.k < k_blocks && share > 0 && place_before > place - within) {
            cut.k = k_blocks;  // the share before has cut this item
        }
        // why: a hand-over costs as much as a few k blocks
        cut.k = cut.k < kMinCut ? 0 : (cut.k > k_blocks - kMinCut ? k_blocks : cut.k);
        if (cut.k == k_blocks) {
            cut.item++;
            cut.k = 0;
        }
        shared.cuts[which] = cut;
    }

    // Steps over experts without rows; false when the next whole item is past this share.
    __device__ bool find_next() {
        const Cut& high = shared_.cuts[1];
        while (expert_ < shared_.experts && expert_ <= high.expert) {
            if (expert_ == high.expert && item_ >= high.item) {
                return false;
            }
            const TokenBlocks blocks = token_blocks<Shape::kMaxColumns>(shared_.counts[expert_]);
            if (item_ < blocks.count * shared_.row_tiles) {
                return true;
            }
            expert_++;
            item_ = shared_.step == 1 ? 0 : item_ - blocks.count * shared_.row_tiles;
        }
        return false;
    }

    __device__ Work work_at(int expert, int item) const {
        const int rows = shared_.counts[expert];
        const TokenBlocks blocks = token_blocks<Shape::kMaxColumns>(rows);
        Work work;
        work.expert = expert;
        work.row_tile = blocks.count == 1 ? item : item / blocks.count;
        work.first_row = (item - work.row_tile * blocks.count) * blocks.rows;
        work.rows = min(blocks.rows, rows - work.first_row);
        return work;
    }

    static constexpr int kMinCut = 2;
    static constexpr int kRoundsToDeal = 8;

    const Shared& shared_;
    int stage_ = 0;   // of next(): the head, whole items, the tail
    int expert_;      // of the next whole item
    int item_;
};

}  // namespace moe::scheduler
