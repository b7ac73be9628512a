"""Owns the gloo worker processes of the multi-process tests: pools that outlive a test, with timeouts instead of hangs.

`pool(4).run(fn, *args)` calls `fn(*args)` in four processes that share one default process group, and returns the four
results in rank order. A pool is kept for the following tests, so that processes start once per world size. If a rank
raises, or is still busy at the deadline, one `WorkerError` shows every rank's error or the stack in which it hangs. The
pool is then closed, because its collectives may be out of step.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120.0
"""Seconds that a call may take; many, because the ranks share few cores with other tests."""
GRACE = 10.0
"""Seconds that the other ranks get to finish once one rank has raised, for which they may wait in a collective."""

_PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
]


class WorkerError(AssertionError):
    """The errors of all ranks in one message; `timed_out`: whether some rank was still busy and had to be killed."""

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class _OneLoopGloo(dist.ProcessGroupGloo):
    """A gloo group on this process's one event loop.

    torch gives every group its own loop, which wakes up a hundred times a second. The few hundred groups of Megatron's
    layouts would leave a small machine little time for the tests. Groups that are made without a timeout (those of
    device meshes) would wait half an hour; here every group waits at most `longest`.
    """

    longest = datetime.timedelta(seconds=TIMEOUT / 2)

    def __init__(
        self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta, **_newer: object
    ) -> None:  # enable_reconfigure, from torch 2.14 on, which is off
        options = dist.ProcessGroupGloo._Options()
        options._devices = [_gloo_device()]
        options._timeout = min(timeout, self.longest)
        super().__init__(store, rank, size, options)


@functools.cache
def _gloo_device() -> Any:
    return dist.ProcessGroupGloo.create_default_device()


def _worker(
    rank: int, world_size: int, port: int, path: list[str], stacks: str, patience: float, pipe: Connection
) -> None:
    """Serve calls until the parent closes the pipe."""
    os.setsid()  # its own process group, so that it can be killed with the children that tests make
    sys.path[:] = path
    torch.set_num_threads(1)
    with open(stacks, "w") as stack_file:
        faulthandler.register(signal.SIGUSR1, stack_file, all_threads=True)
        dist.distributed_c10d.ProcessGroupGloo = _OneLoopGloo
        store = dist.TCPStore("127.0.0.1", port, world_size + 1, is_master=False)
        timeout = _OneLoopGloo.longest = datetime.timedelta(seconds=patience)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        while True:
            try:
                function, args, kwargs = pickle.loads(pipe.recv_bytes())
            except EOFError:
                break
            try:
                reply = pickle.dumps((True, function(*args, **kwargs)))
            except BaseException:
                reply = pickle.dumps((False, traceback.format_exc()))
            pipe.send_bytes(reply)
    os.killpg(0, signal.SIGKILL)  # destroying gloo groups whose peers have ended can take until their timeout


class Pool:
    """`world_size` processes in one gloo process group that run functions on demand.

    `patience`: seconds that a collective waits for a rank that does not join it. It is shorter than the parent's
    timeout, so that such a collective raises where it was called.
    """

    def __init__(self, world_size: int, patience: float = TIMEOUT / 2) -> None:
        context = multiprocessing.get_context("forkserver")
        # The server imports torch once; workers forked from it start in milliseconds.
        context.set_forkserver_preload(_PRELOAD)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self.world_size = world_size
        self._stacks = tempfile.TemporaryDirectory(prefix="dist_clip_stacks_")
        # With port 0 and the store's server in this process no port is guessed, so parallel runs cannot collide.
        self._store = dist.TCPStore("127.0.0.1", 0, world_size + 1, is_master=True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            where = (list(sys.path), str(self._stack_file(rank)))
            arguments = (rank, world_size, self._store.port, *where, patience, theirs)
            # Not daemons, which may not have children: Megatron writes checkpoints in child processes.
            process = context.Process(target=_worker, args=arguments)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _stack_file(self, rank: int) -> Path:
        return Path(self._stacks.name) / f"rank{rank}"

    @property
    def alive(self) -> bool:
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` on every rank; return the results in rank order or raise WorkerError."""
        call = pickle.dumps((function, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(call)
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        pending = dict(enumerate(self._pipes))
        deadline = time.monotonic() + timeout
        while pending and time.monotonic() < deadline:
            for pipe in wait(list(pending.values()), timeout=max(0.0, deadline - time.monotonic())):
                rank = next(r for r, p in pending.items() if p is pipe)
                del pending[rank]
                try:
                    good, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    self._processes[rank].join(1)
                    good, value = False, f"the process died with exit code {self._processes[rank].exitcode}\n"
                if good:
                    results[rank] = value
                else:
                    errors[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE)
        if not errors and not pending:
            return [results[rank] for rank in range(self.world_size)]
        for rank in pending:
            errors[rank] = f"still busy when the time was up, in\n{self._stack_of(rank)}"
        self.close()
        text = "\n".join(f"--- rank {rank} of {self.world_size} ---\n{errors[rank]}" for rank in sorted(errors))
        fine = sorted(results)
        raise WorkerError(f"{function.__name__} failed (fine on ranks {fine})\n{text}", timed_out=bool(pending))

    def _stack_of(self, rank: int) -> str:
        """Return the Python stacks of a worker that does not answer."""
        process = self._processes[rank]
        if process.pid is None or not process.is_alive():
            return f"a dead process (exit code {process.exitcode})"
        os.kill(process.pid, signal.SIGUSR1)
        path = self._stack_file(rank)
        for _ in range(20):
            time.sleep(0.05)
            if path.stat().st_size:
                break
        return path.read_text()

    def close(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process in self._processes:
            process.join(5)
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.close()
        self._processes, self._pipes = [], []
        self._stacks.cleanup()


_pools: dict[tuple[int, str, float], Pool] = {}


def pool(world_size: int, kind: str = "", patience: float = TIMEOUT / 2) -> Pool:
    """Return the pool of that world size, started now if there is none or if the last test broke it.

    `kind`: pools of different kinds share no processes, for tests that change torch for the whole process.
    `patience`: seconds that a collective waits for a rank that does not join it.
    """
    key = (world_size, kind, patience)
    if key not in _pools or not _pools[key].alive:
        if key in _pools:
            _pools.pop(key).close()
        _pools[key] = Pool(world_size, patience)
    return _pools[key]


@atexit.register
def _close_pools() -> None:
    for each in _pools.values():
        each.close()
