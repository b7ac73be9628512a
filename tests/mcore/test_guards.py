"""Guards in a Megatron optimizer: a skipped step changes nothing, and their states are in its checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dist_clip
from tests.harness import pool

from . import training
from .setups import Config, Setup, build
from .test_checkpoints import merged, state_of

BAD = {6: 100.0, 7: 100.0, 9: 30.0}
SAVED_AT, END = 6, 10


def attached(config: Config, **kwargs: Any) -> tuple[Setup, dist_clip.GradClipper]:
    setup = build(config)
    guards = [dist_clip.MedianGuard(warmup_steps=2), dist_clip.SkipStep(window=4)]
    arguments = {"guard": guards, **kwargs}
    return setup, dist_clip.megatron.attach(
        setup.optimizer, dist_clip.LogClip(warmup_steps=2), model=setup.chunks, **arguments
    )


def guards_of(clipper: dist_clip.GradClipper) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for k, entry in clipper.state_dict()["guards"].items():
        for name, slots in {"model": entry["model"], **entry["tensors"]}.items():
            out |= {f"{k} {name} {slot}": value.tolist() for slot, value in slots.items()}
    return out


def everything(setup: Setup, clipper: dist_clip.GradClipper) -> str:
    """What the optimizer and the policy remember."""
    moments = [leaf.optimizer.state_dict() for leaf in training.leaves(setup.optimizer)]
    return str((moments, clipper.memory.groups[0].state))


def steps(setup: Setup, clipper: dist_clip.GradClipper, first: int, last: int) -> list[dict[str, Any]]:
    out = []
    for step in range(first, last + 1):
        loss = setup.backward(step, factor=BAD.get(step, 1.0))
        last_stage = clipper._options.pp_group is None or dist.get_rank(clipper._options.pp_group) == 1
        if last_stage:  # as its loss function would
            clipper.observe_loss(loss + step)
        pieces = [main.detach().clone() for _, _, main in training.main_params(setup)]
        before = everything(setup, clipper)
        success, _, _ = setup.optimizer.step()
        after = everything(setup, clipper)
        mains = [main for _, _, main in training.main_params(setup)]
        same = all(torch.equal(old, new) for old, new in zip(pieces, mains, strict=True))
        out.append({"success": success, "same": same and before == after, "skip": bool(clipper.last_report.skip)})
    return out


def save(config: Config, path: str) -> dict[str, Any]:
    setup, clipper = attached(config)
    from megatron.core import dist_checkpointing

    records = steps(setup, clipper, 1, SAVED_AT)
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        Path(path).mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state_of(setup, loading=False), path)
    saved = guards_of(clipper)
    return {"state": saved, "records": records + steps(setup, clipper, SAVED_AT + 1, END)}


def load(config: Config, path: str) -> dict[str, Any]:
    setup, clipper = attached(config)
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(state_of(setup, loading=True), path)
    for chunk in setup.chunks:
        chunk.module.load_state_dict(loaded["model"])
    setup.optimizer.load_state_dict(loaded["optimizer"])
    state = guards_of(clipper)
    records = steps(setup, clipper, SAVED_AT + 1, END)
    clipper.check_in_sync()
    return {"state": state, "records": records}


@pytest.mark.parametrize(
    ("first", "second"), [(Config(tp=2, pp=2), Config()), (Config(zero=True), Config(tp=2, pp=2, zero=True))], ids=str
)
def test_skipped_steps_change_nothing_and_states_reshard(first: Config, second: Config, tmp_path: Path) -> None:
    ranks = pool(4 if first.pp > 1 else 2, "megatron").run(save, first, str(tmp_path / "checkpoint"))
    for rank in ranks:
        for step, record in enumerate(rank["records"], start=1):
            bad = step in BAD
            assert record == {"success": not bad, "same": bad, "skip": bad}, step
    again = pool(4 if second.pp > 1 else 2, "megatron").run(load, second, str(tmp_path / "checkpoint"))
    expected = merged(ranks)
    for name, value in merged(again).items():
        assert value == expected[name], name
    assert merged(again).keys() == expected.keys()
    for rank in again:
        assert rank["records"] == ranks[0]["records"][SAVED_AT:]


def without_loss(config: Config) -> str:
    setup, _ = attached(config)
    setup.backward(1)
    with pytest.raises(ValueError, match="SkipStep looks at the loss") as error:
        setup.optimizer.step()
    return str(error.value)


def test_a_loss_that_nothing_hands_over() -> None:
    for told in pool(2, "megatron").run(without_loss, Config(pp=2)):
        assert "no rank passed it" in told
        assert "clipper.observe_loss(loss)" in told
