package io.moe4j.examples;

import io.moe4j.BackendMemory;
import io.moe4j.BoundStep;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.StepTensors;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import io.moe4j.weights.Checkpoint;
import io.moe4j.weights.CheckpointLayer;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.List;

/** The program shown in README.md, between the two marks; the same test compares both. */
public final class ReadmeExample {
    private ReadmeExample() {}

    /** Prints the plan of a checkpoint's first layer and the start of its output for one token. */
    public static void main(String[] args) {
        float[] y = firstToken(Path.of(args[0]));
        System.out.println(Arrays.toString(Arrays.copyOf(y, 4)));
    }

    // docs: begin readme
    static float[] firstToken(Path modelFolder) {
        try (Checkpoint checkpoint = Checkpoint.open(modelFolder)) {
            CheckpointLayer weights = checkpoint.layer(checkpoint.moeLayers().get(0));
            MoeConfig config = weights.config().backend("cpu").maxTokensPerRank(8).build();
            int h = config.shape().hidden();
            try (MoeLayer layer = Moe.open(config)) {
                System.out.println(layer.plan()); // every buffer, before one is allocated
                layer.prepare(); // allocates them and packs the weights

                BackendMemory memory = layer.memory();
                Tensor x = memory.allocate(DType.BF16, 8, h); // 8 rows: maxTokensPerRank
                Tensor y = memory.allocate(DType.F32, 8, h);
                Tensor tokenCount = memory.allocate(DType.I32, 1); // read when the step runs
                BoundStep step = layer.bind(List.of(StepTensors.hidden(y, x, tokenCount)));

                x.setFloats(ones(8 * h));
                tokenCount.setInt(0, 1); // any number from 0 to 8, a different one each step
                layer.enqueue(0, step); // 0: the CPU backend has no streams
                layer.check();
                return Arrays.copyOf(y.toFloats(), h);
            }
        }
    }

    // docs: end readme

    private static float[] ones(int count) {
        float[] values = new float[count];
        Arrays.fill(values, 1f);
        return values;
    }
}
