package io.moe4j.weights;

import java.util.ArrayList;
import java.util.Collection;
import java.util.List;
import java.util.Optional;
import java.util.Set;
import java.util.SortedMap;
import java.util.TreeMap;
import java.util.TreeSet;
import java.util.regex.Pattern;

/**
 * The numbered layers below one prefix ({@code model.}, {@code model.language_model.}, ...), with
 * the tensor names of each. Immutable after {@link #discover}.
 *
 * @param prefix everything before {@code layers.}
 * @param layers tensor names inside each layer, by layer number
 */
record LayerStack(String prefix, SortedMap<Integer, Set<String>> layers) {
    private static final String LAYERS = "layers.";
    private static final int MAX_DIGITS = 6;
    private static final List<String> DENSE_BLOCKS = List.of("mlp.", "feed_forward.", "ffn.");

    /** All stacks in a list of tensor names. */
    static Collection<LayerStack> discover(Set<String> names) {
        SortedMap<String, LayerStack> stacks = new TreeMap<>();
        for (String name : names) {
            int at = name.indexOf(LAYERS);
            while (at > 0 && name.charAt(at - 1) != '.') {
                at = name.indexOf(LAYERS, at + 1);
            }
            int dot = at < 0 ? -1 : name.indexOf('.', at + LAYERS.length());
            if (dot >= 0) {
                int number = number(name.substring(at + LAYERS.length(), dot));
                if (number >= 0) {
                    stacks.computeIfAbsent(
                                    name.substring(0, at), p -> new LayerStack(p, new TreeMap<>()))
                            .layers
                            .computeIfAbsent(number, n -> new TreeSet<>())
                            .add(name.substring(dot + 1));
                }
            }
        }
        return stacks.values();
    }

    /**
     * The stack with the most Mixture-of-Experts layers of a family, if any has one.
     *
     * @throws CheckpointException if two have the same number
     */
    static Optional<LayerStack> main(
            Collection<LayerStack> stacks, ModelFamily family, String folder) {
        List<LayerStack> best = new ArrayList<>();
        long most = 1;
        for (LayerStack stack : stacks) {
            long count = stack.moeLayers(family).size();
            if (count > most) {
                best.clear();
                most = count;
            }
            if (count == most) {
                best.add(stack);
            }
        }
        if (best.size() > 1) {
            throw new CheckpointException(
                    folder
                            + ": both "
                            + best.get(0).prefix
                            + LAYERS
                            + "N and "
                            + best.get(1).prefix
                            + LAYERS
                            + "N hold MoE layers: give a folder with one model");
        }
        return best.stream().findFirst();
    }

    /** Numbers of the layers that have a Mixture-of-Experts block. */
    List<Integer> moeLayers(ModelFamily family) {
        return layers.keySet().stream().filter(n -> block(family, n) != null).toList();
    }

    /** Name of a layer's Mixture-of-Experts block with a dot at its end, or null. */
    String block(ModelFamily family, int layer) {
        Set<String> names = layers.get(layer);
        for (String block : family.blocks()) {
            String inside = block + ".";
            if (names.contains(inside + family.router())
                    || names.stream().anyMatch(n -> n.startsWith(inside + "experts."))) {
                return inside;
            }
        }
        return null;
    }

    /** Tensor names inside a layer's block. */
    Set<String> namesIn(int layer, String block) {
        Set<String> inside = new TreeSet<>();
        for (String name : layers.get(layer)) {
            if (name.startsWith(block)) {
                inside.add(name.substring(block.length()));
            }
        }
        return inside;
    }

    /** Full name of a block with a dot at its end. */
    String fullName(int layer, String block) {
        return prefix + LAYERS + layer + "." + block;
    }

    /** Whether all names in the family's first block are names the family uses. */
    boolean speaks(ModelFamily family) {
        int first = moeLayers(family).get(0);
        Pattern known = family.names();
        return namesIn(first, block(family, first)).stream()
                .allMatch(name -> known.matcher(name).matches());
    }

    /** What a layer's tensors show. */
    LayerInfo describe(int layer, ModelFamily family, String moeSummary, int layerCount) {
        String block = block(family, layer);
        if (block != null) {
            return new LayerInfo(
                    layer,
                    LayerInfo.Kind.MOE,
                    "layer "
                            + layer
                            + ": MoE ("
                            + block.substring(0, block.length() - 1)
                            + "), "
                            + moeSummary
                            + (layer < layerCount
                                    ? ""
                                    : ", beyond num_hidden_layers="
                                            + layerCount
                                            + " (multi-token prediction)"));
        }
        for (String name : layers.get(layer)) {
            if (DENSE_BLOCKS.stream().anyMatch(name::startsWith)) {
                return new LayerInfo(
                        layer,
                        LayerInfo.Kind.DENSE,
                        "layer " + layer + ": dense (" + denseName(layer) + "), not a MoE layer");
            }
        }
        return new LayerInfo(
                layer,
                LayerInfo.Kind.OTHER,
                "layer " + layer + ": no feed-forward tensors found, not a MoE layer");
    }

    private String denseName(int layer) {
        List<String> names =
                layers.get(layer).stream()
                        .filter(n -> DENSE_BLOCKS.stream().anyMatch(n::startsWith))
                        .toList();
        String shown =
                names.stream().filter(n -> n.contains("gate")).findFirst().orElse(names.get(0));
        String[] parts = shown.split("\\.", 3);
        return CheckpointException.quote(parts[0] + "." + parts[1]);
    }

    private static int number(String digits) {
        boolean canonical =
                !digits.isEmpty()
                        && digits.length() <= MAX_DIGITS
                        && digits.chars().allMatch(c -> c >= '0' && c <= '9')
                        && (digits.length() == 1 || digits.charAt(0) != '0');
        return canonical ? Integer.parseInt(digits) : -1;
    }
}
