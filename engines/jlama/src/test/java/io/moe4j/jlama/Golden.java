package io.moe4j.jlama;

import com.github.tjake.jlama.safetensors.DType;
import com.github.tjake.jlama.tensor.AbstractTensor;
import com.github.tjake.jlama.tensor.TensorShape;
import io.moe4j.checker.GoldenFile;
import io.moe4j.checker.ReferenceCase;
import io.moe4j.model.MoeShape;
import java.nio.file.Path;
import java.util.List;

/** What transformers recorded for the Mixtral of the test data. */
final class Golden {
    static final MoeShape SHAPE = MoeShape.of(128, 96, 8, 2);

    private Golden() {}

    static Path folder() {
        return Path.of(System.getProperty("moe4j.golden", "../../src/test/resources/golden"))
                .resolve("mixtral");
    }

    /** All recorded cases: two layers, 1, 8 and 37 tokens. */
    static List<ReferenceCase> cases() {
        try (GoldenFile file = GoldenFile.open(folder().resolve("golden.safetensors"))) {
            return file.entries().stream().map(entry -> file.read(entry, SHAPE)).toList();
        }
    }

    /** A tensor of Jlama's with these rows. */
    static AbstractTensor tensor(DType type, float[] values, int tokens) {
        int width = values.length / tokens;
        AbstractTensor tensor = AbstractTensor.make(type, TensorShape.of(tokens, width));
        for (int i = 0; i < values.length; i++) {
            tensor.set(values[i], i / width, i % width);
        }
        return tensor;
    }
}
