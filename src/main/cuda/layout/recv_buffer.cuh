// Addresses in a rank's symmetric region, and the walk over the slots that hold a token.
#pragma once
#include "step_params.cuh"

namespace moe {

constexpr int kRowChunk = 2048;  // columns of a row that one CTA of 256 threads moves, 8 a thread

__device__ __forceinline__ int row_chunks(const StepParams& p) {
    return (p.hidden_pad + kRowChunk - 1) / kRowChunk;
}

struct Symmetric {
    uint8_t* base;
    const StepParams& p;

    __device__ uint64_t* dispatch_flags() const {
        return reinterpret_cast<uint64_t*>(base + p.off_dispatch_flags);
    }
    __device__ uint64_t* combine_flags() const {
        return reinterpret_cast<uint64_t*>(base + p.off_combine_flags);
    }
    __device__ uint64_t* abort_words() const {
        return reinterpret_cast<uint64_t*>(base + p.off_abort_words);
    }
    __device__ int32_t* recv_tokens() const {
        return reinterpret_cast<int32_t*>(base + p.off_recv_tokens);
    }
    // why: 64-bit, ranks * max_tokens * hidden_pad passes 2^31
    __device__ int64_t slot(int rank, int token) const {
        return static_cast<int64_t>(rank) * p.max_tokens + token;
    }
    __device__ int32_t* recv_ids(int64_t slot) const {
        return reinterpret_cast<int32_t*>(base + p.off_recv_ids) + slot * p.top_k;
    }
    __device__ float* recv_weights(int64_t slot) const {
        return reinterpret_cast<float*>(base + p.off_recv_weights) + slot * p.top_k;
    }
    __device__ __nv_bfloat16* recv_row(int64_t slot) const {
        return reinterpret_cast<__nv_bfloat16*>(base + p.off_recv_rows) + slot * p.hidden_pad;
    }
    __device__ __nv_bfloat16* combine_row(int64_t slot) const {
        return reinterpret_cast<__nv_bfloat16*>(base + p.off_combine_rows) + slot * p.hidden_pad;
    }
};

__device__ __forceinline__ Symmetric symmetric_of(const StepParams& p, int rank) {
    return Symmetric{p.ranks[rank].symmetric, p};
}

// Ranks that take part. A rank that does not is neither written to nor waited for, read or counted.
__device__ __forceinline__ bool is_member(uint64_t members, int rank) {
    return (members >> rank & 1) != 0;
}

__device__ __forceinline__ int clamp_tokens(int tokens, int max_tokens) {
    return tokens < 0 ? 0 : (tokens > max_tokens ? max_tokens : tokens);
}

// The received tokens of all sources in slot order, numbered 0 .. total - 1. Built by the whole CTA
// in shared memory; a thread walks its numbers in ascending order.
struct ReceivedTokens {
    const int32_t* first;  // [R + 1], shared
    int source = 0;

    __device__ int locate(int number) {  // returns the token, leaves the rank in source
        while (number >= first[source + 1]) {
            source++;
        }
        return number - first[source];
    }
};

// first[s] = number of the first token of source s; first[R] = all. Ends with a barrier.
__device__ __forceinline__ void number_received_tokens(int32_t* first, const Symmetric& mine,
                                                       uint64_t members) {
    if (threadIdx.x == 0) {
        first[0] = 0;
    }
    const int ranks = mine.p.num_ranks;
    if (threadIdx.x < ranks) {
        int sum = 0;
        for (int s = 0; s <= static_cast<int>(threadIdx.x); s++) {
            sum += is_member(members, s) ? clamp_tokens(mine.recv_tokens()[s], mine.p.max_tokens) : 0;
        }
        first[threadIdx.x + 1] = sum;
    }
    __syncthreads();
}

}  // namespace moe
