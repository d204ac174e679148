package io.moe4j.cuda;

import io.moe4j.MoeConfig;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.RecordingDriver;
import io.moe4j.cuda.layout.DeviceLayout;
import io.moe4j.ep.Group;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;

/** Two ranks that cannot open a layer together; needs neither a GPU nor kernels. */
public final class GroupMismatch {
    private GroupMismatch() {}

    /** Two ranks on one GPU, in two contexts of an engine; fails with what rank 0 hears. */
    public static void prepareOnOneGpu(MoeShape shape) {
        RecordingDriver driver = new RecordingDriver(1, 1L << 30);
        Group.together(
                Group.inProcess(2),
                group -> {
                    MoeConfig config =
                            MoeConfig.builder()
                                    .weights(RandomWeights.of(shape, 1))
                                    .maxTokensPerRank(16)
                                    .group(group)
                                    .build();
                    long engine = driver.foreignContext(0);
                    try (Context context = Context.ofEngine(driver, engine);
                            PeerMemory peers =
                                    new PeerMemory(context, config, new DeviceLayout(config))) {
                        peers.agree("the same kernels");
                    }
                });
    }

    /** Fails with what rank 0 hears. */
    public static void prepare(MoeShape shape) {
        RecordingDriver driver = new RecordingDriver(2, 1L << 30);
        Group.together(
                Group.inProcess(2),
                group -> {
                    MoeConfig config =
                            MoeConfig.builder()
                                    .weights(RandomWeights.of(shape, 1))
                                    .maxTokensPerRank(16 << group.rank())
                                    .group(group)
                                    .build();
                    try (Context context = new Context(driver, group.rank());
                            PeerMemory peers =
                                    new PeerMemory(context, config, new DeviceLayout(config))) {
                        peers.agree("the same kernels");
                    }
                });
    }
}
