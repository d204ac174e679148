/**
 * Benchmarks: the expert chain over given counts, the whole step, and what a launch costs the host.
 * Every result is checked before it is timed. Uses the public API, and {@code CudaProbe} for what
 * only a benchmark needs.
 */
package io.moe4j.bench;
