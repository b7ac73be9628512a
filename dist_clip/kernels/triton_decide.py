"""The Triton kernel of a step's decision: from sums of squares to norms, scales and the policy's new state, in one launch.

One program decides for all tensors of a policy group, 1,024 at a time, because a few thousand numbers are less work than
the dozens of launches that torch's operators need for them, and because the global norm needs all of them. The rules are
those of `dist_clip.policies`, operator by operator in float64, so that the results have the same bits; only exp and log
may differ in the last one. Hyper-parameters are constants of the compiled kernel: Triton would pass them as fp32.

NaN: `tl.where` and comparisons keep it as torch's operators do, `tl.minimum` and `tl.maximum` would not.
"""

# ruff: noqa: SIM108 - Triton has statements for values chosen at compile time

from __future__ import annotations

import triton
import triton.language as tl

from dist_clip.kernels import rules

BLOCK = 1024
"""Number of tensors that the program works on at a time."""

_GLOBAL_NORM, _ADAGC, _LOGCLIP = tl.constexpr(rules.GLOBAL_NORM), tl.constexpr(rules.ADAGC), tl.constexpr(rules.LOGCLIP)


@triton.jit
def _filled(like, VALUE: tl.constexpr):
    """Return float64 values, of the shape of ``like``. As an operand of `tl.where` a constant would be fp32."""
    return tl.zeros_like(like) + VALUE


@triton.jit
def _at_most(x, VALUE: tl.constexpr):
    return tl.where(x > VALUE, _filled(x, VALUE), x)


@triton.jit
def _at_least(x, VALUE: tl.constexpr):
    return tl.where(x < VALUE, _filled(x, VALUE), x)


@triton.jit
def _observed(x):
    return (x > 0) & (x < float("inf"))


@triton.jit
def _storable(x):
    return _observed(x.to(tl.float32))


@triton.jit
def _power(base, exponent):
    return tl.exp(exponent * tl.log(base))


@triton.jit
def _global_scale(norm, MAX_NORM: tl.constexpr):
    return _at_most(MAX_NORM / (norm + 1e-6), 1.0)


@triton.jit
def _adagc(norm, gamma, LAMBDA_REL: tl.constexpr, BETA: tl.constexpr, EPS: tl.constexpr):
    """Return the scales and the new gamma."""
    old = gamma.to(tl.float64)
    known = old > 0
    threshold = LAMBDA_REL * old
    scale = _at_most(threshold / (norm + EPS), 1.0)
    scale = tl.where(known & (norm != 0), scale, _filled(norm, 1.0))
    average = BETA * old + (1 - BETA) * tl.where(norm < threshold, norm, threshold)
    updated = tl.where(known, average, norm)
    return scale, tl.where(_observed(norm) & _storable(updated), updated, old).to(tl.float32)


@triton.jit
def _logclip(
    norm,
    level,
    count,
    streak,
    RATIO: tl.constexpr,
    POWER: tl.constexpr,
    RATE: tl.constexpr,
    PATIENCE: tl.constexpr,
):
    """Return the scales and the new level, count and streak."""
    old = level.to(tl.float64)
    known = old > 0
    allowed = _at_most(RATIO * old / norm, 1.0)
    scale = tl.where(known & (norm != 0), _power(allowed, _filled(norm, POWER)), _filled(norm, 1.0))
    clipped = tl.where(known & (allowed < 1), streak + 1, 0)
    overdue = (clipped - PATIENCE).to(tl.float64)
    seen = count + 1
    r = norm / old
    share = _at_least(1.0 / seen.to(tl.float64), RATE)
    bounded = _power(_at_most(_at_least(r, 1 / RATIO), RATIO), share)
    move = tl.where(overdue > 0, _power(r, _at_most(RATE * overdue, 1.0)), bounded)
    moved = tl.where(known, old * move, norm)
    keep = _storable(norm) & _storable(moved)
    return (
        scale,
        tl.where(keep, moved.to(tl.float32), level),
        tl.where(keep, seen, count),
        tl.where(keep, clipped, streak),
    )


