package io.moe4j.cuda;

import io.moe4j.MoeConfig;
import io.moe4j.StepTensors;
import io.moe4j.cuda.driver.RecordingDriver;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.util.ArrayList;
import java.util.List;

/** A small CUDA layer over a recording driver, and memory to bind. */
final class RecordedLayer {
    private static final MoeShape SHAPE = new MoeShape(64, 48, 12, 4, 32);

    private RecordedLayer() {}

    static MoeConfig config(int ranks) {
        return MoeConfig.builder()
                .weights(RandomWeights.of(SHAPE, 1))
                .maxTokensPerRank(16)
                .ranks(ranks)
                .threads(2)
                .build();
    }

    static CudaLayer open(RecordingDriver driver, int ranks) {
        return CudaBackendProvider.open(
                driver, KernelCatalog.choose(driver, 0), config(ranks), "test");
    }

    static List<StepTensors> tensors(RecordingDriver driver, CudaLayer layer) {
        List<StepTensors> all = new ArrayList<>();
        for (int rank = 0; rank < layer.config().ranks(); rank++) {
            all.add(
                    StepTensors.topk(
                            device(driver, DType.F32, 16, 64),
                            device(driver, DType.BF16, 16, 64),
                            device(driver, DType.I32, 16, 4),
                            device(driver, DType.F32, 16, 4),
                            device(driver, DType.I32, 1)));
        }
        return all;
    }

    private static Tensor device(RecordingDriver driver, DType dtype, long... shape) {
        return Tensor.device(driver.foreignMemory(1 << 16), dtype, shape);
    }
}
