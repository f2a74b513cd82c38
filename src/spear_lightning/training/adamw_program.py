"""AdamW as one Triton program over all parameters; `one_pass_adamw` calls it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def adamw(  # type: ignore[no-untyped-def]
    pointers,
    sizes,
    first_blocks,
    tensor_of_block,
    factor,
    lr,
    decay,
    beta1,
    beta2,
    log_beta1,
    log_beta2,
    eps,
    ALIGNED: tl.constexpr,
    CLIPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update a block of one parameter and of its moments.

    Every row of `pointers` is a parameter, its gradient, the two moments, and the step, all float32.
    """
    block = tl.program_id(0)
    which = tl.load(tensor_of_block + block)
    row = pointers + 5 * which
    kind = tl.pointer_type(tl.float32)
    parameter = tl.load(row).to(kind)
    gradient = tl.load(row + 1).to(kind)
    mean = tl.load(row + 2).to(kind)
    square = tl.load(row + 3).to(kind)
    step = tl.load(tl.load(row + 4).to(kind))
    if ALIGNED:
        parameter = tl.multiple_of(parameter, 16)
        gradient = tl.multiple_of(gradient, 16)
        mean = tl.multiple_of(mean, 16)
        square = tl.multiple_of(square, 16)

    start = (block - tl.load(first_blocks + which)).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < tl.load(sizes + which)
    g = tl.load(gradient + at, mask=inside, other=0.0, eviction_policy="evict_first")
    p = tl.load(parameter + at, mask=inside, other=0.0, eviction_policy="evict_first")
    m = tl.load(mean + at, mask=inside, other=0.0, eviction_policy="evict_first")
    v = tl.load(square + at, mask=inside, other=0.0, eviction_policy="evict_first")
    if CLIPPED:
        g *= tl.load(factor)
    # One minus a power that is near one needs more bits.
    steps = step.to(tl.float64)
    correction1 = (1.0 - tl.exp(steps * log_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(steps * log_beta2)).to(tl.float32)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    p -= decay * p + lr / correction1 * m / (tl.sqrt(v) / tl.sqrt(correction2) + eps)
    tl.store(parameter + at, p, mask=inside, eviction_policy="evict_first")
    tl.store(mean + at, m, mask=inside, eviction_policy="evict_first")
    tl.store(square + at, v, mask=inside, eviction_policy="evict_first")
