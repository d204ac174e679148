package io.moe4j.cuda.kernel;

import io.moe4j.cuda.driver.Driver;
import io.moe4j.cuda.driver.KernelParams;

/**
 * A loaded kernel with its fixed launch configuration.
 *
 * @param symbol its name in the module
 * @param function the driver's handle
 * @param threads threads of a block
 * @param dynamicSharedBytes dynamic shared memory of a block
 * @param gridX blocks; the kernel strides, so any number is correct
 * @param pdl whether it may start before its predecessor ends; it then waits itself
 */
public record Kernel(
        String symbol, long function, int threads, int dynamicSharedBytes, int gridX, boolean pdl) {
    /**
     * Enqueues the kernel; {@code gridY} is the number of local ranks.
     *
     * @param driver calls go through it
     * @param gridY number of local ranks
     * @param stream a CUstream; 0 for the legacy default stream
     * @param params its arguments
     */
    public void launch(Driver driver, int gridY, long stream, KernelParams params) {
        if (pdl) {
            driver.launchKernelPdl(
                    function, gridX, gridY, 1, threads, 1, 1, dynamicSharedBytes, stream, params);
        } else {
            driver.launchKernel(
                    function, gridX, gridY, 1, threads, 1, 1, dynamicSharedBytes, stream, params);
        }
    }
}
