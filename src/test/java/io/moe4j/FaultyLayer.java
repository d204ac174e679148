package io.moe4j;

import java.lang.reflect.InvocationTargetException;
import java.lang.reflect.Proxy;
import java.util.List;
import java.util.function.Consumer;

/** A layer with a fault planted behind one phase, for tests of what has to find it. */
public final class FaultyLayer {
    private FaultyLayer() {}

    /**
     * The same layer, but {@code fault} runs whenever {@code phase} was enqueued last; it is given
     * the tensors bound first.
     */
    public static MoeLayer after(Phase phase, MoeLayer layer, Consumer<List<StepTensors>> fault) {
        Object[] bound = new Object[1];
        return (MoeLayer)
                Proxy.newProxyInstance(
                        MoeLayer.class.getClassLoader(),
                        new Class<?>[] {MoeLayer.class},
                        (proxy, method, args) -> {
                            try {
                                Object result = method.invoke(layer, args);
                                if (method.getName().equals("bind") && bound[0] == null) {
                                    bound[0] = args[0];
                                }
                                if (method.getName().equals("enqueue") && args[3] == phase) {
                                    fault.accept(tensors(bound[0]));
                                }
                                return result;
                            } catch (InvocationTargetException e) {
                                throw e.getCause();
                            }
                        });
    }

    @SuppressWarnings("unchecked")
    private static List<StepTensors> tensors(Object bound) {
        return (List<StepTensors>) bound;
    }
}
