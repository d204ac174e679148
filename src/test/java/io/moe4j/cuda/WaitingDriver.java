package io.moe4j.cuda;

import io.moe4j.cuda.driver.Driver;
import java.lang.reflect.InvocationTargetException;
import java.lang.reflect.Proxy;

/**
 * A driver with a wait for the device planted before its calls of a name, or one that begins so.
 */
final class WaitingDriver {
    private WaitingDriver() {}

    static Driver before(String method, Driver driver) {
        return (Driver)
                Proxy.newProxyInstance(
                        Driver.class.getClassLoader(),
                        new Class<?>[] {Driver.class},
                        (proxy, called, args) -> {
                            if (called.getName().startsWith(method)) {
                                driver.contextSynchronize();
                            }
                            try {
                                return called.invoke(driver, args);
                            } catch (InvocationTargetException e) {
                                throw e.getCause();
                            }
                        });
    }
}
