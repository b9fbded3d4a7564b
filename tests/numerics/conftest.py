"""The numerics tests refuse silent dtype and rank promotion, in every thread: the runner compiles in several."""

from collections.abc import Iterator

import jax
import pytest

STRICT = {"jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise"}


@pytest.fixture(autouse=True, scope="module")
def strict_promotion() -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in STRICT}
    for name, value in STRICT.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
