"""What stands between the matrix products of a transformer layer, one Triton kernel each way.

`add_norm`, dropout, residual sum and LayerNorm of a block's output:

    s = residual + Z * (branch + branch_bias)      Z = 0 with probability p, else 1 / (1 - p)
    x = (s - mean(s)) * r                          r = 1 / sqrt(var(s) + eps), biased variance
    y = x * weight + bias

and backwards, with g = dy * weight (Ba et al. 2016), means over a row, sums over the rows:

    ds = r * (g - mean(g) - x * mean(g * x))       (+ the gradient of s, where s is a result)
    dresidual = ds,  dbranch = Z * ds,  dweight = sum dy * x,  dbias = sum dy
    dbranch_bias = sum dbranch                     (the product's own bias: had in passing)

`rotary`, for the halves a, b of a head and the angles of its position (Su et al. 2021, eq. 34):

    (a, b) -> (a cos - b sin, b cos + a sin)           backwards the same, sin negated

`geglu`, for the halves a, b of a row (Shazeer 2020), F and f the normal distribution and density:

    y = gelu(a) * b,  gelu(a) = a F(a);    da = dy * b * (F(a) + a f(a)),  db = dy * gelu(a)

All arithmetic is fp32, rounded once to the dtype of a result. Nothing waits for the card, nothing
is added atomically: the same input on the same card gives the same bits. Needs nothing but torch
and triton, so the file works copied alone. CUDA tensors, or CPU tensors under TRITON_INTERPRET=1.

Z comes from Philox-4x32-10 keyed by a 64-bit seed and counted by (column // 4, row, 0, site): word
column % 4 decides, its upper 24 bits against p * 2^24. So the backward pass draws the Z of the
forward pass again. kernels/flash.py counts (column // 4, row, head, site): one seed serves a whole
forward pass whose dropouts have a site each. The kernel reads the seed from the card, so that a
captured CUDA graph draws by whatever was written there since.

Checked against float64 in Triton's interpreter and on an H100, and compiled for sm_80, sm_90 and
sm_100 (tests/test_fused.py, results/gpu.md). Tiles and warps follow registers, spills and vector
loads of the compiled code, not measured time: nothing spills for hidden sizes up to 1024 (Triton
3.6 to 3.9); of the variants with 4096 a few spill up to 24 bytes a thread.
"""

import functools

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_HIDDEN = 4096
GEGLU_TILE = 1024  # numbers of the result to a program, 8 to a thread

# These change from call to call: no kernel is to be compiled anew because one is divisible by 16.
# Strides are multiples of a head's size whatever the number of rows, and vector loads need to know.
_jit = functools.partial(triton.jit, do_not_specialize=["rows", "site", "dropped"])


# ---------------------------------------------------------------------------------------- add_norm


@_jit
def _read(pointer, at, inside):
    """pointer[at] in fp32; 0 outside, and everywhere where pointer is None."""
    if pointer is None:
        return tl.zeros(at.shape, tl.float32)
    else:  # not compiled then, as what follows the branch would be
        return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@_jit
def _write(pointer, at, values, inside):
    tl.store(pointer + at, values.to(pointer.dtype.element_ty), mask=inside)


@_jit
def _z(seed, row, site, dropped, keep_scale, BLOCK: tl.constexpr):
    """Z of a row.  [BLOCK] fp32.  dropped: round(p * 2^24)"""
    zero = tl.zeros([BLOCK // 4], tl.uint32)
    quarter = zero + tl.arange(0, BLOCK // 4).to(tl.uint32)
    row, site = (zero + row).to(tl.uint32), (zero + site).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), quarter, row, zero, site)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])
    return tl.where((words >> 8).to(tl.int32) >= dropped, keep_scale, 0.0)


