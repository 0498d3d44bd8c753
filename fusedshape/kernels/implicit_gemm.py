"""The kernels of convolutions: implicit GEMM over channels_last tensors; `conv` launches them.

One kernel computes the convolution and its gradient with respect to the input. In both,
each output pixel is a sum over taps and channels of pixels of the tensor that is read (x or dz):

    fprop     y[i] = Σ_t w[t] · x[i · stride − padding + t · dilation]
    dgrad     dx[a + i · stride] = Σ_t w[first + t · step] · dz[i + origin − t · hop]

In dgrad, pixels of dx with the same remainder a of the stride meet the same taps, so each remainder
is a dense convolution of stride 1. One grid holds the tiles of all remainders. A remainder that no
tap meets takes no steps, and zeros go through the epilogue. The reduction is one flat loop over
taps and blocks of channels; with few channels (an RGB image), a block spans both (FLAT).

wgrad reduces over pixels, split into parts. A second kernel adds up the parts, as another does the
channel sums, in a fixed order, so that every run gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedshape.kernels import epilogue, tiles


@triton.jit
def _taps(remainder, GEOMETRY: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr):
    """The taps that meet an input pixel with this remainder of the stride, along dimension D.

    Returns:
        The first tap, the number of taps, and the offset of the output pixel that the first tap
        reads from the input pixel divided by the stride.
    """
    TAPS: tl.constexpr = GEOMETRY.kernel[D]
    STRIDE: tl.constexpr = GEOMETRY.stride[D]
    PADDING: tl.constexpr = GEOMETRY.padding[D]
    DILATION: tl.constexpr = GEOMETRY.dilation[D]
    APART: tl.constexpr = STEP[D]
    first = tl.zeros_like(remainder) + TAPS
    for i in tl.static_range(APART):
        reach = remainder + PADDING - (APART - 1 - i) * DILATION
        first = tl.where(reach % STRIDE == 0, APART - 1 - i, first)
    first = tl.minimum(first, TAPS)
    # The offset is meaningless if there is no tap.
    return first, tl.cdiv(TAPS - first, APART), (remainder + PADDING - first * DILATION) // STRIDE


@triton.jit
def _within(i, size):
    """Whether 0 ≤ i < size, in one comparison: a negative i becomes a huge unsigned number."""
    return i.to(tl.uint32) < size.to(tl.uint32)


@triton.jit(do_not_specialize=["batch", "in_h", "in_w", "out_h", "out_w", "tiles_m"])
def conv_kernel(
    a_ptr,
    w_ptr,
    out_ptr,
    operands,
    batch,
    in_h,
    in_w,
    out_h,
    out_w,
    tiles_m,
    KIND: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    GEOMETRY: tl.constexpr,
    STEP: tl.constexpr,
    W_STRIDES: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of out = epilogue(Σ a · w), which sums over C channels and writes N."""
    R: tl.constexpr = GEOMETRY.kernel[0]
    S: tl.constexpr = GEOMETRY.kernel[1]
    STRIDE_H: tl.constexpr = GEOMETRY.stride[0]
    STRIDE_W: tl.constexpr = GEOMETRY.stride[1]
    W_TAP: tl.constexpr = W_STRIDES[0]
    W_C: tl.constexpr = W_STRIDES[1]
    W_N: tl.constexpr = W_STRIDES[2]
    BLOCK_M: tl.constexpr = TILE.m
    BLOCK_N: tl.constexpr = TILE.n
    BLOCK_K: tl.constexpr = TILE.k
    SLICES: tl.constexpr = TILE.slices
    DGRAD: tl.constexpr = KIND.grad
    pid = tl.program_id(0)
    remainder = 0
    SUBS_W: tl.constexpr = STRIDE_W if DGRAD else 1
    SUBS: tl.constexpr = STRIDE_H * STRIDE_W if DGRAD else 1
    if SUBS > 1:
        remainder = pid % SUBS
        pid = pid // SUBS
    tile_m, tile_n = tiles.place(pid, tiles_m, (N + BLOCK_N - 1) // BLOCK_N, TILE.group)
    part = tile_m * SUBS + remainder
    if WIDE:
        tile_m = tile_m.to(tl.int64)
        tile_n = tile_n.to(tl.int64)
        part = part.to(tl.int64)

    # At tap (t, u), output pixel (i, j) of this program reads row i · move + origin + t · hop of a,
    # and a column alike.
    if DGRAD:
        row0 = tl.full((), 0, tl.int32) + remainder // SUBS_W
        col0 = tl.full((), 0, tl.int32) + remainder % SUBS_W
        height = tl.cdiv(out_h - row0, STRIDE_H)
        width = tl.cdiv(out_w - col0, STRIDE_W)
        if SUBS > 1:
            first_h, taps_h, origin_h = _taps(row0, GEOMETRY, STEP, 0)
            first_w, taps_w, origin_w = _taps(col0, GEOMETRY, STEP, 1)
            first = first_h * S + first_w
        else:
            taps_h, taps_w = R, S
            origin_h, origin_w = GEOMETRY.padding[0], GEOMETRY.padding[1]
            first = 0
        MOVE_H: tl.constexpr = 1
        MOVE_W: tl.constexpr = 1
        HOP_H: tl.constexpr = -(STEP[0] * GEOMETRY.dilation[0] // STRIDE_H)
        HOP_W: tl.constexpr = -(STEP[1] * GEOMETRY.dilation[1] // STRIDE_W)
    else:
        height, width = out_h, out_w
        taps_h, taps_w = R, S
        origin_h, origin_w = -GEOMETRY.padding[0], -GEOMETRY.padding[1]
        first = 0
        MOVE_H: tl.constexpr = STRIDE_H
        MOVE_W: tl.constexpr = STRIDE_W
        HOP_H: tl.constexpr = GEOMETRY.dilation[0]
        HOP_W: tl.constexpr = GEOMETRY.dilation[1]
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = (batch.to(tl.int64) if WIDE else batch) * height * width
    inside = m < rows
    if SUBS > 1:  # a remainder beyond the image has no pixels; avoid division by zero
        height = tl.maximum(height, 1)
        width = tl.maximum(width, 1)
    j = m % width
    i = (m // width) % height
    image = m // (width * height)
    h0 = i * MOVE_H + origin_h
    w0 = j * MOVE_W + origin_w
    base = ((image * in_h + h0) * in_w + w0) * C
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if WIDE:
        k = k.to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    # Per-pixel work in the loop stalls the tensor cores. So the pointers are computed before it,
    # and for each pixel and tap a bit that says whether the tap lies in the image.
    BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    BITS: tl.constexpr = not FLAT and R * S <= 32
    if not FLAT:
        a_first = a_ptr + (base[:, None] + k[None, :])
        w_first = w_ptr + ((first * W_TAP + k * W_C)[:, None] + (n * W_N)[None, :])
    if BITS:
        row = tl.zeros((BLOCK_M,), tl.int32)
        for tap_w in tl.static_range(S):
            row |= (inside & _within(w0 + tap_w * HOP_W, in_w)).to(tl.int32) << tap_w
        bits = tl.zeros((BLOCK_M,), tl.int32)
        for tap_h in tl.static_range(R):
            bits |= tl.where(_within(h0 + tap_h * HOP_H, in_h), row << (tap_h * S), 0)

    steps = tl.cdiv(taps_h * taps_w * C, BLOCK_K) if FLAT else taps_h * taps_w * BLOCKS
    if SUBS > 1:
        # Every remainder has as many tiles as the first, which has the most pixels.
        steps = tl.where(tile_m * BLOCK_M < rows, steps, 0)
    t = tl.zeros((), tl.int64 if WIDE else tl.int32)
    u = tl.zeros((), t.dtype)
    block = tl.zeros((), t.dtype)
    for step in range(steps):
        if FLAT:
            along = step * BLOCK_K + k
            c = along % C
            ts = along // C // taps_w
            us = along // C % taps_w
            within = along < taps_h * taps_w * C
            h = h0[:, None] + (ts * HOP_H)[None, :]
            w = w0[:, None] + (us * HOP_W)[None, :]
            a_mask = inside[:, None] & within[None, :] & _within(h, in_h) & _within(w, in_w)
            moved = (ts * HOP_H * in_w + us * HOP_W) * C + c
            a_at = a_ptr + (base[:, None] + moved[None, :])
            w_tap = first + ts * (STEP[0] * S) + us * STEP[1]
            w_at = w_ptr + ((w_tap * W_TAP + c * W_C)[:, None] + (n * W_N)[None, :])
        else:
            if BITS:
                there = (bits & (1 << (t * S + u))) != 0
            else:
                there = inside & _within(h0 + t * HOP_H, in_h) & _within(w0 + u * HOP_W, in_w)
            a_mask = there[:, None]
            within = block * BLOCK_K + k < C
            if C % BLOCK_K != 0:
                a_mask = a_mask & within[None, :]
            a_at = a_first + ((t * HOP_H * in_w + u * HOP_W) * C + block * BLOCK_K)
            w_tap = t * (STEP[0] * S) + u * STEP[1]
            w_at = w_first + (w_tap * W_TAP + block * (BLOCK_K * W_C))
        a = tl.load(a_at, mask=a_mask, other=0.0)
        if FLAT or C % BLOCK_K != 0 or N % BLOCK_N != 0:
            b = tl.load(w_at, mask=within[:, None] & (n < N)[None, :], other=0.0)
        else:
            b = tl.load(w_at)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if not FLAT:
            block += 1
            turn = block == BLOCKS
            block = tl.where(turn, 0, block)
            u += turn.to(u.dtype)
            turn = u == taps_w
            u = tl.where(turn, 0, u)
            t += turn.to(t.dtype)

    pixel = m
    if SUBS > 1:
        pixel = (image * out_h + (row0 + i * STRIDE_H)) * out_w + (col0 + j * STRIDE_W)
    parts = tiles.slices(acc, SLICES)
    for s in tl.static_range(SLICES):
        first_n = tile_n * BLOCK_N + s * (BLOCK_N // SLICES)
        z = epilogue.finish(parts[s], operands, pixel, inside, first_n, N, N, part, KIND)
        col = first_n + tl.arange(0, z.shape[1])
        out_at = out_ptr + (pixel[:, None] * N + col[None, :])
        tl.store(out_at, z.to(out_ptr.dtype.element_ty), inside[:, None] & (col < N)[None, :])


@triton.jit(
    do_not_specialize=["pixels", "in_h", "in_w", "out_h", "out_w", "dn", "dp", "dq", "steps"]
)
def wgrad_kernel(
    dz_ptr,
    x_ptr,
    out_ptr,
    pixels,
    in_h,
    in_w,
    out_h,
    out_w,
    dn,
    dp,
    dq,
    steps,
    C: tl.constexpr,
    K: tl.constexpr,
    GEOMETRY: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    EVEN: tl.constexpr,
    SAME: tl.constexpr,
    DEAL: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of one part of dw (K, R · S · C), summed over `steps` blocks of pixels.

    One step moves by BLOCK_K pixels, which are (dn, dp, dq) images, rows and columns. EVEN: the
    number of pixels is a multiple of BLOCK_K. SAME: dz and x have their pixels in the same order.
    """
    R: tl.constexpr = GEOMETRY.kernel[0]
    S: tl.constexpr = GEOMETRY.kernel[1]
    STRIDE_H: tl.constexpr = GEOMETRY.stride[0]
    STRIDE_W: tl.constexpr = GEOMETRY.stride[1]
    BLOCK_M: tl.constexpr = TILE.m
    BLOCK_N: tl.constexpr = TILE.n
    BLOCK_K: tl.constexpr = TILE.k
    TILES_K: tl.constexpr = (K + BLOCK_M - 1) // BLOCK_M
    TILES_C: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    part = tl.program_id(1)
    if WIDE:
        pid = pid.to(tl.int64)
        part = part.to(tl.int64)
        in_h = in_h.to(tl.int64)
        dn = dn.to(tl.int64)
    k = (pid % TILES_K) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_n = pid // TILES_K
    if FLAT:
        col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        tap = col // C
        c = col % C
        in_col = col < R * S * C
    else:
        tap = tile_n // TILES_C
        c = (tile_n % TILES_C) * BLOCK_N + tl.arange(0, BLOCK_N)
        col = tap * C + c
        in_col = c < C
    from_h = (tap // S) * GEOMETRY.dilation[0] - GEOMETRY.padding[0]
    from_w = (tap % S) * GEOMETRY.dilation[1] - GEOMETRY.padding[1]

    # (h, w) is the pixel of x that the tile's tap reads for output pixel m, and `place` is its
    # index in memory. A FLAT tile has many taps; there (h, w) is that of a tap at 0. Adding with
    # carries is cheaper than dividing and multiplying in each step.
    m = part * steps * BLOCK_K + tl.arange(0, BLOCK_K)
    h = (m // out_w) % out_h * STRIDE_H
    w = m % out_w * STRIDE_W
    place = ((m // (out_w * out_h) * in_h + h) * in_w + w) * C
    end_h = out_h * STRIDE_H
    end_w = out_w * STRIDE_W
    x_first = x_ptr + c[None, :]
    if FLAT:
        x_first += ((from_h * in_w + from_w) * C)[None, :]
    else:
        h += from_h
        w += from_w
        place += (from_h * in_w + from_w) * C
        end_h += from_h
        end_w += from_w
    move = ((dn * in_h + dp * STRIDE_H) * in_w + dq * STRIDE_W) * C
    to_row = (STRIDE_H * in_w - out_w * STRIDE_W) * C
    to_image = (in_h - out_h * STRIDE_H) * in_w * C

    dz_m = part * steps * BLOCK_K + (tiles.dealt_rows(BLOCK_K) if DEAL else tl.arange(0, BLOCK_K))
    dz_at = dz_ptr + (k[:, None] + dz_m[None, :] * K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if EVEN:
        steps = tl.minimum(steps, (pixels // BLOCK_K - part * steps).to(tl.int32))
    # No part is empty. If one could be, the compiler might serialise the wgmma instructions.
    tl.assume(steps > 0)
    for _ in range(steps):
        dz_mask = (k < K)[:, None]
        if FLAT:
            hs = h[:, None] + from_h[None, :]
            ws = w[:, None] + from_w[None, :]
            x_mask = in_col[None, :] & _within(hs, in_h) & _within(ws, in_w)
        else:
            x_mask = (_within(h, in_h) & _within(w, in_w))[:, None]
            if C % BLOCK_N != 0:
                x_mask = x_mask & in_col[None, :]
        if not EVEN:
            dz_mask = dz_mask & (dz_m < pixels)[None, :]
            x_mask = x_mask & (m < pixels)[:, None]
        dz = tiles.load_across(dz_at, dz_mask, PRECISION)
        x = tiles.load_across(x_first + place[:, None], x_mask, PRECISION)
        if DEAL:
            x = tiles.deal(x)
        acc = tl.dot(dz, x, acc, input_precision=PRECISION)
        if not EVEN:
            m += BLOCK_K
            dz_m += BLOCK_K
        dz_at += tl.full((), BLOCK_K * K, dz_m.dtype)
        place += move
        w += dq * STRIDE_W
        carry = w >= end_w
        w = tl.where(carry, w - out_w * STRIDE_W, w)
        if not SAME:
            place += tl.where(carry, to_row, 0)
        h += dp * STRIDE_H + tl.where(carry, STRIDE_H, 0)
        carry = h >= end_h
        h = tl.where(carry, h - out_h * STRIDE_H, h)
        if not SAME:
            place += tl.where(carry, to_image, 0)
    if DEAL:
        acc = tiles.gather_columns(acc)
    index = (part * K + k)[:, None] * (R * S * C) + col[None, :]
    mask = (k < K)[:, None] & in_col[None, :]
    tl.store(out_ptr + index, acc.to(out_ptr.dtype.element_ty), mask=mask)
