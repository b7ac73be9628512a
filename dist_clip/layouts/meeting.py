"""The wait for all ranks before they exchange anything, which names the ranks that do not come.

A collective that some rank never enters ends in the backend's timeout, which names no rank, or under NCCL in the end of
the process. The ranks therefore meet in the store of the process group first. Each rank says there that it has come, and
waits for a verdict; the last to come, or the first to lose patience, writes it, so that all ranks get the same one. That
takes each rank three requests, however many ranks there are.
"""

from __future__ import annotations

import datetime
import hashlib
import time
from collections import Counter
from typing import Any

import torch.distributed as dist

from dist_clip.errors import LayoutError
from dist_clip.layouts.process_groups import current_rank, group_size, name_ranks

_MET = "all ranks are here"
_AT_ONCE = datetime.timedelta(seconds=5)
"""The longest single wait, as other users of the store's connection are held up by it."""

_meetings: Counter[tuple[int, ...]] = Counter()
"""How many meetings this rank has entered, by the rank and the ranks that meet: all ranks count alike."""


def meet(group: dist.ProcessGroup | None, doing: str, kind: type[Exception] = LayoutError) -> None:
    """Return when all ranks of `group` (None: all ranks) have called this; then they can use a collective.

    Args:
        doing: what the ranks do together, for the error.
        kind: class of the error.

    Raises:
        LayoutError, or `kind`: some ranks did not come within the group's timeout. The same on all ranks that come, also
            on those that come later.
    """
    store = _store(group)
    if store is None:
        return
    group = group if group is not None else dist.distributed_c10d._get_default_group()
    ranks, me = tuple(dist.get_process_group_ranks(group)), current_rank()
    _meetings[(me, *ranks)] += 1
    number = _meetings[(me, *ranks)]
    place = f"dist_clip/{hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]}"
    verdict, timeout = f"{place}/{number}/verdict", _timeout(group)
    try:
        store.set(f"{place}/rank {me}", str(number))
        if store.add(f"{place}/{number}/count", 1) == len(ranks):
            store.compare_set(verdict, "", _MET)
            if number > 1:  # everybody has left the meeting before
                store.delete_key(f"{place}/{number - 1}/verdict")
                store.delete_key(f"{place}/{number - 1}/count")
        if not _appears(store, verdict, timeout):
            missing = [rank for rank in ranks if not _came(store, f"{place}/rank {rank}", number)]
            if missing:
                store.compare_set(
                    verdict,
                    "",
                    f"rank {me} waited {timeout:g} s for {name_ranks(missing)} to "
                    f"{doing}, as every rank of its process group must: did only some ranks get there, or did one fail "
                    "before? If fewer ranks train this model, pass their group as process_group=",
                )
        result = store.get(verdict).decode()
    except RuntimeError as error:
        raise kind(f"rank {me} lost the other ranks while it waited for all of them to {doing}: {error}") from error
    if result != _MET:
        raise kind(result)


def _store(group: dist.ProcessGroup | None) -> Any:
    """Return the store that the ranks share; None where there is nobody, or no store, to meet."""
    if group_size(group) == 1 or dist.get_backend(group) == "fake":
        return None
    try:
        return dist.distributed_c10d._get_default_store()
    except (AttributeError, ValueError):
        return None


def _timeout(group: dist.ProcessGroup) -> float:
    """Return how long a collective of the group may take, in seconds."""
    try:
        timeout = group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):  # a backend of somebody else's
        timeout = dist.default_pg_timeout
    return float(timeout.total_seconds())


def _appears(store: Any, key: str, seconds: float) -> bool:
    """Wait for the key; return whether it is there in time."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        try:
            store.wait([key], min(_AT_ONCE, datetime.timedelta(seconds=left)))
            return True
        except dist.DistStoreError:
            continue
    return bool(store.check([key]))


def _came(store: Any, key: str, number: int) -> bool:
    return bool(store.check([key])) and int(store.get(key)) >= number
