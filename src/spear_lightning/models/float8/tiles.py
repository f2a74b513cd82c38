"""Triton programs that round tiles of matrices to 8 bits; `kernels` calls them.

A compiler's own programs write transposed matrices of 8 bits a byte here and a byte there. These put four rows of
a tile into words, exchange the sides of the tile in shared memory, and write whole lines of it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gelu(x):  # type: ignore[no-untyped-def]
    """Return GELU (its tanh form is x sigmoid(2 u)) and its slope."""
    square = x * x
    gate = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * square))
    return x * gate, gate + x * gate * (1 - gate) * 1.5957691216057308 * (1 + 0.134145 * square)


@triton.jit
def _scaled(x, unit, END: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bring numbers into the range of 8 bits; what is no number stays none."""
    return tl.clamp(x * tl.div_rn(1.0, unit), -END, END, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _larger(a, b):  # type: ignore[no-untyped-def]
    """Return the larger of two numbers; none if one is none."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load(values, at, inside):  # type: ignore[no-untyped-def]
    return tl.load(values + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def _byte(x, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    return x.to(kind).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def words(a, b, c, d, kind: tl.constexpr, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round four tiles and put their bytes side by side.

    On Hopper, Triton 3.6 gets single bytes wrong that it has just rounded and then moves
    (github.com/triton-lang/triton/issues/11111). The instructions leave none to move; without them, in Triton's
    interpreter, it does not matter.
    """
    if ASSEMBLY:
        if kind == tl.float8e5:
            return tl.inline_asm_elementwise(
                "{ .reg .b16 l, h; cvt.rn.satfinite.e5m2x2.f32 l, $2, $1; "
                "cvt.rn.satfinite.e5m2x2.f32 h, $4, $3; mov.b32 $0, {l, h}; }",
                "=r,f,f,f,f",
                [a, b, c, d],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; "
            "cvt.rn.satfinite.e4m3x2.f32 h, $4, $3; mov.b32 $0, {l, h}; }",
            "=r,f,f,f,f",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return _byte(a, kind) | (_byte(b, kind) << 8) | (_byte(c, kind) << 16) | (_byte(d, kind) << 24)


@triton.jit
def _store_turned(turned, tile, word, column, rows, columns):  # type: ignore[no-untyped-def]
    """Write a tile of words, of four rows each, with its sides exchanged."""
    words = turned.to(tl.pointer_type(tl.int32), bitcast=True)
    inside = (column[:, None] < columns) & (word[None, :] < rows // 4)
    at = column[:, None].to(tl.int64) * (rows // 4) + word[None, :]
    tl.store(words + at, tl.trans(tile), mask=inside)


@triton.jit
def _round_rows(  # type: ignore[no-untyped-def]
    values, small, unit, row, column, rows, columns, END: tl.constexpr
):
    """Round some rows, write them, and return them before rounding."""
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    x = _scaled(_load(values, at, inside), unit, END)
    tl.store(small + at, x.to(small.dtype.element_ty), mask=inside)
    return x


@triton.jit
def round_both_ways(  # type: ignore[no-untyped-def]
    values,
    unit,
    small,
    turned,
    rows,
    columns,
    END: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a tile in 8 bits, and the same with its sides exchanged."""
    word = tl.program_id(1) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    row = 4 * word
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    by = tl.load(unit)
    a = _round_rows(values, small, by, row, column, rows, columns, END)
    b = _round_rows(values, small, by, row + 1, column, rows, columns, END)
    c = _round_rows(values, small, by, row + 2, column, rows, columns, END)
    d = _round_rows(values, small, by, row + 3, column, rows, columns, END)
    tile = words(a, b, c, d, small.dtype.element_ty, ASSEMBLY)
    _store_turned(turned, tile, word, column, rows, columns)


@triton.jit
def largest_of_hidden(  # type: ignore[no-untyped-def]
    gate, up, bias, largest, rows, columns, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write the largest `hidden`, `gate` and `up` of some rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    of_hidden = tl.zeros([ROWS, COLUMNS], tl.float32)
    of_gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    of_up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        at = row[:, None].to(tl.int64) * columns + column[None, :]
        g = _load(gate, at, inside)
        if GATED:
            u = _load(up, at, inside)
            of_up = _larger(of_up, tl.abs(u))
            h = _gelu(g)[0] * u
        else:
            g = tl.where(inside, g + _load(bias, column, column < columns)[None, :], 0.0)
            h = _gelu(g)[0]
        of_gate = _larger(of_gate, tl.abs(g))
        of_hidden = _larger(of_hidden, tl.abs(h))
    at, programs = largest + tl.program_id(0), tl.num_programs(0)
    tl.store(at, _largest(of_hidden))
    tl.store(at + programs, _largest(of_gate))
    tl.store(at + 2 * programs, _largest(of_up))


@triton.jit
def _largest(tile):  # type: ignore[no-untyped-def]
    return tl.reduce(tl.reduce(tile, 1, _larger), 0, _larger)


@triton.jit
def round_hidden(  # type: ignore[no-untyped-def]
    gate,
    up,
    bias,
    unit,
    small,
    rows,
    columns,
    GATED: tl.constexpr,
    END: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a tile of `hidden` in 8 bits."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    g = _load(gate, at, inside)
    if GATED:
        h = _gelu(g)[0] * _load(up, at, inside)
    else:
        h = _gelu(g + _load(bias, column, column < columns)[None, :])[0]
    tl.store(small + at, _scaled(h, tl.load(unit), END).to(small.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_rows(  # type: ignore[no-untyped-def]
    gradient,
    gate,
    up,
    bias,
    unit,
    gate_unit,
    up_unit,
    gate_small,
    up_small,
    row,
    column,
    rows,
    columns,
    GATED: tl.constexpr,
    FORWARD_END: tl.constexpr,
    GRADIENT_END: tl.constexpr,
):
    """Write the gradients of some rows; return what is to be turned, and the bias's gradient."""
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    d = _load(gradient, at, inside)
    g = _load(gate, at, inside)
    if GATED:
        u = _load(up, at, inside)
        activated, slope = _gelu(g)
        h = activated * u
        of_gate = d * u * slope
        of_up = _scaled(d * activated, tl.load(up_unit), GRADIENT_END)
        tl.store(up_small + at, of_up.to(up_small.dtype.element_ty), mask=inside)
    else:
        h, slope = _gelu(g + _load(bias, column, column < columns)[None, :])
        of_gate = d * slope
        of_up = of_gate
    small = _scaled(of_gate, tl.load(gate_unit), GRADIENT_END)
    tl.store(gate_small + at, small.to(gate_small.dtype.element_ty), mask=inside)
    return _scaled(h, tl.load(unit), FORWARD_END), small, of_up, tl.sum(of_gate, axis=0)


@triton.jit
def round_gradients(  # type: ignore[no-untyped-def]
    gradient,
    gate,
    up,
    bias,
    unit,
    gate_unit,
    up_unit,
    gate_small,
    up_small,
    hidden_turned,
    gate_turned,
    up_turned,
    bias_sums,
    rows,
    columns,
    GATED: tl.constexpr,
    FORWARD_END: tl.constexpr,
    GRADIENT_END: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a tile of the gradients both ways, of `hidden` with its sides exchanged, and the bias's sums."""
    word = tl.program_id(1) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    row = 4 * word
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    h0, g0, u0, s0 = _gradient_rows(
        gradient, gate, up, bias, unit, gate_unit, up_unit, gate_small, up_small,
        row + 0, column, rows, columns, GATED, FORWARD_END, GRADIENT_END,
    )  # fmt: skip
    h1, g1, u1, s1 = _gradient_rows(
        gradient, gate, up, bias, unit, gate_unit, up_unit, gate_small, up_small,
        row + 1, column, rows, columns, GATED, FORWARD_END, GRADIENT_END,
    )  # fmt: skip
    h2, g2, u2, s2 = _gradient_rows(
        gradient, gate, up, bias, unit, gate_unit, up_unit, gate_small, up_small,
        row + 2, column, rows, columns, GATED, FORWARD_END, GRADIENT_END,
    )  # fmt: skip
    h3, g3, u3, s3 = _gradient_rows(
        gradient, gate, up, bias, unit, gate_unit, up_unit, gate_small, up_small,
        row + 3, column, rows, columns, GATED, FORWARD_END, GRADIENT_END,
    )  # fmt: skip
    hidden_tile = words(h0, h1, h2, h3, tl.float8e4nv, ASSEMBLY)
    _store_turned(hidden_turned, hidden_tile, word, column, rows, columns)
    gate_tile = words(g0, g1, g2, g3, tl.float8e5, ASSEMBLY)
    _store_turned(gate_turned, gate_tile, word, column, rows, columns)
    if GATED:
        up_tile = words(u0, u1, u2, u3, tl.float8e5, ASSEMBLY)
        _store_turned(up_turned, up_tile, word, column, rows, columns)
    else:
        at = tl.program_id(1) * columns + column
        tl.store(bias_sums + at, (s0 + s1) + (s2 + s3), mask=column < columns)
