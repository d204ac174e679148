package io.moe4j.examples;

import io.moe4j.BoundStep;
import io.moe4j.cuda.driver.Driver;
import io.moe4j.cuda.driver.HostMemory;
import io.moe4j.tensor.Tensor;

/**
 * A step inside a capture that the engine began, between the marks: see docs/graphs.md. The engine
 * has made its context current and owns stream, graph and memory.
 */
public final class OwnCaptureExample {
    private OwnCaptureExample() {}

    // docs: begin own-capture
    /** A graph of the engine: T from page-locked memory, its own kernels, the layer's step. */
    public static long capture(
            Driver driver, long stream, Tensor tokenCount, HostMemory pinnedT, BoundStep step) {
        driver.streamBeginCapture(stream); // the step was bound before
        driver.memcpyHtoDAsync(tokenCount.address(), pinnedT, 0, 4, stream); // read at each replay
        // ... the engine's kernels before the layer
        step.layer().enqueue(stream, step); // adds nodes; runs nothing
        // ... and after it
        long graph = driver.streamEndCapture(stream);
        long executable = driver.graphInstantiate(graph);
        driver.graphDestroy(graph);
        driver.graphUpload(executable, stream);
        return executable;
    }

    /** One replay with this many tokens. The copy of an earlier replay has been executed. */
    public static void replay(
            Driver driver, long stream, long executable, HostMemory pinnedT, int tokens) {
        pinnedT.bytes().putInt(0, tokens);
        driver.graphLaunch(executable, stream);
    }
    // docs: end own-capture
}
