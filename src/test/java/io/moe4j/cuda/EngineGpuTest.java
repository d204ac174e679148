package io.moe4j.cuda;

import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.engines.EngineContract;
import io.moe4j.engines.EngineCuda;
import io.moe4j.engines.JCudaEngine;

/** The engine's contract on a GPU, with an engine in plain JCuda. */
@EnabledIfCuda
class EngineGpuTest extends EngineContract {
    @Override
    protected EngineCuda engine() {
        return new JCudaEngine();
    }

    @Override
    protected MoeLayer open(MoeConfig config) {
        return Moe.open(config);
    }

    @Override
    protected boolean computes() {
        return true;
    }
}
