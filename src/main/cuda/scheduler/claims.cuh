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

namespace moe {
#ifdef MOE_TRACE
__device__ unsigned long long g_trace[132][32][12];  // TRACE(
__device__ __forceinline__ void trace(int seq, int event, unsigned long long value) { if (seq < 32 && blockIdx.x < 132) g_trace[blockIdx.x][seq][event] = value; }  // TRACE(
__device__ __forceinline__ unsigned long long now() { unsigned long long t; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)); return t; }  // TRACE(
#define TRACE(...) __VA_ARGS__
#else
#define TRACE(...)
#endif
}

namespace moe::scheduler {

enum ItemPhase { kGateUpItems = 0, kDownItems = 1, kNoItem = 2 };

struct Item {
    Work work;  // first_row: packed row
    int phase;
    bool once;    // no other item multiplies its weights
    bool halved;  // 64 of the tile's outputs, with half of its columns for each warpgroup
    int half;     // which, else 0
};

// Division by a number that is known before the counts are, so that it costs a product after them.
// Exact while dividend * divisor < 2^32.
struct Divisor {
    int divisor;
    uint32_t inverse;

    __device__ __forceinline__ explicit Divisor(int divisor)
        : divisor(divisor), inverse(divisor > 1 ? 0xffffffffu / divisor + 1 : 0) {}

    __device__ __forceinline__ int quotient(int n) const {
        return divisor > 1 ? static_cast<int>(__umulhi(static_cast<uint32_t>(n), inverse)) : n;
    }
};

// What a kernel's items are dealt by.
struct Dealing {
    Divisor tiles[2];  // row tiles of each phase, 0: the kernel has no such phase
    Divisor grid;      // CTAs
    bool halves[2];    // whether tiles of a phase may be halved

    __device__ __forceinline__ Dealing(int gate_up_tiles, int down_tiles, int grid, bool halves_gate_up, bool halves_down)
        : tiles{Divisor(gate_up_tiles), Divisor(down_tiles)}, grid(grid), halves{halves_gate_up, halves_down} {}
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
    // also run on what stands there before the counts do. Whether no expert has more than kFewRows.
    __device__ __forceinline__ bool build(const int32_t* counts, int experts, int thread, bool live) {
        const int lane = thread % 32;
        const int warp = thread / 32;
        const int each = (experts + kListThreads - 1) / kListThreads;
        const int begin = min(thread * each, experts);
        const int end = min(begin + each, experts);
        int sum[3] = {0, 0, 0};
        bool few = true;
#pragma unroll 1
        for (int expert = begin; expert < end; expert++) {
            // why past L1: a grid that started early may have read what stood there before
#if V_WARM
            int count = 1;
            if (live) count = __ldcg(counts + expert); else asm volatile("prefetch.global.L2 [%0];" ::"l"(counts + expert));
#else
            const int count = __ldcg(counts + expert);
#endif
            TRACE(if (live && thread == 0 && count >= 0) trace(0, 3, now());)
            rows[expert] = count;
            few &= count <= Shape::kFewRows;
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
        TRACE(if (live && thread == 0) trace(0, 4, now() + (before[0] < 0));)
        few = sync_and(few);
        TRACE(if (live && thread == 0) trace(0, 5, now() + (before[0] < 0));)
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
        return few;
    }

    __device__ static void sync() { asm volatile("bar.sync 3, %0;" ::"n"(kListThreads) : "memory"); }

    __device__ static bool sync_and(bool mine) {
        uint32_t all;
        asm volatile(
            "{\n"
            ".reg .pred mine, all;\n"
            "setp.ne.u32 mine, %1, 0;\n"
            "bar.red.and.pred all, 3, %2, mine;\n"
            "selp.u32 %0, 1, 0, all;\n"
            "}\n"
            : "=r"(all)
            : "r"(static_cast<uint32_t>(mine)), "n"(kListThreads)
            : "memory");
        return all != 0;
    }
};

// The items by number; one warp, converged.
template <class Shape>
class Items {
   public:
    __device__ __forceinline__ Items(const ExpertList<Shape>& list, int experts, const Dealing& dealing)
        : list_(list), experts_(experts), dealing_(dealing) {
        narrow_ = list.narrow[experts];
        wide_ = list.wide[experts];
        spread_ = max(wide_, (narrow_ + wide_) / 8 * 7);
        // why up: so that the last wide unit lies in the spread; in float a division costs little
        wide_step_ = wide_ == spread_ ? 1ull << 32 : min(1ull << 32, static_cast<unsigned long long>(__fdividef(wide_, spread_) * 4294971392.0f));
        const int units = narrow_ + wide_;
#pragma unroll
        for (int phase = 0; phase < 2; phase++) {
            const int row_tiles = dealing.tiles[phase].divisor;
            const int tiles = units * row_tiles;
            const int narrow_end = (units - (wide_ > 0 ? spread_ : 0)) * row_tiles;
            const int halved = dealing.halves[phase] ? min(halves_of(tiles), narrow_end) : 0;
            whole_[phase] = tiles - halved;
            items_[phase] = tiles + halved;
        }
    }

