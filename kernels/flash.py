"""Flash attention over packed sequences in Triton, with DeBERTa's disentangled bias inside.

Works copied alone.

For query row r and key column c of one sequence (r and c count from 0 in each sequence):

    s[r, c]  = (q_r . k_c + c2p[r, lut[r - c]] + p2c[c, lut[r - c]]) * scale     (tables: DeBERTa)
    P[r, c]  = softmax over the c with |r - c| <= window
    out_r    = sum_c P[r, c] * Z[r, c] * v_c           Z = 0 with probability p, else 1 / (1 - p)

and backwards, with D_r = dout_r . out_r (arXiv 2307.08691; bias: arXiv 2006.03654, 2111.09543):

    dS[r, c] = P[r, c] * (Z[r, c] * (dout_r . v_c) - D_r)
    dq_r     = scale * sum_c dS[r, c] k_c
    dk_c     = scale * sum_r dS[r, c] q_r
    dv_c     = sum_r P[r, c] Z[r, c] dout_r
    dc2p[r, t] = scale * sum of dS[r, c] over the c with lut[r - c] = t
    dp2c[c, t] = scale * sum of dS[r, c] over the r with lut[r - c] = t

No [rows, columns] matrix is ever in memory. Softmax statistics and sums are fp32; fp32 inputs are
multiplied in IEEE fp32 (no TF32). Z comes from Philox-4x32-10 keyed by the seed and counted by (key
column // 4, packed query row, head, site), so the backward pass and a repeated forward pass see the
same Z, whatever the tile sizes; site numbers the dropouts of one forward pass that share a seed.
The kernels read the seed from memory: a replayed CUDA graph takes what stands there then.

Deterministic: out, dq, dk, dv always (each element is summed by one program in a fixed order, no
atomics). dc2p and dp2c: where two keys of a row share a slot (DeBERTa-v3's log buckets: only at
|r - c| > 128) fp32 atomics add them in any order; `deterministic=True` adds them in a fixed order
instead, a few more passes over those tiles.

Checked against float64 in Triton's interpreter and on an H100 (tests/test_flash.py, results/gpu.md)
and compiled for sm_80, sm_90 and sm_100 (tests/test_flash_aot.py, `python tests/bench aot`). Tile
sizes follow registers, spills and shared memory of the compiled code: at most 4 of 135 bf16 or fp16
kernels spill, no more than 40 bytes a thread, fp32 ones no more than 80 (Triton 3.6, 3.7 and 3.9).
Of the forward kernel they were compared by time on an H200, of the backward kernels not.
"""

import functools
import math

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))

# What changes from call to call. Where it is not told to look away, Triton compiles a kernel anew
# for an integer of 1 or a multiple of 16 and for an address that is not one.
_jit_kernel = functools.partial(
    triton.jit,
    do_not_specialize=[
        "tokens_q", "blocks", "lut_centre", "dropped", "site",
        "stride_c2pt", "stride_c2ph", "stride_p2ct", "stride_p2ch",
        "CU_Q", "CU_K", "LUT", "TURN", "SEED",
    ],
)  # fmt: skip


# ---------------------------------------------------------------------------- pieces of all kernels


