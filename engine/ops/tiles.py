"""How work that is the same for every row is repeated: the place where batch invariance is made.

A row's numbers must not depend on how many rows the step has. Matrix products and reductions choose their order of additions by shape,
so on the CPU every one of them sees exactly `TILE` rows: the work runs in a loop over tiles, whose trip count follows the real size of
the step. Padding then costs nothing, and one compiled program serves every size. Elsewhere a loop of small kernels would be far too slow,
and the whole bucket is computed at once; results may then differ between buckets by rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from engine.batch import TILE
from engine.shapes import Array, Int32

_is_for_accelerators = False


def loops_over_tiles() -> bool:
    """True where the backend computes tile by tile."""
    return jax.default_backend() == "cpu" and not _is_for_accelerators


@contextmanager
def for_accelerators() -> Iterator[None]:
    """Trace programs on a CPU as they are for an accelerator, to look at them. What was traced in the other form is forgotten."""
    global _is_for_accelerators
    jax.clear_caches()
    _is_for_accelerators = True
    try:
        yield
    finally:
        _is_for_accelerators = False
        jax.clear_caches()


def map_rows(function: Callable[..., Any], num_rows: Int32[Array, ""], *arrays: Any) -> Any:
    """`function` on the rows of `arrays` (pytrees of [T, ...], T a multiple of `TILE`); rows from `num_rows` on are zeros or garbage.

    `function` takes and returns pytrees of arrays whose first axis counts rows, and treats every row alike.
    """
    if not loops_over_tiles():
        return function(*arrays)
    return _loop(lambda i: function(*jax.tree.map(lambda a: _tile(a, i), arrays)), -(-num_rows // TILE), _rows_of(arrays), TILE)


def map_slices(function: Callable[..., Any], num_rows: Int32[Array, ""], *arrays: Any, slice_len: int) -> Any:
    """As `map_rows`, for a `function` whose intermediate results are large: at most `slice_len` rows are at work at the same time."""
    if loops_over_tiles():
        return map_rows(function, num_rows, *arrays)
    padded = jax.tree.map(lambda a: jnp.pad(a, [(0, -a.shape[0] % slice_len)] + [(0, 0)] * (a.ndim - 1)), arrays)
    result = _loop(
        lambda i: function(*jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * slice_len, slice_len), padded)),
        -(-num_rows // slice_len),
        _rows_of(padded),
        slice_len,
    )
    return jax.tree.map(lambda a: a[: _rows_of(arrays)], result)


def in_slices(function: Callable[..., Any], *arrays: Any, slice_len: int) -> Any:
    """`function` on `slice_len` rows of a tile at a time, where the backend loops over tiles; a divisor of `TILE`."""
    if not loops_over_tiles() or slice_len == TILE:
        return function(*arrays)

    def of_slice(i: Int32[Array, ""]) -> Any:
        return function(*jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * slice_len, slice_len), arrays))

    return _loop(of_slice, jnp.int32(TILE // slice_len), TILE, slice_len)


def map_each(function: Callable[..., Any], num_items: Int32[Array, ""], *arrays: Any) -> Any:
    """`function` on each of the first `num_items` entries of `arrays`, without the leading axis; results are stacked."""
    if not loops_over_tiles():
        return jax.vmap(function)(*arrays)

    def one(i: Int32[Array, ""]) -> Any:
        result = function(*jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), arrays))
        return jax.tree.map(lambda a: a[None], result)

    return _loop(one, num_items, _rows_of(arrays), 1)


def _tile(array: Array, i: Int32[Array, ""]) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, i * TILE, TILE)


def _rows_of(arrays: Any) -> int:
    return jax.tree.leaves(arrays)[0].shape[0]


def _loop(function: Callable[[Any], Any], trips: Int32[Array, ""], num_rows: int, width: int) -> Any:
    """Write the `width` rows that `function(i)` gives to their place, for i below `trips`."""
    shapes = jax.eval_shape(function, jnp.int32(0))
    buffers = jax.tree.map(lambda shape: jnp.zeros((num_rows, *shape.shape[1:]), shape.dtype), shapes)

    def body(i: Int32[Array, ""], buffers: Any) -> Any:
        return jax.tree.map(lambda buffer, rows: jax.lax.dynamic_update_slice_in_dim(buffer, rows, i * width, 0), buffers, function(i))

    return jax.lax.fori_loop(0, trips, body, buffers)
