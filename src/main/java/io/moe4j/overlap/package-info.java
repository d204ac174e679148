/** Micro-batches whose communication and computation overlap. */
package io.moe4j.overlap;
