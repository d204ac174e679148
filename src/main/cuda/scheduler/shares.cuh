// Shares the work of a masked GEMM out over CTAs by estimated time, in runs of neighbouring items
// (expert, row tile, token block; token blocks innermost, so a weight tile is fetched from memory
// once). All CTAs compute the same cuts from the counts on the device. A cut may lie inside an item:
// its first k blocks are then the giver's first piece, the rest is the taker's last, which goes on
// from the giver's partial sums. So nobody waits, and each output stays one chain over ascending k.
// An item is cut at most once.
#pragma once
#include "../layout/step_params.cuh"
#include "masked.cuh"

namespace moe::scheduler {

// An expert's rows in blocks of equal size.
struct TokenBlocks {
    int count;  // blocks
    int rows;   // of each but perhaps the last
};

template <int kMaxColumns>
__device__ __forceinline__ TokenBlocks token_blocks(int rows) {
    const int count = (rows + kMaxColumns - 1) / kMaxColumns;
    return {count, count == 0 ? 0 : ((rows + count - 1) / count + 7) / 8 * 8};
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
    struct Shared {
        int32_t warp_cost[kThreads / 32];
        int32_t warp_items[kThreads / 32];
        Cut cuts[2];
        const int32_t* counts;
        int32_t experts;
        int32_t row_tiles;
        int32_t k_blocks;
    };

    // All threads of the CTA, of which the first 256 scan; ends with a barrier.
    __device__ Shares(Shared& shared, const int32_t* counts, int experts, int row_tiles, int k_blocks,
                      bool may_cut)
        : shared_(shared) {
        int four[4];
        int mine = 0;
        int items = 0;
        int sum = 0;
        if (threadIdx.x < kThreads) {
            load_counts(four, counts, experts);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const TokenBlocks blocks = token_blocks<Shape::kMaxColumns>(four[i]);
                mine += blocks.count * row_tiles * item_cost(blocks);
                items += blocks.count * row_tiles;
            }
            // Inclusive scan over the warp, then over the warps' sums
            const int lane = threadIdx.x % 32;
            sum = mine;
#pragma unroll
            for (int offset = 1; offset < 32; offset *= 2) {
                const int other = __shfl_up_sync(0xffffffffu, sum, offset);
                sum += lane >= offset ? other : 0;
            }
            items = __reduce_add_sync(0xffffffffu, items);
            if (lane == 31) {
                shared.warp_cost[threadIdx.x / 32] = sum;
                shared.warp_items[threadIdx.x / 32] = items;
            }
            if (threadIdx.x < 2) {
                shared.cuts[threadIdx.x] = {experts, 0, 0};
                shared.counts = counts, shared.experts = experts;
                shared.row_tiles = row_tiles, shared.k_blocks = k_blocks;
            }
        }
        __syncthreads();
        if (threadIdx.x < kThreads) {
            int total = 0;
            int all_items = 0;
            int before = sum - mine;
#pragma unroll
            for (int w = 0; w < kThreads / 32; w++) {
                before += w < static_cast<int>(threadIdx.x) / 32 ? shared.warp_cost[w] : 0;
                total += shared.warp_cost[w];
                all_items += shared.warp_items[w];
            }
            // Whole items where they fill the last round, or nearly
            const int rounds = (all_items + gridDim.x - 1) / gridDim.x;
            may_cut = may_cut && 10 * rounds * static_cast<int>(gridDim.x) > 11 * all_items;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int share = blockIdx.x + i;
                const int place = place_of(share, total);
                if (place >= before && place < before + mine) {
                    const int place_before = share == 0 ? place : place_of(share - 1, total);
                    shared.cuts[i] =
                        cut_at(place - before, place_before - before, four, row_tiles, k_blocks, may_cut);
                }
            }
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
                item_++;
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
    // Time of a k block of an item, in steps of 16 clocks: its products, or its share of the memory
    // or cache bandwidth.
    __device__ static int item_cost(TokenBlocks blocks) {
        const int products = 4 * Shape::columns_for(blocks.rows) + 64;
        const int bytes = blocks.count <= 1 ? 512 : 256 + 256 / blocks.count;
        return max(products, bytes) / 16;
    }

    __device__ static void load_counts(int (&four)[4], const int32_t* counts, int experts) {
        const int first = 4 * threadIdx.x;
        if (first + 4 <= experts) {
            const int4 all = *reinterpret_cast<const int4*>(counts + first);
            four[0] = all.x, four[1] = all.y, four[2] = all.z, four[3] = all.w;
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                four[i] = first + i < experts ? counts[first + i] : 0;
            }
        }
    }

    __device__ static int place_of(int share, int total) {
        return static_cast<int>(static_cast<int64_t>(total) * share / gridDim.x);
    }

    // The cut at a cost within this thread's four experts, given that of the share before.
    __device__ static Cut cut_at(int place, int place_before, const int (&four)[4], int row_tiles,
                                 int k_blocks, bool may_cut) {
        Cut cut = {0, 0, 0};
        bool found = false;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const TokenBlocks blocks = token_blocks<Shape::kMaxColumns>(four[i]);
            const int cost = item_cost(blocks);
            const int all = blocks.count * row_tiles * cost;
            if (!found && place < all) {
                found = true;
                cut.expert = 4 * static_cast<int>(threadIdx.x) + i;
                cut.item = place / cost;
                const int rest = place % cost;
                cut.k = (2 * rest * k_blocks + cost) / (2 * cost);
                if (!may_cut || Shape::columns_for(blocks.rows) > kMaxCutColumns) {
                    cut.k = 2 * rest >= cost ? k_blocks : 0;
                }
                if (cut.k > 0 && cut.k < k_blocks && place_before > place - rest) {
                    cut.k = k_blocks;  // the share before has cut this item
                }
                // why: a hand-over costs as much as a few k blocks
                cut.k = cut.k < kMinCut ? 0 : (cut.k > k_blocks - kMinCut ? k_blocks : cut.k);
                if (cut.k == k_blocks) {
                    cut.item++;
                    cut.k = 0;
                }
            }
            place -= all;
            place_before -= all;
        }
        return cut;
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
            item_ = 0;
        }
        return false;
    }

    __device__ Work work_at(int expert, int item) const {
        const int rows = shared_.counts[expert];
        const TokenBlocks blocks = token_blocks<Shape::kMaxColumns>(rows);
        Work work;
        work.expert = expert;
        work.row_tile = item / blocks.count;
        work.first_row = item % blocks.count * blocks.rows;
        work.rows = min(blocks.rows, rows - work.first_row);
        return work;
    }

    static constexpr int kMinCut = 2;

    const Shared& shared_;
    int stage_ = 0;   // of next(): the head, whole items, the tail
    int expert_;      // of the next whole item
    int item_;
};

}  // namespace moe::scheduler
