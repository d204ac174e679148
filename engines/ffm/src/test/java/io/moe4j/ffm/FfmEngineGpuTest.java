package io.moe4j.ffm;

import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.cuda.EnabledIfCuda;
import io.moe4j.engines.EngineContract;
import io.moe4j.engines.EngineCuda;

/** The engine's contract on a GPU, with an engine in plain FFM: raw addresses, no JCuda in it. */
@EnabledIfCuda
class FfmEngineGpuTest extends EngineContract {
    @Override
    protected EngineCuda engine() {
        return FfmEngine.open();
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
