"""Runs tests under Triton's interpreter, which executes kernels with numpy on CPU tensors.

TRITON_INTERPRET counts when Triton is imported, and torch may have imported it already; so a process of its own, started
with the variable set, serves all tests of a session.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

TIMEOUT = 120.0
"""Seconds a test may take; generous, for it may share few cores with other tests."""


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in the process with the interpreter. Its parameters are pickled; its module must not import Triton."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        _process().submit(_interpret, test.__module__, test.__name__, arguments).result(TIMEOUT)

    return run


@functools.cache
def _process() -> concurrent.futures.ProcessPoolExecutor:
    executor = concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=_set_up, initargs=(list(sys.path),)
    )
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        executor.submit(os.getpid).result(TIMEOUT)  # starts the process, which inherits the variable
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    return executor


def _set_up(path: list[str]) -> None:
    sys.path[:] = path
    import torch

    torch.set_num_threads(1)


def _interpret(module: str, name: str, arguments: dict[str, Any]) -> None:
    import numpy
    import torch
    import triton

    assert triton.knobs.runtime.interpret
    torch.manual_seed(0)
    with numpy.errstate(all="ignore"):  # overflow and NaN are what is tested
        getattr(importlib.import_module(module), name).__wrapped__(**arguments)
