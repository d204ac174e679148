"""Plain Triton kernels for experts whose row counts only the device knows.

Rows are packed by expert: expert e owns the rows from ends[e - 1] to before ends[e]. A tile is
(expert, block of rows, block of columns). Programs stride over the tiles that exist, so one launch
serves as a persistent kernel (few programs) and as one program per tile (as many programs as there
could be tiles; those without one return at once).
"""

import triton
import triton.language as tl


@triton.jit
def _tile(tile, idx, start, end, blocks, last, n_tiles, BM: tl.constexpr):
    """First row, end of rows, column block and expert of a tile; row blocks run fastest."""
    expert = tl.sum((last * n_tiles <= tile).to(tl.int32), axis=0)
    mine = idx == expert
    m_blocks = tl.sum(tl.where(mine, blocks, 0), axis=0)
    before = tl.sum(tl.where(mine, last, 0), axis=0) - m_blocks
    local = tile - before * n_tiles
    row = tl.sum(tl.where(mine, start, 0), axis=0) + (local % m_blocks) * BM
    row_end = tl.sum(tl.where(mine, end, 0), axis=0)
    return row, row_end, local // m_blocks, expert


@triton.jit(do_not_specialize=["experts"])
def gate_up_silu(
    y, x, w, ends, experts, hidden, inter,
    EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """y[r, i] = silu(x[r] . w[e, i]) * (x[r] . w[e, inter + i]), w is [experts, 2 inter, hidden]."""
    idx = tl.arange(0, EXPERTS)
    end = tl.load(ends + idx, mask=idx < experts, other=0)
    start = tl.load(ends + idx - 1, mask=(idx > 0) & (idx < experts), other=0)
    blocks = tl.where(idx < experts, (end - start + BM - 1) // BM, 0)
    last = tl.cumsum(blocks, axis=0)
    n_tiles = inter // BN
    tiles = tl.sum(blocks, axis=0) * n_tiles
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, row_end, n, expert = _tile(tile, idx, start, end, blocks, last, n_tiles, BM)
        rows = row + tl.arange(0, BM)
        cols = n * BN + tl.arange(0, BN)
        ks = tl.arange(0, BK)
        a = x + rows[:, None] * hidden + ks[None, :]
        b = w + expert.to(tl.int64) * 2 * inter * hidden + cols[None, :] * hidden + ks[:, None]
        up_at = inter * hidden
        gate = tl.zeros((BM, BN), dtype=tl.float32)
        up = tl.zeros((BM, BN), dtype=tl.float32)
        for _ in range(0, hidden, BK):
            av = tl.load(a, mask=rows[:, None] < row_end, other=0.0)
            gate = tl.dot(av, tl.load(b), gate)
            up = tl.dot(av, tl.load(b + up_at), up)
            a += BK
            b += BK
        out = gate / (1.0 + tl.exp(-gate)) * up
        at = y + rows[:, None] * inter + cols[None, :]
        tl.store(at, out.to(y.dtype.element_ty), mask=rows[:, None] < row_end)


@triton.jit(do_not_specialize=["experts"])
def down(
    y, x, w, ends, experts, inner, outer,
    EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """y[r, n] = x[r] . w[e, n], w is [experts, outer, inner]."""
    idx = tl.arange(0, EXPERTS)
    end = tl.load(ends + idx, mask=idx < experts, other=0)
    start = tl.load(ends + idx - 1, mask=(idx > 0) & (idx < experts), other=0)
    blocks = tl.where(idx < experts, (end - start + BM - 1) // BM, 0)
    last = tl.cumsum(blocks, axis=0)
    n_tiles = outer // BN
    tiles = tl.sum(blocks, axis=0) * n_tiles
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, row_end, n, expert = _tile(tile, idx, start, end, blocks, last, n_tiles, BM)
        rows = row + tl.arange(0, BM)
        cols = n * BN + tl.arange(0, BN)
        ks = tl.arange(0, BK)
        a = x + rows[:, None] * inner + ks[None, :]
        b = w + expert.to(tl.int64) * outer * inner + cols[None, :] * inner + ks[:, None]
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for _ in range(0, inner, BK):
            av = tl.load(a, mask=rows[:, None] < row_end, other=0.0)
            acc = tl.dot(av, tl.load(b), acc)
            a += BK
            b += BK
        at = y + rows[:, None] * outer + cols[None, :]
        tl.store(at, acc.to(y.dtype.element_ty), mask=rows[:, None] < row_end)


@triton.jit
def silu_mul(y, gate_up, inter, BLOCK: tl.constexpr):
    """y[r, i] = silu(gate_up[r, i]) * gate_up[r, inter + i]; one program per (row, block)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = gate_up + row * 2 * inter + cols
    gate = tl.load(at, mask=cols < inter, other=0.0).to(tl.float32)
    up = tl.load(at + inter, mask=cols < inter, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y + row * inter + cols, out.to(y.dtype.element_ty), mask=cols < inter)
