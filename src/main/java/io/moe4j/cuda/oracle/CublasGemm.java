package io.moe4j.cuda.oracle;

import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.DeviceBuffer;
import io.moe4j.cuda.driver.Scope;
import io.moe4j.cuda.oracle.LibraryBridge.Library;
import jcuda.Pointer;
import jcuda.cudaDataType;
import jcuda.jcublas.JCublas2;
import jcuda.jcublas.cublasComputeType;
import jcuda.jcublas.cublasGemmAlgo;
import jcuda.jcublas.cublasHandle;
import jcuda.jcublas.cublasOperation;

/**
 * cuBLAS as judge and as baseline: one dense product at a time, sizes known on the host. Owns its
 * handle and workspace; calls only enqueue on its stream, also under capture. One thread.
 */
public final class CublasGemm implements AutoCloseable {
    private static final long WORKSPACE_BYTES = 64L << 20;

    private final Context context;
    private final cublasHandle handle = new cublasHandle();
    private final DeviceBuffer workspace;
    private final Pointer one = Pointer.to(new float[] {1f});
    private final Pointer zero = Pointer.to(new float[] {0f});
    private final Pointer one64 = Pointer.to(new double[] {1});
    private final Pointer zero64 = Pointer.to(new double[] {0});
    private boolean closed;

    /**
     * Loads cuBLAS and makes a handle on a stream.
     *
     * @param context everything is made and used in it
     * @param stream the raw stream of all its calls
     * @throws io.moe4j.BackendUnavailableException saying what is missing
     */
    public CublasGemm(Context context, long stream) {
        LibraryBridge.load(Library.CUBLAS);
        this.context = context;
        this.workspace = new DeviceBuffer(context, WORKSPACE_BYTES);
        try (Scope scope = context.enter()) {
            check("cublasCreate", JCublas2.cublasCreate(handle));
            check("cublasSetStream", JCublas2.cublasSetStream(handle, RawHandles.stream(stream)));
            // why: without one of its own cuBLAS would allocate, which a capture would record
            check(
                    "cublasSetWorkspace",
                    JCublas2.cublasSetWorkspace(
                            handle, RawHandles.device(workspace.address()), WORKSPACE_BYTES));
        } catch (RuntimeException | Error e) {
            workspace.close();
            throw e;
        }
    }

    /**
     * out[rows][outputs] = in[rows][inputs] · weights[outputs][inputs]ᵀ, bfloat16 to float32.
     *
     * @param out device address of the result
     * @param in device address of the input
     * @param weights device address of the matrix
     * @param rows rows of input and result
     * @param outputs columns of the result
     * @param inputs columns of the input
     */
    public void multiplyToF32(long out, long in, long weights, int rows, int outputs, int inputs) {
        multiply(out, cudaDataType.CUDA_R_32F, in, weights, rows, outputs, inputs);
    }

    /**
     * The same with the result rounded to bfloat16; sums are float32.
     *
     * @param out device address of the result
     * @param in device address of the input
     * @param weights device address of the matrix
     * @param rows rows of input and result
     * @param outputs columns of the result
     * @param inputs columns of the input
     */
    public void multiplyToBf16(long out, long in, long weights, int rows, int outputs, int inputs) {
        multiply(out, cudaDataType.CUDA_R_16BF, in, weights, rows, outputs, inputs);
    }

    private void multiply(
            long out, int outType, long in, long weights, int rows, int outputs, int inputs) {
        int bf16 = cudaDataType.CUDA_R_16BF;
        try (Scope scope = context.enter()) {
            check(
                    "cublasGemmEx",
                    JCublas2.cublasGemmEx_new(
                            handle,
                            cublasOperation.CUBLAS_OP_T,
                            cublasOperation.CUBLAS_OP_N,
                            outputs,
                            rows,
                            inputs,
                            one,
                            RawHandles.device(weights),
                            bf16,
                            inputs,
                            RawHandles.device(in),
                            bf16,
                            inputs,
                            zero,
                            RawHandles.device(out),
                            outType,
                            outputs,
                            cublasComputeType.CUBLAS_COMPUTE_32F,
                            cublasGemmAlgo.CUBLAS_GEMM_DEFAULT));
        }
    }

    /**
     * As {@link #multiplyToF32}, everything in float64.
     *
     * @param out device address of the result
     * @param in device address of the input
     * @param weights device address of the matrix
     * @param rows rows of input and result
     * @param outputs columns of the result
     * @param inputs columns of the input
     */
    public void multiplyF64(long out, long in, long weights, int rows, int outputs, int inputs) {
        try (Scope scope = context.enter()) {
            check(
                    "cublasDgemm",
                    JCublas2.cublasDgemm(
                            handle,
                            cublasOperation.CUBLAS_OP_T,
                            cublasOperation.CUBLAS_OP_N,
                            outputs,
                            rows,
                            inputs,
                            one64,
                            RawHandles.device(weights),
                            inputs,
                            RawHandles.device(in),
                            inputs,
                            zero64,
                            RawHandles.device(out),
                            outputs));
        }
    }

    /** {@return the version of cuBLAS, for example 130100} */
    public int version() {
        int[] version = new int[1];
        check("cublasGetVersion", JCublas2.cublasGetVersion(handle, version));
        return version[0];
    }

    private static void check(String call, int code) {
        if (code != 0) {
            throw new IllegalStateException(
                    call + " failed: " + jcuda.jcublas.cublasStatus.stringFor(code));
        }
    }

    /** Destroys the handle. Idempotent. */
    @Override
    public void close() {
        if (!closed) {
            closed = true;
            try (Scope scope = context.enter()) {
                JCublas2.cublasDestroy(handle);
            }
            workspace.close();
        }
    }
}
