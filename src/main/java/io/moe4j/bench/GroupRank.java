package io.moe4j.bench;

import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.StepTensors;
import io.moe4j.cuda.CudaProbe;
import io.moe4j.ep.Group;
import io.moe4j.tensor.Tensor;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;

/**
 * One rank of a {@link GroupCase}: its GPU, which has the rank's number, and the layers on it. Its
 * methods run on all ranks at once, each on a thread of its own. Owns probe, layers and membership.
 */
class GroupRank implements AutoCloseable {
    private static final int FEWEST_SAMPLES = 20;
    private static final int MOST_SAMPLES = 1000;

    private final GroupCase groupCase;
    final MoeConfig config;
    final List<MoeLayer> layers = new ArrayList<>();
    CudaProbe probe;
    private final Group group;
    private int meetings;

    GroupRank(GroupCase groupCase, Group group) {
        this.groupCase = groupCase;
        this.config = groupCase.config();
        this.group = group;
    }

    final int rank() {
        return group.rank();
    }

    /** Opens the GPU; comes before everything else. */
    final void openProbe() {
        probe = new CudaProbe(rank());
    }

    /** Opens a layer of the group with the weights of a set. */
    final MoeLayer open(MoeConfig of, int set) {
        long seed = groupCase.options().seed() + set;
        MoeLayer layer =
                Moe.open(
                        of.toBuilder()
                                .weights(
                                        CudaProbe.randomWeights(
                                                of.shape(), groupCase.vectors(), seed))
                                .group(group)
                                .device(rank())
                                .build());
        layers.add(layer);
        layer.prepare();
        return layer;
    }

    /** Some of this rank's tokens, in memory of the layer. */
    final StepTensors load(MoeLayer layer, int first, int tokens) {
        return groupCase.input().load(layer, rank() * config.maxTokensPerRank() + first, tokens);
    }

    /**
     * The relative L2 error of one of this rank's tokens in an output on the host.
     *
     * @throws IllegalStateException if it is too large, so that nothing wrong is timed
     */
    final double error(Tensor out, int token) {
        int h = config.shape().hidden();
        int k = config.shape().topK();
        int at = rank() * config.maxTokensPerRank() + token;
        int[] chosen = Arrays.copyOfRange(groupCase.input().ids(), at * k, (at + 1) * k);
        float[] got = new float[h];
        out.readFloats((long) token * h, got, 0, h);
        String name = "token " + token + " of rank " + rank();
        return groupCase.input().error(layers.get(0), name, at, chosen, got);
    }

    /** A copy on the host. */
    final Tensor read(Tensor out) {
        Tensor host = Tensor.allocateHost(out.dtype(), out.shape());
        layers.get(0).memory().read(host, out);
        return host;
    }

    /** Waits for the GPU and asks every layer for faults. */
    final void checkFaults() {
        probe.synchronize();
        layers.forEach(MoeLayer::check);
    }

    /**
     * Time of one of the {@code runs} that each piece of work holds; all ranks take as many
     * samples. Closes the work.
     */
    final Sample time(CudaTimer.Work timed, int runs) {
        try (CudaTimer.Work work = timed) {
            meet(0);
            double us = meet(Sample.of(probe.deviceUs(work::enqueue, 5), 1).medianUs());
            double wanted = 1e3 * groupCase.options().sampleMs() / us;
            int samples = (int) Math.max(FEWEST_SAMPLES, Math.min(MOST_SAMPLES, wanted));
            meet(0);
            return Sample.of(probe.deviceUs(work::enqueue, samples), runs);
        }
    }

    /** All ranks get the largest of their numbers. */
    final double meet(double mine) {
        byte[] bytes = ByteBuffer.allocate(Double.BYTES).putDouble(mine).array();
        return group.exchange("bench " + meetings++, bytes).stream()
                .mapToDouble(theirs -> ByteBuffer.wrap(theirs).getDouble())
                .max()
                .orElseThrow();
    }

    @Override
    public void close() {
        try (CudaProbe closed = probe) {
            layers.forEach(MoeLayer::close);
        } finally {
            group.close();
        }
    }
}
