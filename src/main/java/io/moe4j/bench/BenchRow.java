package io.moe4j.bench;

import com.fasterxml.jackson.annotation.JsonInclude;
import java.util.Map;

/**
 * One measurement. Values that do not apply are null and left out of JSON.
 *
 * @param bench experts, chain or launch
 * @param number of the case in its file, 0 if it has none
 * @param model the model
 * @param hidden H
 * @param intermediate I
 * @param experts E over all ranks
 * @param topK K
 * @param ep ranks: of the group a case stands for, or virtual ranks that ran
 * @param tokens T of each rank
 * @param routing uniform, zipf:S, ...
 * @param stage id of the {@link Stage}
 * @param backend cpu or cuda
 * @param mode graph or eager
 * @param cache cold: weight sets rotate; hot: one set
 * @param weightSets sets that rotate
 * @param rows rows of the experts
 * @param hitExperts experts with rows
 * @param medianUs median time
 * @param p20Us 20th percentile
 * @param p80Us 80th percentile
 * @param samples number of samples
 * @param tflops operations of valid rows over the median, TFLOP/s
 * @param gbPerS bytes of hit experts' weights over the median, GB/s
 * @param floorUs what the hardware needs at least, see {@link Cost}
 * @param timesFloor median / floor
 * @param baseline name of the baseline
 * @param baselineUs its median
 * @param fasterThanBaseline baseline / median
 * @param peer name of the fastest bfloat16 peer in the case file
 * @param peerUs its time
 * @param fasterThanPeer peer / median
 * @param peersUs all bfloat16 peers
 * @param error largest relative L2 error of the tokens checked before timing
 * @param runPeer name of the fastest peer measured beside this run, see {@link PeersFile}
 * @param runPeerUs its median
 * @param fasterThanRunPeer peer / median
 * @param runPeersUs all peers measured beside this run
 * @param kernels what was timed, in order
 * @param aimUs what the case is to reach, if its file says so
 */
@JsonInclude(JsonInclude.Include.NON_NULL)
public record BenchRow(
        String bench,
        int number,
        String model,
        int hidden,
        int intermediate,
        int experts,
        int topK,
        int ep,
        int tokens,
        String routing,
        String stage,
        String backend,
        String mode,
        String cache,
        int weightSets,
        int rows,
        int hitExperts,
        double medianUs,
        double p20Us,
        double p80Us,
        int samples,
        Double tflops,
        Double gbPerS,
        Double floorUs,
        Double timesFloor,
        String baseline,
        Double baselineUs,
        Double fasterThanBaseline,
        String peer,
        Double peerUs,
        Double fasterThanPeer,
        Map<String, Double> peersUs,
        Double error,
        String runPeer,
        Double runPeerUs,
        Double fasterThanRunPeer,
        Map<String, Double> runPeersUs,
        String kernels,
        Double aimUs) {
    /** This row beside peers that were measured in the same run, by name; at least one. */
    BenchRow withRunPeers(Map<String, Double> us) {
        return with(mode, floorUs, peersUs, us, kernels, aimUs);
    }

    /** This row of a group of GPUs, with what it is compared with there; peers may be empty. */
    BenchRow of(String timedMode, double floor, Map<String, Double> recorded, Double aim) {
        Map<String, Double> known = recorded.isEmpty() ? null : recorded;
        return with(timedMode, floor, known, runPeersUs, kernels, aim);
    }

    /** This row with the kernels that were timed. */
    BenchRow withKernels(String names) {
        return with(mode, floorUs, peersUs, runPeersUs, names, aimUs);
    }

    /** A copy with other values, and what follows from them; peers may be null. */
    private BenchRow with(
            String newMode,
            Double newFloorUs,
            Map<String, Double> newPeersUs,
            Map<String, Double> newRunPeersUs,
            String newKernels,
            Double newAimUs) {
        Map.Entry<String, Double> best = fastest(newPeersUs);
        Map.Entry<String, Double> bestOfRun = fastest(newRunPeersUs);
        return new BenchRow(
                bench,
                number,
                model,
                hidden,
                intermediate,
                experts,
                topK,
                ep,
                tokens,
                routing,
                stage,
                backend,
                newMode,
                cache,
                weightSets,
                rows,
                hitExperts,
                medianUs,
                p20Us,
                p80Us,
                samples,
                tflops,
                gbPerS,
                newFloorUs,
                newFloorUs == null ? null : Double.valueOf(medianUs / newFloorUs),
                baseline,
                baselineUs,
                fasterThanBaseline,
                best == null ? null : best.getKey(),
                best == null ? null : best.getValue(),
                best == null ? null : Double.valueOf(best.getValue() / medianUs),
                newPeersUs,
                error,
                bestOfRun == null ? null : bestOfRun.getKey(),
                bestOfRun == null ? null : bestOfRun.getValue(),
                bestOfRun == null ? null : Double.valueOf(bestOfRun.getValue() / medianUs),
                newRunPeersUs,
                newKernels,
                newAimUs);
    }

    private static Map.Entry<String, Double> fastest(Map<String, Double> us) {
        return us == null
                ? null
                : us.entrySet().stream().min(Map.Entry.comparingByValue()).orElse(null);
    }

    /** Name of the fastest peer, measured beside this run or recorded; null if there is none. */
    String fastestPeer() {
        return runPeerIsFastest() ? runPeer : peer;
    }

    /** Time of the {@link #fastestPeer}; null if there is none. */
    Double fastestPeerUs() {
        return runPeerIsFastest() ? runPeerUs : peerUs;
    }

    private boolean runPeerIsFastest() {
        return runPeerUs != null && (peerUs == null || runPeerUs <= peerUs);
    }

    /** Whether it is one of the {@link Prefill} rows. */
    boolean isPrefill() {
        return number >= Prefill.FIRST_NUMBER;
    }

    /** For sentences: case, model, ranks, tokens. */
    String label() {
        return (number == 0 ? "" : "case " + number + " ")
                + model
                + " EP"
                + ep
                + " T"
                + tokens
                + (routing.equals("uniform") ? "" : " " + routing);
    }

    /** {@return what makes two rows measurements of the same thing} */
    public String key() {
        return String.join(
                " ",
                bench,
                "case=" + number,
                model,
                "H=" + hidden,
                "I=" + intermediate,
                "E=" + experts,
                "K=" + topK,
                "ep=" + ep,
                "T=" + tokens,
                routing,
                stage,
                backend,
                mode,
                cache);
    }
}
