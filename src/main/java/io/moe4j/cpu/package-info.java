/**
 * The CPU backend: plain loops, the definition of correct, and the default without a GPU. It has
 * the structure of the device chain (virtual ranks, rank-major static slots, headers, counts,
 * offsets and row lists), so that what holds here can be asked of every other backend.
 *
 * <p>Arithmetic is float32 with a fixed order that depends on the layer's sizes alone: a dot
 * product is summed in blocks of {@code 64} inputs, four at a time, and a token's result has the
 * same bits whatever the other tokens are. Router logits and routing weights are computed in
 * float64.
 */
package io.moe4j.cpu;