@_jit
def _add_norm_kernel(
    branch, residual,  # [rows, HIDDEN]
    branch_bias, weight, bias,  # [HIDDEN]; either bias or None
    first,  # [rows, HIDDEN]: y, or s where PRE_NORM
    second,  # [rows, HIDDEN]: y, or None
    total,  # [rows, HIDDEN] fp32: s, or None
    statistics,  # [rows, 2] fp32: mean and r, or None
    seed,  # [1] int64, or None without DROPOUT
    site, dropped, keep_scale, eps,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, DROPOUT: tl.constexpr, PRE_NORM: tl.constexpr,
):  # fmt: skip
    """One program per row, which it holds in registers."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    at = row * HIDDEN + columns
    s = _read(branch, at, inside) + _read(branch_bias, columns, inside)
    if DROPOUT:
        s *= _z(seed, row, site, dropped, keep_scale, BLOCK)
    s += _read(residual, at, inside)
    mean = tl.sum(s, 0) / HIDDEN
    # The rounding of that mean, over sqrt(eps), would stand in place of the 0 of a constant row.
    mean += tl.sum(tl.where(inside, s - mean, 0.0), 0) / HIDDEN
    off = tl.where(inside, s - mean, 0.0)
    r = tl.rsqrt(tl.sum(off * off, 0) / HIDDEN + eps)
    y = off * r * _read(weight, columns, inside) + _read(bias, columns, inside)
    if PRE_NORM:
        _write(first, at, s, inside)
    else:
        _write(first, at, y, inside)
    if second is not None:
        _write(second, at, y, inside)
    if total is not None:
        _write(total, at, s, inside)
    if statistics is not None:
        tl.store(statistics + 2 * row, mean)
        tl.store(statistics + 2 * row + 1, r)


@_jit
def _add_norm_backward_kernel(
    dy, dy_too,  # [rows, HIDDEN]: gradients of y, to be added; or None, dy only if both are
    ds_too,  # [rows, HIDDEN]: gradient of s as a result, or None
    total,  # [rows, HIDDEN]: s
    statistics,  # [rows, 2] fp32: mean and r
    weight,  # [HIDDEN]
    dresidual, dbranch,  # [rows, HIDDEN]; dbranch None where it would equal dresidual
    partials,  # [programs, PARTIALS, HIDDEN] fp32: sums of dweight, dbias, dbranch_bias
    seed,  # [1] int64, or None without DROPOUT
    rows, site, dropped, keep_scale,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, DROPOUT: tl.constexpr,
    BIAS: tl.constexpr, BRANCH_BIAS: tl.constexpr,
):  # fmt: skip
    """Every program takes each programs-th row, and keeps the sums over its rows in registers."""
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    w = _read(weight, columns, inside)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    dbranch_bias = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        at = row * HIDDEN + columns
        ds = _read(ds_too, at, inside)
        if dy is not None:
            mean, r = tl.load(statistics + 2 * row), tl.load(statistics + 2 * row + 1)
            x = (_read(total, at, inside) - mean) * r
            d = _read(dy, at, inside) + _read(dy_too, at, inside)
            dweight += d * x
            if BIAS:
                dbias += d
            g = d * w
            ds += r * (g - tl.sum(g, 0) / HIDDEN - x * (tl.sum(g * x, 0) / HIDDEN))
        _write(dresidual, at, ds, inside)
        if DROPOUT:
            ds *= _z(seed, row, site, dropped, keep_scale, BLOCK)
        if dbranch is not None:
            _write(dbranch, at, ds, inside)
        if BRANCH_BIAS:
            dbranch_bias += ds
    sums = partials + tl.program_id(0).to(tl.int64) * HIDDEN * (1 + BIAS + BRANCH_BIAS)
    _write(sums, columns, dweight, inside)
    if BIAS:
        _write(sums + HIDDEN, columns, dbias, inside)
    if BRANCH_BIAS:
        _write(sums + HIDDEN * (1 + BIAS), columns, dbranch_bias, inside)


def _block(hidden):
    """Columns of a program and its warps. Four columns to a thread are a counter of Philox and a
    vector of fp32; with eight of them ptxas begins to spill (Triton 3.8), and so with 32 warps."""
    block = max(16, triton.next_power_of_2(hidden))
    return {"HIDDEN": hidden, "BLOCK": block, "num_warps": min(max(block // 128, 1), 16)}


def _draws(dropout):
    """-> dropped, keep_scale"""
    dropped = round(dropout * 2**24)
    return dropped, 2**24 / (2**24 - dropped)


def _launch_add_norm(
    branch, residual, branch_bias, weight, bias, eps, dropout, seed, site, dtype, pre_norm, keep
):  # fmt: skip
    """-> (first,) or (first, second), s, statistics; these and post-norm's s None unless keep."""
    rows, hidden = branch.shape
    first = torch.empty_like(residual)
    second = total = statistics = None
    if pre_norm or dtype != residual.dtype:
        second = torch.empty_like(residual, dtype=dtype)
    if keep and not pre_norm:
        total = torch.empty_like(residual, dtype=torch.float32)
    if keep:
        statistics = torch.empty(rows, 2, dtype=torch.float32, device=branch.device)
    dropped, keep_scale = _draws(dropout)
    if rows:
        with torch.cuda.device_of(branch):
            _add_norm_kernel[rows,](
                branch, residual, branch_bias, weight, bias, first, second, total, statistics,
                seed, site, dropped, keep_scale, eps, DROPOUT=dropped > 0, PRE_NORM=pre_norm,
                **_block(hidden),
            )  # fmt: skip
    outputs = (first,) if second is None else (first, second)
    return outputs, first if pre_norm else total, statistics


