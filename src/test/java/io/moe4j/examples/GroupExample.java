package io.moe4j.examples;

import io.moe4j.BoundStep;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.RankLostException;
import io.moe4j.Recovery;
import io.moe4j.StepTensors;
import io.moe4j.ep.Group;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Set;
import java.util.function.Function;

/** Programs of docs/transports.md. */
public final class GroupExample {
    private GroupExample() {}

    /** One step on two GPUs; the caller closes the layers. */
    public static List<MoeLayer> oneProcess(
            MoeConfig config, Function<MoeLayer, StepTensors> tensors, long[] streams) {
        // docs: begin one-process
        List<MoeLayer> layers = new ArrayList<>();
        for (Group group : Group.inProcess(2)) {
            layers.add(Moe.open(config.toBuilder().group(group).backend("cuda").build()));
        }
        Group.together(layers, MoeLayer::prepare); // ranks meet, so a thread for each

        List<BoundStep> steps = new ArrayList<>();
        for (MoeLayer layer : layers) {
            steps.add(layer.bind(List.of(tensors.apply(layer)))); // memory of its GPU
        }
        for (int rank = 0; rank < 2; rank++) { // enqueue never waits: one thread will do
            layers.get(rank).enqueue(streams[rank], steps.get(rank));
        }
        // docs: end one-process
        return layers;
    }

    /** A rank of its own process; the caller closes layer and group. */
    public static MoeLayer ownProcess(MoeConfig config, Path directory, int rank, int ranks) {
        // docs: begin own-process
        Group group = Group.join(directory, rank, ranks, Group.DEFAULT_LIMIT);
        MoeLayer layer = Moe.open(config.toBuilder().group(group).backend("cuda").build());
        layer.prepare();
        // docs: end own-process
        return layer;
    }

    /** Confirms a step; goes on without a lost rank. Returns the epoch after which steps count. */
    public static long confirm(MoeLayer layer, int handle, long epoch) {
        // docs: begin recover
        try {
            layer.result(handle, epoch);
            return epoch;
        } catch (RankLostException e) {
            Recovery agreed = layer.recover(Set.of(e.peer())); // recover() if all come back
            return agreed.epoch();
        }
        // docs: end recover
    }
}
