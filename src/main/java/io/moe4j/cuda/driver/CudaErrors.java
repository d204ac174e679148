package io.moe4j.cuda.driver;

import java.util.HashMap;
import java.util.Map;

/** Names and hints of the {@code CUresult} codes; needs no driver. */
final class CudaErrors {
    static final int SUCCESS = 0;
    static final int INVALID_VALUE = 1;
    static final int OUT_OF_MEMORY = 2;
    static final int DEINITIALIZED = 4;
    static final int NO_DEVICE = 100;
    static final int INVALID_CONTEXT = 201;
    static final int INVALID_HANDLE = 400;
    static final int NOT_FOUND = 500;
    static final int NOT_READY = 600;
    static final int ILLEGAL_ADDRESS = 700;
    static final int PEER_ACCESS_ALREADY_ENABLED = 704;
    static final int STREAM_CAPTURE_UNSUPPORTED = 900;
    static final int STREAM_CAPTURE_INVALIDATED = 901;
    static final int STREAM_CAPTURE_UNMATCHED = 903;
    static final int STREAM_CAPTURE_UNJOINED = 904;
    static final int STREAM_CAPTURE_WRONG_THREAD = 908;
    static final int UNKNOWN = 999;

    private static final Map<Integer, String> NAMES = new HashMap<>();
    private static final Map<String, Integer> CODES = new HashMap<>();
    private static final Map<Integer, String> HINTS = new HashMap<>();

    private static final String POISONED =
            "the context is lost and every later call in it will fail too; the cause is an earlier"
                    + " kernel, so rerun with CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer, in a new"
                    + " process";

