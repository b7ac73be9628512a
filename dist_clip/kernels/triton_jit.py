"""The Triton kernels: squared norms and scales of many tensors, found by their addresses. Launched by `triton_kernels`.

A program finds its part of a tensor in two tables. ``addresses`` is int64 [m], where each tensor's memory begins.
``meta`` is int64 [3m + 1 + chunks] and follows from the numbers of elements alone:

    [0, m)            number of elements of each tensor
    [m, 2m + 1)       the tensor's first chunk, and the end of the last tensor's chunks
    [2m + 1, 3m + 1)  the tensor's position in the caller's list
    [3m + 1, ...)     the tensor that each chunk belongs to

A tensor's sum depends on its values only: not on its address, the other tensors, or how programs are scheduled. Ranks
that hold copies of a tensor therefore get the bitwise same norm without communication. For that, no compiled kernel is
specialised on addresses, there are no atomics, and the same code adds up tensors at any address in the same order; only
the loads differ.
"""

# ruff: noqa: SIM108, SIM300 - Triton has statements for values chosen at compile time, and upper-case names for constants

from __future__ import annotations

import triton
import triton.language as tl

TILE = 2048
"""Number of elements that a program loads at a time."""

TILES = 8
"""Number of tiles in a chunk, the work of one program, and number of squares that are added in fp32 before float64.

That many fp32 additions of one sign are off by at most 8 * 2**-24 of the sum: 2.4e-7 of the norm.
"""

CHUNK = TILE * TILES

WARPS = 8
"""Warps of a program that works on a chunk. Half as many read bf16 a quarter slower (H200: 2.7 against 3.6 TB/s)."""

LANES = 512
"""Number of chunks that `add_chunks` adds at a time."""

# Squares of fp32 and bf16 elements may leave fp32's range. If a chunk's sum is below _TINY or infinite, the chunk is
# added up again with its elements times a power of two. What underflowed in a sum above 1e-25 is less than 1e-8 of it.
# Where squares overflow, what the factor for them makes underflow is an even smaller part.
_TINY = tl.constexpr(1e-25)
_UP, _UP_SQUARED = tl.constexpr(2.0**100), tl.constexpr(2.0**-200)
_DOWN, _DOWN_SQUARED = tl.constexpr(2.0**-75), tl.constexpr(2.0**150)


