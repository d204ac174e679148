package io.moe4j.cuda;

import io.moe4j.Phase;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.kernel.Kernel;
import io.moe4j.cuda.kernel.LoadedKernels;

/**
 * The flow of a layer's steps: a fixed list of kernels for each span of phases, in the order of
 * phases. Whoever launches has entered the context. Owns nothing; guarded by its layer, and
 * allocates nothing, because it runs in every step.
 */
final class StepFlow {
    private static final Phase[] PHASES = Phase.values(); // why: values() copies

    private final Context context;
    private final LoadedKernels kernels;
    private final int localRanks;

    StepFlow(Context context, LoadedKernels kernels, int localRanks) {
        this.context = context;
        this.kernels = kernels;
        this.localRanks = localRanks;
    }

    /**
     * Refuses phases out of their order.
     *
     * @throws IllegalStateException if another phase or another step is next on the step's handle
     */
    static void requireNext(CudaStep step, Phase first, Phase last) {
        if (first.compareTo(last) > 0) {
            throw new IllegalArgumentException("phase " + first + " comes after " + last);
        }
        CudaHandle handle = step.handle();
        if (first != handle.nextPhase || (first != Phase.ROUTE && handle.stepInFlight != step)) {
            throw new IllegalStateException(
                    "phase "
                            + first
                            + " cannot run now: the next phase of this handle is "
                            + handle.nextPhase
                            + (handle.stepInFlight == null || handle.stepInFlight == step
                                    ? ""
                                    : " of another step"));
        }
    }

    /** Launches phases of a step and notes which comes next. */
    void launch(long stream, CudaStep step, Phase first, Phase last) {
        CudaHandle handle = step.handle();
        handle.stepInFlight = step;
        launch(stream, step, kernels.flow(first, last), localRanks);
        handle.nextPhase = PHASES[(last.ordinal() + 1) % PHASES.length];
        if (last == Phase.COMBINE_RECV) {
            handle.stepInFlight = null;
        }
    }

    /** The handle's next step begins anew. */
    static void giveUp(CudaStep step) {
        step.handle().nextPhase = Phase.ROUTE;
        step.handle().stepInFlight = null;
    }

    /** The kernels of a part of the experts phase, in order. */
    Kernel[] experts(CudaProbe.Part part) {
        return switch (part) {
            case CHAIN -> kernels.of(Phase.EXPERTS);
            case GATE_UP -> new Kernel[] {kernels.gateUp()};
            case DOWN -> new Kernel[] {kernels.down()};
        };
    }

    /** Launches a part of the experts phase, outside the order of phases. */
    void launchExperts(long stream, CudaStep step, CudaProbe.Part part) {
        launch(stream, step, experts(part), localRanks);
    }

    /** Launches every kernel of the layer over one rank: each phase alone, then a whole step. */
    void launchAll(long stream, CudaStep alone) {
        for (Kernel kernel : kernels.everyKernelOfAStep()) {
            kernel.launch(context.driver(), 1, stream, alone.params());
        }
    }

    private void launch(long stream, CudaStep step, Kernel[] flow, int ranks) {
        for (Kernel kernel : flow) {
            kernel.launch(context.driver(), ranks, stream, step.params());
        }
    }
}
