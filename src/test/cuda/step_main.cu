// The whole step without a JVM: R virtual ranks of one process on one GPU, captured in one graph per
// layer and replayed with changing T and routing. Every result is compared with a float64 reference
// per token, with a second replay over differently poisoned buffers (equal bits), and with grids of
// one CTA (equal bits).
//
//   step_main          all laws
//   step_main laws     all but the one that needs tens of gigabytes
//   step_main short    a few, for compute-sanitizer
//   step_main raw      short, buffers not poisoned, for initcheck
//   step_main bench    graph times of a few shapes
//   step_main once     one replay each of a few decode steps, for a profiler
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#define MOE_TEST_STUBS
#include "../../main/cuda/moe4j.cu"

#include "harness.h"

namespace {

using moe::StepParams;

bool g_poison = true;
std::map<std::string, int> g_passed;
int g_failed = 0;

void expect(bool ok, const char* law, const std::string& where, const std::string& detail = "") {
    if (ok) {
        g_passed[law]++;
    } else if (++g_failed <= 40) {
        std::printf("FAILED %s: %s %s\n", law, where.c_str(), detail.c_str());
    }
}

float bf16(float v) { return __bfloat162float(__float2bfloat16_rn(v)); }

float to_host(const void* base, int64_t i, int dtype) {
    if (dtype == moe::kF32) return static_cast<const float*>(base)[i];
    if (dtype == moe::kF16) return __half2float(static_cast<const __half*>(base)[i]);
    return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[i]);
}

void from_host(void* base, int64_t i, float v, int dtype) {
    if (dtype == moe::kF32) static_cast<float*>(base)[i] = v;
    else if (dtype == moe::kF16) static_cast<__half*>(base)[i] = __float2half_rn(v);
    else static_cast<__nv_bfloat16*>(base)[i] = __float2bfloat16_rn(v);
}

struct Config {
    int R = 1, M = 8, K = 2, E = 4, H = 64, I = 64, S = 0;
    int hidden_dtype = moe::kBF16, out_dtype = moe::kBF16, input = moe::kTopK;
    int scoring = moe::kSoftmax, renormalise = 0, groups = 1, topk_groups = 1;
    float scale = 1.0f;
    int activation = moe::kSwiGlu;
    bool bias = false, shared_gate = false, accumulate = false, router_bias = false, exact = false;
    int misalign = 0;      // elements
    int present = -1;      // local ranks launched, -1: all
    bool host_weights = true;
    uint64_t timeout_ns = 5000000000ull;

    std::string text() const {
        char s[256];
        std::snprintf(s, sizeof s,
                      "R=%d M=%d K=%d E=%d H=%d I=%d S=%d in=%d/%d out=%d scoring=%d renorm=%d "
                      "groups=%d/%d act=%d bias=%d gate=%d acc=%d misalign=%d exact=%d",
                      R, M, K, E, H, I, S, input, hidden_dtype, out_dtype, scoring, renormalise,
                      groups, topk_groups, activation, bias, shared_gate, accumulate, misalign, exact);
        return s;
    }
};

struct Expert {
    std::vector<float> gate, up, down, gate_bias, up_bias, down_bias;
};

struct Rank {
    std::vector<uint8_t> hidden, out_before, out;
    std::vector<int32_t> ids;
    std::vector<float> weights, logits;
    int tokens = 0;  // as asked
    uint8_t *d_hidden, *d_out;
    int32_t *d_count, *d_ids = nullptr;
    float *d_weights = nullptr, *d_logits = nullptr;
    moe::LocalRank device;
};

int up_to(int n, int m) { return (n + m - 1) / m * m; }
int es(int dtype) { return moe::kF32 == dtype ? 4 : 2; }

class Layer {
   public:
    const Config c;
    std::vector<Rank> ranks;
    std::vector<Expert> experts;
    Expert shared;
    std::vector<float> router, router_bias, correction, shared_gate;
    StepParams p{};
    cudaStream_t stream;
    int L, Hp, Ip, Sp;
    moe::ErrorRecord* errors;
    moe::SoftCounters* counters;
    moe::PeerStats* stats;
    uint64_t steps = 0, dropped = 0, duplicates = 0, over = 0;