def _launch_add_norm_backward(
    dy, dy_too, ds_too, total, statistics, weight, biases, dtypes, dropout, seed, site
):
    """-> dbranch, dresidual (of the dtypes), dbranch_bias, dweight, dbias; of weight and bias None
    where y has no gradient. biases: whether there is a branch_bias, a bias."""
    rows, hidden = total.shape
    if dy is None:
        dy, dy_too = dy_too, None
    dy, dy_too, ds_too = (x if x is None else x.contiguous() for x in (dy, dy_too, ds_too))
    dropped, keep_scale = _draws(dropout)
    dresidual = torch.empty_like(total, dtype=dtypes[1])
    dbranch = None
    if dropped or dtypes[0] != dtypes[1]:
        dbranch = torch.empty_like(total, dtype=dtypes[0])
    programs = min(rows, 4 * _processors(total))
    kinds = 1 + sum(biases)
    partials = torch.empty(programs, kinds, hidden, dtype=torch.float32, device=total.device)
    if rows:
        with torch.cuda.device_of(total):
            _add_norm_backward_kernel[programs,](
                dy, dy_too, ds_too, total, statistics, weight, dresidual, dbranch, partials, seed,
                rows, site, dropped, keep_scale, DROPOUT=dropped > 0, BIAS=biases[1],
                BRANCH_BIAS=biases[0], **_block(hidden),
            )  # fmt: skip
    dbranch_bias = dweight = dbias = None
    if dy is not None or biases[0]:
        sums = partials.sum(0)
        dbranch_bias = sums[-1] if biases[0] else None
        if dy is not None:
            dweight, dbias = sums[0], sums[1] if biases[1] else None
    return dresidual if dbranch is None else dbranch, dresidual, dbranch_bias, dweight, dbias


def _processors(x):
    """Multiprocessors of the card of x."""
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return 2


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, branch, residual, branch_bias, weight, bias, eps, dropout, seed, site, dtype, pre_norm
    ):  # fmt: skip
        outputs, total, statistics = _launch_add_norm(
            branch, residual, branch_bias, weight, bias, eps, dropout, seed, site, dtype, pre_norm,
            keep=True,
        )  # fmt: skip
        ctx.save_for_backward(total, statistics, weight, seed)
        ctx.dtypes = branch.dtype, residual.dtype
        ctx.biases = branch_bias is not None, bias is not None
        ctx.dropout, ctx.site, ctx.pre_norm = dropout, site, pre_norm
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, dfirst, dsecond=None):
        if dfirst is None and dsecond is None:
            return (None,) * 11
        total, statistics, weight, seed = ctx.saved_tensors
        gradients = (dsecond, None, dfirst) if ctx.pre_norm else (dfirst, dsecond, None)
        found = _launch_add_norm_backward(
            *gradients, total, statistics, weight, ctx.biases, ctx.dtypes, ctx.dropout, seed,
            ctx.site,
        )  # fmt: skip
        # Autograd casts what comes back to the dtypes of weight and biases.
        return *found, None, None, None, None, None, None


