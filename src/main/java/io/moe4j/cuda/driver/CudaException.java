package io.moe4j.cuda.driver;

/** A CUDA driver call failed; the message names the call, the error and what usually helps. */
public class CudaException extends RuntimeException {
    private static final long serialVersionUID = 1L;

    /** The call that failed. */
    private final Call call;

    /** The CUresult. */
    private final int code;

    /** Name of the CUresult. */
    private final String name;

    /** What usually causes it. */
    private final String hint;

    /**
     * A failure of {@code call}.
     *
     * @param call the call that failed
     * @param code its {@code CUresult}
     * @param detail what the call was about, such as a name or a size; may be empty
     */
    public CudaException(Call call, int code, String detail) {
        super(message(call, code, detail));
        this.call = call;
        this.code = code;
        this.name = CudaErrors.name(code);
        this.hint = CudaErrors.hint(code);
    }

    /**
     * {@return the call that reported the error} After an asynchronous fault it need not be the
     * cause.
     */
    public Call call() {
        return call;
    }

    /** {@return the {@code CUresult}} */
    public int code() {
        return code;
    }

    /** {@return the name of the {@code CUresult}} */
    public String name() {
        return name;
    }

    /**
     * {@return what usually causes this, or what to do about it; empty if there is nothing to add}
     */
    public String hint() {
        return hint;
    }

    /**
     * {@return whether the context is lost: every later call in it fails in the same way, and only
     * a new process gets a working one}
     */
    public boolean poisonsContext() {
        return CudaErrors.poisonsContext(code);
    }

    /** {@return whether the call is one that a capture of this thread does not allow} */
    public boolean inCapture() {
        return code == CudaErrors.STREAM_CAPTURE_UNSUPPORTED
                || code == CudaErrors.STREAM_CAPTURE_INVALIDATED;
    }

    /** {@return whether a handle was passed that does not live, or not in this context} */
    public boolean invalidHandle() {
        return code == CudaErrors.INVALID_HANDLE || code == CudaErrors.INVALID_CONTEXT;
    }

    private static String message(Call call, int code, String detail) {
        String hint = CudaErrors.hint(code);
        return call.symbol()
                + (detail.isEmpty() ? "" : "(" + detail + ")")
                + " failed: "
                + code
                + " "
                + CudaErrors.name(code)
                + (hint.isEmpty() ? "" : ": " + hint);
    }
}