    static {
        add(0, "CUDA_SUCCESS", "");
        add(
                1,
                "CUDA_ERROR_INVALID_VALUE",
                "an argument is out of range; for a launch: grid, block or shared memory above the"
                        + " limits of the device, or MAX_DYNAMIC_SHARED_BYTES not raised");
        add(
                2,
                "CUDA_ERROR_OUT_OF_MEMORY",
                "not enough device memory: lower maxTokensPerRank or free memory of other"
                        + " processes");
        add(3, "CUDA_ERROR_NOT_INITIALIZED", "cuInit has not been called: use Drivers.open()");
        add(4, "CUDA_ERROR_DEINITIALIZED", "the driver is shutting down with the process");
        add(
                34,
                "CUDA_ERROR_STUB_LIBRARY",
                "the libcuda.so.1 found is the stub of the toolkit: remove the stubs folder from"
                        + " LD_LIBRARY_PATH");
        add(
                35,
                "CUDA_ERROR_INSUFFICIENT_DRIVER",
                "the installed NVIDIA driver is too old for this program: update it");
        add(
                36,
                "CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER",
                "the installed NVIDIA driver lacks this call: update it");
        add(46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "another process holds the device exclusively");
        add(
                100,
                "CUDA_ERROR_NO_DEVICE",
                "no CUDA device is visible: check nvidia-smi, CUDA_VISIBLE_DEVICES and, in a"
                        + " container, --gpus all");
        add(101, "CUDA_ERROR_INVALID_DEVICE", "no device has this number");
        add(
                200,
                "CUDA_ERROR_INVALID_IMAGE",
                "the kernel image is neither a cubin, a fat binary nor PTX");
        add(
                201,
                "CUDA_ERROR_INVALID_CONTEXT",
                "no context is current on this thread, or it was destroyed: call inside"
                        + " Driver.enter");
        add(
                208,
                "CUDA_ERROR_ALREADY_MAPPED",
                "two threads mapped the same memory of another process at the same time");
        add(
                209,
                "CUDA_ERROR_NO_BINARY_FOR_GPU",
                "the kernels were not built for this architecture: rebuild them for the device's"
                        + " compute capability, or ship PTX");
        add(214, "CUDA_ERROR_ECC_UNCORRECTABLE", "the device has a memory error: see nvidia-smi");
        add(
                217,
                "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED",
                "these two devices cannot reach each other's memory: see nvidia-smi topo -m");
        add(218, "CUDA_ERROR_INVALID_PTX", "the PTX does not compile: run ptxas on it");
        add(220, "CUDA_ERROR_NVLINK_UNCORRECTABLE", "an NVLink error: see nvidia-smi nvlink -e");
        add(
                221,
                "CUDA_ERROR_JIT_COMPILER_NOT_FOUND",
                "libnvidia-ptxjitcompiler is missing: install the whole NVIDIA driver");
        add(
                222,
                "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
                "the PTX was made by a newer toolkit than the installed driver knows: update the"
                        + " driver or build the kernels with an older nvcc");
        add(
                223,
                "CUDA_ERROR_JIT_COMPILATION_DISABLED",
                "CUDA_DISABLE_PTX_JIT is set and no cubin fits this device");
        add(301, "CUDA_ERROR_FILE_NOT_FOUND", "");
        add(304, "CUDA_ERROR_OPERATING_SYSTEM", "check the permissions of /dev/nvidia*");
        add(
                400,
                "CUDA_ERROR_INVALID_HANDLE",
                "the handle was destroyed or belongs to another context");
        add(401, "CUDA_ERROR_ILLEGAL_STATE", "");
        add(500, "CUDA_ERROR_NOT_FOUND", "the module has no kernel of this name");
        add(600, "CUDA_ERROR_NOT_READY", "");
        add(
                700,
                "CUDA_ERROR_ILLEGAL_ADDRESS",
                "a kernel accessed memory out of bounds; " + POISONED);
        add(
                701,
                "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
                "the block needs more registers or shared memory than an SM has");
        add(702, "CUDA_ERROR_LAUNCH_TIMEOUT", "a kernel ran longer than allowed; " + POISONED);
        add(704, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", "");
        add(705, "CUDA_ERROR_PEER_ACCESS_NOT_ENABLED", "");
        add(708, "CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE", "");
        add(709, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "");
        add(710, "CUDA_ERROR_ASSERT", "a device assertion failed; " + POISONED);
        add(711, "CUDA_ERROR_TOO_MANY_PEERS", "");
        add(712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "");
        add(713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "");
        add(714, "CUDA_ERROR_HARDWARE_STACK_ERROR", POISONED);
        add(715, "CUDA_ERROR_ILLEGAL_INSTRUCTION", POISONED);
        add(
                716,
                "CUDA_ERROR_MISALIGNED_ADDRESS",
                "a kernel accessed misaligned memory; " + POISONED);
        add(717, "CUDA_ERROR_INVALID_ADDRESS_SPACE", POISONED);
        add(718, "CUDA_ERROR_INVALID_PC", POISONED);
        add(719, "CUDA_ERROR_LAUNCH_FAILED", "a kernel trapped; " + POISONED);
        add(720, "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE", "more blocks than fit the device");
        add(800, "CUDA_ERROR_NOT_PERMITTED", "");
        add(801, "CUDA_ERROR_NOT_SUPPORTED", "");
        add(
                802,
                "CUDA_ERROR_SYSTEM_NOT_READY",
                "the fabric manager is not running: needed on machines with NVSwitch");
        add(
                803,
                "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
                "kernel module and libcuda have different versions: reboot, or reinstall the"
                        + " driver");
        add(
                804,
                "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
                "a cuda-compat libcuda was found on a device that does not support it: remove it"
                        + " from LD_LIBRARY_PATH");
        add(
                900,
                "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
                "this call is not allowed while a stream is captured: allocate, load and"
                        + " synchronize before the capture begins");
        add(
                901,
                "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
                "an earlier call broke the capture: end it and start anew");
        add(
                902,
                "CUDA_ERROR_STREAM_CAPTURE_MERGE",
                "the call would join two captures: capture both streams from one");
        add(
                903,
                "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
                "the capture did not begin on this stream: end it where it began");
        add(
                904,
                "CUDA_ERROR_STREAM_CAPTURE_UNJOINED",
                "a forked stream was not joined: let the capturing stream wait for its last"
                        + " event");
        add(
                905,
                "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
                "the call would depend on work outside of the capture: record the event inside"
                        + " it");
        add(
                906,
                "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
                "the legacy default stream cannot take part in a capture: use a stream created"
                        + " with CU_STREAM_NON_BLOCKING");
        add(907, "CUDA_ERROR_CAPTURED_EVENT", "the event was recorded in a capture");
        add(
                908,
                "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
                "a capture must end on the thread that began it");
        add(909, "CUDA_ERROR_TIMEOUT", "");
        add(
                910,
                "CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE",
                "the graph changed shape: capture and instantiate it anew");
        add(999, "CUDA_ERROR_UNKNOWN", "");
    }

    private CudaErrors() {}

    private static void add(int code, String name, String hint) {
        NAMES.put(code, name);
        CODES.put(name, code);
        HINTS.put(code, hint);
    }

    static String name(int code) {
        return NAMES.getOrDefault(code, "CUresult " + code);
    }

    static String hint(int code) {
        return HINTS.getOrDefault(code, "");
    }

    /** The code of a name; {@link #UNKNOWN} if there is none. */
    static int code(String name) {
        return CODES.getOrDefault(name == null ? "" : name.trim(), UNKNOWN);
    }

    static boolean poisonsContext(int code) {
        return code == 700
                || code == 702
                || code == 709
                || code == 710
                || (code >= 714 && code <= 719);
    }
}
