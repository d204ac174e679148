// The items (phase, expert, row tile, token block) of one or both masked GEMMs, which CTAs claim one
// after the other from a counter in device memory, the first when the counts are final, each further one
// while the weights of the one before are on their way. So CTAs need no estimate of times. An item of the
// second GEMM waits for items of the first, which all come before it: they are with CTAs that run.
//
// Order: phase by phase; in a phase, experts with many rows (wide, their tokens take the time) are
// spread over the first part among those with few (narrow, their weights take the time), so that
// tensor cores and memory are busy together; otherwise expert by expert, row tile by row tile, token
// blocks innermost, so that a weight tile is fetched from memory once. Of the tiles that full rounds of the
// grid leave over, as many are halved as there would be idle CTAs.
#pragma once
#include "../layout/weight_tiles.cuh"
#include "masked.cuh"

namespace moe::scheduler {

enum ItemPhase { kGateUpItems = 0, kDownItems = 1, kNoItem = 2 };

struct Item {
    Work work;  // first_row: packed row
    int phase;
    bool once;    // no other item multiplies its weights
    bool halved;  // 64 of the tile's outputs, with half of its columns for each warpgroup
    int half;     // which, else 0
    int blocks;   // token blocks of its expert
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
    Divisor tiles[2];     // row tiles of each phase, 0: the kernel has no such phase
    Divisor grid;         // CTAs
    bool halves_gate_up;  // whether tiles of that phase may be halved

    __device__ __forceinline__ Dealing(int gate_up_tiles, int down_tiles, int grid, bool halves_gate_up)
        : tiles{Divisor(gate_up_tiles), Divisor(down_tiles)}, grid(grid), halves_gate_up(halves_gate_up) {}
};

// What the items are made of, in shared memory: sums over the experts before each.
template <class Shape>
struct ExpertList {
    int32_t rows[kMaxExperts + 1];
    int32_t narrow[kMaxExperts + 1];  // token blocks of narrow experts, one each
    int32_t wide[kMaxExperts + 1];    // token blocks of wide experts

    __device__ static bool is_wide(int count) { return count > Shape::kNarrowRows; }

    __device__ static int blocks_of(int count) {
        return (count + Shape::Columns::kMost - 1) / Shape::Columns::kMost;
    }

    // One warp, converged. Not live: does what it would, but reads no counts and writes nothing.
    __device__ __forceinline__ void build(const int32_t* counts, int experts, bool live) {
        const int lane = threadIdx.x % 32;
        const int each = (experts + 31) / 32;
        const int begin = min(lane * each, experts);
        const int end = min(begin + each, experts);
        constexpr int kBatch = 8;  // loads on their way together
        int sum[3] = {0, 0, 0};
#pragma unroll 1
        for (int expert = begin; expert < end; expert += kBatch) {
            int count[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; i++) {
                // why past L1: a grid that started early may have read what stood there before
                count[i] = live && expert + i < end ? __ldcg(counts + expert + i) : 0;
            }
#pragma unroll
            for (int i = 0; i < kBatch; i++) {
                if (live && expert + i < end) {
                    rows[expert + i] = count[i];
                }
                sum[0] += count[i];
                sum[1] += count[i] > 0 && !is_wide(count[i]) ? 1 : 0;
                sum[2] += is_wide(count[i]) ? blocks_of(count[i]) : 0;
            }
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
            before[i] = scan - sum[i];
        }
        if (live && begin < end && end == experts) {
            rows[experts] = before[0] + sum[0];
            narrow[experts] = before[1] + sum[1];
            wide[experts] = before[2] + sum[2];
        }
#pragma unroll 1
        for (int expert = begin; expert < end; expert += kBatch) {
            int count[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; i++) {
                count[i] = live && expert + i < end ? rows[expert + i] : 0;
            }
#pragma unroll
            for (int i = 0; i < kBatch; i++) {
                if (live && expert + i < end) {
                    rows[expert + i] = before[0];
                    narrow[expert + i] = before[1];
                    wide[expert + i] = before[2];
                }
                before[0] += count[i];
                before[1] += count[i] > 0 && !is_wide(count[i]) ? 1 : 0;
                before[2] += is_wide(count[i]) ? blocks_of(count[i]) : 0;
            }
        }
        __syncwarp();
    }
};

// The items by number; one warp, converged, that built the list. Not live: does what it would, but reads
// no list, which another warp is writing.
template <class Shape>
class Items {
   public:
    __device__ __forceinline__ Items(const ExpertList<Shape>& list, int experts, const Dealing& dealing, bool live)
        : list_(list), experts_(experts), dealing_(dealing), live_(live) {
        // why not zero: there must be an item to look for
        narrow_ = live ? list.narrow[experts] : kMaxExperts;
        wide_ = read(list.wide, experts);
        const int units = narrow_ + wide_;
        const int grid = dealing.grid.divisor;
        const Divisor first_tiles = dealing.tiles[0].divisor > 0 ? dealing.tiles[0] : dealing.tiles[1];
        const int rounds = dealing.grid.quotient(units * first_tiles.divisor);  // full ones, of the first phase
        // why not past them: a wide item takes longer than a narrow one and should not be in the last round
        const int in_rounds = rounds > 0 ? first_tiles.quotient(rounds * grid) : units;
        spread_ = max(wide_, min(units / 8 * 7, in_rounds));
        // why up: so that the last wide unit lies in the spread. In float: a division of 64 bits takes 0.2 us
        wide_step_ = wide_ == spread_
                         ? 1u << 31
                         : min(1u << 31, static_cast<uint32_t>(__fdividef(wide_, spread_) * 2147485696.0f));
#pragma unroll
        for (int phase = 0; phase < 2; phase++) {
            const int tiles = units * dealing.tiles[phase].divisor;
            const int left = tiles - dealing.grid.quotient(tiles) * grid;
            // why none beside wide experts: case 5 of the benchmark was slower with them
            const bool may_halve = phase == kGateUpItems && dealing.halves_gate_up && wide_ == 0;
            const int halved = may_halve ? min(left, grid - left) : 0;
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
        const bool group_before = first_of_group < experts_ && read(before, min(first_of_group, experts_)) <= unit;
        const int begin = (31 - __clz(__ballot_sync(0xffffffffu, group_before))) * group;
        const bool expert_before =
            lane < group && begin + lane < experts_ && read(before, min(begin + lane, experts_)) <= unit;
        const int low = begin + 31 - __clz(__ballot_sync(0xffffffffu, expert_before));
        const int before_low = read(before, low);
        const int within = place - before_low * tiles.divisor;
        const int first_row = read(list_.rows, low);
        const int rows = read(list_.rows, low + 1) - first_row;
        item.work.expert = low;
        item.work.row_tile = within;
        item.work.first_row = first_row;
        item.work.rows = rows;
        item.once = true;
        item.blocks = 1;
        if (is_wide) {
            const int blocks = read(before, low + 1) - before_low;
            item.blocks = blocks;
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
    __device__ __forceinline__ int wide_before_of(int number, int spread, int row_tiles) const {
        return min(wide_ * row_tiles, static_cast<int>((static_cast<uint64_t>(number) * wide_step_) >> 31));
    }

    __device__ __forceinline__ int read(const int32_t* values, int at) const { return live_ ? values[at] : 0; }

    const ExpertList<Shape>& list_;
    int experts_;
    const Dealing& dealing_;
    bool live_;
    int whole_[2];  // items of each phase that are whole tiles
    int items_[2];
    int narrow_;  // token blocks
    int wide_;
    int spread_;
    uint32_t wide_step_;  // wide items an item, in 1 / 2^31
};

}  // namespace moe::scheduler
