package io.moe4j.ffm;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import io.moe4j.StepTensors;
import io.moe4j.weights.EngineTensor;
import io.moe4j.weights.GgufType;
import java.lang.foreign.Arena;
import java.lang.foreign.MemorySegment;
import java.lang.foreign.ValueLayout;
import org.bytedeco.javacpp.BytePointer;
import org.bytedeco.javacpp.FloatPointer;
import org.junit.jupiter.api.Test;

/** Weights are read from where an engine keeps them. */
class OwnMemoryTest {
    @Test
    void shouldReadSegmentsAndRowPointers() {
        try (Arena arena = Arena.ofConfined()) {
            MemorySegment memory = arena.allocate(4 * 12);
            for (int i = 0; i < 12; i++) {
                memory.setAtIndex(ValueLayout.JAVA_FLOAT, i, i);
            }
            EngineTensor tensor = OwnMemoryExample.tensor(memory, GgufType.F32, 2, 2, 3);
            assertThat(read(tensor, 1)).containsExactly(6, 7, 8, 9, 10, 11);
            float[] second = new float[6];
            OwnMemoryExample.matrix(memory.address() + 12, GgufType.F32, 2, 3).read(second);
            assertThat(second).containsExactly(3, 4, 5, 6, 7, 8);
            assertThatThrownBy(() -> OwnMemoryExample.tensor(memory, GgufType.F32, 3, 2, 3))
                    .hasMessageContaining("the memory has 48 bytes but F32[3, 2, 3] needs 72");
        }
    }

    @Test
    void shouldSayThatASegmentWasClosed() {
        EngineTensor tensor;
        try (Arena arena = Arena.ofConfined()) {
            tensor = OwnMemoryExample.tensor(arena.allocate(24), GgufType.F32, 1, 2, 3);
        }
        assertThatThrownBy(() -> read(tensor, 0)).isInstanceOf(IllegalStateException.class);
    }

    @Test
    void shouldReadPointersOfJavaCpp() {
        float[] values = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
        try (FloatPointer floats = new FloatPointer(values);
                BytePointer bytes = new BytePointer(floats).capacity(48)) {
            assertThat(read(OwnMemoryExample.tensor(bytes, GgufType.F32, 2, 2, 3), 1))
                    .containsExactly(6, 7, 8, 9, 10, 11);
        }
    }

    @Test
    void shouldMakeTheTensorsOfAStepFromNumbers() {
        StepTensors step = OwnMemoryExample.step(1 << 20, 1 << 21, 8, 24, 40, 4, 64, 2);
        assertThat(step.accumulate()).isTrue();
        assertThat(step.hidden().address()).isEqualTo(1 << 21);
        assertThat(step.topkIds()).hasToString("I32[4, 2] device");
    }

    private static float[] read(EngineTensor tensor, int index) {
        float[] values = new float[6];
        tensor.matrix(index).read(values);
        return values;
    }
}
