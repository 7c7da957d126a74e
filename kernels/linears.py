"""The linear maps of an encoder, each run the way its device and purpose want it.

    project(x, *linears, act=None, part=None, bias=True)

is a tensor per linear of x [rows, in_features] (one alone for one), with `act` applied to it; of
one linear only the output features in the slice `part`, or the product without its bias.

`by_modules` calls the modules: training in fp32 and on a CPU. `Joined` is for scoring: maps of one
input are one product, on a CPU with weights laid out for oneDNN. `Narrow` is for autocast on a GPU:
bf16 copies of the fp32 weights, made once a step instead of at every use, with their gradients
taken back to fp32 in one go: the numbers are autocast's own, the launches a quarter.
"""

from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.activations import GELUActivation

from kernels import cpu


def count_change(optimizer, args, kwargs) -> None:
    """Torch's fused optimizers change weights and leave their versions as they were, by which
    copies of weights are known to be old."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_post_hook(count_change)


def native_bf16(device) -> bool:
    """Whether the device multiplies bf16 in hardware; elsewhere it is emulated, slower than
    fp32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu.native_bf16()


def activated(out, act):
    """act(out), in place where it is GELU and no backward pass needs `out`."""
    if act is None:
        return out
    if isinstance(act, GELUActivation) and not out.requires_grad:
        return torch.ops.aten.gelu_(out)
    return act(out)


def _part(weight, part, wanted=True):
    """The rows of a weight or bias that are wanted."""
    if weight is None or not wanted:
        return None
    return weight if part is None else weight[part]


def by_modules(x, *linears, act=None, part=None, bias=True):
    """Each linear map on its own."""
    if part is not None or not bias:
        return F.linear(x, _part(linears[0].weight, part), _part(linears[0].bias, part, bias))
    outs = [linear(x) for linear in linears]
    return outs if len(outs) > 1 else activated(outs[0], act)


class Joined:
    """Scoring: the maps of one input as one product.

    On a CPU with the weights laid out as oneDNN wants them for `rows` rows and an exact GELU in the
    same pass: 10 to 20 % faster than F.linear. Both are kept while the weights do not change.
    """

    def __init__(self, rows: int):
        self.rows, self.kept = rows, {}

    def __call__(self, x, *linears, act=None, part=None, bias=True):
        on_cpu = x.device.type == "cpu"
        if part is not None or not bias or len(linears) == 1 and not on_cpu:
            return by_modules(x, *linears, act=act, part=part, bias=bias)
        joined = self._joined(linears, self._dtype(linears, on_cpu), on_cpu)
        if isinstance(joined, cpu.LaidOut):
            gelu = isinstance(act, GELUActivation)
            out = joined(x, gelu)
            out = out if gelu else activated(out, act)
        else:
            out = activated(F.linear(x, *joined), act)
        return out.chunk(len(linears), -1) if len(linears) > 1 else out

    @staticmethod
    def _dtype(linears, on_cpu):
        if on_cpu and torch.is_autocast_enabled("cpu"):
            return torch.get_autocast_dtype("cpu")
        return linears[0].weight.dtype

    def _joined(self, linears, dtype, on_cpu):
        """The maps as one: a cpu.LaidOut, or (weight, bias); kept until a weight changes."""
        sources = [p for linear in linears for p in (linear.weight, linear.bias) if p is not None]
        now = dtype, [(p.data_ptr(), p._version) for p in sources]
        kept = self.kept.get(linears)
        if kept is None or kept[0] != now:
            weight = torch.cat([linear.weight for linear in linears]).to(dtype)
            bias = None
            if linears[0].bias is not None:
                bias = torch.cat([linear.bias for linear in linears]).to(dtype)
            joined = weight, bias
            if on_cpu and cpu.lays_out(dtype):
                joined = cpu.LaidOut(weight, bias, self.rows)
            kept = self.kept[linears] = now, joined
        return kept[1]


