#!/usr/bin/env python3
"""Dispatch + combine by NCCL's collectives, through torch: what an engine does without a library.

  nccl.py --cases FILE --out FILE [--ranks N] [--pairs N] [--sample-ms N]

Cases are those of bench/ep.json with as many ranks as there are GPUs; one process per GPU. Peers, all
bfloat16, both with every rank's rows at every rank (no routing, no counts, no reordering):
  nccl_ag_rs   all-gather of rows with their ids and weights; reduce-scatter of the results
  nccl_a2a     all-to-all of T rows for each destination, there and back

Many pairs are captured in a CUDA graph; an event between replays; the median over replays on each rank,
then the largest of the ranks. What the collectives deliver is checked before it is timed. NVLink
multicast is off: it is no part of this comparison.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile

PEERS = ("nccl_ag_rs", "nccl_a2a")
WARM_UP_REPLAYS = 5
FEWEST_REPLAYS = 20


def buffers(torch, case, ranks):
    tokens, hidden, top_k = case["tokens_per_rank"], case["hidden"], case["topk"]
    wide = hidden + 4 * top_k  # a row with its ids and weights behind it: one message, not three

    def rows(count, width):
        return torch.randn(count, width, device="cuda").to(torch.bfloat16)

    return {
        "sent": rows(tokens, wide),
        "sent_to_each": rows(ranks * tokens, wide),
        "received": rows(ranks * tokens, wide),
        "results": rows(ranks * tokens, hidden),
        "home": rows(ranks * tokens, hidden),
        "out": rows(tokens, hidden),
    }


def pair(dist, peer, b):
    """One dispatch and one combine; the experts between them do nothing."""
    if peer == "nccl_ag_rs":
        dist.all_gather_into_tensor(b["received"], b["sent"])
        dist.reduce_scatter_tensor(b["out"], b["results"])
    else:
        dist.all_to_all_single(b["received"], b["sent_to_each"])
        dist.all_to_all_single(b["home"], b["results"])


def wrong(torch, dist, peer, b, rank, ranks):
    """A reason if the collectives did not deliver what a dispatch and combine have to."""
    tokens, hidden = b["out"].shape
    mine = slice(rank * tokens, (rank + 1) * tokens)
    sent = b["sent"] if peer == "nccl_ag_rs" else b["sent_to_each"][mine]
    if not torch.equal(b["received"][mine], sent):
        return "a rank's own rows did not arrive"
    # Send back what came: each row comes home as it went, from every rank
    b["results"].copy_(b["received"][:, :hidden])
    torch.cuda.synchronize()
    pair(dist, peer, b)
    torch.cuda.synchronize()
    if peer == "nccl_ag_rs":
        # The same row from all ranks; exact, since the number of ranks is a power of two
        home = torch.equal(b["out"], b["sent"][:, :hidden] * ranks)
    else:
        home = torch.equal(b["home"], b["sent_to_each"][:, :hidden])
    return None if home else "rows came home changed"


def measure(torch, dist, peer, case, ranks, pairs, sample_ms):
    b = buffers(torch, case, ranks)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            pair(dist, peer, b)
    torch.cuda.synchronize()
    reason = wrong(torch, dist, peer, b, dist.get_rank(), ranks)
    if reason:
        raise RuntimeError(f"{peer}: {reason}")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(pairs):
            pair(dist, peer, b)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
        dist.barrier()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        # why the same on all ranks: each replay is a collective
        guess = torch.tensor([start.elapsed_time(end)], device="cuda")
        dist.all_reduce(guess, op=dist.ReduceOp.MAX)
        replays = max(FEWEST_REPLAYS, int(sample_ms / max(1e-3, guess.item())))
        dist.barrier()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
    times = [a.elapsed_time(z) * 1e3 / pairs for a, z in zip(events, events[1:])]
    median = torch.tensor([statistics.median(times)], device="cuda")
    dist.all_reduce(median, op=dist.ReduceOp.MAX)
    return median.item()


def worker(rank, ranks, store, args, cases):
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        store=dist.FileStore(store, ranks),
        rank=rank,
        world_size=ranks,
        device_id=torch.device("cuda", rank),
    )
    rows = []
    for case in cases:
        for peer in PEERS:
            row = {"case": case["case"], "stage": "pair", "peer": peer, "median_us": None, "error": None}
            try:
                row["median_us"] = measure(torch, dist, peer, case, ranks, args.pairs, args.sample_ms)
            except RuntimeError as error:
                row["error"] = str(error).splitlines()[0]
            rows.append(row)
    if rank == 0:
        report = {
            "gpu": torch.cuda.get_device_name(0),
            "torch": torch.__version__,
            "nccl": ".".join(str(part) for part in torch.cuda.nccl.version()),
            "ranks": ranks,
            "pairs_per_graph": args.pairs,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
            "cases": rows,
        }
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
    dist.barrier()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(prog="nccl.py", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", metavar="FILE", required=True, help="as bench/ep.json")
    parser.add_argument("--out", metavar="FILE", required=True, help="JSON to write")
    parser.add_argument("--ranks", metavar="N", type=int, help="GPUs to use (all that are there)")
    parser.add_argument("--pairs", metavar="N", type=int, default=16, help="in one graph")
    parser.add_argument("--sample-ms", metavar="N", type=int, default=60, help="for one figure")
    args = parser.parse_args()
    try:
        import torch
    except ImportError as error:
        print(f"nccl: torch is missing ({error}): install torch for python3", file=sys.stderr)
        return 3
    found = torch.cuda.device_count()
    ranks = args.ranks or found
    if ranks < 2 or ranks > found:
        print(f"nccl: {ranks} ranks need as many GPUs, at least 2; torch finds {found}", file=sys.stderr)
        return 3
    with open(args.cases, encoding="utf-8") as file:
        cases = [case for case in json.load(file)["cases"] if case["ep"] == ranks]
    if not cases:
        print(f"nccl: {args.cases} has no case for {ranks} ranks", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        torch.multiprocessing.spawn(worker, args=(ranks, store, args, cases), nprocs=ranks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