@triton.jit
def _load_rows(X, stride_token, rows, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of one head of one sequence, X -> [length, D]; zeros beyond length and D."""
    dims = tl.arange(0, BLOCK_D)
    inside = (rows < length)[:, None]
    if D != BLOCK_D:
        inside = inside & (dims < D)[None, :]
    where = X + rows.to(tl.int64)[:, None] * stride_token + dims[None, :]
    return tl.load(where, mask=inside, other=0.0)


@triton.jit
def _store_rows(X, stride_token, rows, length, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    inside = (rows < length)[:, None]
    if D != BLOCK_D:
        inside = inside & (dims < D)[None, :]
    where = X + rows.to(tl.int64)[:, None] * stride_token + dims[None, :]
    tl.store(where, values.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _scores(qk, r, c, length_q, length_k, scale, window, C2P, P2C, LUT, lut_centre, stride_c2p,
            stride_p2c, WINDOW: tl.constexpr, BIAS: tl.constexpr):
    """s * log2(e) from a tile of products, -inf outside sequence or window; a mask, True inside.

    r and c are [n, 1] and [1, m] or the other way round: the tile may be transposed.
    """
    inside = (r < length_q) & (c < length_k)
    if WINDOW:
        inside = inside & (r - c <= window) & (c - r <= window)
    if BIAS:
        slot = tl.load(LUT + (r - c + lut_centre), mask=inside, other=0)
        of_row = C2P + r.to(tl.int64) * stride_c2p + slot
        of_column = P2C + c.to(tl.int64) * stride_p2c + slot
        qk += tl.load(of_row, mask=inside, other=0.0).to(tl.float32)
        qk += tl.load(of_column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, qk * (scale * LOG2E), float("-inf")), inside


@triton.jit
def _keep(seed, site, head, packed_row, first_column, dropped, ROWS: tl.constexpr,
          COLUMNS: tl.constexpr):  # fmt: skip
    """[ROWS, COLUMNS]: whether Z[r, c] > 0 for the query rows and the keys from first_column on.

    first_column is a multiple of 4.
    Philox gives four 32-bit words per counter: word i of counter (c // 4, packed row, head, site)
    decides column 4 (c // 4) + i. dropped: round(dropout * 2^24), compared with the word's upper 24
    bits.
    """
    zero = tl.zeros([ROWS, COLUMNS // 4], tl.uint32)
    quarter = (first_column // 4 + tl.arange(0, COLUMNS // 4))[None, :].to(tl.uint32)
    row, head = zero + packed_row[:, None].to(tl.uint32), zero + head.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, zero + quarter, row, head, zero + site.to(tl.uint32))
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [ROWS, COLUMNS])
    return (words >> 8).to(tl.int32) >= dropped


@triton.jit
def _add_to_table(TABLE, slots_of_row, turn, ds, inside, DETERMINISTIC: tl.constexpr):
    """TABLE[row, slot] += ds, where elements of a row may share a slot.

    Only this program writes these rows. turn: a number below the tile's length that differs between
    the elements of a row that share a slot.
    """
    if DETERMINISTIC:
        for t in range(0, tl.max(tl.max(tl.where(inside, turn, -1), 1), 0) + 1):
            now = inside & (turn == t)
            # the sums of the previous turn, stored by other threads, are visible after it
            tl.debug_barrier()
            before = tl.load(TABLE + slots_of_row, mask=now, other=0.0)
            tl.store(TABLE + slots_of_row, before + ds, mask=now)
        tl.debug_barrier()
    else:
        tl.atomic_add(TABLE + slots_of_row, ds, mask=inside, sem="relaxed")


# ----------------------------------------------------------------------------------- forward kernel
# One program: BLOCK_Q query rows of one head of one sequence. Grid [sequences * blocks, heads].


@_jit_kernel
def _forward_kernel(
    Q,  # [tokens_q, heads, D]
    K, V,  # [tokens_k, heads, D]
    OUT,  # [tokens_q, heads, D]
    LSE,  # [heads, tokens_q] fp32: log2 of sum_c 2^(s log2 e)
    CU_Q, CU_K,  # [sequences + 1] int32
    C2P,  # [tokens_q, heads, slots]
    P2C,  # [tokens_k, heads, slots]
    LUT,  # [2 lut_centre + 1] int32
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_c2pt, stride_c2ph, stride_p2ct, stride_p2ch,
    tokens_q, blocks, lut_centre, window,
    scale, dropped, keep_scale,
    SEED,  # [1] int64, None without dropout
    site,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    first_row = (tl.program_id(0) % blocks) * BLOCK_Q
    start_q, start_k = tl.load(CU_Q + sequence).to(tl.int64), tl.load(CU_K + sequence).to(tl.int64)
    length_q = (tl.load(CU_Q + sequence + 1) - start_q).to(tl.int32)
    length_k = (tl.load(CU_K + sequence + 1) - start_k).to(tl.int32)
    if first_row >= length_q:
        return
    Q += start_q * stride_qt + head * stride_qh
    K += start_k * stride_kt + head * stride_kh
    V += start_k * stride_vt + head * stride_vh
    OUT += start_q * stride_ot + head * stride_oh
    LSE += head * tokens_q + start_q
    if BIAS:
        C2P += start_q * stride_c2pt + head * stride_c2ph
        P2C += start_k * stride_p2ct + head * stride_p2ch

    rows = first_row + tl.arange(0, BLOCK_Q)
    q = _load_rows(Q, stride_qt, rows, length_q, D, BLOCK_D)
    # finite: a row whose keys are all masked stays free of NaN
    highest = tl.full([BLOCK_Q], -1e38, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if DROPOUT:
        seed = tl.load(SEED)

    begin, end = 0, length_k
    if WINDOW:
        begin = tl.maximum(first_row - window, 0) // BLOCK_K * BLOCK_K
        end = tl.minimum(first_row + BLOCK_Q + window, length_k)
    for first_column in range(begin, end, BLOCK_K):
        columns = first_column + tl.arange(0, BLOCK_K)
        k = _load_rows(K, stride_kt, columns, length_k, D, BLOCK_D)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        s, _ = _scores(qk, rows[:, None], columns[None, :], length_q, length_k, scale, window, C2P,
                       P2C, LUT, lut_centre, stride_c2pt, stride_p2ct, WINDOW, BIAS)  # fmt: skip
        new_highest = tl.maximum(highest, tl.max(s, 1))
        shrink = tl.exp2(highest - new_highest)
        p = tl.exp2(s - new_highest[:, None])
        total = total * shrink + tl.sum(p, 1)
        highest = new_highest
        if DROPOUT:
            keep = _keep(seed, site, head, start_q + rows, first_column, dropped, BLOCK_Q, BLOCK_K)
            p = tl.where(keep, p, 0.0)
        v = _load_rows(V, stride_vt, columns, length_k, D, BLOCK_D)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")

    no_key = total == 0.0
    total = tl.where(no_key, 1.0, total)
    out = out * (keep_scale / total)[:, None]
    _store_rows(OUT, stride_ot, rows, length_q, out, D, BLOCK_D)
    tl.store(LSE + rows, tl.where(no_key, 0.0, highest + tl.log2(total)), mask=rows < length_q)


# --------------------------------------------------------------------------------- backward kernels
# dq, dc2p and D: one program per BLOCK_Q query rows, as forward. dk, dv and dp2c: one program per
# BLOCK_K keys. They read the seed at every tile: read before the loop, its round keys fill
# registers that spill.


@_jit_kernel
def _backward_q_kernel(  # noqa: PLR0915 (one pass over the tiles of a row: nothing to take apart)
    Q,  # [tokens_q, heads, D]
    K, V,  # [tokens_k, heads, D]
    OUT, DOUT,  # [tokens_q, heads, D]
    LSE, DELTA,  # [heads, tokens_q] fp32; DELTA = D_r is written here and read by the next kernel
    DQ,  # [tokens_q, heads, D]
    CU_Q, CU_K,  # [sequences + 1] int32
    C2P, DC2P,  # [tokens_q, heads, slots]; DC2P fp32, zeros, strides of C2P
    P2C,  # [tokens_k, heads, slots]
    LUT, TURN,  # [2 lut_centre + 1] int32
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_dot, stride_doh, stride_dqt, stride_dqh,
    stride_c2pt, stride_c2ph, stride_p2ct, stride_p2ch,
    tokens_q, blocks, lut_centre, window,
    scale, dropped, keep_scale,
    SEED,  # [1] int64, None without dropout
    site,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    first_row = (tl.program_id(0) % blocks) * BLOCK_Q
    start_q, start_k = tl.load(CU_Q + sequence).to(tl.int64), tl.load(CU_K + sequence).to(tl.int64)
    length_q = (tl.load(CU_Q + sequence + 1) - start_q).to(tl.int32)
    length_k = (tl.load(CU_K + sequence + 1) - start_k).to(tl.int32)
    if first_row >= length_q:
        return
    Q += start_q * stride_qt + head * stride_qh
    K += start_k * stride_kt + head * stride_kh
    V += start_k * stride_vt + head * stride_vh
    OUT += start_q * stride_ot + head * stride_oh
    DOUT += start_q * stride_dot + head * stride_doh
    DQ += start_q * stride_dqt + head * stride_dqh
    LSE += head * tokens_q + start_q
    DELTA += head * tokens_q + start_q
    if BIAS:
        C2P += start_q * stride_c2pt + head * stride_c2ph
        DC2P += start_q * stride_c2pt + head * stride_c2ph
        P2C += start_k * stride_p2ct + head * stride_p2ch

    rows = first_row + tl.arange(0, BLOCK_Q)
    q = _load_rows(Q, stride_qt, rows, length_q, D, BLOCK_D)
    dout = _load_rows(DOUT, stride_dot, rows, length_q, D, BLOCK_D)
    out = _load_rows(OUT, stride_ot, rows, length_q, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(DELTA + rows, delta, mask=rows < length_q)
    lse = tl.load(LSE + rows, mask=rows < length_q, other=0.0)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    begin, end = 0, length_k
    if WINDOW:
        begin = tl.maximum(first_row - window, 0) // BLOCK_K * BLOCK_K
        end = tl.minimum(first_row + BLOCK_Q + window, length_k)
    for first_column in range(begin, end, BLOCK_K):
        columns = first_column + tl.arange(0, BLOCK_K)
        r, c = rows[:, None], columns[None, :]
        k = _load_rows(K, stride_kt, columns, length_k, D, BLOCK_D)
        v = _load_rows(V, stride_vt, columns, length_k, D, BLOCK_D)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        s, inside = _scores(qk, r, c, length_q, length_k, scale, window, C2P, P2C, LUT, lut_centre,
                            stride_c2pt, stride_p2ct, WINDOW, BIAS)  # fmt: skip
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee") * keep_scale
        if DROPOUT:
            seed = tl.load(SEED)
            keep = _keep(seed, site, head, start_q + rows, first_column, dropped, BLOCK_Q, BLOCK_K)
            dp = tl.where(keep, dp, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        if BIAS:
            slot = tl.load(LUT + (r - c + lut_centre), mask=inside, other=0)
            turn = slot
            if DETERMINISTIC:
                turn = tl.load(TURN + (r - c + lut_centre), mask=inside, other=0) % BLOCK_K
            slots_of_row = r.to(tl.int64) * stride_c2pt + slot
            _add_to_table(DC2P, slots_of_row, turn, ds * scale, inside, DETERMINISTIC)

    _store_rows(DQ, stride_dqt, rows, length_q, dq * scale, D, BLOCK_D)


@_jit_kernel
def _backward_kv_kernel(  # noqa: PLR0915 (one pass over the tiles of a column, likewise)
    Q,  # [tokens_q, heads, D]
    K, V,  # [tokens_k, heads, D]
    DOUT,  # [tokens_q, heads, D]
    LSE, DELTA,  # [heads, tokens_q] fp32
    DK, DV,  # [tokens_k, heads, D]
    CU_Q, CU_K,  # [sequences + 1] int32
    C2P,  # [tokens_q, heads, slots]
    P2C, DP2C,  # [tokens_k, heads, slots]; DP2C fp32, zeros, strides of P2C
    LUT, TURN,  # [2 lut_centre + 1] int32
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_dot, stride_doh, stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    stride_c2pt, stride_c2ph, stride_p2ct, stride_p2ch,
    tokens_q, blocks, lut_centre, window,
    scale, dropped, keep_scale,
    SEED,  # [1] int64, None without dropout
    site,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    first_column = (tl.program_id(0) % blocks) * BLOCK_K
    start_q, start_k = tl.load(CU_Q + sequence).to(tl.int64), tl.load(CU_K + sequence).to(tl.int64)
    length_q = (tl.load(CU_Q + sequence + 1) - start_q).to(tl.int32)
    length_k = (tl.load(CU_K + sequence + 1) - start_k).to(tl.int32)
    if first_column >= length_k:
        return
    Q += start_q * stride_qt + head * stride_qh
    K += start_k * stride_kt + head * stride_kh
    V += start_k * stride_vt + head * stride_vh
    DOUT += start_q * stride_dot + head * stride_doh
    DK += start_k * stride_dkt + head * stride_dkh
    DV += start_k * stride_dvt + head * stride_dvh
    LSE += head * tokens_q + start_q
    DELTA += head * tokens_q + start_q
    if BIAS:
        C2P += start_q * stride_c2pt + head * stride_c2ph
        P2C += start_k * stride_p2ct + head * stride_p2ch
        DP2C += start_k * stride_p2ct + head * stride_p2ch

    columns = first_column + tl.arange(0, BLOCK_K)
    k = _load_rows(K, stride_kt, columns, length_k, D, BLOCK_D)
    v = _load_rows(V, stride_vt, columns, length_k, D, BLOCK_D)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)

    begin, end = 0, length_q
    if WINDOW:
        begin = tl.maximum(first_column - window, 0) // BLOCK_Q * BLOCK_Q
        end = tl.minimum(first_column + BLOCK_K + window, length_q)
    # Tiles are [keys, queries] here: p and ds enter the products as they are.
    for first_row in range(begin, end, BLOCK_Q):
        rows = first_row + tl.arange(0, BLOCK_Q)
        r, c = rows[None, :], columns[:, None]
        q = _load_rows(Q, stride_qt, rows, length_q, D, BLOCK_D)
        dout = _load_rows(DOUT, stride_dot, rows, length_q, D, BLOCK_D)
        lse = tl.load(LSE + rows, mask=rows < length_q, other=0.0)
        delta = tl.load(DELTA + rows, mask=rows < length_q, other=0.0)
        qk = tl.dot(k, tl.trans(q), input_precision="ieee")
        s, inside = _scores(qk, r, c, length_q, length_k, scale, window, C2P, P2C, LUT, lut_centre,
                            stride_c2pt, stride_p2ct, WINDOW, BIAS)  # fmt: skip
        p = tl.exp2(s - lse[None, :])
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee") * keep_scale
        z = p * keep_scale
        if DROPOUT:
            seed = tl.load(SEED)
            keep = _keep(seed, site, head, start_q + rows, first_column, dropped, BLOCK_Q, BLOCK_K)
            keep = tl.trans(keep)
            dp = tl.where(keep, dp, 0.0)
            z = tl.where(keep, z, 0.0)
        dv = tl.dot(z.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        if BIAS:
            slot = tl.load(LUT + (r - c + lut_centre), mask=inside, other=0)
            turn = slot
            if DETERMINISTIC:
                turn = tl.load(TURN + (r - c + lut_centre), mask=inside, other=0) % BLOCK_Q
            slots_of_column = c.to(tl.int64) * stride_p2ct + slot
            _add_to_table(DP2C, slots_of_column, turn, ds * scale, inside, DETERMINISTIC)

    _store_rows(DK, stride_dkt, columns, length_k, dk * scale, D, BLOCK_D)
    _store_rows(DV, stride_dvt, columns, length_k, dv, D, BLOCK_D)


# ---------------------------------------------------------------------------------------- launchers


def _tiles(q, max_seqlen_q, bias, keys_stay=False):
    """Tile sizes, warps and stages of one kernel; keys_stay: its programs own keys, not rows.

    The longer side is the one that stays on chip, the rows of every product; but DeBERTa's scatter
    to dp2c spills on sm_80 with 64 keys. Eight warps where four would spill. The cost on each card:
    `python tests/bench aot`.
    """
    block_d = max(16, triton.next_power_of_2(q.shape[-1]))
    longer = 32 if q.dtype == torch.float32 else 64  # 64 rows of 128 fp32 numbers spill kilobytes
    block_q, block_k = (32, longer) if keys_stay and not bias else (longer, 32)
    # a [CLS]-only layer: one query row per sequence, and 16 is the least a matrix product takes
    if max_seqlen_q <= 16:
        block_q = 16
    warps = 8 if bias or block_d > 64 or q.dtype == torch.float32 else 4
    return dict(BLOCK_D=block_d, BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=warps, num_stages=2)


def _shared_arguments(q, max_seqlen, block, lut, scale, window, dropout, seed, site):
    """What all kernels take after their strides: sizes, centre of lut, window, scale, dropout."""
    blocks = triton.cdiv(max_seqlen, block)
    centre = 0 if lut is None else (lut.shape[0] - 1) // 2
    dropped = round(dropout * 2**24)
    keep_scale = 2**24 / (2**24 - dropped)
    return q.shape[0], blocks, centre, window, scale, dropped, keep_scale, seed, site


def _token_head(*tensors):
    """Strides of token and head of each [tokens, heads, n] tensor (0, 0 for None)."""
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])]


def launch_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, window,
                   c2p, p2c, lut, dropout, seed, site):  # fmt: skip
    """out like q, contiguous, and lse [heads, tokens_q] fp32.

    window -1: all keys. seed: int64 tensor [1], None without dropout.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    sequences = cu_seqlens_q.shape[0] - 1
    tiles = _tiles(q, max_seqlen_q, c2p is not None)
    shared = _shared_arguments(
        q, max_seqlen_q, tiles["BLOCK_Q"], lut, scale, window, dropout, seed, site
    )
    grid = (sequences * shared[1], q.shape[1])
    if grid[0] > 0:
        with torch.cuda.device_of(q):
            _forward_kernel[grid](
                q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, c2p, p2c, lut,
                *_token_head(q, k, v, out, c2p, p2c), *shared,
                D=q.shape[2], WINDOW=window >= 0, BIAS=c2p is not None, DROPOUT=dropout > 0.0,
                **tiles,
            )  # fmt: skip
    return out, lse


def launch_backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                    scale, window, c2p, p2c, lut, dropout, seed, site, deterministic):  # fmt: skip
    """[dq, dk, dv] contiguous, and with tables [.., dc2p, dp2c] in the tables' dtype and strides.

    The latter are views of one buffer: so one launch fills, and one casts, both.
    """
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    dc2p = dp2c = turn = None
    if c2p is not None:
        size = _second_table(c2p) + p2c.numel()
        both = torch.zeros(size, dtype=torch.float32, device=q.device)
        dc2p, dp2c = _as_tables(both, c2p, p2c)
        if deterministic:
            turn = _turns(lut)
    flags = dict(D=q.shape[2], WINDOW=window >= 0, BIAS=c2p is not None, DROPOUT=dropout > 0.0,
                 DETERMINISTIC=deterministic)  # fmt: skip
    sequences = cu_seqlens_q.shape[0] - 1

    with torch.cuda.device_of(q):
        tiles = _tiles(q, max_seqlen_q, c2p is not None)
        shared = _shared_arguments(
            q, max_seqlen_q, tiles["BLOCK_Q"], lut, scale, window, dropout, seed, site
        )
        grid = (sequences * shared[1], q.shape[1])
        if grid[0] > 0:
            _backward_q_kernel[grid](
                q, k, v, out, dout, lse, delta, dq, cu_seqlens_q, cu_seqlens_k,
                c2p, dc2p, p2c, lut, turn,
                *_token_head(q, k, v, out, dout, dq, c2p, p2c), *shared, **flags, **tiles,
            )  # fmt: skip

        tiles = _tiles(q, max_seqlen_q, c2p is not None, keys_stay=True)
        shared = _shared_arguments(
            q, max_seqlen_k, tiles["BLOCK_K"], lut, scale, window, dropout, seed, site
        )
        grid = (sequences * shared[1], q.shape[1])
        if grid[0] > 0:
            _backward_kv_kernel[grid](
                q, k, v, dout, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k,
                c2p, p2c, dp2c, lut, turn,
                *_token_head(q, k, v, dout, dk, dv, c2p, p2c), *shared, **flags, **tiles,
            )  # fmt: skip
    if c2p is None:
        return [dq, dk, dv]
    return [dq, dk, dv, *_as_tables(both.to(c2p.dtype), c2p, p2c)]


def _second_table(c2p):
    """Where the second table starts in a buffer of both: on 128 bytes, in 16-bit numbers too."""
    return triton.cdiv(c2p.numel(), 64) * 64


def _as_tables(both, c2p, p2c):
    """Views of a buffer [_second_table(c2p) + elements of p2c], laid out as the two tables are."""
    first = both.as_strided(c2p.shape, c2p.stride(), 0)
    return first, both.as_strided(p2c.shape, p2c.stride(), _second_table(c2p))


def _turns(lut):
    """How many smaller deltas have the same slot, for each delta of lut.

    Over n consecutive deltas the turns of one slot are consecutive numbers, so turn % n tells apart
    all elements of a tile's row that share it.
    """
    in_order, order = torch.sort(lut, stable=True)
    turn = torch.arange(lut.shape[0], device=lut.device) - torch.searchsorted(in_order, in_order)
    return torch.empty_like(lut).scatter_(0, order, turn.to(lut.dtype))


# ----------------------------------------------------------------------------------------- autograd
# Custom operators under torch.compile, which takes a call as one opaque node instead of tracing
# into it; an autograd.Function in eager, where an operator costs the host several times as much.


@torch.library.custom_op("kernels_flash::forward", mutates_args=())
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, scale: float, window: int,
    c2p: torch.Tensor | None, p2c: torch.Tensor | None, lut: torch.Tensor | None, dropout: float,
    seed: torch.Tensor | None, site: int, deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return launch_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
                          window, c2p, p2c, lut, dropout, seed, site)  # fmt: skip


@_forward.register_fake
def _(q, k, v, *_):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("kernels_flash::backward", mutates_args=())
def _backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int,
    max_seqlen_k: int, scale: float, window: int, c2p: torch.Tensor | None,
    p2c: torch.Tensor | None, lut: torch.Tensor | None, dropout: float, seed: torch.Tensor | None,
    site: int, deterministic: bool,
) -> list[torch.Tensor]:  # fmt: skip
    grads = launch_backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                            max_seqlen_k, scale, window, c2p, p2c, lut, dropout, seed, site,
                            deterministic)  # fmt: skip
    return grads if c2p is None else [*grads[:4], grads[4].clone()]  # results must not share memory