    __device__ __forceinline__ int total() const { return items_[0] + items_[1]; }

    __device__ __forceinline__ Item at(int number) const {
        Item item;
        item.phase = kGateUpItems;
        int rest = number;
        if (rest >= items_[0]) {
            rest -= items_[0];
            item.phase = kDownItems;
        }
        const bool second = item.phase == kDownItems;
        if (rest >= (second ? items_[1] : items_[0])) {
            item.phase = kNoItem;
            return item;
        }
        const int past_whole = rest - (second ? whole_[1] : whole_[0]);
        item.halved = past_whole >= 0;
        item.half = item.halved ? past_whole % 2 : 0;
        rest -= item.halved ? (past_whole + 1) / 2 : 0;
        const Divisor tiles = second ? dealing_.tiles[1] : dealing_.tiles[0];
        // Wide items before this one, in the spread
        const int spread = spread_ * tiles.divisor;
        const int wide_before = wide_before_of(rest, spread, tiles.divisor);
        const bool is_wide = wide_before_of(rest + 1, spread, tiles.divisor) > wide_before;
        const int place = is_wide ? wide_before : rest - wide_before;
        const int32_t* before = is_wide ? list_.wide : list_.narrow;

        // The last expert with at most so many units before it: of 32 groups of experts, then of the group's
        const int unit = tiles.quotient(place);
        const int lane = threadIdx.x % 32;
        const int group = (experts_ + 31) / 32;
        const int first_of_group = lane * group;
        const bool group_before = first_of_group < experts_ && before[min(first_of_group, experts_)] <= unit;
        const int begin = (31 - __clz(__ballot_sync(0xffffffffu, group_before))) * group;
        const bool expert_before =
            lane < group && begin + lane < experts_ && before[min(begin + lane, experts_)] <= unit;
        const int low = begin + 31 - __clz(__ballot_sync(0xffffffffu, expert_before));
        const int within = place - before[low] * tiles.divisor;
        const int rows = list_.rows[low + 1] - list_.rows[low];
        item.work.expert = low;
        item.work.row_tile = within;
        item.work.first_row = list_.rows[low];
        item.work.rows = rows;
        item.once = true;
        if (is_wide) {
            const int blocks = before[low + 1] - before[low];
            const int block_rows = ((rows + blocks - 1) / blocks + 7) / 8 * 8;
            item.work.row_tile = within / blocks;
            const int first = (within - item.work.row_tile * blocks) * block_rows;
            item.work.first_row += first;
            item.work.rows = min(block_rows, rows - first);
            item.once = blocks == 1;
        }
        return item;
    }

   private:
    // How many of a phase's tiles are halved, its last: of the tiles left over after full rounds of the
    // grid as many as there are CTAs without one.
    __device__ __forceinline__ int halves_of(int tiles) const {
        const int grid = dealing_.grid.divisor;
        const int left = tiles - dealing_.grid.quotient(tiles) * grid;
        return min(left, grid - left);
    }

    __device__ __forceinline__ int wide_before_of(int number, int spread, int row_tiles) const {
        return min(wide_ * row_tiles, static_cast<int>((static_cast<uint64_t>(number) * wide_step_) >> 32));
    }

    const ExpertList<Shape>& list_;
    int experts_;
    const Dealing& dealing_;
    int whole_[2];  // items of each phase that are whole tiles
    int items_[2];
    int narrow_;  // token blocks
    int wide_;
    int spread_;
    uint64_t wide_step_;  // wide items an item, in 1 / 2^32
};

}  // namespace moe::scheduler
