package io.moe4j.bench;

import java.io.IOException;
import java.nio.file.Path;

/**
 * Writes plots. XChart, its SVG library and java.desktop are optional: no class of theirs is loaded
 * before {@link #write}, which says what is missing. Stateless.
 */
public final class Plots {
    private Plots() {}

    /**
     * Draws a chart into a file whose name ends with .svg or .png.
     *
     * @param chart what to draw
     * @param file the file
     * @throws IllegalArgumentException if this JVM or its class path cannot draw, with the cure
     * @throws IOException if the file cannot be written
     */
    public static void write(Chart chart, Path file) throws IOException {
        boolean svg = isSvg(file);
        require(
                "java.awt.Graphics2D",
                "this JVM lacks the module java.desktop, which plots need: copy the JSON and run"
                        + " moe4j plot with a full JDK");
        require(
                "org.knowm.xchart.XYChart",
                "XChart is not on the class path: add org.knowm.xchart:xchart:4.0.3");
        System.setProperty("java.awt.headless", "true");
        if (svg) {
            require(
                    "de.erichseifert.vectorgraphics2d.VectorGraphics2D",
                    "an SVG needs de.erichseifert.vectorgraphics2d:VectorGraphics2D:0.13 on the"
                            + " class path: add it, or write a .png");
            ChartWriter.writeSvg(chart, file);
        } else {
            ChartWriter.writePng(chart, file);
        }
    }

    /**
     * {@return whether a file is to be an SVG}
     *
     * @param file the file
     * @throws IllegalArgumentException if it ends with neither .svg nor .png
     */
    public static boolean isSvg(Path file) {
        String name = file.toString();
        if (!name.endsWith(".svg") && !name.endsWith(".png")) {
            throw new IllegalArgumentException(
                    "--out=" + file + " ends with neither .svg nor .png");
        }
        return name.endsWith(".svg");
    }

    private static void require(String name, String otherwise) {
        try {
            Class.forName(name, false, Plots.class.getClassLoader());
        } catch (ClassNotFoundException | LinkageError e) {
            throw new IllegalArgumentException(otherwise, e);
        }
    }
}
