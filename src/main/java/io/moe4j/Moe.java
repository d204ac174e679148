package io.moe4j;

import java.util.ArrayList;
import java.util.Comparator;
import java.util.List;
import java.util.OptionalInt;
import java.util.ServiceLoader;

/**
 * The entry point: finds the backends, picks one and says why. Stateless and thread-safe. Using the
 * CPU backend loads no class of a GPU library.
 */
public final class Moe {
    private static final System.Logger LOG = System.getLogger("io.moe4j");

    private Moe() {}

    /**
     * Opens a layer. Nothing is allocated until {@link MoeLayer#prepare}.
     *
     * @param config with weights
     * @return the layer, not prepared yet; the caller closes it
     * @throws IllegalArgumentException if the configuration has no weights
     * @throws BackendUnavailableException if the backend asked for cannot run here; the message
     *     says what is missing
     */
    public static MoeLayer open(MoeConfig config) {
        Choice choice = chooseFor(config);
        return choice.provider().open(config, choice.reason());
    }

    /**
     * Opens a layer that notes every driver call a step must not make (see {@link
     * HostSyncCheckedLayer}). For tests and tools; a step costs more on the host.
     *
     * @param config with weights
     * @return the layer, not prepared yet; the caller closes it
     * @throws IllegalArgumentException if the configuration has no weights, or the backend has no
     *     device a step could wait for
     * @throws BackendUnavailableException if the backend asked for cannot run here
     */
    public static HostSyncCheckedLayer openHostSyncChecked(MoeConfig config) {
        Choice choice = chooseFor(config);
        return choice.provider().openHostSyncChecked(config, choice.reason());
    }

    private static Choice chooseFor(MoeConfig config) {
        if (config.weights() == null) {
            throw new IllegalArgumentException(
                    "weights are missing: set weights(...), from a checkpoint or RandomWeights");
        }
        Choice choice = choose(config.backend());
        LOG.log(System.Logger.Level.INFO, choice.reason());
        return choice;
    }

    /**
     * {@return what {@link #open} and prepare would allocate} Needs no weights and allocates
     * nothing. A backend that is asked for by name is planned for even where it cannot run.
     *
     * @param config weights may be missing
     * @throws BackendUnavailableException if the backend is unknown
     * @throws IllegalArgumentException if the backend cannot run such a layer
     */
    public static MemoryPlan plan(MoeConfig config) {
        return planner(config).plan(config);
    }

    /**
     * {@return the largest M whose plan fits the budget; empty if not even one token does}
     *
     * @param config its own M does not count
     * @param budgetBytes the most bytes a plan may have
     */
    public static OptionalInt largestMaxTokensPerRank(MoeConfig config, long budgetBytes) {
        BackendProvider provider = planner(config);
        return MemoryPlan.largestMaxTokensPerRank(
                m -> provider.plan(config.toBuilder().maxTokensPerRank(m).build()), budgetBytes);
    }

    private static BackendProvider planner(MoeConfig config) {
        return backends().stream()
                .filter(provider -> provider.name().equals(config.backend()))
                .findFirst()
                .orElseGet(() -> choose(config.backend()).provider());
    }

    /** {@return all backends this build knows, the preferred first} */
    public static List<BackendProvider> backends() {
        List<BackendProvider> providers = new ArrayList<>();
        ServiceLoader.load(BackendProvider.class, Moe.class.getClassLoader())
                .forEach(providers::add);
        providers.sort(Comparator.comparingInt(BackendProvider::preference).reversed());
        return providers;
    }

    /**
     * {@return the backend that {@code auto}, {@code cpu} or {@code cuda} stands for on this
     * machine} Loads no GPU library unless the CUDA backend is considered.
     *
     * @param backend {@code auto}, {@code cpu} or {@code cuda}
     * @throws BackendUnavailableException if the one named cannot run here
     */
    public static Choice choose(String backend) {
        List<String> passedOver = new ArrayList<>();
        for (BackendProvider provider : backends()) {
            if (!backend.equals("auto") && !backend.equals(provider.name())) {
                continue;
            }
            BackendProvider.Availability availability = provider.availability();
            if (availability.usable()) {
                String reason = provider.name() + " backend: " + availability.reason();
                if (!passedOver.isEmpty()) {
                    reason += " (" + String.join("; ", passedOver) + ")";
                }
                return new Choice(provider, reason);
            }
            passedOver.add("not " + provider.name() + ": " + availability.reason());
        }
        throw new BackendUnavailableException(
                passedOver.isEmpty()
                        ? "no backend named " + backend + " in this build"
                        : "backend "
                                + backend
                                + " is not usable: "
                                + String.join("; ", passedOver));
    }

    /**
     * A backend and why it was chosen.
     *
     * @param provider the backend
     * @param reason one line
     */
    public record Choice(BackendProvider provider, String reason) {}
}
