"""One process, tensors that are whole: every policy against torch, the zclip package and the memory's bandwidth."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import zclip
from pytorch_optimizer import AdaGC as PackageAdaGC
from torch import Tensor, nn

import dist_clip
from scripts.benchmark.timing import FLOOR_COLUMN, RATIO_COLUMNS, Candidate, Section, interleaved, ratio_rows

TORCH = "torch clip_grad_norm_, foreach"
FLOOR = "read the same bytes once (sum of one flat tensor)"
NO_LIMIT = 1e30

Shapes = list[tuple[int, ...]]


def gpt2_shapes(layers: int = 12, dim: int = 768, vocab: int = 50257, context: int = 1024) -> Shapes:
    """Parameters of GPT-2, tied embeddings once: 148 tensors, 124 million elements, by default."""
    block = [(dim,), (dim,), (dim, 3 * dim), (3 * dim,), (dim, dim), (dim,)]
    block += [(dim,), (dim,), (dim, 4 * dim), (4 * dim,), (4 * dim, dim), (dim,)]
    return [(vocab, dim), (context, dim), *(shape for _ in range(layers) for shape in block), (dim,), (dim,)]


class Gradients:
    """Parameters with gradients, and the originals to put back. The parameters have no memory of their own."""

    def __init__(self, shapes: Shapes, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        elements = sum(math.prod(shape) for shape in shapes)
        self.flat = torch.randn(elements, device=device).mul_(1e-3).to(dtype)
        self.originals = [
            part.view(shape)
            for part, shape in zip(torch.split(self.flat, [math.prod(s) for s in shapes]), shapes, strict=True)
        ]
        self.params = [nn.Parameter(self.flat.new_zeros(1).expand(shape)) for shape in shapes]
        for param, original in zip(self.params, self.originals, strict=True):
            param.grad = original.clone()
        self.named = [(f"p{i}", param) for i, param in enumerate(self.params)]
        self.norm = float(torch.stack([g.double().norm() for g in self.originals]).norm())

    def restore(self, doubled: int = 0) -> None:
        """Put the original gradients back, `doubled` of them, evenly spread, times two."""
        grads: list[Tensor] = [param.grad for param in self.params]  # type: ignore[misc]
        torch._foreach_copy_(grads, self.originals)
        if doubled:
            torch._foreach_mul_([grads[i * len(grads) // doubled] for i in range(doubled)], 2.0)


def clipper(gradients: Gradients, policy: dist_clip.Policy, kernels: str | None = None) -> dist_clip.GradClipper:
    """A clipper past its policy's warm-up, on which nothing was clipped."""
    made = dist_clip.GradClipper(gradients.named, policy, kernels=kernels)
    gradients.restore()
    for _ in range(3):
        made.clip_()
    return made


def adagc(scope: str = "tensor") -> dist_clip.AdaGC:
    return dist_clip.AdaGC(warmup_steps=2, max_norm=NO_LIMIT, scope=scope)  # type: ignore[arg-type]


def logclip() -> dist_clip.LogClip:
    return dist_clip.LogClip(ratio=1.04, warmup_steps=2, max_norm=NO_LIMIT)


def zclip_of(max_norm: float) -> dist_clip.ZClip:
    return dist_clip.ZClip(warmup_steps=2, max_norm=max_norm)


def package_zclip(gradients: Gradients, max_norm: float) -> Callable[[], object]:
    rule = zclip.ZClip(warmup_steps=2, max_grad_norm=max_norm)
    model = nn.ParameterList(gradients.params)
    gradients.restore()
    for _ in range(3):
        rule.step(model)
    return lambda: rule.step(model)


