package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import io.moe4j.MoeFaultException;
import io.moe4j.cuda.driver.Call;
import io.moe4j.cuda.driver.RecordingDriver;
import io.moe4j.cuda.kernel.KernelCatalog;
import io.moe4j.cuda.layout.DeviceStructs;
import io.moe4j.ep.PeerStatistics;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.List;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;

/** What the host makes of what the device tells of its steps, without a GPU. */
class FiguresRecordingTest {
    private static final int RANKS = 2;

    private final RecordingDriver recording = new RecordingDriver();
    private CudaLayer layer;
    private CudaHandle handle;

    @BeforeEach
    void open() {
        assumeTrue(
                KernelCatalog.class.getResource("/io/moe4j/kernels/manifest.json") != null,
                "the kernels are not built: nvcc is not installed");
        layer = RecordedLayer.open(recording, RANKS);
        layer.prepare();
        handle = layer.handle(0);
        for (int rank = 0; rank < RANKS; rank++) {
            told(rank, 7);
        }
    }

    @AfterEach
    void close() {
        if (layer != null) {
            layer.close();
            assertThat(recording.leaks()).isEmpty();
        }
    }

    /** The device has told of so many steps. */
    private void told(int rank, long steps) {
        page().putLong(
                        handle.errorOffset(rank) + DeviceStructs.ERROR_RECORD.offset("valid_epoch"),
                        steps)
                .putLong(
                        handle.countersOffset(rank) + DeviceStructs.SOFT_COUNTERS.offset("steps"),
                        steps);
    }

    private void fault(int rank, long epoch) {
        int at = handle.errorOffset(rank);
        page().putInt(at + DeviceStructs.ERROR_RECORD.offset("op"), 2)
                .putLong(at + DeviceStructs.ERROR_RECORD.offset("epoch"), epoch)
                .putInt(at + DeviceStructs.ERROR_RECORD.offset("code"), 1);
    }

    private ByteBuffer page() {
        return handle.reports().order(ByteOrder.LITTLE_ENDIAN);
    }

    @Test
    void shouldTakeEveryStepToldForValidWithoutAFault() {
        assertThat(layer.validEpoch(0)).isEqualTo(7);
        assertThat(layer.counters().steps()).isEqualTo(7);
        layer.result(0, 7);
    }

    @Test
    void shouldNotTakeAStepForValidThatFailedAfterItWasTold() {
        fault(0, 7);
        assertThat(layer.validEpoch(0)).isEqualTo(6);
        assertThat(layer.counters().steps()).isEqualTo(6);
        assertThatThrownBy(() -> layer.result(0, 6))
                .isInstanceOf(MoeFaultException.class)
                .hasMessageEndingWith("the last valid epoch is 6");
    }

    @Test
    void shouldKeepTheLastValidStepOfAFaultBeforeAnythingWasTold() {
        fault(1, 8);
        assertThat(layer.validEpoch(0)).isEqualTo(7);
        assertThat(layer.counters().steps()).isEqualTo(7);
    }

    @Test
    void shouldBeginANewGenerationAtTheValidStepAndCountWithoutTheFailedOne() {
        fault(0, 7);
        recording.clearCalls();
        assertThat(layer.recover().validEpochs()).containsExactly(6L);
        assertThat(layer.validEpoch(0)).as("with the fault gone").isEqualTo(6);
        assertThat(layer.counters().steps()).isEqualTo(6);
        assertThat(recording.calls(Call.MEMCPY_H_TO_D))
                .as("the device goes on counting from there")
                .anyMatch(
                        call ->
                                call.arguments()
                                        .equals(List.of(handle.workspace(0, "totals"), 8L)));
        layer.result(0, 6);
    }

    @Test
    void shouldTellRowsBySourceAndLocalExpertWithoutACallOfTheDriver() {
        int experts = layer.config().expertsPerRank();
        for (int peer = 0; peer < RANKS; peer++) {
            for (int expert = 0; expert < experts; expert++) {
                page().putLong(
                                handle.receivedOffset(1) + (peer * experts + expert) * Long.BYTES,
                                100L * peer + expert);
            }
        }
        recording.clearCalls();
        List<PeerStatistics> peers = layer.peers();
        assertThat(recording.calls()).isEmpty();
        assertThat(peers).hasSize(RANKS * RANKS);
        PeerStatistics last = peers.get(3);
        assertThat(last.rank()).isEqualTo(1);
        assertThat(last.peer()).isEqualTo(1);
        assertThat(last.expertRowsTotal()).hasSize(experts).startsWith(100L, 101L);
        assertThat(peers.get(2).expertRowsTotal()).startsWith(0L, 1L);
        assertThat(peers.get(0).expertRowsTotal()).containsOnly(0L);
    }
}