@triton.jit
def _zclip(
    norm,
    mean,
    var,
    count,
    ALPHA: tl.constexpr,
    Z_THRESH: tl.constexpr,
    WARMUP: tl.constexpr,
    PERCENTILE: tl.constexpr,
    TO_MEAN: tl.constexpr,
    FACTOR: tl.constexpr,
    MAX_NORM: tl.constexpr,
    SKIP_UPDATE: tl.constexpr,
    EPS: tl.constexpr,
):
    """Return the scales and the new mean, variance and count."""
    seen = _observed(norm)
    warm = count < WARMUP
    new_count = tl.where(warm & seen, count + 1, count)
    k = _at_least(new_count.to(tl.float64), 1.0)
    warm_mean = mean + (norm - mean) / k
    warm_var = var + ((norm - mean) * (norm - warm_mean) - var) / k

    std = tl.sqrt(_at_least(var, 0.0))
    if PERCENTILE:
        threshold = mean + Z_THRESH * std
        spike = norm > threshold
    else:
        z = (norm - mean) / (std + EPS)
        spike = z > Z_THRESH
        if TO_MEAN:
            threshold = mean
        else:
            threshold = FACTOR * (mean + Z_THRESH * std / (z / Z_THRESH))
    target = tl.where(spike, threshold, norm)
    if MAX_NORM < 0:
        applied = target
        warm_scale = _filled(norm, 1.0)
    else:
        applied = _at_most(target, MAX_NORM)
        warm_scale = _global_scale(norm, MAX_NORM)
    scale = tl.where(norm > applied, applied / (norm + 1e-6), _filled(norm, 1.0))
    scale = tl.where(norm != norm, norm, scale)
    next_mean = ALPHA * mean + (1 - ALPHA) * target
    off = target - next_mean
    next_var = ALPHA * var + (1 - ALPHA) * (off * off)
    if SKIP_UPDATE:
        follows = seen & (spike == 0)
    else:
        follows = seen
    takes = tl.where(warm, seen, follows)
    return (
        tl.where(warm, warm_scale, scale),
        tl.where(takes, tl.where(warm, warm_mean, next_mean), mean),
        tl.where(takes, tl.where(warm, warm_var, next_var), var),
        new_count,
    )


@triton.jit
def _apply(
    norm,
    a,
    b,
    c,
    at,
    mask,
    keeps,
    RULE: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    P3: tl.constexpr,
    P4: tl.constexpr,
    P5: tl.constexpr,
    P6: tl.constexpr,
    P7: tl.constexpr,
    P8: tl.constexpr,
):
    """Return the scales of the elements at ``at``, and update their state where ``keeps``."""
    if RULE == _GLOBAL_NORM:
        scale = _global_scale(norm, P0)
    elif RULE == _ADAGC:
        scale, gamma = _adagc(norm, tl.load(a + at, mask=mask, other=0.0), P0, P1, P2)
        tl.store(a + at, gamma, mask=keeps)
    elif RULE == _LOGCLIP:
        level = tl.load(a + at, mask=mask, other=0.0)
        count, streak = tl.load(b + at, mask=mask, other=0), tl.load(c + at, mask=mask, other=0)
        scale, level, count, streak = _logclip(norm, level, count, streak, P0, P1, P2, P3)
        tl.store(a + at, level, mask=keeps)
        tl.store(b + at, count, mask=keeps)
        tl.store(c + at, streak, mask=keeps)
    else:
        mean, var = tl.load(a + at, mask=mask, other=0.0), tl.load(b + at, mask=mask, other=0.0)
        count = tl.load(c + at, mask=mask, other=0)
        scale, mean, var, count = _zclip(norm, mean, var, count, P0, P1, P2, P3, P4, P5, P6, P7, P8)
        tl.store(a + at, mean, mask=keeps)
        tl.store(b + at, var, mask=keeps)
        tl.store(c + at, count, mask=keeps)
    return scale


