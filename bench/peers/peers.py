#!/usr/bin/env python3
"""What a user would pick instead of moe4j on the same GPU, on the same cases.

  peers.py --cases FILE --out FILE [--only N,N] [--prefill] [--sample-ms N]

Peers, all bfloat16:
  torch_grouped_mm  torch's grouped product, rows packed by expert, ends of experts on the device
  triton_masked     plain Triton kernels (masked_triton.py), tiles chosen for each case by timing

Stages: g1 the gate/up product (triton_masked includes the activation, torch does not), g2 the down
product, ch gate/up, silu(gate) * up, down. Also a dense 8192^3 product and a device-to-device copy.

Measured as `moe4j bench experts` measures: a result is checked against float64 before it is timed;
weight sets take turns until a rotation reads more than 400 MB; many runs are captured in a CUDA graph
of at least 2.5 ms, with an event between replays; median, 20th and 80th percentile of one run.

Peers are measured in a process of its own that is started again if one breaks it, so a peer that
fails costs its own figures only; the reason is in the JSON. The file is rewritten after every figure.
"""

import argparse
import datetime
import json
import math
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import traceback

ROTATION_BYTES = 400e6
MOST_SETS = 256
GRAPH_US = 2500.0
MOST_ROUNDS = 64
MOST_SAMPLES = 1000
FEWEST_SAMPLES = 20
WARM_UP_US = 20_000.0
TUNE_REPLAYS = 8
STAGES = ("g1", "g2", "ch")
PEERS = ("torch_grouped_mm", "triton_masked")
MACHINE = ("machine", "", "")
TOLERANCE = {"g1": 8e-3, "ch": 1.2e-2}
BROKEN_CONTEXT = 77


# ------------------------------------------------------------------ cases


def read_cases(path):
    with open(path, encoding="utf-8") as file:
        cases = json.load(file)["cases"]
    for case in cases:
        counts = case["expert_counts"]
        if len(counts) != case["local_experts"]:
            raise SystemExit(f"peers: {path}: case {case['case']} has {len(counts)} counts")
    return cases


def select(args):
    cases = read_cases(args.cases) if args.cases else []
    if args.prefill:
        beside = os.path.dirname(os.path.abspath(args.cases)) if args.cases else ""
        here = os.path.dirname(os.path.abspath(__file__))
        for folder in (beside, os.path.dirname(here), here):
            path = os.path.join(folder, "prefill.json")
            if os.path.exists(path):
                cases += read_cases(path)
                break
        else:
            raise SystemExit("peers: prefill.json is neither beside the case file nor above peers.py")
    if args.only:
        wanted = {int(number) for number in args.only.split(",")}
        missing = wanted - {case["case"] for case in cases}
        if missing:
            raise SystemExit(f"peers: no case {sorted(missing)}")
        cases = [case for case in cases if case["case"] in wanted]
    if not cases:
        raise SystemExit("peers: no cases: give --cases bench/cases.json or --prefill")
    return cases


def weight_sets(bytes_per_run):
    """As many as make a rotation cold; the same rule as BenchOptions.weightSets."""
    return int(max(1, min(MOST_SETS, math.ceil(ROTATION_BYTES / max(1.0, bytes_per_run)))))


def quantile(ordered, q):
    at = q * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


# ------------------------------------------------------------------ the measuring process


