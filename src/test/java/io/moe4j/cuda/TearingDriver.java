package io.moe4j.cuda;

import io.moe4j.cuda.driver.Driver;
import io.moe4j.cuda.driver.KernelParams;
import io.moe4j.cuda.layout.DeviceStructs;
import java.lang.reflect.InvocationTargetException;
import java.lang.reflect.Proxy;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;

/** A driver under which the test of lines stores each line of some forms in two transactions. */
final class TearingDriver {
    /** LineForm of line_test.cu. */
    static final int ROWS = 1;

    static final int IDS = 2;

    private TearingDriver() {}

    static Driver over(Driver driver, int forms) {
        Set<Object> functions = ConcurrentHashMap.newKeySet();
        int halves = DeviceStructs.LINE_TEST_PARAMS.offset("halves");
        return (Driver)
                Proxy.newProxyInstance(
                        Driver.class.getClassLoader(),
                        new Class<?>[] {Driver.class},
                        (proxy, method, arguments) -> {
                            if (method.getName().equals("launchKernel")
                                    && functions.contains(arguments[0])) {
                                KernelParams params =
                                        (KernelParams) arguments[arguments.length - 1];
                                params.bytes(0).putInt(halves, forms);
                            }
                            try {
                                Object result = method.invoke(driver, arguments);
                                if (method.getName().equals("moduleGetFunction")
                                        && arguments[1].equals("moe_line_test")) {
                                    functions.add(result);
                                }
                                return result;
                            } catch (InvocationTargetException e) {
                                throw e.getCause();
                            }
                        });
    }
}