def add_norm(
    branch, residual, weight, bias, eps, *, branch_bias=None, dropout=0.0, seed=None, site=0,
    dtype=None, pre_norm=False,
):  # fmt: skip
    """Dropout of branch, its sum with residual and LayerNorm of the sum -> (first, second).

        s = residual + Z * (branch + branch_bias)
        y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

    branch, residual  [rows, hidden]  fp32, bf16 or fp16 each, hidden up to 4096
    weight, bias, branch_bias  [hidden]  fp32, bf16 or fp16; a bias that is None: 0
    dropout           probability p of Z = 0, kept to 24 bits; 0: Z = 1
    seed, site        int64 [1] on the device of branch, read by the kernel (the backward pass must
                      find it unchanged); a host integer in 0..2^31 - 1. Z follows from these two,
                      row and column. Without dropout neither is looked at.
    dtype             of second; None: that of residual

    Post-norm (BERT): first is y in the dtype of residual, second y in `dtype`, the same tensor
    where the two dtypes are equal. pre_norm (ModernBERT): first is s in the dtype of residual,
    second y in `dtype`; y and its statistics come from s before it is rounded, the gradients from
    the rounded s. Differentiable once in all five. ValueError on tensors that do not fit together.
    """
    if branch.dim() != 2 or residual.shape != branch.shape or branch.shape[1] > MAX_HIDDEN:
        shapes = f"branch {list(branch.shape)}, residual {list(residual.shape)}"
        raise ValueError(f"{shapes}: both must be [rows, hidden], hidden at most {MAX_HIDDEN}")
    tensors = [x for x in (branch, residual, branch_bias, weight, bias) if x is not None]
    if any(x.shape != branch.shape[1:] for x in tensors[2:]):
        shapes = " and ".join(str(list(x.shape)) for x in tensors[2:])
        raise ValueError(f"weight and biases {shapes}: must be [{branch.shape[1]}]")
    dtype = residual.dtype if dtype is None else dtype
    _check_floats(dtype, *tensors)
    if not 0.0 <= dropout < 1.0 - 2**-25:
        raise ValueError(f"dropout {dropout}: want a probability in [0, 1)")
    if dropout:
        if seed is None or seed.dtype != torch.int64 or seed.shape != (1,):
            raise ValueError("dropout needs a seed, an int64 tensor [1]")
        if seed.device != branch.device:
            places = f"seed on {seed.device}, branch on {branch.device}"
            raise ValueError(f"{places}: move them to one device")
        if not 0 <= site < 2**31:
            raise ValueError(f"site {site}: want an integer in 0..2^31 - 1")
    tensors = (branch, residual, branch_bias, weight, bias)
    tensors = [x if x is None else x.contiguous() for x in tensors]
    rest = eps, dropout, seed if dropout else None, site, dtype, pre_norm
    if _recording(*tensors):
        outputs = _AddNorm.apply(*tensors, *rest)
    else:
        outputs = _launch_add_norm(*tensors, *rest, keep=False)[0]
    return outputs[0], outputs[-1]


