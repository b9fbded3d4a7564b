"""Shape annotations for the device side: jaxtyping for the type checker and the tests, plain stand-ins at run time.

A bare GPU machine has only jax and NumPy. The tests set `GROK_SERVER_CHECK_SHAPES=1` and check every annotated call with beartype.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or os.environ.get("GROK_SERVER_CHECK_SHAPES"):
    from jaxtyping import Array, Bool, Float, Float32, Int, Int8, Int32, Shaped, UInt32
else:
    from jax import Array

    class _Unchecked:
        """Takes any shape string and checks nothing."""

        def __class_getitem__(cls, _: object) -> Any:
            return Array

    Bool = Float = Float32 = Int = Int8 = Int32 = Shaped = UInt32 = _Unchecked

__all__ = ["Array", "Bool", "Float", "Float32", "Int", "Int8", "Int32", "Shaped", "UInt32"]
