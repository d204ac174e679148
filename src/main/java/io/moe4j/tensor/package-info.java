/**
 * Element types and typed views of memory. Nothing here owns device memory or knows a backend;
 * every other package may depend on this one.
 */
package io.moe4j.tensor;