def _check_floats(dtype, *tensors):
    """ValueError unless dtype and those of the tensors are supported and all are on one device."""
    dtypes = [dtype, *(x.dtype for x in tensors)]
    if any(kind not in FLOATS for kind in dtypes):
        raise ValueError(f"{', '.join(map(str, dtypes))}: want float32, bfloat16 or float16")
    devices = {str(x.device) for x in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors on {' and '.join(sorted(devices))}: move them to one device")


def _recording(*tensors):
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


# ------------------------------------------------------------------------------------------ rotary


@_jit
def _turn(
    x, stride_token, stride_head, y, stride_y, token, cos, sin,
    TURNED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """y[token] = x[token], turned or as it is; zeros where x is None; nothing where y is None."""
    if y is not None:
        head, column = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
        inside = (head < HEADS) & (column < HALF)
        at = token * stride_token + head.to(tl.int64) * stride_head + column
        a, b = _read(x, at, inside), _read(x, at + HALF, inside)
        if TURNED:
            a, b = a * cos - b * sin, b * cos + a * sin
        at = token * stride_y + head * (2 * HALF) + column
        _write(y, at, a, inside)
        _write(y, at + HALF, b, inside)


@_jit
def _rotary_kernel(
    x0, x1, x2,  # [tokens, HEADS, 2 HALF], any strides of token and head; or None
    y0, y1, y2,  # [tokens, HEADS, 2 HALF], any stride of token; or None
    stride_t0, stride_h0, stride_t1, stride_h1, stride_t2, stride_h2, stride_y,
    cos, sin,  # [positions, 2 HALF] fp32, both halves of a row equal
    positions,  # [tokens] int32 or int64
    PARTS: tl.constexpr, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """One program per token. The first PARTS are turned (by the opposite angle if BACK)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    at = tl.load(positions + token).to(tl.int64) * (2 * HALF) + column
    c, s = _read(cos, at, column < HALF), _read(sin, at, column < HALF)
    if BACK:
        s = -s
    _turn(x0, stride_t0, stride_h0, y0, stride_y, token, c, s,
          PARTS > 0, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF)  # fmt: skip
    _turn(x1, stride_t1, stride_h1, y1, stride_y, token, c, s,
          PARTS > 1, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF)  # fmt: skip
    _turn(x2, stride_t2, stride_h2, y2, stride_y, token, c, s,
          PARTS > 2, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF)  # fmt: skip


def _launch_rotary(inputs, outputs, cos, sin, positions, parts, back):
    """Write outputs[i] [tokens, heads, d], of one stride of token, from inputs[i]; None gives 0."""
    tokens, heads, d = outputs[0].shape
    block_heads, block_half = triton.next_power_of_2(heads), triton.next_power_of_2(d // 2)
    missing = [None] * (3 - len(outputs))
    inputs, stride_y = [*inputs, *missing], outputs[0].stride(0)
    strides = [n for x in inputs for n in ((0, 0) if x is None else x.stride()[:2])]
    if tokens:
        with torch.cuda.device_of(outputs[0]):
            _rotary_kernel[tokens,](
                *inputs, *outputs, *missing, *strides, stride_y, cos, sin, positions,
                PARTS=parts, BACK=back, HEADS=heads, HALF=d // 2, BLOCK_HEADS=block_heads,
                BLOCK_HALF=block_half, num_warps=min(max(block_heads * block_half // 256, 1), 8),
            )  # fmt: skip


def _forward_rotary(x, cos, sin, positions, parts):
    inputs = x.unbind(1)
    outputs = [x.new_empty(part.shape) for part in inputs[:parts]]
    _launch_rotary(inputs[:parts], outputs, cos, sin, positions, parts, back=False)
    return *outputs, *inputs[parts:]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, positions, parts):
        ctx.save_for_backward(cos, sin, positions)
        ctx.shape, ctx.dtype, ctx.device, ctx.parts = x.shape, x.dtype, x.device, parts
        ctx.set_materialize_grads(False)
        return _forward_rotary(x, cos, sin, positions, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        dx = torch.empty(ctx.shape, dtype=ctx.dtype, device=ctx.device)
        gradients = [g if g is None or g.stride(-1) == 1 else g.contiguous() for g in gradients]
        _launch_rotary(gradients, dx.unbind(1), *ctx.saved_tensors, ctx.parts, back=True)
        return dx, None, None, None, None


def rotary(x, cos, sin, positions, *, parts):
    """Rotary position embedding of the first `parts` of q, k, v -> tuple of n [tokens, heads, d].

        (a, b) -> (a cos - b sin, b cos + a sin)     a, b: the halves of a head

    x          [tokens, n, heads, d]  fp32, bf16 or fp16; n in 1..3, d even, stride 1 of the last
    cos, sin   [positions, d]         fp32, contiguous, both halves equal (Hugging Face's tables)
    positions  [tokens]               int32 or int64, contiguous; not checked to lie in the tables

    The turned ones are new and contiguous, the rest views of x. Differentiable once in x, whose
    gradient one launch writes. ValueError on tensors that do not fit together.
    """
    if x.dim() != 4 or not 1 <= parts <= x.shape[1] <= 3 or x.shape[3] % 2 or x.stride(3) != 1:
        shape = f"x {list(x.shape)} of strides {x.stride()}, parts {parts}"
        raise ValueError(f"{shape}: want [tokens, n, heads, d], parts <= n <= 3, d even, stride 1")
    _check_floats(x.dtype, x, cos, sin)
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] != x.shape[3]:
        shapes = f"cos {list(cos.shape)}, sin {list(sin.shape)}"
        raise ValueError(f"{shapes}: both must be [positions, {x.shape[3]}]")
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in (cos, sin)):
        raise ValueError("cos and sin must be contiguous float32 tables")
    if positions.shape != x.shape[:1] or positions.dtype not in (torch.int32, torch.int64):
        kind = f"{positions.dtype} {list(positions.shape)}"
        raise ValueError(f"positions {kind}: want int32 or int64 [{x.shape[0]}]")
    if positions.device != x.device or not positions.is_contiguous():
        raise ValueError(f"positions must be contiguous and on {x.device}")
    function = _Rotary.apply if _recording(x) else _forward_rotary
    return function(x, cos, sin, positions, parts)


# ------------------------------------------------------------------------------------------- geglu


@_jit
def _places(rows, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this program's tile: where it stands in [rows, 2 HALF] (a; b is HALF further) and in
    [rows, HALF], and a mask.  [ROWS, COLUMNS] each. Tiles of the same rows follow each other."""
    across: tl.constexpr = (HALF + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < HALF)
    return row * (2 * HALF) + column, row * HALF + column, inside


@_jit
def _normal(x):
    """Distribution function of the normal distribution."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@_jit
def _geglu_kernel(
    x,  # [rows, 2 HALF]
    y,  # [rows, HALF]
    rows, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    source, target, inside = _places(rows, HALF, ROWS, COLUMNS)
    a, b = _read(x, source, inside), _read(x, source + HALF, inside)
    _write(y, target, a * _normal(a) * b, inside)


@_jit
def _geglu_backward_kernel(
    x,  # [rows, 2 HALF]
    dy,  # [rows, HALF]
    dx,  # [rows, 2 HALF]
    rows, HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    source, target, inside = _places(rows, HALF, ROWS, COLUMNS)
    a, b = _read(x, source, inside), _read(x, source + HALF, inside)
    d = _read(dy, target, inside)
    below = _normal(a)
    density = tl.exp(-0.5 * a * a) * 0.3989422804014327
    _write(dx, source, d * b * (below + a * density), inside)
    _write(dx, source + HALF, d * a * below, inside)


def _launch_geglu(kernel, *tensors):
    """tensors: x [rows, 2 n], then what the kernel takes beside it."""
    rows, half = tensors[0].shape[0], tensors[0].shape[1] // 2
    # Columns that divide n: no lane idles. If those are too few, rows are not aligned either way.
    columns = min(half & -half, GEGLU_TILE)
    if columns < 16:
        columns = min(triton.next_power_of_2(half), GEGLU_TILE)
    tile = GEGLU_TILE // columns
    if rows * half:
        with torch.cuda.device_of(tensors[0]):
            kernel[triton.cdiv(rows, tile) * triton.cdiv(half, columns),](
                *tensors, rows, HALF=half, ROWS=tile, COLUMNS=columns, num_warps=4
            )


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        y = x.new_empty(x.shape[0], x.shape[1] // 2)
        _launch_geglu(_geglu_kernel, x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        _launch_geglu(_geglu_backward_kernel, x, dy.contiguous(), dx)
        return dx


def geglu(x):
    """gelu(x[:, :n]) * x[:, n:], the exact gelu, of x [rows, 2 n] fp32, bf16 or fp16 -> [rows, n].

    Differentiable once; x alone is saved. ValueError on other shapes and dtypes.
    """
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"x {list(x.shape)}: want [rows, 2 n]")
    _check_floats(x.dtype, x)
    return _Geglu.apply(x.contiguous())
