"""Shows that a change of the code did not change any number by a single bit.

    python -m scripts.same_bits record before.json       # in a checkout of the code before the change: some minutes
    python -m scripts.same_bits record after.json        # in a checkout of the code after it: same machine, same packages
    python -m scripts.same_bits compare before.json after.json

`record` trains each layout of the test suite with each policy on gloo processes, at the layout's largest number of ranks,
at most 4, and the suite's Megatron configurations likewise. Each run's optimizer follows that run's own policy. Digests
cover the parameters at the end, the scales and tensor norms of each step and the values of the clipper's state at the end,
on all ranks. `compare` lists the runs that differ and fails if there are any. It also lists the runs that only one file has.
Layouts, models and steps are those of tests/: where a change touches those, record both with the same tests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

import dist_clip
from tests.distributed import training
from tests.distributed.layouts import LAYOUTS
from tests.distributed.model import make_net
from tests.harness import WorkerError, pool
from tests.mcore import setups as megatron_setups
from tests.mcore import training as megatron_training
from tests.mcore.test_layouts import CONFIGS

DEEP = ("pp", "pp-chunks", "pp-tied", "pp-frozen", "pp-hole", "pp-chunks-fsdp", "pp-chunks-fsdp-summed")
"""Layouts that need all blocks of their model, one for each stage. The others train half of them, to save time."""
# "adagc" differs from "adagc-median" only in how it starts, which the suite's own layouts cover.
MEGATRON_POLICIES = tuple(policy for policy in megatron_training.POLICIES if policy != "adagc")
TIMEOUT = 900.0  # seconds for all policies of one layout

Run = tuple[list[tuple[str, Tensor]], list[Any], Any]
"""Named parameters, the report of each step, and the clipper."""


def train_all(name: str, policies: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Train with each policy on this rank: {policy: {what is digested: digest}}."""
    checkout, used = Path(__file__).resolve().parents[1], Path(dist_clip.__file__).resolve()
    if not used.is_relative_to(checkout):
        raise RuntimeError(f"this script would record {used}: start it in its own checkout, {checkout}")
    train = train_megatron if name.startswith("megatron/") else train_layout
    return {policy: digests(*train(name, policy)) for policy in policies}


def train_layout(name: str, policy: str) -> Run:
    layout = LAYOUTS[name]
    config = dataclasses.replace(layout.config, blocks=layout.config.blocks // (1 if name in DEEP else 2))
    setup = layout.build(make_net(config, layout.dtype or torch.float32), config)
    params = [param for _, param in setup.named]
    clipper = training.make_clipper(setup, training.POLICIES[policy].ours())
    # AdamW treats each element alone: local tensors step as DTensors do, without DTensor's dispatch.
    owned = [nn.Parameter(training.local(param.detach())) for param in params]
    optimizer = training.OPTIMIZERS["adamw"](owned)
    reports = []
    for step in range(1, training.STEPS + 1):
        for param in params:
            param.grad = None
        setup.backward(step)
        reports.append(clipper.clip_())
        for mine, param in zip(owned, params, strict=True):
            mine.grad = training.local_grad(param)
        optimizer.step()
    return [(name, training.local(param.detach())) for name, param in setup.named], reports, clipper


def train_megatron(name: str, policy: str) -> Run:
    config = CONFIGS[name.removeprefix("megatron/")][1]
    setup = megatron_setups.build(dataclasses.replace(config, layers=config.pp * (config.vpp or 1)))
    params = [(name, main.detach()) for name, _, main in megatron_training.main_params(setup)]
    rule = megatron_training.POLICIES[policy][0]()
    clipper = dist_clip.megatron.attach(setup.optimizer, rule, model=setup.chunks)
    reports = []
    for step in range(1, megatron_training.STEPS + 1):
        setup.backward(step)
        setup.optimizer.step()
        reports.append(clipper.last_report)
    return params, reports, clipper


def digests(params: list[tuple[str, Tensor]], reports: list[Any], clipper: Any) -> dict[str, str]:
    state = {key: value for key, value in clipper.state_dict().items() if key not in ("format_version", "policies")}
    return {
        "params": digest(f"{name} {param.dtype} {bits(param)}" for name, param in params),
        "scales": digest(f"{list(report.names)} {list(map(float.hex, report.scales.tolist()))}" for report in reports),
        "norms": digest(
            f"{list(report.names)} {list(map(float.hex, report.tensor_norms.tolist()))}" for report in reports
        ),
        "state": digest(numbers(state)),
    }


def bits(tensor: Tensor) -> str:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes().hex()


def numbers(value: Any, where: str = "") -> Iterator[str]:
    """All numbers of a state dict with their places, exactly. Text and empty lists have none."""
    value = value.tolist() if isinstance(value, Tensor) else value
    if isinstance(value, (Mapping, list)):
        for key, entry in sorted(value.items()) if isinstance(value, Mapping) else enumerate(value):
            yield from numbers(entry, f"{where}/{key}")
    elif not isinstance(value, str):
        yield f"{where} {float(value).hex()}"


def digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def record(out: Annotated[Path, tyro.conf.Positional], only: str = "*") -> int:
    """Train everything and write the digests.

    Args:
        out: JSON file to write.
        only: pattern of the layouts to train: "fsdp*", "megatron/*".
    """
    groups = [("", max(layout.worlds, default=4), name, training.MAIN_POLICIES) for name, layout in LAYOUTS.items()]
    groups += [("megatron", world, f"megatron/{name}", MEGATRON_POLICIES) for name, (world, _) in CONFIGS.items()]
    groups = sorted(group for group in groups if fnmatch(group[2], only))
    runs: dict[str, dict[str, str]] = {}
    failed, started, number = [], time.monotonic(), itertools.count(1)
    for (kind, world), alike in itertools.groupby(groups, key=lambda group: group[:2]):
        for _, _, name, policies in alike:
            seconds = time.monotonic() - started
            print(f"{seconds:5.0f} s  {next(number)}/{len(groups)}  {name} on {world}", file=sys.stderr, flush=True)
            try:
                ranks = pool(world, kind).run(train_all, name, policies, timeout=TIMEOUT)
            except WorkerError as error:
                failed.append(name)
                print(error, file=sys.stderr)
                continue
            for policy in policies:
                what = {key: digest(rank[policy][key] for rank in ranks) for key in ranks[0][policy]}
                runs[f"{name} on {world}, {policy}"] = what
            out.write_text(json.dumps(runs, indent=1) + "\n")  # each time: an interrupted recording is of use, too
        pool(world, kind).close()  # idle gloo processes take time, too
    print(f"{len(runs)} runs in {time.monotonic() - started:.0f} s; failed: {', '.join(failed) or 'none'}")
    return 1 if failed or not runs else 0


def compare(before: Annotated[Path, tyro.conf.Positional], after: Annotated[Path, tyro.conf.Positional]) -> int:
    """List the runs that differ between two recordings."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    for path, runs, others in ((before, old, new), (after, new, old)):
        for run in sorted(runs.keys() - others.keys()):
            print(f"only in {path}: {run}")
    common = sorted(old.keys() & new.keys())
    different = [run for run in common if old[run] != new[run]]
    for run in different:
        print(f"differs: {run}: {', '.join(key for key in old[run] if old[run][key] != new[run].get(key))}")
    print(f"{len(common)} runs are in both files, {len(different)} of them differ")
    return 1 if different or not common else 0


if __name__ == "__main__":
    sys.exit(tyro.extras.subcommand_cli_from_dict({"record": record, "compare": compare}, description=__doc__))
