"""`values` of `python tests/bench gpu`: the kernels against their formulas in float64.

A case is (run, exact, leaves): run(*leaves) and exact(*leaves in float64) give the same tensors,
and their gradients are compared too.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from bench.clock import alternate
from bench.section import by_attention, relative
from kernels import losses
from kernels.attention import dropout_from, varlen_attention

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative errors beyond these are faults


def values(section):
    """The speed of the card itself; then every loss, attention and fused kernel in fp32 and bf16
    against its formula in float64: |x - y| / |y| of outputs and of gradients. Needs torch and
    triton."""
    with section.tolerates("the card"):
        speed(section)
    dtypes = (torch.bfloat16, torch.float32) if section.cuda else (torch.float32,)
    for dtype in dtypes:
        for cases in (loss_cases, attention_cases, fused_cases):
            with section.tolerates(cases.__name__, str(dtype)):
                for name, make in cases(section, dtype).items():
                    with section.tolerates(name, str(dtype)):
                        compare(section, name, dtype, *make())


def speed(section):
    """What the card reaches: the ceilings of all that follows."""
    size, numbers = (256, 2**20) if section.tiny else (8192, 2**30)
    x = torch.randn(numbers, device=section.device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    a, b = torch.randn(2, size, size, device=section.device, dtype=torch.bfloat16)
    sides = {"copy": lambda: y.copy_(x), "product": lambda: a @ b}
    seconds = {name: t.seconds for name, t in alternate(sides, 5, section.device, 5).items()}
    total = math.nan
    if section.cuda:
        total = torch.cuda.get_device_properties(section.device).total_memory / 2**30
    section.row("The card", {
        "GiB": total, "copy TB/s": 4 * numbers / seconds["copy"] / 1e12,
        f"bf16 {size}^3 TFLOP/s": 2 * size**3 / seconds["product"] / 1e12})  # fmt: skip


def compare(section, name, dtype, run, exact, leaves):
    """A row of the errors of one case."""
    torch.manual_seed(0)
    got, upstream = outputs_and_gradients(run, leaves)
    want, _ = outputs_and_gradients(exact, [leaf.double() for leaf in leaves], upstream)
    errors = [max(map(relative, *both)) for both in zip(got, want, strict=True)]
    kind = str(dtype).removeprefix("torch.")
    section.row("Relative errors against float64", {
        "what": name, "dtype": kind, "outputs": errors[0], "gradients": errors[1]})  # fmt: skip
    if not max(errors) <= BOUNDS[dtype]:  # as NaN is not either
        section.error(f"{name}, {kind}", f"error {max(errors):.1e}, {BOUNDS[dtype]:.0e} is allowed")


def outputs_and_gradients(function, leaves, upstream=None):
    """((outputs, gradients of leaves), the outputs' gradients that were given or drawn)."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if upstream is None:
        upstream = [torch.randn_like(out) for out in outputs]
    given = [g.to(out.dtype) for g, out in zip(upstream, outputs, strict=True)]
    return (outputs, torch.autograd.grad(outputs, leaves, given)), upstream


def normal(seed):
    """A function that draws tensors of the normal distribution, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def loss_cases(section, dtype):
    """{name: function that makes the case} of every loss, over lists of all kinds of lengths."""
    losses._kernels = True  # on a CPU too, interpreted; float64 takes the formula always
    lengths = torch.tensor([1, 3, 20] if section.tiny else [1, 2, 7, 64, 100, 1000])
    draw, shape = normal(1), (len(lengths), int(lengths.max()))
    scores = (3 * draw(*shape)).to(section.device, dtype)
    targets, lengths = draw(*shape).to(section.device), lengths.to(section.device)
    labels = (targets > 0.8).float()

    def make(function, goal, **options):
        loss = partial(function, targets=goal, lengths=lengths, **options)
        return loss, loss, [scores]

    cases = {}
    for name, function in losses.LOSSES.items():
        goal = labels if name in ("bce", "hinge", "infonce") else targets
        cases[f"loss {name}"] = partial(make, function, goal)
    cases["loss marginmse, all pairs"] = partial(make, losses.marginmse, targets, pairs="all")
    return cases


def attention_cases(section, dtype):
    """The same of kernels.flash in all its forms, and of torch's FlashAttention-2 in those it
    has."""
    forms = {
        "": {},
        "head of 32": {"d": 32},
        "window": {"window": 8 if section.tiny else 64},
        "[CLS] row": {"cls": True},
        "dropout": {"dropout": 0.1},
        "bias": {"slots": 64},
        "bias, dropout": {"slots": 64, "dropout": 0.1},
        "bias, deterministic": {"slots": 64, "deterministic": True},
    }
    cases = {}
    for name, form in forms.items():
        cases[f"attention {name}"] = lambda form=form: Attention(section, dtype, **form).case()
        if section.cuda and dtype == torch.bfloat16 and "slots" not in form:
            cases[f"torch's attention {name}"] = lambda form=form: Attention(
                section, dtype, **form
            ).case(torchs=True)
    return cases


class Attention:
    """One problem of attention over packed sequences, its kernels and its formula."""

    def __init__(self, section, dtype, d=64, cls=False, slots=0, window=None, dropout=0.0,
                 deterministic=False):  # fmt: skip
        self.device, self.window, self.dropout = section.device, window, dropout
        self.deterministic, self.scale = deterministic, (3 * d if slots else d) ** -0.5
        self.lengths = [1, 7, 33] if section.tiny else [1, 90, 200, 17, 300, 64]
        self.rows = [1] * len(self.lengths) if cls else self.lengths
        rows, keys, heads = sum(self.rows), sum(self.lengths), 2 if section.tiny else 4
        shapes = [(rows, heads, d), (keys, heads, d), (keys, heads, d)]
        if slots:
            shapes += [(rows, heads, slots), (keys, heads, slots)]
        draw = normal(2)
        self.leaves = [draw(*shape).to(self.device, dtype) for shape in shapes]
        reach = 2 * max(self.lengths) - 1
        self.lut = torch.arange(reach, device=self.device).mul(slots).div(reach).int()
        self.cu_rows, self.cu_keys = (
            torch.tensor([0, *lengths], device=self.device).cumsum(0).int()
            for lengths in (self.rows, self.lengths)
        )

    def case(self, torchs=False):
        run = self.by_torch if torchs else self.by_flash
        kept = self.kept(run) if self.dropout else None
        return run, partial(self.exact, kept), self.leaves

    def by_flash(self, q, k, v, *tables):
        from kernels.flash import flash_varlen

        bias = {}
        if tables:
            bias = {"c2p": tables[0], "p2c": tables[1], "lut": self.lut}
        return flash_varlen(q, k, v, self.cu_rows, self.cu_keys, max(self.rows), max(self.lengths),
                            scale=self.scale, window=self.window, dropout=self.dropout, seed=7,
                            deterministic=self.deterministic, **bias)  # fmt: skip

    def by_torch(self, q, k, v):
        one_row = {}
        if self.rows != self.lengths:
            one_row = {"cu_seqlens_q": self.cu_rows, "max_seqlen_q": 1}
        how = {"scale": self.scale, "window": self.window, "dropout": self.dropout}
        with by_attention("torch"), dropout_from(7, self.device):
            return varlen_attention(q, k, v, self.cu_keys, max(self.lengths), **how, **one_row)

    def kept(self, run):
        """Z [rows, heads, keys], 0 or 1 / (1 - p), as run() draws it: read off outputs whose values
        mark the keys, as many at a time as a head has dimensions."""
        q, k, v, *tables = self.leaves
        place = torch.cat([torch.arange(n, device=self.device) for n in self.lengths])
        parts = []
        for first in range(0, max(self.lengths), v.shape[2]):
            marked = place[:, None, None] == first + torch.arange(v.shape[2], device=self.device)
            parts.append(run(q, k, marked.expand(v.shape).to(v.dtype), *tables) > 0)
        return torch.cat(parts, -1).double() / (1 - self.dropout)

    def exact(self, kept, q, k, v, *tables):
        """The formulas at the top of kernels/flash.py, one sequence at a time."""
        outputs, row, key = [], 0, 0
        for rows, keys in zip(self.rows, self.lengths, strict=True):
            here, there = slice(row, row + rows), slice(key, key + keys)
            row, key = row + rows, key + keys
            scores = torch.einsum("rhd,chd->hrc", q[here], k[there])
            r, c = (torch.arange(n, device=self.device) for n in (rows, keys))
            distance = r[:, None] - c
            if tables:
                slot = self.lut.long()[distance + len(self.lut) // 2].expand(scores.shape)
                c2p, p2c = tables[0][here].transpose(0, 1), tables[1][there].transpose(0, 1)
                scores = scores + c2p.gather(2, slot)
                scores = scores + p2c.gather(2, slot.transpose(1, 2)).transpose(1, 2)
            if self.window is not None:
                scores = scores.masked_fill(distance.abs() > self.window, -math.inf)
            shares = (scores * self.scale).softmax(-1)
            if kept is not None:
                shares = shares * kept[here, :, :keys].transpose(0, 1)
            outputs.append(torch.einsum("hrc,chd->rhd", shares, v[there]))
        return torch.cat(outputs)


def fused_cases(section, dtype):
    """The same of kernels.fused; the residual stream is fp32."""
    from kernels import fused

    rows, hidden, heads, d = (9, 64, 2, 32) if section.tiny else (3000, 768, 12, 64)
    draw, device, eps = normal(3), section.device, 1e-6
    dropout = {"dropout": 0.1, "seed": torch.tensor([7], device=device), "site": 3}

    def add_norm(pre_norm):
        def run(branch, residual, weight, bias):
            return fused.add_norm(branch, residual, weight, bias, eps, dtype=dtype,
                                  pre_norm=pre_norm, **dropout)  # fmt: skip

        def exact(branch, residual, weight, bias):
            total = residual + kept * branch
            y = F.layer_norm(total, (hidden,), weight, bias, eps)
            return (total, y) if pre_norm else (y, y)

        shapes = (rows, hidden), (rows, hidden), (hidden,), (hidden,)
        branch, *wide = (draw(*shape).to(device) for shape in shapes)
        ones, zeros = torch.ones_like(branch), torch.zeros_like(branch)
        kept = fused.add_norm(ones, zeros, wide[1], None, eps, pre_norm=True, **dropout)[0].double()
        return run, exact, [branch.to(dtype), *wide]

    def rotary():
        angles = draw(rows, d // 2).to(device).repeat(1, 2)
        cos, sin, positions = angles.cos(), angles.sin(), torch.arange(rows, device=device)

        def exact(x):
            first, second = x[:, :2].chunk(2, -1)
            turned = torch.cat((-second, first), -1)
            q, k = (x[:, :2] * cos[:, None, None] + turned * sin[:, None, None]).unbind(1)
            return q, k, x[:, 2]

        leaf = draw(rows, 3, heads, d).to(device, dtype)
        return lambda x: fused.rotary(x, cos, sin, positions, parts=2), exact, [leaf]

    def geglu():
        leaf = draw(rows, 2 * hidden).to(device, dtype)
        return fused.geglu, lambda x: F.gelu(x[:, :hidden]) * x[:, hidden:], [leaf]

    return {"add_norm, post-norm": partial(add_norm, False), "rotary": rotary, "geglu": geglu,
            "add_norm, pre-norm": partial(add_norm, True)}  # fmt: skip