class Device:
    """The GPU and how work on it is timed. With --device cpu: wall time, to try the script out."""

    def __init__(self, name, sample_ms):
        import torch

        self.torch = torch
        self.name = name
        self.cuda = name == "cuda"
        self.sample_ms = sample_ms
        if self.cuda:
            torch.cuda.init()
            self.stream = torch.cuda.Stream()
            self.multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        else:
            self.multiprocessors = 4

    def synchronize(self):
        if self.cuda:
            self.torch.cuda.synchronize()

    def free_bytes(self):
        return self.torch.cuda.mem_get_info()[0] if self.cuda else 2e9

    def release(self):
        import gc

        gc.collect()
        if self.cuda:
            self.torch.cuda.empty_cache()

    def _capture(self, runs, rounds):
        torch = self.torch
        if not self.cuda:

            class Plain:
                @staticmethod
                def replay():
                    for _ in range(rounds):
                        for run in runs:
                            run()

            return Plain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for _ in range(rounds):
                for run in runs:
                    run()
        return graph

    def _replays(self, graph, count):
        """Time of each of count replays, µs."""
        if not self.cuda:
            import time

            samples = []
            for _ in range(min(count, 3)):
                start = time.perf_counter()
                graph.replay()
                samples.append((time.perf_counter() - start) * 1e6)
            return samples
        torch = self.torch
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        with torch.cuda.stream(self.stream):
            events[0].record()
            for event in events[1:]:
                graph.replay()
                event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) * 1e3 for a, b in zip(events, events[1:])]

    def _warm(self, runs):
        """Outside of a capture: compiles and allocates what a first call does."""
        if not self.cuda:
            runs[0]()
            return
        torch = self.torch
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for run in runs[:1] * 2:
                run()
        torch.cuda.synchronize()

    def time(self, runs):
        """Sample of one run; runs are one per weight set."""
        self._warm(runs)
        graph = self._capture(runs, 1)
        round_us = statistics.median(self._replays(graph, 5))
        rounds = int(max(1, min(MOST_ROUNDS, math.ceil(GRAPH_US / round_us))))
        del graph
        graph = self._capture(runs, rounds)
        each_us = round_us * rounds
        self._replays(graph, int(max(3, min(MOST_SAMPLES, WARM_UP_US / each_us))))
        count = int(max(FEWEST_SAMPLES, min(MOST_SAMPLES, 1e3 * self.sample_ms / each_us)))
        samples = sorted(us / (rounds * len(runs)) for us in self._replays(graph, count))
        return {
            "median_us": quantile(samples, 0.5),
            "p20_us": quantile(samples, 0.2),
            "p80_us": quantile(samples, 0.8),
            "samples": len(samples),
            "weight_sets": len(runs),
        }

    def quick_us(self, runs):
        """A median good enough to choose between configurations."""
        self._warm(runs)
        graph = self._capture(runs, 1)
        self._replays(graph, 2)
        return statistics.median(self._replays(graph, TUNE_REPLAYS)) / len(runs)