class Narrow:
    """Autocast's products on a GPU from copies of the weights that are kept from step to step.

    groups: tuples of nn.Linear that read the same input, each group one product. The copies
    (`dtype`, one joined weight and bias a group) are refreshed when a weight has changed since.
    Their gradients arrive in `dtype`, as autocast's do, and leave in the weights' own fp32, one
    tensor a parameter: sums over micro-batches are fp32.
    """

    def __init__(self, groups, dtype):
        self.dtype, self.version = dtype, None
        self.leaves = self.into = None  # of a pass that is captured, see `standing_in`
        self.sources, self.copies, self.parts, self.sizes = [], [], [], []
        # linear -> (weight and bias of its group, by number of copy; sizes), its place
        self.place = {}
        for group in groups:
            weight = self._join([linear.weight for linear in group])
            bias = None
            if group[0].bias is not None:
                bias = self._join([linear.bias for linear in group])
            product = weight, bias, tuple(linear.out_features for linear in group)
            self.place |= {linear: (product, at) for at, linear in enumerate(group)}

    def _join(self, sources) -> int:
        # made while scoring, it serves training too
        with torch.inference_mode(False), torch.no_grad():
            joined = torch.cat(sources).to(self.dtype)
            self.sizes.append([len(p) for p in sources])
            self.parts += joined.split(self.sizes[-1])
        self.copies.append(joined)
        self.sources += sources
        return len(self.copies) - 1

    def refresh(self) -> None:
        """The copies as the weights are now; two or three launches where they have changed."""
        version = sum(p._version for p in self.sources)
        if version != self.version:
            with torch.no_grad():
                torch._foreach_copy_(self.parts, self.sources)
            self.version = version

    def projector(self):
        """project() for one forward pass. Of a group that is asked for in part the rest is computed
        too, so that its weights stay one tensor."""
        self.refresh()
        copies = self.copies
        if torch.is_grad_enabled():
            copies = _ToNarrow.apply(self, *(self.leaves or self.sources))
        # not a function that calls itself: in a cycle it would keep autograd's graph
        return partial(self._project, copies)

    def _project(self, copies, x, *linears, act=None, part=None, bias=True):
        product, at = self.place[linears[0]]
        if any(self.place[linear] != (product, at + i) for i, linear in enumerate(linears)):
            return [self._project(copies, x, linear) for linear in linears]
        weight, of_bias, sizes = product
        shift = None if of_bias is None else copies[of_bias]
        weight, shift = _part(copies[weight], part), _part(shift, part, bias)
        out = F.linear(x.to(self.dtype), weight, shift)
        if len(sizes) == 1:
            return activated(out, act)
        outs = out.split(sizes, -1)[at : at + len(linears)]
        return outs if len(linears) > 1 else activated(outs[0], act)

    @contextmanager
    def standing_in(self, leaves, into):
        """Inside, gradients go to the tensors `leaves` has for the sources, {source: tensor}, and
        are written to those of `into`."""
        self.leaves, self.into = ([of[p] for p in self.sources] for of in (leaves, into))
        try:
            yield
        finally:
            self.leaves = self.into = None

    def widened(self, gradients):
        """Gradients of the copies (None where unused) -> of the sources, fp32, slices of one buffer
        or where `standing_in` says."""
        parts = []
        for sizes, gradient in zip(self.sizes, gradients, strict=True):
            parts += [None] * len(sizes) if gradient is None else gradient.split(sizes)
        used = [i for i, part in enumerate(parts) if part is not None]
        if self.into is None:
            wide = torch.empty(sum(parts[i].numel() for i in used), device=self.copies[0].device)
            slices = wide.split([parts[i].numel() for i in used])
            outs = [s.view_as(self.sources[i]) for s, i in zip(slices, used, strict=True)]
        else:
            outs = [self.into[i] for i in used]
        torch._foreach_copy_(outs, [parts[i] for i in used])
        found = dict(zip(used, outs, strict=True))
        return [found.get(i) for i in range(len(parts))]


class _ToNarrow(torch.autograd.Function):
    """fp32 weights -> the copies of a Narrow."""

    @staticmethod
    def forward(ctx, narrow, *sources):
        ctx.narrow = narrow
        ctx.set_materialize_grads(False)
        return tuple(copy.detach() for copy in narrow.copies)

    @staticmethod
    def backward(ctx, *gradients):
        return None, *ctx.narrow.widened(gradients)