def compare(title: str, about: str, shapes: Shapes, repeats: int) -> Section:
    """The table of one list of shapes: nothing clipped, 5 % of the tensors, all of them."""
    gradients = Gradients(shapes)
    half = gradients.norm / 2
    some = max(1, round(0.05 * len(shapes)))
    params = gradients.params

    def nothing(run: Callable[[], object]) -> Candidate:
        return Candidate(run, gradients.restore)

    def doubled(run: Callable[[], object], count: int) -> Candidate:
        return Candidate(run, lambda: gradients.restore(count))

    every = len(shapes)
    candidates = {
        TORCH: nothing(lambda: torch.nn.utils.clip_grad_norm_(params, NO_LIMIT, foreach=True)),
        "torch clip_grad_norm_, one by one": nothing(
            lambda: torch.nn.utils.clip_grad_norm_(params, NO_LIMIT, foreach=False)
        ),
        "zclip package, 0 % clipped": nothing(package_zclip(gradients, NO_LIMIT)),
        "zclip package, 100 % clipped": nothing(package_zclip(gradients, half)),
        "GlobalNorm, 0 % clipped": nothing(clipper(gradients, dist_clip.GlobalNorm(NO_LIMIT)).clip_),
        "GlobalNorm, 100 % clipped": nothing(clipper(gradients, dist_clip.GlobalNorm(half)).clip_),
        "ZClip, 0 % clipped": nothing(clipper(gradients, zclip_of(NO_LIMIT)).clip_),
        "ZClip, 100 % clipped": nothing(clipper(gradients, zclip_of(half)).clip_),
        "AdaGC, 0 % clipped": nothing(clipper(gradients, adagc()).clip_),
        "AdaGC, 5 % clipped": doubled(clipper(gradients, adagc()).clip_, some),
        "AdaGC, 100 % clipped": doubled(clipper(gradients, adagc()).clip_, every),
        "LogClip, 0 % clipped": nothing(clipper(gradients, logclip()).clip_),
        "LogClip, 5 % clipped": doubled(clipper(gradients, logclip()).clip_, some),
        "LogClip, 100 % clipped": doubled(clipper(gradients, logclip()).clip_, every),
        'AdaGC scope="global", 0 % clipped': nothing(clipper(gradients, adagc("global")).clip_),
        'AdaGC scope="global", 100 % clipped': doubled(clipper(gradients, adagc("global")).clip_, every),
        "dist_clip.clip_grad_norm_": nothing(lambda: dist_clip.clip_grad_norm_(params, NO_LIMIT)),
        FLOOR: nothing(gradients.flat.sum),
    }
    rows = ratio_rows(interleaved(candidates, repeats), TORCH, FLOOR)
    facts = {"tensors": len(shapes), "elements": gradients.flat.numel(), "repeats": repeats}
    return Section(title, about, RATIO_COLUMNS | FLOOR_COLUMN, rows, facts)


ABOUT = (
    "torch scales every gradient on every call, also by 1, so what it is given does not change its time. GlobalNorm, ZClip "
    "and AdaGC of scope global clip all tensors or none."
)


def gpt2(quick: bool) -> Section:
    shapes = gpt2_shapes(layers=2, vocab=2048) if quick else gpt2_shapes()
    size = "cut to 2 layers" if quick else "124M"
    return compare(f"GPT-2, {size}", ABOUT, shapes, 3 if quick else 11)


def small(quick: bool) -> Section:
    n = 300 if quick else 2000
    return compare(f"{n} tensors of 1,000 elements", ABOUT, [(1000,)] * n, 5 if quick else 41)


def large(quick: bool) -> Section:
    n, size = (2, 1_000_000) if quick else (10, 10_000_000)
    return compare(f"{n} tensors of {size:,} elements", ABOUT, [(size,)] * n, 3 if quick else 9)


def optimizer(quick: bool) -> Section:
    """pytorch_optimizer's AdaGC is Adam and clipping in one: held against clipping, then Adam."""
    shapes = gpt2_shapes(layers=1, vocab=2048) if quick else gpt2_shapes()
    gradients = Gradients(shapes)

    def fresh() -> list[nn.Parameter]:
        """Parameters with memory, for an optimizer to change, and gradients shared by all candidates."""
        params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for param, shared in zip(params, gradients.params, strict=True):
            param.grad = shared.grad
        return params

    package = PackageAdaGC(fresh(), warmup_steps=2, lambda_abs=NO_LIMIT, weight_decay=0.0)
    params = fresh()
    adam = torch.optim.Adam(params, foreach=True)
    clip = dist_clip.GradClipper([(f"p{i}", p) for i, p in enumerate(params)], adagc())
    for _ in range(3):
        package.step()
        clip.clip_()

    def ours() -> None:
        clip.clip_()
        adam.step()

    def torchs() -> None:
        torch.nn.utils.clip_grad_norm_(params, NO_LIMIT, foreach=True)
        adam.step()

    reference = "torch clip_grad_norm_, then torch.optim.Adam"
    candidates = {
        reference: Candidate(torchs),
        "dist_clip AdaGC, then torch.optim.Adam": Candidate(ours),
        "pytorch_optimizer's AdaGC (Adam included)": Candidate(package.step),
        "torch.optim.Adam alone": Candidate(adam.step),
    }
    repeats = 3 if quick else 5
    return Section(
        "AdaGC with Adam",
        "Whole optimizer steps on the shapes above, nothing clipped, foreach everywhere: pytorch_optimizer's AdaGC is Adam "
        "and clipping in one and cannot be timed apart.",
        RATIO_COLUMNS,
        ratio_rows(interleaved(candidates, repeats), reference),
        {"tensors": len(shapes), "elements": gradients.flat.numel(), "repeats": repeats},
    )