class CaseData:
    """Rows and weight sets of one case, the same for every peer."""

    def __init__(self, case, device):
        torch = device.torch
        self.case = case
        self.device = device
        self.counts = case["expert_counts"]
        self.hidden = case["hidden"]
        self.inter = case["intermediate"]
        self.experts = len(self.counts)
        self.rows = sum(self.counts)
        self.hit = sum(1 for count in self.counts if count)
        if self.rows == 0:
            raise ValueError("the case has no rows")
        matrix = self.hidden * self.inter
        self.sets = {
            "g1": weight_sets(self.hit * 4.0 * matrix),
            "g2": weight_sets(self.hit * 2.0 * matrix),
            "ch": weight_sets(self.hit * 6.0 * matrix),
        }
        if not device.cuda:
            self.sets = dict.fromkeys(STAGES, 1)
        cap = 0.6 * device.free_bytes()
        while True:
            n13 = max(self.sets["g1"], self.sets["ch"])
            n2 = max(self.sets["g2"], self.sets["ch"])
            need = self.experts * matrix * (4.0 * n13 + 2.0 * n2)
            if need <= cap or n13 == n2 == 1:
                break
            self.sets = {stage: max(1, int(n * 0.9)) for stage, n in self.sets.items()}
        torch.manual_seed(case["case"])
        self.x = self._normal((self.rows, self.hidden), 1.0)
        shape13 = (self.experts, 2 * self.inter, self.hidden)
        self.w13 = [self._normal(shape13, self.hidden**-0.5) for _ in range(n13)]
        shape2 = (self.experts, self.hidden, self.inter)
        self.w2 = [self._normal(shape2, self.inter**-0.5) for _ in range(n2)]
        ends = torch.tensor(self.counts, dtype=torch.int64).cumsum(0).to(torch.int32)
        self.ends = ends.to(device.name)
        device.synchronize()
        self.references = self._references()

    def _normal(self, shape, deviation):
        torch = self.device.torch
        empty = torch.empty(shape, dtype=torch.bfloat16, device=self.device.name)
        return empty.normal_(0.0, deviation)

    def _references(self):
        """float64 results of some rows with weight set 0: (row, gate|up, activated, out)."""
        torch = self.device.torch
        hit = [expert for expert, count in enumerate(self.counts) if count]
        fullest = max(hit, key=lambda expert: self.counts[expert])
        chosen = []
        for expert, place in ((hit[0], 0.0), (fullest, 1.0), (hit[-1], 0.5)):
            start = sum(self.counts[:expert])
            row = start + int(place * (self.counts[expert] - 1))
            if row not in [r for _, r in chosen]:
                chosen.append((expert, row))
        references = []
        for expert, row in chosen:
            gate_up = self.w13[0][expert].double() @ self.x[row].double()
            gate, up = gate_up[: self.inter], gate_up[self.inter :]
            activated = gate * torch.sigmoid(gate) * up
            out = self.w2[0][expert].double() @ activated
            references.append((row, gate_up, activated, out))
        return references

    def worst(self, got, which):
        """Largest relative L2 error of the rows that have a reference; which: 1, 2 or 3."""
        worst = 0.0
        for reference in self.references:
            want = reference[which]
            error = (got[reference[0]].double() - want).norm() / want.norm()
            error = float(error)
            if not math.isfinite(error):
                return math.inf
            worst = max(worst, error)
        return worst


def require(error, stage):
    if not error <= TOLERANCE[stage]:
        raise ValueError(f"{stage} is off by {error:.2e} from float64: a wrong result is not timed")
    return error