    explicit Layer(const Config& config) : c(config), random{1234567ull + config.H * 31 + config.E} {
        L = (c.E + c.R - 1) / c.R;
        Hp = up_to(c.H, 64), Ip = up_to(c.I, 64), Sp = up_to(c.S, 64);
        CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CHECK_CUDA(cudaHostAlloc(&errors, sizeof(*errors) * c.R, cudaHostAllocMapped));
        CHECK_CUDA(cudaHostAlloc(&counters, sizeof(*counters) * c.R, cudaHostAllocMapped));
        std::memset(errors, 0, sizeof(*errors) * c.R);
        std::memset(counters, 0, sizeof(*counters) * c.R);
        CHECK_CUDA(cudaHostAlloc(&stats, sizeof(*stats) * c.R * c.R, cudaHostAllocMapped));
        std::memset(stats, 0, sizeof(*stats) * c.R * c.R);
        int device, value;
        CHECK_CUDA(cudaGetDevice(&device));
        CHECK_CUDA(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device));
        sms = value;
        CHECK_CUDA(cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, device));
        hopper = value == 9;
        fill_params();
        make_weights();
        make_ranks();
        p.num_local_ranks = c.present < 0 ? c.R : c.present;
        CHECK_CUDA(cudaStreamSynchronize(stream));
        wide = capture(false);
        narrow = capture(true);
    }

    ~Layer() {
        CHECK_CUDA(cudaStreamSynchronize(stream));
        cudaGraphExecDestroy(wide);
        cudaGraphExecDestroy(narrow);
        for (void* a : allocations) cudaFree(a);
        cudaFreeHost(errors);
        cudaFreeHost(counters);
        cudaFreeHost(stats);
        cudaStreamDestroy(stream);
    }

    void upload() {
        for (Rank& r : ranks) {
            put(r.d_hidden, r.hidden.data(), r.hidden.size());
            put(r.d_count, &r.tokens, 4);
            if (r.d_ids) put(r.d_ids, r.ids.data(), r.ids.size() * 4);
            if (r.d_weights) put(r.d_weights, r.weights.data(), r.weights.size() * 4);
            if (r.d_logits) put(r.d_logits, r.logits.data(), r.logits.size() * 4);
        }
    }

    // One replay over buffers filled with the byte; outputs come back in ranks[].out.
    void run(int poison_byte, bool narrow_grids) {
        for (Rank& r : ranks) put(r.d_out, r.out_before.data(), r.out_before.size());
        if (g_poison) {
            for (auto& region : poisonable) {
                CHECK_CUDA(cudaMemsetAsync(region.first, poison_byte, region.second, stream));
            }
        }
        CHECK_CUDA(cudaGraphLaunch(narrow_grids ? narrow : wide, stream));
        CHECK_CUDA(cudaStreamSynchronize(stream));
        steps++;
        for (Rank& r : ranks) {
            r.out.resize(r.out_before.size());
            CHECK_CUDA(cudaMemcpy(r.out.data(), r.d_out, r.out.size(), cudaMemcpyDeviceToHost));
        }
    }

    template <class T>
    std::vector<T> get(const T* from, size_t n) {
        std::vector<T> v(n);
        CHECK_CUDA(cudaMemcpy(v.data(), from, n * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }

    const uint8_t* region(int rank) { return get(p.ranks + rank, 1)[0].symmetric; }

    int clamped(int rank) const { return std::max(0, std::min(ranks[rank].tokens, c.M)); }

    float time_us(int replays) {
        cudaEvent_t a, b;
        CHECK_CUDA(cudaEventCreate(&a));
        CHECK_CUDA(cudaEventCreate(&b));
        std::vector<float> times;
        for (int i = 0; i < replays; i++) {
            CHECK_CUDA(cudaEventRecord(a, stream));
            for (int j = 0; j < 8; j++) CHECK_CUDA(cudaGraphLaunch(wide, stream));
            CHECK_CUDA(cudaEventRecord(b, stream));
            CHECK_CUDA(cudaStreamSynchronize(stream));
            float ms;
            CHECK_CUDA(cudaEventElapsedTime(&ms, a, b));
            times.push_back(ms * 1000 / 8);
        }
        std::sort(times.begin(), times.end());
        return times[times.size() / 2];
    }

   private:
    Random random;
    int sms;
    bool hopper;
    cudaGraphExec_t wide, narrow;
    std::vector<void*> allocations;
    std::vector<std::pair<void*, size_t>> poisonable;

    template <class T>
    T* alloc(size_t n, bool poisoned) {
        void* a;
        const size_t bytes = std::max<size_t>(16, n * sizeof(T));
        CHECK_CUDA(cudaMalloc(&a, bytes));
        allocations.push_back(a);
        if (poisoned) poisonable.push_back({a, bytes});
        else CHECK_CUDA(cudaMemsetAsync(a, 0, bytes, stream));
        return static_cast<T*>(a);
    }

    void put(void* to, const void* from, size_t bytes) {
        CHECK_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream));
        CHECK_CUDA(cudaStreamSynchronize(stream));
    }

    float* device_floats(const std::vector<float>& v) {
        if (v.empty()) return nullptr;
        float* d = alloc<float>(v.size(), false);
        put(d, v.data(), v.size() * 4);
        return d;
    }

    void fill_params() {
        p.num_ranks = c.R, p.max_tokens = c.M, p.top_k = c.K, p.experts = c.E, p.experts_per_rank = L;
        p.hidden = c.H, p.hidden_pad = Hp, p.intermediate = c.I, p.intermediate_pad = Ip;
        p.shared = c.S, p.shared_pad = Sp, p.hidden_dtype = c.hidden_dtype, p.out_dtype = c.out_dtype;
        p.routing_input = c.input, p.scoring = c.scoring, p.renormalise = c.renormalise;
        p.groups = c.groups, p.topk_groups = c.topk_groups, p.scale = c.scale;
        p.activation = c.activation, p.alpha = 1.702f, p.limit = c.activation ? 1.0f : INFINITY;
        p.early_next = c.R == 1;
        p.timeout_ns = p.first_timeout_ns = c.timeout_ns;
    }

    std::vector<float> matrix(int64_t n, float scale) {
        std::vector<float> v(n);
        for (float& x : v) x = bf16(random.uniform() * scale);
        return v;
    }

    Expert make_expert(int width, int number) {
        Expert e;
        const int64_t n = static_cast<int64_t>(width) * c.H;
        if (c.exact) {
            // gate = 128 (sigmoid is exactly 1), up and down pick one input each
            e.gate.assign(n, 0.0f), e.up.assign(n, 0.0f), e.down.assign(n, 0.0f);
            e.gate_bias.assign(width, 128.0f), e.up_bias.assign(width, 0.0f);
            e.down_bias.assign(c.H, 0.0f);
            for (int i = 0; i < width; i++) {
                e.up[static_cast<int64_t>(i) * c.H + (i * 7 + number) % c.H] = i % 3 ? 1.0f : -1.0f;
            }
            for (int h = 0; h < c.H; h++) {
                e.down[static_cast<int64_t>(h) * width + (h * 5 + number) % width] = h % 2 ? 1.0f : -1.0f;
            }
            return e;
        }
        e.gate = matrix(n, 1.7f / std::sqrt(static_cast<float>(c.H)) * 1.7f);
        e.up = matrix(n, 1.7f / std::sqrt(static_cast<float>(c.H)));
        e.down = matrix(n, 1.7f / std::sqrt(static_cast<float>(width)));
        if (c.bias) {
            auto bias = [&](int m) {
                std::vector<float> v(m);
                for (float& x : v) x = random.uniform() * 0.3f;
                return v;
            };
            e.gate_bias = bias(width), e.up_bias = bias(width), e.down_bias = bias(c.H);
        }
        return e;
    }

    void pack(__nv_bfloat16* gate_up, __nv_bfloat16* down, float* gate_up_bias, float* down_bias,
              const Expert& e, int width, int width_pad) {
        std::vector<float*> temporary;
        auto temp = [&](const std::vector<float>& v) -> float* {
            if (v.empty()) return nullptr;
            float* d;
            CHECK_CUDA(cudaMalloc(&d, v.size() * 4));
            temporary.push_back(d);
            put(d, v.data(), v.size() * 4);
            return d;
        };
        moe::PackParams g{temp(e.gate), temp(e.up), temp(e.gate_bias), temp(e.up_bias), gate_up,
                          gate_up_bias, moe::kF32, width, c.H, moe::gate_up_row_tiles(width_pad), Hp / 64, 0};
        moe_pack_gate_up<<<16, 256, 0, stream>>>(g);
        moe::PackParams d{temp(e.down), nullptr, temp(e.down_bias), nullptr, down, down_bias,
                          moe::kF32, c.H, width, moe::down_row_tiles(Hp), width_pad / 64, 0};
        moe_pack_down<<<16, 256, 0, stream>>>(d);
        CHECK_CUDA(cudaStreamSynchronize(stream));
        for (float* t : temporary) cudaFree(t);
    }

    void make_weights() {
        if (c.host_weights) {
            for (int e = 0; e < c.E; e++) experts.push_back(make_expert(c.I, e));
        }
        if (c.S) {
            shared = make_expert(c.S, 5);
            shared.gate_bias.clear(), shared.up_bias.clear(), shared.down_bias.clear();
            auto* gu = alloc<__nv_bfloat16>(2ll * Sp * Hp, false);
            auto* dn = alloc<__nv_bfloat16>(static_cast<int64_t>(up_to(Hp, 128)) * Sp, false);
            pack(gu, dn, nullptr, nullptr, shared, c.S, Sp);
            p.w_shared_gate_up = gu, p.w_shared_down = dn;
            if (c.shared_gate) {
                shared_gate = matrix(c.H, 0.2f);
                p.shared_gate = device_floats(shared_gate);
            }
        }
        if (c.input == moe::kHidden) {
            router = matrix(static_cast<int64_t>(c.E) * c.H, 1.0f);
            p.router = device_floats(router);
            if (c.router_bias) router_bias = matrix(c.E, 0.5f), p.router_bias = device_floats(router_bias);
        }
        if (c.scoring == moe::kSigmoid) correction = matrix(c.E, 0.1f), p.correction_bias = device_floats(correction);
    }

    void make_ranks() {
        const int64_t slots = static_cast<int64_t>(c.R) * c.M;
        const int64_t packed = slots * std::min(c.K, L);
        uint64_t at = 0;
        auto place = [&](uint64_t bytes) {
            const uint64_t here = at;
            at = (at + bytes + 255) / 256 * 256;
            return here;
        };
        p.off_dispatch_flags = place(8 * c.R);
        p.off_combine_flags = place(8 * c.R);
        p.off_abort_words = place(8 * c.R);
        const uint64_t flags_end = at;
        p.off_recv_tokens = place(4 * c.R);
        p.off_recv_ids = place(4 * slots * c.K);
        p.off_recv_weights = place(4 * slots * c.K);
        p.off_recv_rows = place(2 * slots * Hp);
        p.off_combine_rows = place(2 * slots * Hp);

        std::vector<moe::RankView> views;
        ranks.resize(c.R);
        for (int r = 0; r < c.R; r++) {
            void* region;
            CHECK_CUDA(cudaMalloc(&region, at));
            allocations.push_back(region);
            CHECK_CUDA(cudaMemsetAsync(region, 0, flags_end, stream));
            poisonable.push_back({static_cast<uint8_t*>(region) + flags_end, at - flags_end});
            views.push_back({static_cast<uint8_t*>(region)});

            Rank& k = ranks[r];
            moe::LocalRank& d = k.device;
            std::memset(&d, 0, sizeof d);
            const int hs = es(c.hidden_dtype), os = es(c.out_dtype);
            k.d_hidden = alloc<uint8_t>((static_cast<int64_t>(c.M) * c.H + c.misalign) * hs + 16, false) + c.misalign * hs;
            k.d_out = alloc<uint8_t>((static_cast<int64_t>(c.M) * c.H + c.misalign) * os + 16, false) + c.misalign * os;
            k.hidden.resize(static_cast<int64_t>(c.M) * c.H * hs);
            k.out_before.resize(static_cast<int64_t>(c.M) * c.H * os);
            k.d_count = alloc<int32_t>(1, false);
            if (c.input == moe::kTopK) {
                k.d_ids = alloc<int32_t>(static_cast<int64_t>(c.M) * c.K, false);
                k.d_weights = alloc<float>(static_cast<int64_t>(c.M) * c.K, false);
                k.ids.resize(static_cast<int64_t>(c.M) * c.K), k.weights.resize(k.ids.size());
            } else if (c.input == moe::kLogits) {
                k.d_logits = alloc<float>(static_cast<int64_t>(c.M) * c.E, false);
                k.logits.resize(static_cast<int64_t>(c.M) * c.E);
            }
            d.hidden = k.d_hidden, d.out = k.d_out, d.token_count = k.d_count, d.topk_ids = k.d_ids;
            d.topk_weights = k.d_weights, d.router_logits = k.d_logits, d.accumulate = c.accumulate;
            d.rank = r;
            const int first = std::min(c.E, r * L);
            d.local_experts = std::min(c.E, first + L) - first;
            d.home_tokens = alloc<int32_t>(1, true);
            d.home_ids = alloc<int32_t>(static_cast<int64_t>(c.M) * c.K, true);
            d.home_weights = alloc<float>(static_cast<int64_t>(c.M) * c.K, true);
            d.home_mask = alloc<uint64_t>(c.M, true);
            if (c.input == moe::kHidden) {
                // why not poisoned only: rows past T are read, and thrown away
                const int64_t logits = static_cast<int64_t>(c.M) * c.E;
                d.logits = alloc<float>(logits, false);
                poisonable.push_back({d.logits, static_cast<size_t>(logits) * 4});
            }
            if (c.S) {
                d.home_rows = alloc<__nv_bfloat16>(static_cast<int64_t>(c.M) * Hp, true);
                d.shared_activated = alloc<__nv_bfloat16>(static_cast<int64_t>(c.M) * Sp, true);
                d.shared_out = alloc<__nv_bfloat16>(static_cast<int64_t>(c.M) * Hp, true);
            }
            d.expert_counts = alloc<int32_t>(L, true);
            d.expert_offsets = alloc<int32_t>(L + 1, true);
            d.expert_rows = alloc<int32_t>(packed, true);
            d.packed_row_of = alloc<int32_t>(slots * c.K, true);
            d.activated = alloc<__nv_bfloat16>(packed * Ip, true);
            d.expert_out = alloc<__nv_bfloat16>(packed * Hp, true);
            d.epoch = alloc<uint64_t>(2, false);
            d.arrivals = alloc<uint32_t>(8, false);
            d.totals = alloc<uint64_t>(8, false);
            const uint64_t everyone = ~0ull >> (64 - c.R);
            uint64_t* members = alloc<uint64_t>(1, false);
            put(members, &everyone, 8);
            d.members = members, d.stats = stats + r * c.R;
            d.peer_totals = alloc<uint64_t>(moe::kPeerWords * c.R, false);
            d.received_totals = alloc<uint64_t>(static_cast<int64_t>(c.R) * L, false);
            d.received_rows = alloc<uint64_t>(static_cast<int64_t>(c.R) * L, false);
            d.error = errors + r, d.counters = counters + r;
            d.work = alloc<uint32_t>(8, false);
            d.expert_done = alloc<uint32_t>(L, false);

            const int64_t gu = 2ll * Ip * Hp, dn = static_cast<int64_t>(up_to(Hp, 128)) * Ip;
            auto* wgu = alloc<__nv_bfloat16>(gu * L, false);
            auto* wdn = alloc<__nv_bfloat16>(dn * L, false);
            d.w_gate_up = wgu, d.w_down = wdn;
            const bool bias = c.bias || c.exact;
            float* bgu = bias ? alloc<float>(2ll * Ip * L, false) : nullptr;
            float* bdn = bias ? alloc<float>(static_cast<int64_t>(up_to(Hp, 128)) * L, false) : nullptr;
            d.bias_gate_up = bgu, d.bias_down = bdn;
            if (!c.host_weights) {
                moe::FillParams f{wgu, 7, L, c.I, c.H, moe::gate_up_row_tiles(Ip), Hp / 64, 1, 0.05f, 0};
                moe_fill_random<<<8 * sms, 256, 0, stream>>>(f);
                moe::FillParams g{wdn, 8, L, c.H, c.I, moe::down_row_tiles(Hp), Ip / 64, 0, 0.05f, 0};
                moe_fill_random<<<8 * sms, 256, 0, stream>>>(g);
            }
            for (int e = 0; c.host_weights && e < d.local_experts; e++) {
                pack(wgu + gu * e, wdn + dn * e, bias ? bgu + 2ll * Ip * e : nullptr,
                     bias ? bdn + static_cast<int64_t>(up_to(Hp, 128)) * e : nullptr, experts[first + e], c.I, Ip);
            }
        }
        auto* dv = alloc<moe::RankView>(c.R, false);
        put(dv, views.data(), views.size() * sizeof(views[0]));
        p.ranks = dv;
        std::vector<moe::LocalRank> locals;
        for (Rank& r : ranks) locals.push_back(r.device);
        auto* dl = alloc<moe::LocalRank>(c.R, false);
        put(dl, locals.data(), locals.size() * sizeof(locals[0]));
        p.locals = dl;
    }

    // With programmatic dependence where there is one.
    void launch_early(void (*kernel)(StepParams), dim3 blocks, int threads, int shared) {
        CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
        cudaLaunchConfig_t config{};
        config.gridDim = blocks, config.blockDim = dim3(threads);
        config.dynamicSmemBytes = shared, config.stream = stream;
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        config.attrs = &attribute, config.numAttrs = hopper ? 1 : 0;
        CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, p));
    }

    // Both products in one kernel or in two, few rows or many, by the layer's sizes, with programmatic
    // dependence.
    template <class Grid>
    void launch_wgmma(const Grid& grid) {
        using Kernel = void (*)(StepParams);
        const int narrow = moe::kWgmmaSharedBytes<moe::NarrowShape>;
        struct Flow {
            std::vector<Kernel> kernels;
            int shared, ctas;
            unsigned least = 1;
        };
        const Flow flows[] = {{{moe_experts_wgmma}, narrow, sms},
                              {{moe_gate_up_wgmma, moe_down_wgmma}, narrow, sms},
                              {{moe_experts_wgmma_prefill}, moe::prefill::kSharedBytes, sms / 2 * 2, 2},
                              {{moe_gate_up_wgmma_prefill, moe_down_wgmma_prefill},
                               moe::prefill::kSharedBytes, sms / 2 * 2, 2}};
        const Flow& flow = flows[(c.H / 8 + c.E + c.M + c.R) % 4];
        for (Kernel kernel : flow.kernels) {
            dim3 blocks = grid(flow.ctas);
            blocks.x = std::max(blocks.x, flow.least);
            launch_early(kernel, blocks, moe::kWgmmaThreads, flow.shared);
        }
    }

    cudaGraphExec_t capture(bool one_cta) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        auto grid = [&](int64_t x) {
            return dim3(one_cta ? 1 : static_cast<unsigned>(std::max<int64_t>(1, x)), p.num_local_ranks);
        };
        const int64_t chunks = (Hp + 2047) / 2048;
        const int64_t rows = std::min<int64_t>(c.M * chunks, 2 * sms);
        const int64_t slots = std::min<int64_t>(static_cast<int64_t>(c.R) * c.M * chunks, 2 * sms);
        const int64_t per_expert = std::min(L, 4 * sms);
        const int smem = moe::kGemmSharedBytes;
        CHECK_CUDA(cudaFuncSetAttribute(moe_gate_up_mma, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
        CHECK_CUDA(cudaFuncSetAttribute(moe_down_mma, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
        CHECK_CUDA(cudaFuncSetAttribute(moe_shared_gate_up_mma, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
        CHECK_CUDA(cudaFuncSetAttribute(moe_shared_down_mma, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
        CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        if (c.input == moe::kHidden) {
            const int64_t blocks = std::max<int64_t>((static_cast<int64_t>(c.M) * c.E + 7) / 8, c.E);
            launch_early(moe_route_logits, grid(std::min<int64_t>(blocks, 4 * sms)), moe::kLogitsThreads,
                         moe::kLogitsSharedBytes);
        }
        // One rank: the wide graph has one kernel for dispatch and one for combine, the narrow one all
        const bool local = c.R == 1 && !one_cta;
        const int64_t pieces = c.M * ((Hp + 239) / 240);
        if (!local || c.input != moe::kTopK) {
            const int64_t blocks = std::max<int64_t>((c.M + 7) / 8, std::min(c.M, sms));
            launch_early(moe_route_topk, grid(std::min<int64_t>(blocks, 8 * sms)), moe::kTopKThreads, 0);
        }
        if (local) {
            launch_early(moe_dispatch_local, grid(std::min<int64_t>(1 + (pieces + 63) / 64, sms)), moe::kFusedThreads, 0);
        } else {
            moe_dispatch_send<<<grid(rows), 256, 0, stream>>>(p);
            moe_dispatch_recv<<<grid(per_expert), 256, 0, stream>>>(p);
            moe_dispatch_index<<<grid(per_expert), 256, 0, stream>>>(p);
        }
        // The narrow graph multiplies with mma.sync, the wide one with wgmma where there is one
        if (one_cta || !hopper) {
            moe_gate_up_mma<<<grid(2 * sms), 256, smem, stream>>>(p);
            moe_down_mma<<<grid(2 * sms), 256, smem, stream>>>(p);
        } else {
            launch_wgmma(grid);
        }
        if (!local) moe_combine_send<<<grid(slots), 256, 0, stream>>>(p);
        if (c.S) {
            moe_shared_gate_up_mma<<<grid(2 * sms), 256, smem, stream>>>(p);
            moe_shared_down_mma<<<grid(2 * sms), 256, smem, stream>>>(p);
        }
        if (local) launch_early(moe_combine_local, grid(std::min<int64_t>((pieces + 3) / 4, sms)), moe::kSumThreads, 0);
        else moe_combine_recv<<<grid(rows), 256, 0, stream>>>(p);
        CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
        CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
        CHECK_CUDA(cudaGraphDestroy(graph));
        return exec;
    }
};

// ---------------------------------------------------------------- the reference, plain float64

double sigmoid64(double x) { return 1.0 / (1.0 + std::exp(-x)); }

void add_expert(std::vector<double>& y, const Expert& e, const std::vector<double>& x, int width,
                double weight, const Config& c) {
    const int H = c.H;
    std::vector<double> a(width);
    for (int i = 0; i < width; i++) {
        double g = e.gate_bias.empty() ? 0 : e.gate_bias[i], u = e.up_bias.empty() ? 0 : e.up_bias[i];
        for (int h = 0; h < H; h++) {
            g += e.gate[static_cast<int64_t>(i) * H + h] * x[h];
            u += e.up[static_cast<int64_t>(i) * H + h] * x[h];
        }
        if (c.activation == moe::kClampedSwiGlu) {
            g = std::min(g, 1.0), u = std::max(-1.0, std::min(u, 1.0));
            a[i] = (u + 1) * g * sigmoid64(static_cast<double>(1.702f) * g);
        } else {
            a[i] = g * sigmoid64(g) * u;
        }
    }
    for (int h = 0; h < H; h++) {
        double d = e.down_bias.empty() ? 0 : e.down_bias[h];
        for (int i = 0; i < width; i++) d += e.down[static_cast<int64_t>(h) * width + i] * a[i];
        y[h] += weight * d;
    }
}

void reference_route(std::vector<int>& ids, std::vector<double>& weights, const Layer& l,
                     const std::vector<float>& logits) {
    const Config& c = l.c;
    std::vector<double> score(c.E), ranking(c.E);
    double max = -INFINITY, sum = 0;
    for (int e = 0; e < c.E; e++) ranking[e] = logits[e], max = std::max<double>(max, logits[e]);
    for (int e = 0; e < c.E; e++) sum += std::exp(logits[e] - max);
    for (int e = 0; e < c.E; e++) {
        if (c.scoring == moe::kSoftmax) score[e] = std::exp(logits[e] - max) / sum;
        else if (c.scoring == moe::kTopKSoftmax) score[e] = std::exp(logits[e] - max);
        else score[e] = sigmoid64(logits[e]), ranking[e] = score[e] + l.correction[e];
    }
    std::vector<bool> allowed(c.E, c.groups == 1);
    if (c.groups > 1) {
        const int size = c.E / c.groups;
        std::vector<std::pair<double, int>> order;
        for (int g = 0; g < c.groups; g++) {
            std::vector<double> v(ranking.begin() + g * size, ranking.begin() + (g + 1) * size);
            std::sort(v.rbegin(), v.rend());
            order.push_back({-(size == 1 ? v[0] : v[0] + v[1]), g});
        }
        std::sort(order.begin(), order.end());
        for (int i = 0; i < c.topk_groups; i++) {
            for (int e = 0; e < size; e++) allowed[order[i].second * size + e] = true;
        }
    }
    std::vector<std::pair<double, int>> order;
    for (int e = 0; e < c.E; e++) if (allowed[e]) order.push_back({-ranking[e], e});
    std::sort(order.begin(), order.end());
    double divisor = c.scoring == moe::kSigmoid ? 1e-20 : 0;
    for (int k = 0; k < c.K; k++) ids[k] = order[k].second, divisor += score[ids[k]];
    for (int k = 0; k < c.K; k++) {
        weights[k] = score[ids[k]] / (c.renormalise || c.scoring == moe::kTopKSoftmax ? divisor : 1) * c.scale;
    }
}

std::string at_text(int rank, int token) { return "rank " + std::to_string(rank) + " token " + std::to_string(token); }

void check_token(Layer& l, int rank, int token, const std::string& where) {
    const Config& c = l.c;
    const Rank& r = l.ranks[rank];
    std::vector<double> x(c.H), full(c.H), y(c.H, 0.0);
    for (int h = 0; h < c.H; h++) {
        full[h] = to_host(r.hidden.data(), static_cast<int64_t>(token) * c.H + h, c.hidden_dtype);
        x[h] = bf16(static_cast<float>(full[h]));
    }
    std::vector<int> ids(c.K);
    std::vector<double> weights(c.K);
    if (c.input == moe::kTopK) {
        for (int k = 0; k < c.K; k++) ids[k] = r.ids[token * c.K + k], weights[k] = r.weights[token * c.K + k];
    } else {
        std::vector<float> logits(c.E);
        for (int e = 0; e < c.E; e++) {
            if (c.input == moe::kLogits) {
                logits[e] = r.logits[static_cast<int64_t>(token) * c.E + e];
            } else {
                double s = 0;
                for (int h = 0; h < c.H; h++) s += full[h] * l.router[static_cast<int64_t>(e) * c.H + h];
                logits[e] = static_cast<float>(l.router_bias.empty() ? s : s + l.router_bias[e]);
            }
        }
        reference_route(ids, weights, l, logits);
        const auto got_ids = l.get(r.device.home_ids + static_cast<int64_t>(token) * c.K, c.K);
        const auto got_weights = l.get(r.device.home_weights + static_cast<int64_t>(token) * c.K, c.K);
        bool same = true;
        for (int k = 0; k < c.K; k++) {
            same &= got_ids[k] == ids[k] && std::fabs(got_weights[k] - weights[k]) <= 1e-6 * std::fabs(weights[k]);
        }
        expect(same, "route equals the rule", where, at_text(rank, token));
    }
    for (int k = 0; k < c.K; k++) {
        if (ids[k] >= 0 && ids[k] < c.E) add_expert(y, l.experts[ids[k]], x, c.I, weights[k], c);
    }
    if (c.S) {
        double gate = 1;
        if (c.shared_gate) {
            double s = 0;
            for (int h = 0; h < c.H; h++) s += full[h] * l.shared_gate[h];
            gate = sigmoid64(s);
        }
        add_expert(y, l.shared, x, c.S, gate, c);
    }
    double error = 0, norm = 0;
    bool exact = true;
    for (int h = 0; h < c.H; h++) {
        const int64_t i = static_cast<int64_t>(token) * c.H + h;
        double want = y[h];
        if (c.accumulate) want += to_host(r.out_before.data(), i, c.out_dtype);
        const double got = to_host(r.out.data(), i, c.out_dtype);
        error += (got - want) * (got - want), norm += want * want;
        exact &= got == want;
    }
    const bool close = error <= 6e-3 * 6e-3 * norm;  // false for NaN
    char detail[160];
    std::snprintf(detail, sizeof detail, "%s: relative L2 error %.3g", at_text(rank, token).c_str(), std::sqrt(error / norm));
    expect(close, "token equals the reference", where, detail);
    if (c.exact) expect(exact, "integers are exact", where, at_text(rank, token));
}

enum Routing { kRandom, kSkewed, kOneHot, kNone, kGarbage, kRoutings };
const char* const kRoutingNames[] = {"random", "skewed", "one-hot", "none", "garbage"};

void make_inputs(Layer& l, Routing routing, Random& random) {
    const Config& c = l.c;
    for (Rank& r : l.ranks) {
        for (int64_t i = 0; i < static_cast<int64_t>(c.M) * c.H; i++) {
            from_host(r.hidden.data(), i, c.exact ? static_cast<float>(random.below(3) - 1) : random.uniform() * 1.7f, c.hidden_dtype);
            from_host(r.out_before.data(), i, random.uniform(), c.out_dtype);
        }
        for (float& v : r.logits) v = std::round(random.uniform() * 16) / 4;  // with ties
        for (int t = 0; c.input == moe::kTopK && t < c.M; t++) {
            std::vector<int> all(c.E);
            for (int e = 0; e < c.E; e++) all[e] = e;
            for (int k = 0; k < c.K; k++) {
                std::swap(all[k], all[k + random.below(c.E - k)]);
                int id = all[k];
                if (routing == kSkewed) id = k == 0 ? 0 : all[k];
                if (routing == kSkewed && k > 0 && id == 0) id = -1;
                if (routing == kOneHot) id = k == 0 ? c.E - 1 : -1;
                if (routing == kNone) id = -1;
                if (routing == kGarbage) {
                    const int pick = random.below(6);
                    if (pick == 0) id = -1;
                    if (pick == 1) id = c.E + random.below(3);
                    if (pick == 2) id = static_cast<int>(random.bits());
                    if (pick == 3 && k > 0) id = r.ids[t * c.K + k - 1];
                }
                r.ids[t * c.K + k] = id;
                r.weights[t * c.K + k] = c.exact ? 0.5f : (id < 0 || id >= c.E ? NAN : 0.2f + 0.4f * std::fabs(random.uniform()));
            }
        }
    }
}

void count_soft(Layer& l) {
    const Config& c = l.c;
    for (int r = 0; r < c.R; r++) {
        l.over += std::max(0, l.ranks[r].tokens - c.M);
        for (int t = 0; c.input == moe::kTopK && t < l.clamped(r); t++) {
            for (int k = 0; k < c.K; k++) {
                const int id = l.ranks[r].ids[t * c.K + k];
                const bool in = id >= 0 && id < c.E;
                l.dropped += !in && id != -1;
                bool repeat = false;
                for (int j = 0; j < k; j++) repeat |= in && l.ranks[r].ids[t * c.K + j] == id;
                l.duplicates += repeat;
            }
        }
    }
}

bool rows_equal(const Layer& l, const std::vector<std::vector<uint8_t>>& a, int rank, int from, int to) {
    const int64_t row = static_cast<int64_t>(l.c.H) * es(l.c.out_dtype);
    return to <= from || std::memcmp(a[rank].data() + from * row, l.ranks[rank].out.data() + from * row, (to - from) * row) == 0;
}

std::vector<std::vector<uint8_t>> outputs(const Layer& l) {
    std::vector<std::vector<uint8_t>> v;
    for (const Rank& r : l.ranks) v.push_back(r.out);
    return v;
}

void check_step(Layer& l, const std::string& where, Random& random, int max_tokens) {
    const Config& c = l.c;
    count_soft(l);
    l.upload();
    l.run(0xff, false);
    const auto first = outputs(l);
    for (int r = 0; r < c.R; r++) {
        const int T = l.clamped(r);
        std::vector<std::vector<uint8_t>> before(c.R);
        before[r] = l.ranks[r].out_before;
        expect(rows_equal(l, before, r, T, c.M), "rows from T on are untouched", where, at_text(r, T));
        for (int i = 0; i < std::min(T, std::max(1, max_tokens / c.R)); i++) {
            check_token(l, r, i == 0 ? T - 1 : random.below(T), where);
        }
        expect(l.errors[r].code == 0 && l.errors[r].valid_epoch == l.steps, "step is valid", where, at_text(r, 0));
    }
    for (int again = 0; again < 2; again++) {
        count_soft(l);
        l.run(again == 0 ? 0x7f : 0xff, again == 1);
        for (int r = 0; r < c.R; r++) {
            expect(rows_equal(l, first, r, 0, c.M), again == 0 ? "replay has equal bits" : "one-CTA grids have equal bits", where, at_text(r, 0));
        }
    }
    uint64_t steps = 0, dropped = 0, duplicates = 0, over = 0;
    for (int r = 0; r < c.R; r++) {
        steps = l.counters[r].steps;
        dropped += l.counters[r].dropped_ids, duplicates += l.counters[r].duplicate_ids;
        over += l.counters[r].over_capacity_tokens;
    }
    char detail[200];
    std::snprintf(detail, sizeof detail, "steps %llu/%llu dropped %llu/%llu duplicates %llu/%llu over %llu/%llu",
                  (unsigned long long)steps, (unsigned long long)l.steps, (unsigned long long)dropped,
                  (unsigned long long)l.dropped, (unsigned long long)duplicates,
                  (unsigned long long)l.duplicates, (unsigned long long)over, (unsigned long long)l.over);
    expect(steps == l.steps && dropped == l.dropped && duplicates == l.duplicates && over == l.over, "counters", where, detail);
}

void check_layer(const Config& c, const std::vector<Routing>& routings, int tokens_per_step, int patterns) {
    Layer l(c);
    Random random{99};
    const int counts[] = {0, 1, 3, 8, 37, c.M, c.M + 5, -3};
    for (Routing routing : routings) {
        for (int pattern = 0; pattern < patterns; pattern++) {
            make_inputs(l, routing, random);
            for (int r = 0; r < c.R; r++) l.ranks[r].tokens = counts[(pattern * 5 + r + (patterns == 1 ? 5 : 0)) % 8];
            check_step(l, c.text() + " " + kRoutingNames[routing] + " pattern " + std::to_string(pattern), random, tokens_per_step);
        }
    }

    // A token's bits do not depend on its mates, nor on a NaN among them
    Random again{5};
    make_inputs(l, kRandom, again);
    for (Rank& r : l.ranks) r.tokens = c.M;
    l.upload(), count_soft(l), l.run(0xff, false);
    const auto full = outputs(l);
    for (Rank& r : l.ranks) r.tokens = std::min(3, c.M);
    l.upload(), count_soft(l), l.run(0xff, false);
    for (int r = 0; r < c.R; r++) expect(rows_equal(l, full, r, 0, std::min(3, c.M)), "bits are the same alone", c.text());
    for (Rank& r : l.ranks) {
        r.tokens = c.M;
        for (int h = 0; h < c.H; h++) from_host(r.hidden.data(), h, h % 2 ? NAN : INFINITY, c.hidden_dtype);
    }
    l.upload(), count_soft(l), l.run(0xff, false);
    for (int r = 0; r < c.R; r++) expect(rows_equal(l, full, r, 1, c.M), "NaN stays in its token", c.text());
}

void check_timeout(bool timed) {
    Config c;
    c.R = 2, c.present = 1, c.timeout_ns = 20000000;
    Layer l(c);
    Random random{3};
    make_inputs(l, kRandom, random);
    for (Rank& r : l.ranks) r.tokens = 3;
    l.upload();
    l.run(0xff, false);
    const moe::ErrorRecord& e = l.errors[0];
    char detail[160];
    std::snprintf(detail, sizeof detail, "code %u op %u rank %u peer %u expected %llu seen %llu waited %llu valid %llu",
                  e.code, e.op, e.rank, e.peer, (unsigned long long)e.epoch_expected, (unsigned long long)e.epoch_seen,
                  (unsigned long long)e.waited_ns, (unsigned long long)e.valid_epoch);
    expect(e.code == moe::kTimeout && e.op == moe::kOpDispatchRecv && e.rank == 0 && e.peer == 1 &&
               e.epoch_expected == 1 && e.epoch_seen == 0 && e.waited_ns >= c.timeout_ns &&
               e.waited_ns < 100 * c.timeout_ns && e.valid_epoch == 0 && l.counters[0].steps == 0,
           "a missing peer is reported", c.text(), detail);
    const auto told = l.get(reinterpret_cast<const uint64_t*>(l.region(1) + l.p.off_abort_words), 1);
    expect(told[0] == (2ull << 32 | 1), "a fault is told to the peers", c.text(), std::to_string(told[0]));
    expect(l.ranks[0].out == l.ranks[0].out_before, "a faulted step writes no output", c.text());
    const float us = l.time_us(1);
    expect(!timed || us < 5000, "replays after a fault do not wait", c.text(), std::to_string(us));
    std::printf("timeout record: %s; replay after it %.0f us\n", detail, us);
}

void check_large_offsets() {
    Config c;
    c.R = 3, c.M = 150000, c.K = 2, c.E = 6, c.H = 7168, c.I = 64;
    size_t free_bytes, total;
    CHECK_CUDA(cudaMemGetInfo(&free_bytes, &total));
    const double slots = 3.0 * c.M, need = 3 * (slots * 7168 * 2 * 2 + slots * 2 * 7168 * 2 + c.M * 7168.0 * 4 + slots * 2 * 128 + 1e8);
    if (need > free_bytes * 0.98) c.K = 1;
    const double need1 = c.K == 2 ? need : 3 * (slots * 7168 * 2 * 3 + c.M * 7168.0 * 4 + slots * 128 + 1e8);
    if (need1 > free_bytes * 0.98) {
        std::printf("skipped: offsets past 2^31 elements need %.0f GB, %.0f are free\n", need1 / 1e9, free_bytes / 1e9);
        return;
    }
    Layer l(c);
    Random random{8};
    for (Rank& r : l.ranks) {
        // Inputs of the rows used only: filling gigabytes on the host takes too long
        for (int64_t i = 0; i < 3ll * c.H; i++) from_host(r.hidden.data(), i, random.uniform(), c.hidden_dtype);
        for (size_t i = 0; i < r.ids.size(); i++) r.ids[i] = static_cast<int>((i * 7 + i / 11) % c.E), r.weights[i] = 0.5f;
        r.tokens = 3;
    }
    // the last source sends all it can, so that packed rows and slots reach the end of the buffers
    Rank& last = l.ranks[2];
    last.tokens = c.M;
    for (int64_t t = 3; t < c.M; t++) std::memcpy(last.hidden.data() + t * c.H * 2, last.hidden.data() + t % 3 * c.H * 2, c.H * 2);
    l.upload();
    l.run(0xff, false);
    const std::string where = c.text();
    for (int r = 0; r < 3; r++) {
        for (int t = 0; t < 3; t++) check_token(l, r, t, where);
    }
    for (int i = 0; i < 12; i++) check_token(l, 2, c.M - 1 - i * 9973, where);
    g_passed["offsets past 2^31 elements"]++;
}

void bench(bool timed) {
    struct { const char* name; int H, I, E, K; } shapes[] = {
        {"qwen3-30b", 2048, 768, 128, 8}, {"mixtral", 4096, 14336, 8, 2}, {"deepseek-v3 / 8", 7168, 2048, 32, 8}};
    for (auto& s : shapes) {
        Config c;
        c.M = 4096, c.H = s.H, c.I = s.I, c.E = s.E, c.K = s.K, c.host_weights = false;
        if (!timed && c.E != 128) continue;
        Layer l(c);
        Random random{1};
        make_inputs(l, kRandom, random);
        for (int T : {1, 8, 32, 128, 1024, 4096}) {
            l.ranks[0].tokens = T;
            l.upload();
            l.run(0xff, false);
            if (!timed) continue;
            std::vector<bool> hit(c.E, false);
            int hits = 0;
            for (int i = 0; i < T * c.K; i++) if (!hit[l.ranks[0].ids[i]]) hit[l.ranks[0].ids[i]] = true, hits++;
            const float us = l.time_us(9);
            const double bytes = 6.0 * c.H * c.I * hits, flops = 6.0 * c.H * c.I * c.K * T;
            std::printf("%-16s T %5d  %9.1f us a step  hit %3d experts  %7.2f TB/s weights  %7.1f TFLOP/s\n",
                        s.name, T, us, hits, bytes / us * 1e-6, flops / us * 1e-6);
        }
    }
}

void check_all(bool brief) {
    const std::vector<Routing> every = {kRandom, kSkewed, kOneHot, kNone, kGarbage};
    const std::vector<Routing> few = {kRandom, kGarbage};

    // Shapes, ranks and routings
    for (int R : {1, 2, 4, 8}) {
        if (brief && R != 4) continue;
        Config tiny;
        tiny.R = R;
        check_layer(tiny, brief ? few : every, 16, brief ? 1 : 8);
        Config ragged;
        ragged.R = R, ragged.M = 37, ragged.K = 4, ragged.E = 12, ragged.H = 192, ragged.I = 96;
        ragged.bias = true, ragged.activation = moe::kClampedSwiGlu;
        check_layer(ragged, brief ? few : every, 24, brief ? 1 : 8);
        Config odd;
        odd.R = R, odd.M = 40, odd.K = 3, odd.E = 10, odd.H = 100, odd.I = 72, odd.S = 50, odd.shared_gate = true, odd.bias = true;
        check_layer(odd, brief ? few : every, 24, brief ? 1 : 8);
        Config exact;
        exact.R = R, exact.M = 70, exact.K = 4, exact.E = 9, exact.H = 320, exact.I = 200, exact.exact = true;
        check_layer(exact, few, 24, brief ? 1 : 4);
        if (brief) break;
        Config middle;
        middle.R = R, middle.M = 200, middle.K = 8, middle.E = 64, middle.H = 512, middle.I = 256, middle.S = 320;
        middle.accumulate = true;
        check_layer(middle, every, 12, 4);
    }

    // Routing rules
    for (int input : {moe::kLogits, moe::kHidden}) {
        for (int rule = 0; rule < 6; rule++) {
            if (brief && rule != 5) continue;
            Config c;
            c.R = rule % 3 == 0 ? 1 : 2, c.M = 90, c.K = 6, c.E = rule == 4 ? 600 : 64, c.H = rule == 1 ? 100 : 128, c.I = 64, c.input = input;
            c.scoring = rule < 2 || rule == 4 ? moe::kSoftmax : (rule == 2 ? moe::kTopKSoftmax : moe::kSigmoid);
            c.renormalise = rule == 1 || rule == 5, c.router_bias = rule == 2;
            if (rule >= 3 && rule != 4) c.groups = 8, c.topk_groups = 3, c.scale = 2.5f;
            check_layer(c, {kRandom}, 24, brief ? 1 : 8);
        }
    }

    // Types and alignment
    for (int in : {moe::kF32, moe::kF16, moe::kBF16}) {
        for (int out : {moe::kF32, moe::kF16, moe::kBF16}) {
            for (int variant = 0; variant < 3; variant++) {
                if (brief && !(in != out && variant == 1)) continue;
                Config c;
                c.R = 1 + (in + variant) % 2, c.M = 37, c.K = 2, c.E = 6, c.H = variant == 2 ? 90 : 128, c.I = 64, c.S = 64;
                c.hidden_dtype = in, c.out_dtype = out, c.misalign = variant == 1, c.accumulate = variant != 0;
                c.shared_gate = true;
                check_layer(c, {kRandom}, 12, brief ? 1 : 3);
            }
        }
    }
    check_timeout(!brief);  // why: under a checker time means nothing
}

}  // namespace

int main(int argc, char** argv) {
    const std::string mode = argc > 1 ? argv[1] : "all";
    cudaDeviceProp device;
    CHECK_CUDA(cudaGetDeviceProperties(&device, 0));
    std::printf("%s, %s\n", device.name, mode.c_str());
    g_poison = mode != "raw";
    if (mode == "bench" || mode == "once") {
        bench(mode == "bench");
    } else {
        check_all(mode == "short" || mode == "raw");
        if (mode == "all") check_large_offsets();
    }
    for (auto& law : g_passed) std::printf("%7d  %s\n", law.second, law.first.c_str());
    std::printf("%s: %d failed\n", g_failed ? "FAILED" : "ok", g_failed);
    return g_failed ? 1 : 0;
}
