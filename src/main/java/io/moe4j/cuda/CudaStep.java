package io.moe4j.cuda;

import io.moe4j.BoundStep;
import io.moe4j.MoeLayer;
import io.moe4j.StepTensors;
import io.moe4j.cuda.driver.DeviceBuffer;
import io.moe4j.cuda.driver.KernelParams;
import java.util.List;

/**
 * A step bound to a CUDA layer: the kernel parameter, packed once, and the device array of rank
 * descriptions it points to. Freed with its layer.
 */
final class CudaStep implements BoundStep {
    private final CudaLayer layer;
    private final CudaHandle handle;
    private final KernelParams params;
    private final DeviceBuffer locals;
    private final List<StepTensors> tensors;

    CudaStep(
            CudaLayer layer,
            List<StepTensors> tensors,
            CudaHandle handle,
            KernelParams params,
            DeviceBuffer locals) {
        this.layer = layer;
        this.tensors = tensors;
        this.handle = handle;
        this.params = params;
        this.locals = locals;
    }

    @Override
    public MoeLayer layer() {
        return layer;
    }

    @Override
    public int handleIndex() {
        return layer.indexOf(handle);
    }

    @Override
    public List<StepTensors> tensors() {
        return tensors;
    }

    @Override
    public void requireAlive() {
        layer.requireAlive(tensors);
    }

    CudaLayer cudaLayer() {
        return layer;
    }

    CudaHandle handle() {
        return handle;
    }

    KernelParams params() {
        return params;
    }

    void free() {
        locals.close();
    }
}
