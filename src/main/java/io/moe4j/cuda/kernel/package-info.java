/** The compiled kernels in the jar: which there are, for which GPU, and how they are launched. */
package io.moe4j.cuda.kernel;
