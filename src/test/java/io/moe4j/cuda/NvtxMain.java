package io.moe4j.cuda;

import com.sun.management.ThreadMXBean;
import io.moe4j.BoundStep;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLayer;
import io.moe4j.cuda.driver.RecordingDriver;
import io.moe4j.cuda.kernel.KernelCatalog;
import java.lang.management.ManagementFactory;
import java.util.List;

/** A layer as properties ask for it, over a recording driver; run in a child JVM. */
public final class NvtxMain {
    private NvtxMain() {}

    /** With an argument: also counts the bytes that replays allocate. */
    public static void main(String[] args) {
        RecordingDriver driver = new RecordingDriver();
        KernelCatalog catalog = KernelCatalog.choose(driver, 0);
        CudaLayer plain = RecordedLayer.open(driver, 1);
        try (MoeLayer layer =
                CudaBackendProvider.openAsAsked(driver, catalog, RecordedLayer.config(1), "test")) {
            layer.prepare();
            BoundStep step = layer.bind(RecordedLayer.tensors(driver, plain));
            long stream = driver.foreignStream();
            layer.enqueue(stream, step);
            try (MoeGraph graph = layer.capture(stream, List.of(io.moe4j.GraphPart.whole(step)))) {
                graph.launch(stream);
                if (args.length > 0) {
                    driver.beginQuiet();
                    System.out.println("bytes " + allocatedBy(() -> graph.launch(stream)));
                    driver.endQuiet();
                }
            }
            System.out.println("ran on a " + layer.getClass().getSimpleName());
        }
    }

    private static long allocatedBy(Runnable work) {
        ThreadMXBean threads = (ThreadMXBean) ManagementFactory.getThreadMXBean();
        long self = Thread.currentThread().getId();
        long least = Long.MAX_VALUE;
        for (int round = 0; round < 8; round++) {
            long before = threads.getThreadAllocatedBytes(self);
            for (int i = 0; i < 5_000; i++) {
                work.run();
            }
            least = Math.min(least, threads.getThreadAllocatedBytes(self) - before);
        }
        return least;
    }
}
