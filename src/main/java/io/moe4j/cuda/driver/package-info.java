/**
 * The CUDA driver behind one interface, so that everything above it can be proven without a GPU.
 *
 * <pre>
 *   Driver ─┬─ NativeDriver     JCuda; PDL launches through JNA            (production)
 *           ├─ CheckedDriver    decorator: no wait, allocation or pageable copy in a zone
 *           └─ RecordingDriver  no GPU: records calls in order, simulates capture, counts leaks
 * </pre>
 *
 * Handles, streams and addresses are raw {@code long} values, so memory and streams of any other
 * library can be used. {@link io.moe4j.cuda.driver.Drivers} is the only way in; it says why when
 * there is no driver. Loading this package loads no JCuda class. {@link io.moe4j.cuda.driver.Call}
 * is the single list of what each call may do: wait, allocate, or break a capture.
 */
package io.moe4j.cuda.driver;
