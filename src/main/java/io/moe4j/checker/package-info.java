/**
 * Tells whether a backend computes what it should: {@link io.moe4j.checker.Checker} runs a layer
 * through the public API over several ranks and compares routing and outputs, per token, with a
 * {@link io.moe4j.checker.ReferenceCase} that comes from a {@link io.moe4j.checker.GoldenFile} or
 * from the {@link io.moe4j.checker.Float64Oracle}. Depends on no backend.
 */
package io.moe4j.checker;
