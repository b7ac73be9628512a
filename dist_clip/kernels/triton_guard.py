"""The Triton kernel of `MedianGuard`: from sums of squares to whether a step is skipped, and its new state, in one launch.

It follows the guard operator by operator, as `triton_decide` follows the policies.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dist_clip.kernels.triton_decide import _at_least, _filled, _observed

BLOCK = 256
"""Number of tensors that the program works on at a time. Each is compared with all edges at once."""

EDGES = 16
"""Steps of the median's movement on either side of 0, as in the guard."""

_LOW, _LOW_STEPS, _WARMUP_BOUND, _EARN = tl.constexpr(4.0), tl.constexpr(8), tl.constexpr(100.0), tl.constexpr(50)


@triton.jit
def _tally(
    sums, level, peak, earlier, observations, far, n, WARMUP: tl.constexpr, UNIT: tl.constexpr, EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Return how many tensors are above, low, count, and have a level; above how many edges most are; and how many are bad.

    Most is more than half of those that have a level.
    """
    edges = (tl.arange(0, 2 * EDGES) - EDGES).to(tl.float64) + 0.5
    above, low = tl.zeros([BLOCK], dtype=tl.int32), tl.zeros([BLOCK], dtype=tl.int32)
    counted, seen, bad = above, above, above
    beyond = tl.zeros([2 * EDGES], dtype=tl.int32)
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mask = at < n
        norm = tl.sqrt(tl.load(sums + at, mask=mask, other=0.0))
        old = tl.load(level + at, mask=mask, other=0.0).to(tl.float64)
        high, before = tl.load(peak + at, mask=mask, other=0.0), tl.load(earlier + at, mask=mask, other=0.0)
        usual = tl.where(high > before, high, before).to(tl.float64)
        times = tl.load(observations + at, mask=mask, other=0)
        has = (times > 0) & (norm != 0) & mask
        counts = has & (times >= WARMUP)
        above += (counts & ((norm <= far * usual) == 0)).to(tl.int32)
        low += (counts & (norm * _LOW < usual)).to(tl.int32)
        counted += counts.to(tl.int32)
        seen += has.to(tl.int32)
        bad += (mask & ((norm < float("inf")) == 0)).to(tl.int32)
        moved = tl.log(norm / old)
        beyond += tl.sum((has[None, :] & (moved[None, :] > (UNIT * edges)[:, None])).to(tl.int32), axis=1)
    total = tl.sum(seen, axis=0)
    return (
        tl.sum(above, axis=0),
        tl.sum(low, axis=0),
        tl.sum(counted, axis=0),
        total,
        tl.sum((2 * beyond > total).to(tl.int32), axis=0),
        tl.sum(bad, axis=0),
    )


@triton.jit
def _follow(
    sums, level, peak, earlier, observations, usual, renew, begins, n, THRESHOLD: tl.constexpr, RATE: tl.constexpr,
    WARMUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the tensors' slots after a `usual` step; where they `renew`, from its norms."""
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mask = at < n
        norm = tl.sqrt(tl.load(sums + at, mask=mask, other=0.0))
        stored = tl.load(level + at, mask=mask, other=0.0)
        old = stored.to(tl.float64)
        times = tl.load(observations + at, mask=mask, other=0) + 1
        first = times <= WARMUP
        bound = tl.where(first, _filled(norm, _WARMUP_BOUND), _filled(norm, THRESHOLD))
        ratio = norm / old
        ratio = tl.where(ratio < 1 / bound, 1 / bound, ratio)
        ratio = tl.where(ratio > bound, bound, ratio)
        rate = _at_least(1.0 / times.to(tl.float64), RATE)
        moved = tl.where((old > 0) & (renew == 0), old * tl.exp(rate * tl.log(ratio)), norm).to(tl.float32)
        takes = _observed(norm.to(tl.float32)) & _observed(moved) & usual
        now = tl.where(takes, moved, stored)
        anew = takes & (renew | first)
        high, before = tl.load(peak + at, mask=mask, other=0.0), tl.load(earlier + at, mask=mask, other=0.0)
        high = tl.where(anew | (now > high), now, high)
        turns = begins & usual
        tl.store(level + at, now, mask=mask)
        tl.store(observations + at, tl.where(takes, times, times - 1), mask=mask)
        tl.store(peak + at, tl.where(turns, now, high), mask=mask)
        tl.store(earlier + at, tl.where(turns, high, tl.where(anew, now, before)), mask=mask)


@triton.jit(
    do_not_specialize=[
        "sums", "n", "level", "peak", "earlier", "observations", "drift", "scatter", "moves", "clock", "lows", "spent",
        "in_a_row", "skip",
    ]
)  # fmt: skip
def median_guard(
    sums, n, level, peak, earlier, observations, drift, scatter, moves, clock, lows, spent, in_a_row, skip,
    THRESHOLD: tl.constexpr, LOG_THRESHOLD: tl.constexpr, DEVIATIONS: tl.constexpr, RATE: tl.constexpr,
    WARMUP: tl.constexpr, WINDOW: tl.constexpr, MOST: tl.constexpr, EDGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decide whether the step is skipped.

    Args:
        sums: float64 [n], the squared norms of the whole tensors.
        level, ..., spent: the guard's state, updated in place. in_a_row: int32 [], skips in a row.
        skip: bool [], the decision.
        LOG_THRESHOLD: the logarithm of ``THRESHOLD``, as the guard computes it.
    """
    drifted, scattered, number = tl.load(drift), tl.load(scatter), tl.load(moves)
    mean, spread = drifted.to(tl.float64), scattered.to(tl.float64)
    unit: tl.constexpr = 2 * LOG_THRESHOLD / EDGES
    far = tl.exp(_at_least(mean + DEVIATIONS * spread, LOG_THRESHOLD))
    above, low, counted, seen, steps, bad = _tally(
        sums, level, peak, earlier, observations, far, n, WARMUP, unit, EDGES, BLOCK
    )
    most_above, most_low = 2 * above > counted, 2 * low > counted
    low_steps, budget, turn, row = tl.load(lows), tl.load(spent), tl.load(clock), tl.load(in_a_row)
    fault = most_above & (low_steps <= _LOW_STEPS)
    renew = fault & (budget >= _EARN * MOST) & (bad == 0)
    skips = fault & (renew == 0)
    usual = (skips | (most_low & (low_steps < WINDOW))) == 0
    turn = tl.where(usual, (turn + 1) % WINDOW, turn)
    after = tl.where(most_low, low_steps + 1, tl.where(most_above, low_steps, low_steps - 1))
    after = tl.minimum(tl.maximum(after, 0), WINDOW)

    tl.debug_barrier()  # the slots that were read above are written below
    _follow(sums, level, peak, earlier, observations, usual, renew, turn == 0, n, THRESHOLD, RATE, WARMUP, BLOCK)

    movement = unit * (steps - EDGES).to(tl.float64)
    takes = usual & (renew == 0) & (seen > 0)
    share = _at_least(1.0 / number.to(tl.float64), RATE)
    calm = tl.where(number > 0, spread + share * (tl.abs(movement - mean) - spread), spread)
    share = _at_least(1.0 / (number + 1).to(tl.float64), RATE)
    tl.store(drift, tl.where(takes, (mean + share * (movement - mean)).to(tl.float32), drifted))
    tl.store(scatter, tl.where(takes, calm.to(tl.float32), scattered))
    tl.store(moves, tl.where(takes, number + 1, number))
    tl.store(clock, turn)
    tl.store(lows, after)
    tl.store(spent, tl.where(skips, budget + _EARN, tl.maximum(budget - 1, 0)))
    # As for every guard: after so many skips in a row a step is taken, unless its norms are not finite.
    final = skips & (((row >= MOST) & (bad == 0)) == 0)
    tl.store(in_a_row, tl.where(final, row + 1, 0))
    tl.store(skip, final)
