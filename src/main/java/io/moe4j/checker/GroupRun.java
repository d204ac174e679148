package io.moe4j.checker;

import io.moe4j.MoeConfig;
import io.moe4j.ProgressListener;
import io.moe4j.ep.Group;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.List;

/** One rank's part in running cases on a group; what the ranks produced is put together. */
final class GroupRun {
    private GroupRun() {}

    /** Runs all cases; every rank gets the outputs of all tokens. */
    static Checker.Run run(MoeConfig config, List<ReferenceCase> cases, ProgressListener progress) {
        Group group = config.group();
        try (LayerHarness harness = LayerHarness.open(config, progress)) {
            List<LayerHarness.Output> outputs = new ArrayList<>();
            for (ReferenceCase reference : cases) {
                harness.load(reference.hidden(), reference.tokens());
                // why: the first rank of a step may not wait for another that still loads
                group.exchange("case " + outputs.size() + " loaded", new byte[0]);
                harness.step();
                byte[] mine = encode(harness.collect());
                List<byte[]> all = group.exchange("case " + outputs.size() + " output", mine);
                outputs.add(join(all, config));
            }
            return new Checker.Run(harness.layer().backend(), outputs);
        }
    }

    private static byte[] encode(LayerHarness.Output output) {
        Routing routing = output.routing();
        int values = routing.ids().length + routing.weights().length + output.out().length;
        ByteBuffer to = ByteBuffer.allocate(8 + 4 * values);
        to.putInt(routing.tokens()).putInt(output.paddingUntouched() ? 1 : 0);
        for (int id : routing.ids()) {
            to.putInt(id);
        }
        for (float weight : routing.weights()) {
            to.putFloat(weight);
        }
        for (float value : output.out()) {
            to.putFloat(value);
        }
        return to.array();
    }

    private static LayerHarness.Output join(List<byte[]> all, MoeConfig config) {
        int k = config.shape().topK();
        int h = config.shape().hidden();
        int tokens = all.stream().mapToInt(bytes -> ByteBuffer.wrap(bytes).getInt()).sum();
        int[] ids = new int[tokens * k];
        float[] weights = new float[tokens * k];
        float[] out = new float[tokens * h];
        boolean untouched = true;
        int first = 0;
        for (byte[] bytes : all) {
            ByteBuffer from = ByteBuffer.wrap(bytes);
            int count = from.getInt();
            untouched &= from.getInt() == 1;
            for (int i = 0; i < count * k; i++) {
                ids[first * k + i] = from.getInt();
            }
            for (int i = 0; i < count * k; i++) {
                weights[first * k + i] = from.getFloat();
            }
            for (int i = 0; i < count * h; i++) {
                out[first * h + i] = from.getFloat();
            }
            first += count;
        }
        return new LayerHarness.Output(new Routing(tokens, k, ids, weights), out, untouched);
    }
}
