package io.moe4j.bench;

import java.awt.Color;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import org.knowm.xchart.BitmapEncoder;
import org.knowm.xchart.CategoryChart;
import org.knowm.xchart.CategoryChartBuilder;
import org.knowm.xchart.VectorGraphicsEncoder;
import org.knowm.xchart.XYChart;
import org.knowm.xchart.XYChartBuilder;
import org.knowm.xchart.XYSeries;
import org.knowm.xchart.internal.chartpart.IChart;
import org.knowm.xchart.style.AxesChartStyler;
import org.knowm.xchart.style.Styler;
import org.knowm.xchart.style.markers.SeriesMarkers;

/**
 * Draws a {@link Chart} with XChart. The only class that needs XChart and java.desktop; ask {@link
 * Plots} first, which says what is missing. An SVG carries its figures as text. Stateless.
 */
final class ChartWriter {
    private static final int WIDTH = 1000;
    private static final int HEIGHT = 480;

    private ChartWriter() {}

    static void writeSvg(Chart chart, Path file) throws IOException {
        ByteArrayOutputStream bytes = new ByteArrayOutputStream();
        VectorGraphicsEncoder.saveVectorGraphic(
                drawn(chart), bytes, VectorGraphicsEncoder.VectorGraphicsFormat.SVG);
        // why: outlines of letters have 15 digits, which make most of the file
        String svg = bytes.toString(StandardCharsets.UTF_8).replaceAll("(\\.\\d\\d)\\d+", "$1");
        int from = svg.indexOf('>', svg.indexOf("<svg")) + 1;
        // why: letters are drawn as outlines; title and description are for readers and programs
        String words =
                "<title>"
                        + escaped(chart.title())
                        + "</title><desc>"
                        + escaped(chart.data())
                        + "</desc>";
        Files.writeString(file, svg.substring(0, from) + words + svg.substring(from));
    }

    static void writePng(Chart chart, Path file) throws IOException {
        ByteArrayOutputStream bytes = new ByteArrayOutputStream();
        BitmapEncoder.saveBitmap(drawn(chart), bytes, BitmapEncoder.BitmapFormat.PNG);
        Files.write(file, bytes.toByteArray());
    }

    private static String escaped(String text) {
        return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;");
    }

    private static IChart drawn(Chart chart) {
        return chart.kind() == Chart.Kind.FLOOR ? bars(chart) : lines(chart);
    }

    private static CategoryChart bars(Chart chart) {
        CategoryChart drawn =
                new CategoryChartBuilder()
                        .width(WIDTH)
                        .height(HEIGHT)
                        .title(chart.title())
                        .xAxisTitle(chart.xTitle())
                        .yAxisTitle(chart.yTitle())
                        .build();
        style(drawn.getStyler());
        drawn.getStyler().setAvailableSpaceFill(0.85);
        drawn.getStyler().setYAxisMin(0.0);
        for (Chart.Series series : chart.series()) {
            List<Double> values = new ArrayList<>();
            series.y().forEach(y -> values.add(y == null ? 0.0 : y));
            drawn.addSeries(series.name(), series.labels(), values);
        }
        return drawn;
    }

    private static XYChart lines(Chart chart) {
        XYChart drawn =
                new XYChartBuilder()
                        .width(WIDTH)
                        .height(HEIGHT)
                        .title(chart.title())
                        .xAxisTitle(chart.xTitle())
                        .yAxisTitle(chart.yTitle())
                        .build();
        style(drawn.getStyler());
        boolean roofline = chart.kind() == Chart.Kind.ROOFLINE;
        drawn.getStyler().setXAxisLogarithmic(roofline);
        drawn.getStyler().setYAxisLogarithmic(roofline);
        if (!roofline) {
            drawn.getStyler().setYAxisMin(0.0);
        }
        for (int i = 0; i < chart.series().size(); i++) {
            Chart.Series series = chart.series().get(i);
            XYSeries added = drawn.addSeries(series.name(), series.x(), series.y());
            if (roofline && i == 0) {
                added.setMarker(SeriesMarkers.NONE).setLineColor(Color.DARK_GRAY);
            } else if (roofline) {
                added.setXYSeriesRenderStyle(XYSeries.XYSeriesRenderStyle.Scatter);
            }
        }
        return drawn;
    }

    private static void style(AxesChartStyler styler) {
        styler.setChartBackgroundColor(Color.WHITE);
        styler.setLegendPosition(Styler.LegendPosition.OutsideE);
        styler.setPlotBorderVisible(false);
        styler.setLocale(java.util.Locale.ROOT);
    }
}
