/**
 * NVTX ranges, for profilers such as Nsight Systems: {@link io.moe4j.cuda.nvtx.Ranges} names them,
 * and a small native library hands them to the profiler. Loaded only where {@code moe4j.nvtx=true}.
 */
package io.moe4j.cuda.nvtx;
