package io.moe4j.bench;

import com.fasterxml.jackson.annotation.JsonIgnoreProperties;
import com.fasterxml.jackson.annotation.JsonInclude;
import java.util.List;

/**
 * Where and with what the peers of a report were measured. Values that are not known are null.
 *
 * @param gpu its name
 * @param driver its driver
 * @param torch version of torch
 * @param triton version of Triton
 * @param nccl version of NCCL
 * @param date when
 * @param denseTflops a dense 8192³ bfloat16 product by torch, TFLOP/s
 * @param copyGbPerS a copy within device memory, GB/s read and written together
 * @param failures what could not be measured, and why; one line each
 */
@JsonInclude(JsonInclude.Include.NON_NULL)
@JsonIgnoreProperties(ignoreUnknown = true)
public record PeersRun(
        String gpu,
        String driver,
        String torch,
        String triton,
        String nccl,
        String date,
        Double denseTflops,
        Double copyGbPerS,
        List<String> failures) {}
