package io.moe4j;

import static com.tngtech.archunit.base.DescribedPredicate.not;
import static com.tngtech.archunit.core.domain.JavaClass.Predicates.belongToAnyOf;
import static com.tngtech.archunit.core.domain.JavaClass.Predicates.resideInAPackage;
import static com.tngtech.archunit.core.domain.JavaClass.Predicates.resideInAnyPackage;
import static com.tngtech.archunit.lang.syntax.ArchRuleDefinition.noClasses;
import static com.tngtech.archunit.library.dependencies.SlicesRuleDefinition.slices;

import com.tngtech.archunit.core.importer.ImportOption;
import com.tngtech.archunit.junit.AnalyzeClasses;
import com.tngtech.archunit.junit.ArchTest;
import com.tngtech.archunit.lang.ArchRule;
import io.moe4j.cuda.CudaProbe;

/**
 * The package arrows run one way: cli → bench → checker → {root, weights}; cpu, cuda → root;
 * weights → root → model → tensor; the backends tell observe what happens; metrics stands on root
 * alone. Backends are found by ServiceLoader, so nobody depends on them, but for benchmarks, which
 * know the probe of the CUDA backend.
 */
@AnalyzeClasses(packages = "io.moe4j", importOptions = ImportOption.DoNotIncludeTests.class)
class ArchitectureTest {
    @ArchTest
    static final ArchRule packagesHaveNoCycles =
            slices().matching("io.moe4j.(**)").should().beFreeOfCycles();

    @ArchTest
    static final ArchRule tensorDependsOnNothingOfOurs =
            noClasses()
                    .that()
                    .resideInAPackage("io.moe4j.tensor")
                    .should()
                    .dependOnClassesThat()
                    .resideInAnyPackage(
                            "io.moe4j",
                            "io.moe4j.model..",
                            "io.moe4j.weights..",
                            "io.moe4j.cpu..",
                            "io.moe4j.cuda..",
                            "io.moe4j.checker..",
                            "io.moe4j.bench..",
                            "io.moe4j.cli..");

    @ArchTest
    static final ArchRule modelDependsOnTensorOnly =
            noClasses()
                    .that()
                    .resideInAPackage("io.moe4j.model")
                    .should()
                    .dependOnClassesThat()
                    .resideInAnyPackage(
                            "io.moe4j",
                            "io.moe4j.weights..",
                            "io.moe4j.cpu..",
                            "io.moe4j.cuda..",
                            "io.moe4j.checker..",
                            "io.moe4j.bench..",
                            "io.moe4j.cli..");

    @ArchTest
    static final ArchRule rootKnowsNoBackendNoFilesAndNoTools =
            noClasses()
                    .that()
                    .resideInAPackage("io.moe4j")
                    .should()
                    .dependOnClassesThat()
                    .resideInAnyPackage(
                            "io.moe4j.weights..",
                            "io.moe4j.cpu..",
                            "io.moe4j.cuda..",
                            "io.moe4j.checker..",
                            "io.moe4j.bench..",
                            "io.moe4j.cli..");

    @ArchTest
    static final ArchRule rootAndBackendsKnowNoSchedules =
            noClasses()
                    .that()
                    .resideInAnyPackage("io.moe4j", "io.moe4j.cpu..", "io.moe4j.cuda..")
                    .should()
                    .dependOnClassesThat()
                    .resideInAPackage("io.moe4j.overlap");

    @ArchTest
    static final ArchRule schedulesKnowTheRootAlone =
            noClasses()
                    .that()
                    .resideInAPackage("io.moe4j.overlap")
                    .should()
                    .dependOnClassesThat(
                            resideInAPackage("io.moe4j..")
                                    .and(not(resideInAnyPackage("io.moe4j", "io.moe4j.overlap"))));

    @ArchTest
    static final ArchRule nobodyDependsOnTheCpuBackend =
            noClasses()
                    .that()
                    .resideOutsideOfPackage("io.moe4j.cpu..")
                    .should()
                    .dependOnClassesThat()
                    .resideInAPackage("io.moe4j.cpu..");

    @ArchTest
    static final ArchRule backendsReadNoFilesAndKnowNoTools =
            noClasses()
                    .that()
                    .resideInAnyPackage("io.moe4j.cpu..", "io.moe4j.cuda..")
                    .should()
                    .dependOnClassesThat()
                    .resideInAnyPackage(
                            "io.moe4j.weights..",
                            "io.moe4j.checker..",
                            "io.moe4j.bench..",
                            "io.moe4j.cli..");

