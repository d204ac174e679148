package io.moe4j.cuda;

import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.catchThrowable;

import io.moe4j.BackendMemory;
import io.moe4j.BoundStep;
import io.moe4j.GraphPart;
import io.moe4j.LanePart;
import io.moe4j.MoeLayer;
import io.moe4j.Phase;
import io.moe4j.ProgressListener;
import io.moe4j.StepInspection;
import io.moe4j.StepTensors;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.lang.reflect.Method;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import org.assertj.core.api.ThrowableAssert.ThrowingCallable;

/** What every method of a layer does after close; a new method has to be added here. */
final class UseAfterClose {
    private static final Set<String> STILL_USABLE =
            Set.of("config", "backend", "backendReason", "plan", "handles", "close");

    private UseAfterClose() {}

    /** Closes the layer and calls everything. */
    static void check(MoeLayer layer, List<StepTensors> tensors, BoundStep step, long stream) {
        BackendMemory memory = layer.memory();
        Tensor device = memory.allocate(DType.F32, 4);
        Tensor host = Tensor.allocateHost(DType.F32, 4);
        StepInspection inspection = layer.inspect(0, 0);
        layer.close();
        layer.close();
        assertThat(layer.config()).isNotNull();
        assertThat(layer.plan().totalBytes()).isPositive();
        assertThat(layer.backend() + layer.backendReason()).isNotBlank();

        Map<String, ThrowingCallable> calls = new LinkedHashMap<>();
        calls.put("prepare", layer::prepare);
        calls.put("prepare with progress", () -> layer.prepare(ProgressListener.NONE));
        calls.put("bind", () -> layer.bind(tensors));
        calls.put("enqueue", () -> layer.enqueue(stream, step));
        calls.put("enqueue of phases", () -> layer.enqueue(stream, step, Phase.ROUTE, Phase.ROUTE));
        calls.put("capture", () -> layer.capture(stream, step));
        LanePart whole = new LanePart(GraphPart.whole(step), 0, List.of());
        calls.put("lanes", () -> layer.lanes(List.of(whole)));
        calls.put("synchronize", () -> layer.synchronize(stream));
        calls.put("readRouting", () -> layer.readRouting(0, new int[64], new float[64]));
        calls.put("inspect", () -> layer.inspect(0, 0));
        calls.put("counters", layer::counters);
        calls.put("check", layer::check);
        calls.put("validEpoch", () -> layer.validEpoch(0));
        calls.put("result", () -> layer.result(0, 1));
        calls.put("peers", layer::peers);
        calls.put("recover", layer::recover);
        calls.put("memory", layer::memory);
        calls.put("memory allocated before: allocate", () -> memory.allocate(DType.F32, 1));
        calls.put("memory allocated before: write", () -> memory.write(device, host));
        calls.put("memory allocated before: read", () -> memory.read(host, device));
        calls.put("inspection made before", inspection::tokens);
        calls.forEach(
                (name, call) ->
                        assertThat(catchThrowable(call))
                                .as(name)
                                .isInstanceOf(IllegalStateException.class)
                                .hasMessageContaining("closed"));

        Set<String> untested = new TreeSet<>();
        for (Method method : MoeLayer.class.getMethods()) {
            if (calls.keySet().stream().noneMatch(n -> n.startsWith(method.getName()))) {
                untested.add(method.getName());
            }
        }
        assertThat(untested).isEqualTo(new TreeSet<>(STILL_USABLE));
    }
}
