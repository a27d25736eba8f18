"""Loops over single numbers, compiled for the processor: what the column sweep and the descent do within few columns.

Arrays are columns first, `[columns, rows]`, C-contiguous. What `sweep_columns` and `descend_columns` do here for some
rows at a time, `sweep.gptq_codes` and `refine.refine` do in torch on a GPU; tests compare the two. Rows are independent
but for what a metric couples (`couple_columns`, `best_steps`, `refused_steps`).
"""

# mypy: disable-error-code="no-untyped-def, misc"

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ...kernels.numbers import BESIDE, Integers, Numbers

_ROWS = 1024  # that are worth a thread of their own
_TILE = 256  # rows of some columns that stay in a processor's nearest memory


def _compiled(function: Callable[..., Any]) -> Any:
    """Machine code, kept for later processes where there is a folder for it."""
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract", "arcp", "nsz"}, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither beside this file nor in the user's folder can a file be made
        return njit(**options)(function)


@cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="solver")


def _by_rows(function: Any, rows: int, *arguments: Any, share: int = 1) -> None:
    """Call `function(first row, row behind the last, *arguments)` for parts of the rows, as many as there are threads;
    a row has the work of so many (`share`)."""
    count = max(1, min(torch.get_num_threads(), rows, rows * share // _ROWS))
    if count == 1:
        function(0, rows, *arguments)
        return
    cuts = [rows * part // count for part in range(count + 1)]
    list(_workers().map(lambda part: function(cuts[part], cuts[part + 1], *arguments), range(count)))


def _format(numbers: Numbers, like: Tensor) -> tuple[Any, Any, int, int]:
    """Lowest and highest number, bits of a mantissa (-1 for integers) and least exponent."""
    kind = like.numpy().dtype.type
    digits = (-1, 0) if isinstance(numbers, Integers) else (numbers.mantissa, numbers.least)
    return kind(numbers.low), kind(numbers.high), *digits


def _array(tensor: Tensor | None, like: Tensor, dimensions: int = 2) -> Any:
    """A tensor's numbers; of none, an array without any."""
    return np.zeros((0,) * dimensions, like.numpy().dtype) if tensor is None else tensor.numpy()


def _kept(keep: Tensor | None) -> Any:
    return np.zeros((0, 0), np.bool_) if keep is None else keep.numpy()


def sweep_columns(
    work: Tensor,
    own: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    keep: Tensor | None,
    numbers: Numbers,
    *,
    fractional: bool,
) -> None:
    """Fix some columns, one after the other: each becomes its error over the diagonal of the factor, of which those
    that follow have taken what they make up for.

    Args:
        work: `[n, rows]`, in the order in which columns are fixed; overwritten.
        own: `[n, n]`, these columns of the factor.
        codes: `[n, rows]`; filled in.
        scales, zeros: of every column, `[n, rows]`.
        keep: bool alike, false where a zero is to stay.
        fractional: whether zeros are no integers.
    """
    arrays = work.numpy(), own.numpy(), codes.numpy(), scales.numpy(), _array(zeros, work)
    _by_rows(_sweep, work.shape[1], *arrays, _kept(keep), *_format(numbers, codes), fractional)


def descend_columns(
    codes: Tensor,
    values: Tensor,
    gradient: Tensor,
    own: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    keep: Tensor | None,
    numbers: Numbers,
    *,
    fractional: bool,
) -> None:
    """Set every code of some columns that share a scale in turn to the best one; gradients follow.

    Args:
        codes, values, gradient: `[n, rows]`; overwritten.
        own: the moment of these columns.
        scale, zero: `[rows]`.
        keep, fractional: as of `sweep_columns`.
    """
    arrays = codes.numpy(), values.numpy(), gradient.numpy(), own.numpy(), scale.numpy(), _array(zero, codes, 1)
    _by_rows(_descend, codes.shape[1], *arrays, _kept(keep), *_format(numbers, codes), fractional)


def couple_columns(
    codes: Tensor,
    values: Tensor,
    gradient: Tensor,
    own: Tensor,
    metric: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    keep: Tensor | None,
    numbers: Numbers,
    *,
    fractional: bool,
) -> None:
    """Set every code of some columns that share a scale to the best one, row after row, for `metric` `[rows, rows]` has
    each row's errors count in the others'; gradients follow.

    Args:
        codes, values, gradient: as of `descend_columns`, and so all others; `gradient` is `H δ M`.
    """
    arrays = codes.numpy(), values.numpy(), gradient.numpy(), own.numpy(), metric.numpy(), scale.numpy()
    _couple(*arrays, _array(zero, codes, 1), _kept(keep), *_format(numbers, codes), fractional)


def follow_choices(
    left: Tensor,
    losses: Tensor,
    own: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    keep: Tensor | None,
    numbers: Numbers,
    *,
    fractional: bool,
) -> tuple[Tensor, Tensor]:
    """What `beam._followed` does, row after row."""
    codes, origin = torch.zeros_like(left), torch.zeros(losses.shape, dtype=torch.int64)
    arrays = left.numpy(), losses.numpy(), own.numpy(), codes.numpy(), origin.numpy(), scales.numpy()
    form = *_format(numbers, left), fractional
    _by_rows(_follow, len(left), *arrays, _array(zeros, left), _kept(keep), *form, share=left.shape[1])
    return codes, origin


def best_steps(quadratic: Tensor, slopes: Tensor) -> Tensor:
    """Changes `[n]` that lower `slopes · c + ½ c · quadratic c` the most, up to two turns over the entries."""
    found = torch.zeros_like(slopes)
    _minimize(quadratic.numpy(), slopes.clone().numpy(), found.numpy())
    return found


def refused_steps(quadratic: Tensor, slopes: Tensor, changes: Tensor) -> Tensor:
    """Some changes, zeros in the place of those that, the ones before them being made, do not lower
    `slopes · c + ½ c · quadratic c`."""
    found = changes.clone()
    _refuse(quadratic.numpy(), slopes.clone().numpy(), found.numpy())
    return found


@_compiled
def _nearest(value, low, high, mantissa, least):
    if mantissa < 0:
        return min(max(np.rint(value), low), high)
    value = min(max(value, low), high)
    spacing = type(value)(math.ldexp(1.0, max(math.frexp(value)[1] - 1, least) - mantissa))
    return np.rint(value / spacing) * spacing


@_compiled
def _beside(value, code, low, high, mantissa, least):
    away = type(code)(1)
    if mantissa >= 0:
        exponent = max(math.frexp(code)[1] - 1, least) if code != 0 else least
        away = type(code)(math.ldexp(BESIDE, exponent - mantissa))
    return _nearest(code + away if value > code else code - away, low, high, mantissa, least)


@_compiled
def _placed(value, zero, low, high, fractional):
    moved = np.rint(value + zero) if fractional else np.rint(value) + zero
    return min(max(moved, low), high)


@_compiled
def _sweep(first, last, work, own, codes, scales, zeros, keep, low, high, mantissa, least, fractional):
    columns = work.shape[0]
    for start in range(first, last, _TILE):
        part = slice(start, min(start + _TILE, last))
        for j in range(columns):
            targets, found, steps = work[j, part], codes[j, part], scales[j, part]
            diagonal = own[j, j]
            for r in range(len(found)):
                value = targets[r] / steps[r]
                if not zeros.size:
                    code = _nearest(value, low, high, mantissa, least)
                    found[r] = code if not keep.size or keep[j, start + r] else low - low
                    targets[r] = (targets[r] - found[r] * steps[r]) / diagonal
                else:
                    zero = zeros[j, start + r]
                    code = _placed(value, zero, low, high, fractional)
                    found[r] = code if not keep.size or keep[j, start + r] else zero
                    targets[r] = (targets[r] - (found[r] - zero) * steps[r]) / diagonal
            for later in range(j + 1, columns):
                share, others = own[j, later], work[later, part]
                for r in range(len(others)):
                    others[r] -= share * targets[r]


@_compiled
def _follow(first, last, left, losses, own, codes, origin, scales, zeros, keep, low, high, mantissa, least, fractional):
    width, columns = left.shape[1:]
    rest, start = np.empty((2, width, columns), left.dtype), np.empty(width, np.int64)
    # Of each column, the choices that stay: their codes and errors, what they came from, and their losses.
    stay, missed, come = (np.empty((columns, width), left.dtype), np.empty((columns, width), left.dtype),
                          np.empty((columns, width), np.int64))  # fmt: skip
    both, errors = np.empty((width, 2), left.dtype), np.empty((width, 2), left.dtype)
    lost, sums, order = np.empty(width, left.dtype), np.empty(width, left.dtype), np.empty(width, np.int64)
    for r in range(first, last):
        now, count = 0, 0
        for b in range(width):
            if losses[r, b] < np.inf:
                rest[0, count], start[count], lost[count] = left[r, b], b, losses[r, b]
                count += 1
        for j in range(columns):
            scale, zero, stays, taken = scales[j, r], low - low, keep.size > 0 and not keep[j, r], 0
            if zeros.size:
                zero = zeros[j, r]
            diagonal = own[j, j]
            for b in range(count):
                if taken == width and lost[b] >= sums[width - 1]:
                    break  # nor can any that follows, for they are in the order of their losses
                target = rest[now, b, j]
                value = target / scale
                code = other = zero
                if not stays:
                    if zeros.size:
                        code = _placed(value, zero, low, high, fractional)
                    else:
                        code = _nearest(value, low, high, mantissa, least)
                    other = _beside(value + zero, code, low, high, mantissa, least)
                both[b, 0], both[b, 1] = code, other
                for which in range(1 + (other != code)):
                    error = (target - (both[b, which] - zero) * scale) / diagonal
                    errors[b, which], loss = error, lost[b] + error * error
                    if taken == width and loss >= sums[width - 1]:
                        break  # the other number is further away
                    i = taken if taken < width else width - 1
                    taken = i + 1
                    while i and sums[i - 1] > loss:
                        sums[i], order[i] = sums[i - 1], order[i - 1]
                        i -= 1
                    sums[i], order[i] = loss, 2 * b + which
            for b in range(taken):
                of, which = order[b] >> 1, order[b] & 1
                stay[j, b], missed[j, b], come[j, b], lost[b] = both[of, which], errors[of, which], of, sums[b]
                ours, theirs, error, line = rest[1 - now, b], rest[now, of], errors[of, which], own[j]
                for k in range(columns):  # of those up to j nothing is read again; whole lines are faster
                    ours[k] = theirs[k] - error * line[k]
            now, count = 1 - now, taken
        left[r], losses[r] = 0, np.inf
        for b in range(count):
            losses[r, b], i = lost[b], b
            for j in range(columns - 1, -1, -1):
                codes[r, b, j], left[r, b, j], i = stay[j, i], missed[j, i], come[j, i]
            origin[r, b] = start[i]


@_compiled
def _descend(first, last, codes, values, gradient, own, scale, zeros, keep, low, high, mantissa, least, fractional):
    columns = codes.shape[0]
    moved = np.empty(_TILE, values.dtype)
    for start in range(first, last, _TILE):
        part = slice(start, min(start + _TILE, last))
        steps = scale[part]
        for j in range(columns):
            found, slope, now = codes[j, part], gradient[j, part], values[j, part]
            curvature = own[j, j]
            for r in range(len(found)):
                old = found[r]
                if not zeros.size:
                    code = _nearest(old - slope[r] / curvature / steps[r], low, high, mantissa, least)
                else:
                    zero = zeros[start + r]
                    code = _placed(old - zero - slope[r] / curvature / steps[r], zero, low, high, fractional)
                if keep.size and not keep[j, start + r]:
                    code = old
                found[r] = code
                change = (code - old) * steps[r]
                now[r] += change
                moved[r] = change
            for later in range(j + 1, columns):
                share, others = own[later, j], gradient[later, part]
                for r in range(len(others)):
                    others[r] += share * moved[r]


@_compiled
def _couple(codes, values, gradient, own, metric, scale, zeros, keep, low, high, mantissa, least, fractional):
    columns, rows = codes.shape
    spread = np.empty(rows, values.dtype)
    for j in range(columns):
        found, slope, now = codes[j], gradient[j], values[j]
        curvature = own[j, j]
        spread[:] = 0
        for r in range(rows):
            if keep.size and not keep[j, r]:
                continue
            old, line = found[r], metric[r]
            wanted = old - (slope[r] + curvature * spread[r]) / curvature / line[r] / scale[r]
            if not zeros.size:
                code = _nearest(wanted, low, high, mantissa, least)
            else:
                code = _placed(wanted - zeros[r], zeros[r], low, high, fractional)
            if code != old:
                change = (code - old) * scale[r]
                found[r] = code
                now[r] += change
                for k in range(rows):
                    spread[k] += change * line[k]
        for later in range(j + 1, columns):
            share, others = own[later, j], gradient[later]
            for k in range(rows):
                others[k] += share * spread[k]


@_compiled
def _minimize(quadratic, slopes, found):
    for _ in range(2):
        for i in range(len(found)):
            line = quadratic[i]
            if line[i] > 0:
                change = -slopes[i] / line[i]
                found[i] += change
                for k in range(len(line)):
                    slopes[k] += change * line[k]


@_compiled
def _refuse(quadratic, slopes, changes):
    for i in range(len(changes)):
        change, line = changes[i], quadratic[i]
        if change * (2 * slopes[i] + change * line[i]) < 0:
            for k in range(len(line)):
                slopes[k] += change * line[k]
        else:
            changes[i] = 0
