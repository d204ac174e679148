// The items (phase, expert, row tile, token block) of one or both masked GEMMs, which CTAs claim one
// after the other from a counter in device memory. A CTA's first item is its number; each further one is
// claimed while the weights of the one before are on their way. So CTAs need no estimate of times. An
// item of the second GEMM waits for items of the first, which all come before it: they are with CTAs that
// run, or, first items, with CTAs of a lower number, which start earlier than this one unless it has
// already claimed its second item.
//
// Order: phase by phase; in a phase, experts with many rows (wide, their tokens take the time) are
// spread over the first part among those with few (narrow, their weights take the time), so that
// tensor cores and memory are busy together; otherwise expert by expert, row tile by row tile, token
// blocks innermost, so that a weight tile is fetched from memory once.
#pragma once
#include "../layout/weight_tiles.cuh"
#include "masked.cuh"

namespace moe::scheduler {

enum ItemPhase { kGateUpItems = 0, kDownItems = 1, kNoItem = 2 };

struct Item {
    Work work;  // first_row: packed row
    int phase;
    bool once;  // no other item multiplies its weights
};

constexpr int kListThreads = 128;

// What the items are made of, in shared memory: sums over the experts before each.
template <class Shape>
struct ExpertList {
    int32_t rows[kMaxExperts + 1];
    int32_t narrow[kMaxExperts + 1];  // token blocks of narrow experts, one each
    int32_t wide[kMaxExperts + 1];    // token blocks of wide experts
    int32_t sums[3][kListThreads / 32];

    __device__ static bool is_wide(int count) { return count > Shape::kNarrowRows; }

    __device__ static int blocks_of(int count) {
        return (count + Shape::Columns::kMost - 1) / Shape::Columns::kMost;
    }

    // kListThreads threads, numbered; ends with their barrier. Safe for any counts, so that it may
    // also run on what stands there before the counts do.
    __device__ __forceinline__ void build(const int32_t* counts, int experts, int thread) {
        const int lane = thread % 32;
        const int warp = thread / 32;
        const int each = (experts + kListThreads - 1) / kListThreads;
        const int begin = min(thread * each, experts);
        const int end = min(begin + each, experts);
        int sum[3] = {0, 0, 0};
#pragma unroll 1
        for (int expert = begin; expert < end; expert++) {
            // why past L1: a grid that started early may have read what stood there before
            const int count = __ldcg(counts + expert);
            rows[expert] = count;
            sum[0] += count;
            sum[1] += count > 0 && !is_wide(count) ? 1 : 0;
            sum[2] += is_wide(count) ? blocks_of(count) : 0;
        }
        int before[3];
#pragma unroll
        for (int i = 0; i < 3; i++) {
            int scan = sum[i];
#pragma unroll
            for (int offset = 1; offset < 32; offset *= 2) {
                const int other = __shfl_up_sync(0xffffffffu, scan, offset);
                scan += lane >= offset ? other : 0;
            }
            if (lane == 31) {
                sums[i][warp] = scan;
            }
            before[i] = scan - sum[i];
        }
        sync();
#pragma unroll
        for (int i = 0; i < 3; i++) {
            for (int w = 0; w < warp; w++) {
                before[i] += sums[i][w];
            }
        }
#pragma unroll 1
        for (int expert = begin; expert < end; expert++) {
            const int count = rows[expert];
            rows[expert] = before[0];
            narrow[expert] = before[1];
            wide[expert] = before[2];
            before[0] += count;
            before[1] += count > 0 && !is_wide(count) ? 1 : 0;
            before[2] += is_wide(count) ? blocks_of(count) : 0;
        }
        if (end == experts && begin < end) {
            rows[experts] = before[0];
            narrow[experts] = before[1];
            wide[experts] = before[2];
        }
        sync();
    }

    __device__ static void sync() { asm volatile("bar.sync 3, %0;" ::"n"(kListThreads) : "memory"); }
};

// The items by number; one warp, converged.
template <class Shape>
class Items {
   public:
    // row_tiles[phase]; 0: the kernel has no such phase.
    __device__ __forceinline__ Items(const ExpertList<Shape>& list, int experts, const int (&row_tiles)[2])
        : list_(list), experts_(experts), row_tiles_{row_tiles[0], row_tiles[1]} {
        narrow_ = list.narrow[experts];
        wide_ = list.wide[experts];
        spread_ = max(wide_, (narrow_ + wide_) / 8 * 7);
        // why up: so that the last wide unit lies in the spread
        wide_step_ = wide_ == 0 ? 0 : ((static_cast<uint64_t>(wide_) << 32) + spread_ - 1) / spread_;
    }

    __device__ __forceinline__ int total() const { return (narrow_ + wide_) * (row_tiles_[0] + row_tiles_[1]); }

    __device__ __forceinline__ Item at(int number) const {
        const int units = narrow_ + wide_;
        Item item;
        item.phase = kGateUpItems;
        int rest = number;
        if (rest >= units * row_tiles_[0]) {
            rest -= units * row_tiles_[0];
            item.phase = kDownItems;
        }
        const int row_tiles = item.phase == kGateUpItems ? row_tiles_[0] : row_tiles_[1];
        if (rest >= units * row_tiles) {
            item.phase = kNoItem;
            return item;
        }
        // Wide items before this one, in the spread
        const int spread = spread_ * row_tiles;
        const int wide_before = wide_before_of(rest, spread, row_tiles);
        const bool is_wide = wide_before_of(rest + 1, spread, row_tiles) > wide_before;
        const int place = is_wide ? wide_before : rest - wide_before;
        const int32_t* before = is_wide ? list_.wide : list_.narrow;

        // The last expert with at most so many units before it: of 32 groups of experts, then of the group's
        const int unit = place / row_tiles;
        const int lane = threadIdx.x % 32;
        const int group = (experts_ + 31) / 32;
        const int first_of_group = lane * group;
        const bool group_before = first_of_group < experts_ && before[min(first_of_group, experts_)] <= unit;
        const int begin = (31 - __clz(__ballot_sync(0xffffffffu, group_before))) * group;
        const bool expert_before =
            lane < group && begin + lane < experts_ && before[min(begin + lane, experts_)] <= unit;
        const int low = begin + 31 - __clz(__ballot_sync(0xffffffffu, expert_before));
        const int blocks = before[low + 1] - before[low];
        const int within = place - before[low] * row_tiles;
        const int rows = list_.rows[low + 1] - list_.rows[low];
        const int block_rows = ((rows + blocks - 1) / blocks + 7) / 8 * 8;
        item.work.expert = low;
        item.work.row_tile = within / blocks;
        const int first = (within - item.work.row_tile * blocks) * block_rows;
        item.work.first_row = list_.rows[low] + first;
        item.work.rows = min(block_rows, rows - first);
        item.once = blocks == 1;
        return item;
    }

   private:
    __device__ __forceinline__ int wide_before_of(int number, int spread, int row_tiles) const {
        return number >= spread ? wide_ * row_tiles
                                : static_cast<int>((static_cast<uint64_t>(number) * wide_step_) >> 32);
    }

    const ExpertList<Shape>& list_;
    int experts_;
    int row_tiles_[2];
    int narrow_;  // token blocks
    int wide_;
    int spread_;
    uint64_t wide_step_;  // wide items an item, in 1 / 2^32
};

}  // namespace moe::scheduler
