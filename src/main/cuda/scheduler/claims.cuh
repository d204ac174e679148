// The items (phase, expert, row tile, token block) of one or both masked GEMMs, which CTAs claim one
// after the other from a counter in device memory, the first when the counts are final, each further one
// while the weights of the one before are on their way. So CTAs need no estimate of times. An item of the
// second GEMM waits for items of the first, which all come before it: they are with CTAs that run.
//
// Order: phase by phase; in a phase, experts with many rows (wide, their tokens take the time) are
// spread over the first part among those with few (narrow, their weights take the time), so that
// tensor cores and memory are busy together; otherwise expert by expert, row tile by row tile, token
// blocks innermost, so that a weight tile is fetched from memory once. The tiles that full rounds of the
// grid leave over are cut: into quarters where these are at most one for each CTA, into halves where those
// are, into halves for all CTAs and quarters where these are at most another one for each; else as many are
// halved as there would be idle CTAs. Of the second GEMM all that full rounds leave over are halved: so a CTA has
// half a tile of an expert whose rows are long there before one of an expert whose rows may be late.
#pragma once
#include "../layout/weight_tiles.cuh"
#include "masked.cuh"

namespace moe::scheduler {

enum ItemPhase { kGateUpItems = 0, kDownItems = 1, kNoItem = 2 };

struct Item {
    Work work;  // first_row: packed row
    int phase;
    bool once;   // no other item multiplies its weights
    int parts;   // 1: the whole tile; 2 or 4: so many items have a part of its outputs each
    int part;    // which, else 0
    int blocks;  // token blocks of its expert
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
    int parts[2];      // at most so many of a tile of each phase: 1, 2 or 4

    __device__ __forceinline__ Dealing(int gate_up_tiles, int down_tiles, int grid, int gate_up_parts,
                                       int down_parts)
        : tiles{Divisor(gate_up_tiles), Divisor(down_tiles)}, grid(grid), parts{gate_up_parts, down_parts} {}
};

// Token blocks of a rank's experts.
struct Units {
    int narrow;
    int wide;
    bool few;  // no expert has more rows than Shape::kFewRows
};

// What the items are made of, in shared memory: sums over the experts before each.
template <class Shape>
struct ExpertList {
    alignas(16) int32_t rows[kMaxExperts + 4];
    int32_t narrow[kMaxExperts + 4];  // token blocks of narrow experts, one each
    int32_t wide[kMaxExperts + 4];    // token blocks of wide experts

    __device__ static bool is_wide(int count) { return count > Shape::kNarrowRows; }

    __device__ static int blocks_of(int count) {
        return (count + Shape::Columns::kMost - 1) / Shape::Columns::kMost;
    }

    // One warp, converged; counts aligned to 16 bytes. Not live: does what it would, but reads no counts and
    // writes nothing.
    __device__ __forceinline__ Units build(const int32_t* counts, int experts, bool live) {
        const int lane = threadIdx.x % 32;
        // Narrow and wide blocks are summed in one word: at most 1,024 narrow ones in its low 11 bits
        int rows_before = 0;
        uint32_t blocks_before = 0;
        bool few = true;
        int4 next = load(counts, 4 * lane, experts, live);
#pragma unroll 1
        for (int first = 0; first < experts; first += 128) {
            const int4 four = next;
            const int expert = first + 4 * lane;
            next = load(counts, expert + 128, experts, live);
            const int count[4] = {four.x, four.y, four.z, four.w};
            uint32_t blocks[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                blocks[i] = is_wide(count[i]) ? static_cast<uint32_t>(blocks_of(count[i])) << 11 : count[i] > 0;
                few = few && count[i] <= Shape::kFewRows;
            }
            const int own_rows = count[0] + count[1] + count[2] + count[3];
            const uint32_t own_blocks = blocks[0] + blocks[1] + blocks[2] + blocks[3];
            int rows_scan = own_rows;
            uint32_t blocks_scan = own_blocks;
#pragma unroll
            for (int offset = 1; offset < 32; offset *= 2) {
                const int other_rows = __shfl_up_sync(0xffffffffu, rows_scan, offset);
                const uint32_t other_blocks = __shfl_up_sync(0xffffffffu, blocks_scan, offset);
                rows_scan += lane >= offset ? other_rows : 0;
                blocks_scan += lane >= offset ? other_blocks : 0;
            }
            int before[3][4];
            int row = rows_before + rows_scan - own_rows;
            uint32_t block = blocks_before + blocks_scan - own_blocks;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                before[0][i] = row;
                before[1][i] = block & 0x7ff;
                before[2][i] = block >> 11;
                row += count[i];
                block += blocks[i];
            }
            if (live && expert < experts) {
                store(rows + expert, before[0]);
                store(narrow + expert, before[1]);
                store(wide + expert, before[2]);
            }
            rows_before += __shfl_sync(0xffffffffu, rows_scan, 31);
            blocks_before += __shfl_sync(0xffffffffu, blocks_scan, 31);
        }
        const Units units = {static_cast<int>(blocks_before & 0x7ff), static_cast<int>(blocks_before >> 11),
                             __all_sync(0xffffffffu, few) != 0};
        __syncwarp();
        if (live && lane == 0) {
            rows[experts] = rows_before;
            narrow[experts] = units.narrow;
            wide[experts] = units.wide;
        }
        __syncwarp();
        return units;
    }

