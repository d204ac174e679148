package io.moe4j.cuda;

import io.moe4j.MoeConfig;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.DeviceBuffer;
import io.moe4j.cuda.driver.KernelParams;
import io.moe4j.cuda.driver.ParamArena;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.driver.Stream;
import io.moe4j.cuda.kernel.LoadedKernels;
import io.moe4j.cuda.layout.CStruct;
import io.moe4j.cuda.layout.DeviceLayout;
import io.moe4j.cuda.layout.DeviceStructs;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.List;

/**
 * Do lines arrive whole, between every ordered pair of a group's ranks? All ranks run this at once;
 * each hears of what it received. Made, and its kernel launched once, before any rank may wait.
 */
final class LineTest implements AutoCloseable {
    /** A pair's share of the time to open: thousands of epochs, looked at some 100,000 times. */
    private static final long HAMMER_NS = 3_000_000;

    private final Context context;
    private final MoeConfig config;
    private final LoadedKernels kernels;
    private final Deque<AutoCloseable> owned = new ArrayDeque<>();
    private DeviceBuffer findings;
    private Stream stream;
    private KernelParams params;

    /**
     * What a rank has seen of the lines of another.
     *
     * @param source the rank that wrote
     * @param torn looks that found an epoch without its payload
     * @param missing lines whose last epoch did not come
     * @param epochs changes seen
     */
    record Finding(int source, long torn, long missing, long epochs) {
        static final int BYTES = Integer.BYTES + 3 * Long.BYTES;

        boolean good() {
            return torn == 0 && missing == 0;
        }

        void put(ByteBuffer to) {
            to.putInt(source).putLong(torn).putLong(missing).putLong(epochs);
        }

        static Finding get(ByteBuffer from) {
            return new Finding(from.getInt(), from.getLong(), from.getLong(), from.getLong());
        }
    }

    LineTest(Context context, MoeConfig config, LoadedKernels kernels) {
        this.context = context;
        this.config = config;
        this.kernels = kernels;
        try {
            long bytes = (long) config.ranks() * DeviceStructs.LINE_FINDING.size();
            findings = own(new DeviceBuffer(context, bytes));
            stream = own(new Stream(context));
            params = own(new ParamArena(context)).params(DeviceStructs.LINE_TEST_PARAMS.size());
            launch(0, 0, 0);
            stream.synchronize();
        } catch (RuntimeException | Error e) {
            closeAll(e);
            throw e;
        }
    }

    private <T extends AutoCloseable> T own(T resource) {
        owned.push(resource);
        return resource;
    }

    private void launch(int ranks, long views, long tiles) {
        CStruct.Writer to = DeviceStructs.LINE_TEST_PARAMS.writer(params.bytes(0));
        to.put("ranks", views);
        to.put("findings", findings.address());
        to.put("off_tiles", tiles);
        to.put("hammer_ns", HAMMER_NS);
        to.put("timeout_ns", config.firstStepTimeout().toNanos());
        to.put("num_ranks", ranks);
        to.put("rank", config.firstLocalRank());
        to.put("halves", 0);
        try (Scope scope = context.enter()) {
            kernels.kernel("moe_line_test").launch(context.driver(), 1, stream.handle(), params);
        }
    }

    /**
     * Writes to all peers and looks at what they write, for some milliseconds.
     *
     * @param handle whose regions; the tiles in them hold zeros
     * @param layout where the tiles are
     */
    List<Finding> run(CudaHandle handle, DeviceLayout layout) {
        int size = DeviceStructs.LINE_FINDING.size();
        try (Scope scope = context.enter()) {
            // why ones: a finding that nobody wrote is no good one
            context.driver()
                    .memsetD8Async(findings.address(), (byte) -1, findings.size(), stream.handle());
            launch(config.ranks(), handle.rankViews(), layout.selfTestOffset(0));
            stream.synchronize();
            ByteBuffer got =
                    ByteBuffer.allocateDirect(config.ranks() * size).order(ByteOrder.LITTLE_ENDIAN);
            context.driver().memcpyDtoH(got, findings.address());
            List<Finding> all = new ArrayList<>();
            for (int source = 0; source < config.ranks(); source++) {
                if (source != config.firstLocalRank()) {
                    all.add(
                            new Finding(
                                    source,
                                    field(got, source, "torn"),
                                    field(got, source, "missing"),
                                    field(got, source, "epochs")));
                }
            }
            return all;
        }
    }

    private static long field(ByteBuffer got, int source, String name) {
        return got.getLong(
                source * DeviceStructs.LINE_FINDING.size()
                        + DeviceStructs.LINE_FINDING.offset(name));
    }

    @Override
    public void close() {
        RuntimeException failure = new RuntimeException("closing the test of lines");
        closeAll(failure);
        if (failure.getSuppressed().length > 0) {
            throw failure;
        }
    }

    private void closeAll(Throwable cause) {
        while (!owned.isEmpty()) {
            try {
                owned.pop().close();
            } catch (Exception e) {
                cause.addSuppressed(e);
            }
        }
    }
}
