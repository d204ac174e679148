package io.moe4j.cli;

import picocli.CommandLine.IVersionProvider;

/** The version of this build, from the jar's manifest. */
public final class Version implements IVersionProvider {
    /** For picocli. */
    public Version() {}

    /** {@return the version, or {@code development} when classes run without their jar} */
    public static String number() {
        String version = Version.class.getPackage().getImplementationVersion();
        return version == null ? "development" : version;
    }

    @Override
    public String[] getVersion() {
        return new String[] {"moe4j " + number()};
    }
}