   private:
    __device__ __forceinline__ static void store(int32_t* to, const int (&four)[4]) {
        *reinterpret_cast<int4*>(to) = make_int4(four[0], four[1], four[2], four[3]);
    }

    // why past L1: a grid that started early may have read what stood there before
    __device__ __forceinline__ static int4 load(const int32_t* counts, int expert, int experts, bool live) {
        if (expert + 4 <= experts) {
            return live ? __ldcg(reinterpret_cast<const int4*>(counts + expert)) : make_int4(0, 0, 0, 0);
        }
        int count[3];
#pragma unroll
        for (int i = 0; i < 3; i++) {
            count[i] = live && expert + i < experts ? __ldcg(counts + expert + i) : 0;
        }
        return make_int4(count[0], count[1], count[2], 0);
    }
};

// The items by number; one warp, converged, that built the list. Not live: does what it would, but reads
// no list, which another warp is writing.
template <class Shape>
class Items {
   public:
    __device__ __forceinline__ Items(const ExpertList<Shape>& list, const Units& total, int experts,
                                     const Dealing& dealing, bool live)
        : list_(list), experts_(experts), dealing_(dealing), live_(live) {
        // why not none: there must be an item to look for
        narrow_ = live ? total.narrow : kMaxExperts;
        wide_ = total.wide;
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
            const int parts = wide_ == 0 ? dealing.parts[phase] : 1;
            int halved = parts == 1 ? 0 : phase == kDownItems ? left : min(left, grid - left);
            int quartered = 0;
            if (phase == kGateUpItems && parts > 2 && total.few) {
                if (4 * left <= grid) {
                    halved = 0;
                    quartered = left;
                } else if (2 * left > grid && 4 * (left - grid / 2) <= grid) {
                    halved = grid / 2;
                    quartered = left - halved;
                }
            }
            whole_[phase] = tiles - halved - quartered;
            halves_[phase] = 2 * halved;
            items_[phase] = tiles + halved + 3 * quartered;
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
        const int whole = second ? whole_[1] : whole_[0];
        const int halves = second ? halves_[1] : halves_[0];
        item.parts = rest < whole ? 1 : rest < whole + halves ? 2 : 4;
        item.part = 0;
        if (item.parts > 1) {
            const int before = item.parts == 2 ? whole : whole + halves;
            item.part = (rest - before) & (item.parts - 1);
            rest = (item.parts == 2 ? whole : whole + halves / 2) + ((rest - before) >> (item.parts / 2));
        }
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
    int whole_[2];   // items of each phase that are whole tiles
    int halves_[2];  // and halves; the others are quarters
    int items_[2];
    int narrow_;  // token blocks
    int wide_;
    int spread_;
    uint32_t wide_step_;  // wide items an item, in 1 / 2^31
};

}  // namespace moe::scheduler