@triton.jit(
    do_not_specialize=["sums", "index", "members", "a", "b", "c", "t", "norms", "exact", "scales", "nonfinite", "skip"]
)
def decide(
    sums,
    index,
    members,
    a,
    b,
    c,
    t,
    norms,
    exact,
    scales,
    nonfinite,
    skip,
    RULE: tl.constexpr,
    ONE: tl.constexpr,
    POST: tl.constexpr,
    SKIPS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    P3: tl.constexpr,
    P4: tl.constexpr,
    P5: tl.constexpr,
    P6: tl.constexpr,
    P7: tl.constexpr,
    P8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decide for the tensors of one policy group.

    Args:
        sums: float64 [n], the squared norms.
        index: int64 [members], the group's tensors among the n.
        a, b, c: the policy's state, [members] or, with ``ONE``, [1]; updated in place.
        t: int64 [], the number of steps taken; counted up by the ``LAST`` group.
        norms, scales: fp32 [n], what comes of it, and ``exact``, float64 [n], the scales before they were rounded.
        nonfinite: bool [], whether any norm is NaN or Inf; the ``FIRST`` group sets it anew.
        skip: bool [], whether the step is skipped, if it can be (``SKIPS``): scales are 1 then, and the rest as it was.
        RULE: one of `dist_clip.kernels.rules`, with its parameters P0, P1, ...
        ONE: the rule sees one element, the global norm.
        POST: clip the result at this global norm; 0: do not.
    """
    lanes = tl.arange(0, BLOCK)
    if SKIPS:
        taken = tl.load(skip) == 0
    else:
        taken = True
    one = _filled(tl.zeros([BLOCK], dtype=tl.float64), 1.0)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    if ONE:
        for begin in range(0, members, BLOCK):
            mask = begin + lanes < members
            norm = tl.sqrt(tl.load(sums + tl.load(index + begin + lanes, mask=mask, other=0), mask=mask, other=0.0))
            total += norm * norm
        together = tl.sqrt(tl.sum(total, axis=0)) + tl.zeros([BLOCK], dtype=tl.float64)
        one = _apply(together, a, b, c, lanes, lanes < 1, (lanes < 1) & taken, RULE, P0, P1, P2, P3, P4, P5, P6, P7, P8)
        one = tl.sum(tl.where(lanes == 0, one, _filled(one, 0.0)), axis=0) + tl.zeros([BLOCK], dtype=tl.float64)
        total = tl.where(lanes == 0, (together * one) * (together * one), _filled(together, 0.0))
    bad = tl.zeros([BLOCK], dtype=tl.int32)
    for begin in range(0, members, BLOCK):
        at = begin + lanes
        mask = at < members
        tensor = tl.load(index + at, mask=mask, other=0)
        norm = tl.sqrt(tl.load(sums + tensor, mask=mask, other=0.0))
        tl.store(norms + tensor, norm.to(tl.float32), mask=mask)
        bad = tl.where(norm < float("inf"), bad, 1)
        if ONE:
            scale = one
        else:
            scale = _apply(norm, a, b, c, at, mask, mask & taken, RULE, P0, P1, P2, P3, P4, P5, P6, P7, P8)
            total += tl.where(mask, (norm * scale) * (norm * scale), _filled(norm, 0.0))
        if POST == 0:
            scale = tl.where(taken, scale, _filled(scale, 1.0))
            tl.store(scales + tensor, scale.to(tl.float32), mask=mask)
        tl.store(exact + tensor, scale, mask=mask)
    if POST > 0:
        after = tl.sqrt(tl.sum(total, axis=0)) + tl.zeros([BLOCK], dtype=tl.float64)
        factor = _global_scale(after, POST)
        tl.debug_barrier()  # what is loaded below was stored above
        for begin in range(0, members, BLOCK):
            at = begin + lanes
            mask = at < members
            tensor = tl.load(index + at, mask=mask, other=0)
            scale = tl.load(exact + tensor, mask=mask, other=1.0) * factor
            scale = tl.where(taken, scale, _filled(scale, 1.0))
            tl.store(exact + tensor, scale, mask=mask)
            tl.store(scales + tensor, scale.to(tl.float32), mask=mask)
    found = tl.max(bad, axis=0)
    if FIRST:
        tl.store(nonfinite, found != 0)
    else:
        tl.store(nonfinite, (found != 0) | (tl.load(nonfinite) != 0))
    if LAST:
        tl.store(t, tl.load(t) + taken)
