/**
 * Java twins of the device layouts in {@code src/main/cuda/layout}: structs, regions and packed
 * weight tiles. Sizes and offsets are computed here once and compared with the compiler's by test.
 */
package io.moe4j.cuda.layout;
