"""Triton's interpreter where a version of it needs help: for tests and for `bench.gpu --device cpu`."""

from __future__ import annotations

import importlib
from typing import Any

import triton


def mend() -> None:
    """Lets the interpreter of Triton 3.6 loop to a number of run time with NumPy 2.4 and later.

    These make no number of an array (1,) any more; Triton 3.7 asks for one in another way.
    """
    if not triton.__version__.startswith("3.6."):
        return
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_for_numpy(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_for_numpy