@triton.jit
def _elements(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to the elements (bf16: to their bits). ``ALIGNED``: the address is a multiple of 16."""
    if ALIGNED:
        # Without this product the compiler would apply the hint below to the unaligned pointer, too.
        address = address // 16 * 16
    if DTYPE == tl.bfloat16:
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _widened(x, DTYPE: tl.constexpr):
    """Return loaded values as fp32. The bits of a bf16 are the upper half of an fp32's.

    bf16 is not cast, because the cast of Triton's interpreter is wrong for subnormal values.
    """
    if DTYPE == tl.bfloat16:
        wide = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """Return fp32 values as they are stored, rounded once to nearest even.

    bf16 is not cast, because the cast of Triton's interpreter, with which the kernels are tested, truncates.
    """
    if DTYPE == tl.bfloat16:
        # All NaNs become one NaN, because rounding the bits of some would give an infinity or overflow.
        bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
        stored = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
    else:
        stored = x.to(DTYPE)
    return stored


@triton.jit
def _place(addresses, meta, m, first_chunk, CHUNK: tl.constexpr):
    """Return this program's chunk, its tensor's position and address, the chunk's begin and the tensor's end."""
    chunk = first_chunk + tl.program_id(0)
    tensor = tl.load(meta + 3 * m + 1 + chunk)
    begin = (chunk - tl.load(meta + m + tensor)) * CHUNK
    return chunk, tl.load(meta + 2 * m + 1 + tensor), tl.load(addresses + tensor), begin, tl.load(meta + tensor)


@triton.jit
def _tiles(address, begin, end, TILE: tl.constexpr, TILES: tl.constexpr):
    """Return how many tiles of a chunk are whole and aligned, for loads of 16 bytes, and how many there are."""
    whole = tl.minimum((end - begin) // TILE, TILES) * ((address & 15) == 0)
    return whole.to(tl.int32), tl.minimum(tl.cdiv(end - begin, TILE), TILES).to(tl.int32)


@triton.jit
def _squares(address, begin, end, factor, DTYPE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Return ``sum((factor * x)**2)`` of a chunk, float64."""
    whole, tiles = _tiles(address, begin, end, TILE, TILES)
    lanes = begin + tl.arange(0, TILE)
    sums = tl.zeros([TILE], dtype=tl.float32)
    elements = _elements(address, DTYPE, True) + lanes
    for i in range(whole):
        x = _widened(tl.load(elements + i * TILE), DTYPE) * factor
        sums = tl.fma(x, x, sums)
    elements = _elements(address, DTYPE, False) + lanes
    for i in range(whole, tiles):
        x = _widened(tl.load(elements + i * TILE, mask=lanes + i * TILE < end, other=0), DTYPE) * factor
        sums = tl.fma(x, x, sums)
    return tl.sum(sums.to(tl.float64), axis=0)


@triton.jit(do_not_specialize=["addresses", "meta", "m", "first_chunk", "partials"])
def chunk_squares(
    addresses, meta, m, first_chunk, partials, DTYPE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr
):
    """Store the sum of squares of each chunk in ``partials``, float64 [chunks]."""
    chunk, _, address, begin, end = _place(addresses, meta, m, first_chunk, TILE * TILES)
    total = _squares(address, begin, end, 1.0, DTYPE, TILE, TILES)
    if DTYPE != tl.float16:
        if total < _TINY:
            total = _squares(address, begin, end, _UP, DTYPE, TILE, TILES) * _UP_SQUARED
        elif total == float("inf"):
            total = _squares(address, begin, end, _DOWN, DTYPE, TILE, TILES) * _DOWN_SQUARED
    tl.store(partials + chunk, total)


@triton.jit(do_not_specialize=["meta", "m", "partials", "sums"])
def add_chunks(meta, m, partials, sums, LANES: tl.constexpr):
    """Store the sum of each tensor's chunks in ``sums``, float64, at the tensor's position. One program a tensor."""
    tensor = tl.program_id(0)
    end = tl.load(meta + m + tensor + 1)
    lanes = tl.zeros([LANES], dtype=tl.float64)
    for begin in range(tl.load(meta + m + tensor), end, LANES):
        chunks = begin + tl.arange(0, LANES)
        lanes += tl.load(partials + chunks, mask=chunks < end, other=0.0)
    tl.store(sums + tl.load(meta + 2 * m + 1 + tensor), tl.sum(lanes, axis=0))


@triton.jit(do_not_specialize=["addresses", "meta", "m", "first_chunk", "scales"])
def scale_chunks(addresses, meta, m, first_chunk, scales, DTYPE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Multiply each tensor in place by its scale, fp32. Tensors whose scale is 1 are not read."""
    _, position, address, begin, end = _place(addresses, meta, m, first_chunk, TILE * TILES)
    scale = tl.load(scales + position)
    if scale != 1.0:  # true for a NaN
        whole, tiles = _tiles(address, begin, end, TILE, TILES)
        lanes = begin + tl.arange(0, TILE)
        elements = _elements(address, DTYPE, True) + lanes
        for i in range(whole):
            x = _widened(tl.load(elements + i * TILE), DTYPE)
            tl.store(elements + i * TILE, _rounded(x * scale, DTYPE))
        elements = _elements(address, DTYPE, False) + lanes
        for i in range(whole, tiles):
            mask = lanes + i * TILE < end
            x = _widened(tl.load(elements + i * TILE, mask=mask, other=0), DTYPE)
            tl.store(elements + i * TILE, _rounded(x * scale, DTYPE), mask=mask)


@triton.jit(do_not_specialize=["addresses", "meta", "m", "first_chunk", "flags"])
def zero_chunks(addresses, meta, m, first_chunk, flags, DTYPE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Store exact zeros in each tensor whose flag, uint8, is set."""
    _, position, address, begin, end = _place(addresses, meta, m, first_chunk, TILE * TILES)
    if tl.load(flags + position) != 0:
        zeros = _rounded(tl.zeros([TILE], dtype=tl.float32), DTYPE)
        whole, tiles = _tiles(address, begin, end, TILE, TILES)
        lanes = begin + tl.arange(0, TILE)
        elements = _elements(address, DTYPE, True) + lanes
        for i in range(whole):
            tl.store(elements + i * TILE, zeros)
        elements = _elements(address, DTYPE, False) + lanes
        for i in range(whole, tiles):
            tl.store(elements + i * TILE, zeros, mask=lanes + i * TILE < end)
