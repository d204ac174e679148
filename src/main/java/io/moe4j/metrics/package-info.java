/**
 * Metrics of a layer for Micrometer: {@link io.moe4j.metrics.MoeMetrics}. Needs {@code
 * io.micrometer:micrometer-core}, which moe4j does not bring along; nothing else of moe4j refers to
 * this package.
 */
package io.moe4j.metrics;