class TorchGroupedMm:
    """torch.nn.functional.grouped_mm, or torch._grouped_mm where that is all there is."""

    def __init__(self, data):
        torch = data.device.torch
        self.data = data
        self.torch = torch
        self.product, self.label = self._product()
        self.silu_mul, self.silu_label = self._activation()
        first = self._gate_up(0)
        self.errors = {"g1": require(data.worst(first, 1), "g1")}
        self.errors["g2"] = None
        self.errors["ch"] = require(data.worst(self._chain(0), 3), "ch")
        self.activated = self.silu_mul(first)

    def _product(self):
        torch, data = self.torch, self.data
        tried = []
        for holder, name, label in (
            (torch.nn.functional, "grouped_mm", "torch.nn.functional.grouped_mm"),
            (torch, "_grouped_mm", "torch._grouped_mm"),
        ):
            function = getattr(holder, name, None)
            if function is None:
                tried.append(label + " does not exist")
                continue
            try:
                call = lambda a, b, ends, f=function: f(a, b.transpose(-2, -1), offs=ends)  # noqa: E731
                call(data.x, data.w13[0], data.ends)
                data.device.synchronize()
                return call, label
            except Exception as error:  # noqa: BLE001: the next one may do
                tried.append(f"{label}: {first_line(error)}")
                data.device.synchronize()
        raise RuntimeError("; ".join(tried))

    def _activation(self):
        torch, inter = self.torch, self.data.inter

        def eager(gate_up):
            return torch.nn.functional.silu(gate_up[:, :inter]) * gate_up[:, inter:]

        try:
            import masked_triton

            def fused(gate_up):
                out = torch.empty(
                    (gate_up.shape[0], inter), dtype=gate_up.dtype, device=gate_up.device
                )
                grid = (gate_up.shape[0], (inter + 1023) // 1024)
                masked_triton.silu_mul[grid](out, gate_up, inter, BLOCK=1024, num_warps=4)
                return out

            fused(torch.zeros((1, 2 * inter), dtype=torch.bfloat16, device=self.data.device.name))
            self.data.device.synchronize()
            return fused, "fused activation by Triton"
        except Exception as error:  # noqa: BLE001: without Triton torch's own operations do
            print(f"peers: no fused activation: {first_line(error)}", file=sys.stderr)
            return eager, "activation by torch"

    def _gate_up(self, number):
        return self.product(self.data.x, self.data.w13[number], self.data.ends)

    def _chain(self, number):
        activated = self.silu_mul(self._gate_up(number))
        return self.product(activated, self.data.w2[number], self.data.ends)

    def runs(self, stage):
        data = self.data
        one = {
            "g1": self._gate_up,
            "g2": lambda n: self.product(self.activated, data.w2[n], data.ends),
            "ch": self._chain,
        }[stage]
        return [lambda n=n: one(n) for n in range(data.sets[stage])]

    def config(self, stage):
        return self.label + (", " + self.silu_label if stage == "ch" else "")


class TritonMasked:
    """Plain Triton tiles; tile sizes and number of programs chosen for each case by timing."""

    # columns, depth, warps, stages by rows of a tile; gate/up has two weight tiles of these columns
    GATE_UP = {
        16: ((64, 128, 4, 4), (32, 128, 4, 5), (64, 64, 4, 5), (32, 256, 4, 3)),
        32: ((64, 128, 4, 3), (64, 64, 4, 5), (32, 128, 4, 4)),
        64: ((64, 64, 4, 4), (128, 64, 8, 4), (64, 128, 4, 3)),
        128: ((128, 64, 8, 3), (64, 64, 8, 4)),
    }
    DOWN = {
        16: ((64, 128, 4, 5), (128, 128, 4, 4), (128, 64, 4, 5), (64, 256, 4, 3)),
        32: ((64, 128, 4, 4), (128, 128, 4, 3), (128, 64, 4, 5)),
        64: ((128, 64, 4, 4), (128, 128, 8, 3), (64, 128, 4, 4)),
        128: ((128, 64, 8, 4), (256, 64, 8, 3), (128, 64, 4, 3)),
    }

    def __init__(self, data):
        import masked_triton

        self.kernels = masked_triton
        self.data = data
        torch = data.device.torch
        # why: one compiled kernel for cases with few and with many experts
        self.padded = max(128, 1 << (data.experts - 1).bit_length())
        self.activated = [self._empty(data.inter)]
        self.out = [self._empty(data.hidden)]
        self.chosen = {}
        self.chosen["g1"] = self._tune("g1", self.GATE_UP, data.inter, data.hidden)
        self._launch("g1", 0)
        error = require(data.worst(self.activated[0], 2), "g1")
        self.chosen["g2"] = self._tune("g2", self.DOWN, data.hidden, data.inter)
        self.out[0].fill_(math.nan)
        self._launch("g1", 0)
        self._launch("g2", 0)
        self.errors = {"g1": error, "g2": None, "ch": require(data.worst(self.out[0], 3), "ch")}
        torch.manual_seed(0)

    def _empty(self, columns):
        torch = self.data.device.torch
        shape = (self.data.rows, columns)
        return torch.full(shape, math.nan, dtype=torch.bfloat16, device=self.data.device.name)

    def _launch(self, stage, number, config=None):
        data = self.data
        (rows, cols, depth, warps, stages), programs = config or self.chosen[stage]
        if stage == "g1":
            kernel, y, x, w = self.kernels.gate_up_silu, self.activated[0], data.x, data.w13[number]
            sizes = (data.hidden, data.inter)
        else:
            kernel, y, x, w = self.kernels.down, self.out[0], self.activated[0], data.w2[number]
            sizes = (data.inter, data.hidden)
        kernel[(programs,)](
            y, x, w, data.ends, data.experts, *sizes,
            EXPERTS=self.padded, BM=rows, BN=cols, BK=depth, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def _row_tiles(self):
        """Tile heights worth trying: up to the fullest expert, down to a quarter of that."""
        fullest = max(self.data.counts)
        top = 16
        while top < fullest and top < 128:
            top *= 2
        return [rows for rows in (16, 32, 64, 128) if top // 4 <= rows <= top]

    def _most_tiles(self, rows, cols, width):
        """What the host knows without counts: at most one part-filled tile more per expert."""
        case, data = self.data.case, self.data
        visits = case["ep"] * case["tokens_per_rank"] * min(case["topk"], data.experts)
        return (min(data.experts, visits) + visits // rows) * (width // cols)

    def _tune(self, stage, table, width, inner):
        data, processors = self.data, self.data.device.multiprocessors
        sets = range(data.sets[stage])
        best, best_us, failures = None, math.inf, []

        def try_out(config):
            nonlocal best, best_us
            try:
                runs = [lambda n=n: self._launch(stage, n, config) for n in sets]
                us = data.device.quick_us(runs)
            except Exception as error:  # noqa: BLE001: a tile too large for the GPU is no candidate
                failures.append(f"{config}: {first_line(error)}")
                data.device.synchronize()  # a broken context ends here
                return
            if us < best_us:
                best, best_us = config, us

        for rows in self._row_tiles():
            for cols, depth, warps, stages in table[rows]:
                if width % cols or inner % depth:
                    continue
                most = self._most_tiles(rows, cols, width)
                try_out(((rows, cols, depth, warps, stages), min(most, 4 * processors)))
        if best is None:
            raise RuntimeError("no tile configuration ran: " + "; ".join(failures[:3]))
        tile = best[0]
        most = self._most_tiles(tile[0], tile[1], width)
        for programs in sorted({min(most, n * processors) for n in (1, 2, 3, 6, 8)} | {most}):
            if programs != best[1] and programs < 2**31:
                try_out((tile, programs))
        return best

    def runs(self, stage):
        def chain(number):
            self._launch("g1", number)
            self._launch("g2", number)

        one = chain if stage == "ch" else lambda number: self._launch(stage, number)
        return [lambda n=n: one(n) for n in range(self.data.sets[stage])]

    def config(self, stage):
        parts = []
        for part in ("g1", "g2") if stage == "ch" else (stage,):
            (rows, cols, depth, warps, stages), programs = self.chosen[part]
            parts.append(f"{rows}x{cols}x{depth}, {warps} warps, {stages} stages, {programs} programs")
        return "; ".join(parts)


KINDS = {"torch_grouped_mm": TorchGroupedMm, "triton_masked": TritonMasked}


def measure_machine(device):
    """A dense product, TFLOP/s, and a copy within device memory, GB/s read and written together."""
    torch = device.torch
    size, copy_bytes = (8192, 2 << 30) if device.cuda else (256, 1 << 20)
    result = {}
    a, b = (torch.randn(size, size, device=device.name).to(torch.bfloat16) for _ in range(2))
    c = torch.empty(size, size, device=device.name, dtype=torch.bfloat16)
    row = a[1].double() @ b.double()
    torch.mm(a, b, out=c)
    error = float((c[1].double() - row).norm() / row.norm())
    if not error < 1e-2:
        raise ValueError(f"the dense product is off by {error:.1e}")
    sample = device.time([lambda: torch.mm(a, b, out=c)])
    result["dense_8192_tflops"] = 2.0 * size**3 / sample["median_us"] / 1e6
    del a, b, c
    device.release()
    source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    sample = device.time([lambda: target.copy_(source)])
    result["copy_gb_per_s"] = 2.0 * copy_bytes / sample["median_us"] / 1e3
    return result


class Unprepared(Exception):
    """A peer that failed on a case before; its message is complete."""


def first_line(error):
    if isinstance(error, Unprepared):
        return str(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def worker():
    """Measures what stdin asks for; results are JSON lines on what was stdout."""
    job = json.loads(sys.stdin.readline())
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # why: nothing that a library prints may come between the lines
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

    def say(event, key, **more):
        pipe.write(json.dumps({"event": event, "key": key, **more}) + "\n")

    todo = [tuple(key) for key in job["todo"]]
    cases = {case["case"]: case for case in job["cases"]}
    say("start", todo[0])
    device = Device(job["device"], job["sample_ms"])
    say("facts", todo[0], facts=facts(device))
    data, prepared = None, {}

    def measure(key):
        nonlocal data, prepared
        number, stage, peer = key
        if key == MACHINE:
            return measure_machine(device)
        if data is None or data.case["case"] != number:
            data, prepared = None, {}
            device.release()
            data = CaseData(cases[number], device)
        if peer not in prepared:
            try:
                prepared[peer] = KINDS[peer](data)
            except Exception as error:
                prepared[peer] = first_line(error)
                raise
        if isinstance(prepared[peer], str):
            raise Unprepared(prepared[peer])
        ready = prepared[peer]
        sample = device.time(ready.runs(stage))
        return {**sample, "checked_error": ready.errors[stage], "config": ready.config(stage)}

    for key in todo:
        say("start", key)
        try:
            say("result", key, result=measure(key))
        except Exception as error:  # noqa: BLE001: one failure must not stop the others
            traceback.print_exc(file=sys.stderr)
            say("error", key, error=first_line(error))
            try:
                device.synchronize()
            except Exception:  # noqa: BLE001
                pipe.close()
                os._exit(BROKEN_CONTEXT)
            # why not released at once: the traceback holds tensors until here
            device.release()
    pipe.close()
    sys.stderr.flush()
    os._exit(0)  # why: no wait for libraries that tear down


def facts(device):
    torch = device.torch
    found = {
        "gpu": torch.cuda.get_device_name(0) if device.cuda else "none",
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except Exception as error:  # noqa: BLE001
        found["triton"] = None
        print(f"peers: Triton cannot be used: {first_line(error)}", file=sys.stderr)
    return found


# ------------------------------------------------------------------ the process that looks after it


def nvidia_smi(fields):
    try:
        result = subprocess.run(
            ["nvidia-smi", "--query-gpu=" + fields, "--format=csv,noheader"],
            capture_output=True, text=True, timeout=15, check=True,
        )  # fmt: skip
        return [value.strip() for value in result.stdout.splitlines()[0].split(",")]
    except (OSError, subprocess.SubprocessError, IndexError):
        return []


class Run:
    def __init__(self, args, cases):
        self.args = args
        self.cases = cases
        by_number = {case["case"]: case for case in cases}
        self.by_number = by_number
        self.todo = [MACHINE] + [
            (number, stage, peer) for number in by_number for stage in STAGES for peer in PEERS
        ]
        self.done = len(self.todo)
        self.broken = {}
        self.report = {
            "gpu": None,
            "driver": (nvidia_smi("driver_version") or [None])[0],
            "torch": None,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "dense_8192_tflops": None,
            "copy_gb_per_s": None,
            "errors": [],
            "cases": [],
        }

    def finish(self, key, result, error):
        self.todo.remove(key)
        done = f"{self.done - len(self.todo)}/{self.done}"
        if key == MACHINE:
            if error:
                self.report["errors"].append("dense product and copy: " + error)
            else:
                self.report.update(result)
            text = error or ", ".join(f"{k} {v:.0f}" for k, v in result.items())
            print(f"[{done}] {text}", file=sys.stderr, flush=True)
        else:
            number, stage, peer = key
            case = self.by_number[number]
            row = {
                "case": number,
                "stage": stage,
                "peer": peer,
                "median_us": None,
                "p20_us": None,
                "p80_us": None,
                "error": error,
                "model": case["model"],
                "ep": case["ep"],
                "tokens": case["tokens_per_rank"],
                "rows": sum(case["expert_counts"]),
                "hit_experts": sum(1 for count in case["expert_counts"] if count),
            }
            row.update(result or {})
            self.report["cases"].append(row)
            text = error or f"{row['median_us']:.1f} us  {row['config']}"
            print(f"[{done}] case {number} {stage} {peer}: {text}", file=sys.stderr, flush=True)
        self.save()

    def save(self):
        part = self.args.out + ".part"
        with open(part, "w", encoding="utf-8") as file:
            json.dump(self.report, file, indent=1)
            file.write("\n")
        os.replace(part, self.args.out)

    def worker(self):
        """Runs one measuring process until it ends; returns whether another makes sense."""
        numbers = {key[0] for key in self.todo}
        job = {
            "todo": self.todo,
            "cases": [case for case in self.cases if case["case"] in numbers],
            "device": self.args.device,
            "sample_ms": self.args.sample_ms,
        }
        process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        lines = queue.Queue()

        def read():
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        current, finished, why, hung = None, 0, None, False
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.close()
        except OSError:
            pass  # it ended already: its exit code says more
        try:
            while True:
                try:
                    line = lines.get(timeout=self.args.timeout)
                except queue.Empty:
                    why, hung = f"no answer in {self.args.timeout} s", True
                    break
                if line is None:
                    break
                message = json.loads(line)
                key = tuple(message["key"])
                if message["event"] == "facts":
                    self.report.update(message["facts"])
                elif message["event"] == "start":
                    current = key
                else:
                    self.finish(key, message.get("result"), message.get("error"))
                    current = None
                    finished += 1
        finally:
            if process.poll() is None and why:
                process.kill()
            code = process.wait()
        if current is not None and current in self.todo:
            if why is None:
                why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            self.finish(current, None, "the measuring process ended: " + why)
            self.give_up(current, hung)
            finished += 1
        return finished > 0

    def give_up(self, broken, hung):
        """A peer that ended the process loses the case; one that does so again, or hangs, the rest."""
        number, _, peer = broken
        self.broken[peer] = self.broken.get(peer, 0) + 1
        everywhere = hung or self.broken[peer] > 1
        for key in list(self.todo):
            if key[2] == peer and (everywhere or key[0] == number):
                self.finish(key, None, f"not tried: it ended the process in case {number}")

    def run(self):
        while self.todo:
            if not self.worker():
                for key in list(self.todo):
                    self.finish(key, None, "the measuring process could not start")
        clocks = nvidia_smi("clocks.sm,clocks.max.sm,power.draw,temperature.gpu")
        if len(clocks) == 4:
            names = ("sm_clock_after", "sm_clock_at_most", "power_after", "temperature_c")
            self.report.update(zip(names, clocks))
        self.save()
        failed = [row for row in self.report["cases"] if row["error"]]
        print(
            f"peers: {len(self.report['cases']) - len(failed)} figures, {len(failed)} failed,"
            f" in {self.args.out}",
            file=sys.stderr,
        )
        return 1 if len(failed) == len(self.report["cases"]) else 0


def main():
    if sys.argv[1:] == ["--worker"]:
        worker()
        return 0
    parser = argparse.ArgumentParser(
        prog="peers.py", description="Times torch and Triton on the cases of moe4j bench experts."
    )
    parser.add_argument("--cases", metavar="FILE", help="exact counts, as in bench/cases.json")
    parser.add_argument("--out", metavar="FILE", required=True, help="JSON to write")
    parser.add_argument("--only", metavar="N,N", help="numbers of cases")
    parser.add_argument("--prefill", action="store_true", help="also the cases of prefill.json")
    parser.add_argument("--sample-ms", metavar="N", type=int, default=100, help="for one figure")
    parser.add_argument("--timeout", metavar="S", type=int, default=240, help="for one figure")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sample_ms < 1:
        parser.error("--sample-ms is not positive")
    cases = select(args)
    try:
        import torch
    except ImportError as error:
        print(f"peers: torch is missing ({error}): install torch and triton for python3", file=sys.stderr)
        return 3
    if args.device == "cuda" and not torch.cuda.is_available():
        print("peers: torch finds no CUDA device", file=sys.stderr)
        return 3
    return Run(args, cases).run()


if __name__ == "__main__":
    sys.exit(main())
