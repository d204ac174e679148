// The only walk over (expert, row tile, token block). Items are numbered expert by expert, within an
// expert row tile by row tile, within a row tile token block by token block; experts without rows
// have no items and cost nothing. The counts are read on the device: each thread of the CTA takes
// four experts with one load, a shuffle scan numbers the items, and the first item of each four
// experts stays in shared memory, where find() searches it.
#pragma once
#include "../layout/step_params.cuh"

namespace moe::scheduler {

constexpr int kTokenBlock = 64;
constexpr int kThreads = 256;
constexpr int kMaxExperts = 4 * kThreads;

struct Work {
    int expert;
    int row_tile;
    int first_row;  // of the expert's
    int rows;
};

class Masked {
   public:
    struct Shared {
        int32_t first_item[kThreads + 1];  // of experts 4i ..
        int32_t warp_items[kThreads / 32];
    };

    // All threads of the CTA; ends with a barrier. experts <= kMaxExperts; counts aligned to 16 bytes.
    __device__ Masked(Shared& shared, const int32_t* counts, int experts, int row_tiles)
        : shared_(shared), counts_(counts), experts_(experts), row_tiles_(row_tiles) {
        const int lane = threadIdx.x % 32;
        const int warp = threadIdx.x / 32;
        const int4 four = counts_of(threadIdx.x);
        const int mine =
            (blocks(four.x) + blocks(four.y) + blocks(four.z) + blocks(four.w)) * row_tiles;

        // Inclusive scan over the warp, then over the warps' sums
        int sum = mine;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, sum, offset);
            sum += lane >= offset ? other : 0;
        }
        if (lane == 31) {
            shared_.warp_items[warp] = sum;
        }
        __syncthreads();
        int before = 0;
        for (int w = 0; w < warp; w++) {
            before += shared_.warp_items[w];
        }
        shared_.first_item[threadIdx.x + 1] = before + sum;
        if (threadIdx.x == 0) {
            shared_.first_item[0] = 0;
        }
        __syncthreads();
        items_ = shared_.first_item[kThreads];
    }

    __device__ int items() const { return items_; }

    // The work of an item < items(). No barrier: every thread may ask for its own.
    __device__ Work find(int item) const {
        // The last four whose first item is not after this one
        int low = 0;
#pragma unroll
        for (int step = kThreads / 2; step > 0; step /= 2) {
            low += shared_.first_item[low + step] <= item ? step : 0;
        }
        int rest = item - shared_.first_item[low];
        const int4 four = counts_of(low);
        const int counts[4] = {four.x, four.y, four.z, four.w};
        Work work{0, 0, 0, 0};
        bool found = false;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int items = blocks(counts[i]) * row_tiles_;
            if (!found && rest < items) {
                const int token_blocks = blocks(counts[i]);
                work.expert = 4 * low + i;
                work.row_tile = rest / token_blocks;
                work.first_row = rest % token_blocks * kTokenBlock;
                work.rows = min(kTokenBlock, counts[i] - work.first_row);
                found = true;
            }
            rest -= items;
        }
        return work;
    }

   private:
    __device__ static int blocks(int count) { return (count + kTokenBlock - 1) / kTokenBlock; }

    __device__ int4 counts_of(int four) const {
        const int first = 4 * four;
        if (first + 4 <= experts_) {
            return *reinterpret_cast<const int4*>(counts_ + first);
        }
        return make_int4(first < experts_ ? counts_[first] : 0,
                         first + 1 < experts_ ? counts_[first + 1] : 0,
                         first + 2 < experts_ ? counts_[first + 2] : 0, 0);
    }

    Shared& shared_;
    const int32_t* counts_;
    int experts_;
    int row_tiles_;
    int items_;
};

}  // namespace moe::scheduler