@_backward.register_fake
def _(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
      window, c2p, p2c, *_):
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    return grads if c2p is None else grads + [torch.empty_like(c2p), torch.empty_like(p2c)]


def _save(ctx, inputs, output):
    q, k, v, cu_q, cu_k, max_q, max_k, scale, window, c2p, p2c, lut, dropout, seed, *last = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, c2p, p2c, lut, seed)
    ctx.host = max_q, max_k, scale, window, dropout, *last


def _gradients(ctx, dout, _dlse=None, *, backward=_backward):
    q, k, v, out, lse, cu_q, cu_k, c2p, p2c, lut, seed = ctx.saved_tensors
    max_q, max_k, scale, window, dropout, site, deterministic = ctx.host
    grads = backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, window, c2p, p2c,
                     lut, dropout, seed, site, deterministic)  # fmt: skip
    dq, dk, dv, dc2p, dp2c = grads if c2p is not None else [*grads, None, None]
    return dq, dk, dv, *[None] * 6, dc2p, dp2c, *[None] * 5


_forward.register_autograd(_gradients, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same without the dispatcher: the arguments of the operator -> out."""

    @staticmethod
    def forward(ctx, *inputs):
        out, lse = launch_forward(*inputs[:-1])
        if any(ctx.needs_input_grad):
            _save(ctx, inputs, (out, lse))
        return out

    @staticmethod
    def backward(ctx, dout):
        # With create_graph the operator runs: it refuses to be differentiated once more.
        backward = _backward if torch.is_grad_enabled() else launch_backward
        return _gradients(ctx, dout, backward=backward)


def flash_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, scale=None,
                 window=None, c2p=None, p2c=None, lut=None, dropout=0.0, seed=0, site=0,
                 deterministic=False):  # fmt: skip
    """Attention of each packed sequence over itself; the formulas stand at the top of this file.

    q [tokens_q, heads, d], k and v [tokens_k, heads, d], fp32, bf16 or fp16, d at most 128, last
        dimension contiguous (a slice of a fused qkv product is fine); on CUDA, or on the CPU under
        TRITON_INTERPRET=1.
    cu_seqlens_q, cu_seqlens_k [sequences + 1] int32 on the same device: sequence i is rows cu[i]
        to cu[i + 1]; first 0, last the number of tokens. Empty sequences are allowed. Query row r
        and key column c of a sequence have positions r and c, so one query row per sequence is its
        [CLS].
    max_seqlen_q, max_seqlen_k: host integers, at least the longest (rows beyond them are not
        computed).
    scale: default d ** -0.5 (DeBERTa with both tables: (3 d) ** -0.5). window: keys with
        |r - c| <= window, None for all. A query row without any key gives zeros.
    c2p [tokens_q, heads, slots], p2c [tokens_k, heads, slots], lut int32 [2 M - 1]: DeBERTa's
        content-to-position and position-to-content products and the slot of delta = r - c at
        lut[delta + M - 1]; M at least both max_seqlen.
    dropout: probability in [0, 1), kept to 24 bits. seed: a 64-bit integer, or an int64 tensor [1]
        on q's device that the kernels read, so it stays as it is until backward has run; site: host
        integer in [0, 2^31), the number of this dropout within a forward pass. The same seed, site
        and packing give the same mask.
    deterministic: fixed order of summation of dc2p and dp2c too (all else is always in a fixed
        order).
    Returns out like q, contiguous. Differentiable in q, k, v, c2p, p2c. Never synchronises with the
    device. ValueError on tensors that do not fit together.
    """
    tables = (c2p, p2c, lut)
    if any(x is None for x in tables) and any(x is not None for x in tables):
        raise ValueError("c2p, p2c and lut come together: give all three or none")
    _check_sequences(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _check_dropout(q, dropout, seed)
    if c2p is not None:
        _check_tables(q, k, c2p, p2c, lut, max(max_seqlen_q, max_seqlen_k))
        # tokens or heads first and no gaps, as their gradients, laid out alike, share a buffer
        c2p, p2c = (x if x.transpose(0, 1).is_contiguous() else x.contiguous() for x in (c2p, p2c))
        lut = lut.contiguous()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    window = -1 if window is None else int(window)
    if dropout == 0.0:
        seed = None
    elif not isinstance(seed, torch.Tensor):
        seed = torch.full((1,), seed, dtype=torch.int64, device=q.device)
    arguments = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, window,
                 c2p, p2c, lut, float(dropout), seed, site, deterministic)  # fmt: skip
    if torch.compiler.is_compiling():
        return _forward(*arguments)[0]
    return _Eager.apply(*arguments)


def _check_sequences(q, k, v, cu_seqlens_q, cu_seqlens_k):
    _, _, d = q.shape
    if k.shape != v.shape or k.shape[1:] != q.shape[1:]:
        shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        raise ValueError(f"{shapes}: want [tokens, heads, d], same heads and d")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if not q.dtype == k.dtype == v.dtype or q.dtype not in dtypes:
        given = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
        raise ValueError(f"{given}: want one of float32, bfloat16, float16 for all")
    if d > 128:
        raise ValueError(f"head dimension {d}: at most 128")
    integers = cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    if not integers or cu_seqlens_q.shape != cu_seqlens_k.shape:
        want = "want int32 [sequences + 1], both of the same length"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k: {want}")


def _check_dropout(q, dropout, seed):
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout {dropout}: want a probability in [0, 1)")
    if isinstance(seed, torch.Tensor) and (
        seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != q.device
    ):
        given = f"seed {seed.dtype} {list(seed.shape)} on {seed.device}"
        raise ValueError(f"{given}: want an integer or int64 [1] on {q.device}")


def _check_tables(q, k, c2p, p2c, lut, longest):
    fit = c2p.shape[:2] == q.shape[:2] and p2c.shape[:2] == k.shape[:2]
    if not fit or c2p.shape[2] != p2c.shape[2]:
        shapes = f"c2p {list(c2p.shape)}, p2c {list(p2c.shape)}"
        raise ValueError(f"{shapes}: want [tokens, heads, slots] of q and of k")
    if c2p.dtype != p2c.dtype:
        raise ValueError(f"c2p {c2p.dtype}, p2c {p2c.dtype}: want one dtype")
    if lut.dtype != torch.int32 or lut.ndim != 1 or lut.shape[0] < 2 * longest - 1:
        given = f"lut {lut.dtype} {list(lut.shape)}"
        raise ValueError(f"{given}: want int32 [2 M - 1], M at least both max_seqlen")
