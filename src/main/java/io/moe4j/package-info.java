/**
 * moe4j runs the routed-expert part of a Mixture-of-Experts layer.
 *
 * <pre>
 *   hidden [T, H] ─┬─► router_topk ─► ids, weights [T, K]
 *                  │                        │
 *                  └────────► dispatch_send ┴─► receive buffer [R][M][H] on every rank
 *                                                  │ dispatch_recv: counts, offsets, row lists
 *                                                  ▼
 *                             gate/up GEMM ─► SwiGLU ─► down GEMM      (hit experts only)
 *                                                  │
 *            out [T, H] ◄── combine_recv ◄── combine_send: one weighted row per (slot, home rank)
 * </pre>
 *
 * Start with {@link io.moe4j.Moe#open}: it validates a {@link io.moe4j.MoeConfig}, picks a backend
 * and says why. {@link io.moe4j.MoeLayer#prepare} allocates everything the {@link
 * io.moe4j.MemoryPlan} lists; {@link io.moe4j.MoeLayer#enqueue} allocates nothing. The number of
 * tokens is a value in memory that the backend reads when the step runs.
 *
 * <p>Symbols: R ranks, E experts (L = ceil(E / R) per rank), K experts per token, M = {@code
 * maxTokensPerRank}, T tokens of a rank in this step (0 ≤ T ≤ M), H hidden size, I intermediate
 * size.
 */
package io.moe4j;