    @ArchTest
    static final ArchRule nobodyButBenchmarksDependsOnTheCudaBackend =
            noClasses()
                    .that()
                    .resideOutsideOfPackages("io.moe4j.cuda..", "io.moe4j.bench")
                    .should()
                    .dependOnClassesThat()
                    .resideInAPackage("io.moe4j.cuda..");

    @ArchTest
    static final ArchRule benchmarksKnowOnlyTheProbeOfTheCudaBackend =
            noClasses()
                    .that()
                    .resideInAPackage("io.moe4j.bench")
                    .should()
                    .dependOnClassesThat(
                            resideInAPackage("io.moe4j.cuda..")
                                    .and(not(belongToAnyOf(CudaProbe.class))));

    @ArchTest
    static final ArchRule benchmarksAreUsedByTheCommandLineAlone =
            noClasses()
                    .that()
                    .resideOutsideOfPackages("io.moe4j.bench", "io.moe4j.cli")
                    .should()
                    .dependOnClassesThat()
                    .resideInAPackage("io.moe4j.bench");

    @ArchTest
    static final ArchRule benchmarksKnowNoCommandLine =
            noClasses()
                    .that()
                    .resideInAPackage("io.moe4j.bench")
                    .should()
                    .dependOnClassesThat()
                    .resideInAnyPackage("io.moe4j.cli..", "io.moe4j.cpu..", "picocli..");

    @ArchTest
    static final ArchRule onlyTheCudaBackendUsesJCudaAndJna =
            noClasses()
                    .that()
                    .resideOutsideOfPackage("io.moe4j.cuda..")
                    .should()
                    .dependOnClassesThat()
                    .resideInAnyPackage("jcuda..", "com.sun.jna..");

    @ArchTest
    static final ArchRule onlyTheWriterOfPlotsNeedsJavaDesktop =
            noClasses()
                    .that()
                    .doNotHaveSimpleName("ChartWriter")
                    .should()
                    .dependOnClassesThat()
                    .resideInAnyPackage("org.knowm..", "java.awt..", "javax.swing..");

    @ArchTest
    static final ArchRule theCoreNeedsNoLibrary =
            noClasses()
                    .that()
                    .resideInAnyPackage(
                            "io.moe4j",
                            "io.moe4j.model",
                            "io.moe4j.tensor",
                            "io.moe4j.cpu",
                            "io.moe4j.observe")
                    .should()
                    .dependOnClassesThat()
                    .resideInAnyPackage(
                            "com.fasterxml..",
                            "picocli..",
                            "me.tongfei..",
                            "jcuda..",
                            "com.sun..",
                            "io.micrometer..");

    @ArchTest
    static final ArchRule onlyTheEventsNeedTheFlightRecorder =
            noClasses()
                    .that()
                    .haveNameNotMatching("io\\.moe4j\\.observe\\.JfrEvents(\\$.*)?")
                    .should()
                    .dependOnClassesThat()
                    .resideInAPackage("jdk.jfr..");

    @ArchTest
    static final ArchRule nobodyNeedsTheMetricsAndTheyNeedTheRootAlone =
            noClasses()
                    .that()
                    .resideOutsideOfPackage("io.moe4j.metrics")
                    .should()
                    .dependOnClassesThat()
                    .resideInAnyPackage("io.moe4j.metrics", "io.micrometer..");

    @ArchTest
    static final ArchRule onlyTheBackendsTellOfThemselves =
            noClasses()
                    .that()
                    .resideOutsideOfPackages(
                            "io.moe4j.cpu..", "io.moe4j.cuda..", "io.moe4j.observe")
                    .should()
                    .dependOnClassesThat()
                    .resideInAPackage("io.moe4j.observe");

    @ArchTest
    static final ArchRule aLayerCarriesNoTraceOfDebugging =
            noClasses()
                    .that()
                    .haveNameMatching(
                            "io\\.moe4j\\.(cuda\\.(Cuda(Layer|Resources|Step|Graph|Handle)|Step.*)"
                                    + "|cuda\\.kernel\\..*|cpu\\.Cpu(?!Inspection).*)(\\$.*)?")
                    .should()
                    .dependOnClassesThat()
                    .haveNameMatching(
                            ".*\\.(CheckedDriver|CheckedCudaLayer|HostSyncCheckedLayer"
                                    + "|StageChecker|RangedLayer|Nvtx|Ranges)(\\$.*)?");
}
