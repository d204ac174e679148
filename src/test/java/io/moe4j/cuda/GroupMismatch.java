package io.moe4j.cuda;

import io.moe4j.MoeConfig;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.RecordingDriver;
import io.moe4j.cuda.layout.DeviceLayout;
import io.moe4j.ep.Group;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;

/** Two ranks that open layers of different sizes; needs neither a GPU nor kernels. */
public final class GroupMismatch {
    private GroupMismatch() {}

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
