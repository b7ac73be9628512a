"""The clipper in `torch.distributed.checkpoint`, beside model and optimizer: saved under one layout, loaded under another.

Several policies clip the same gradients, each with a clipper of its own in the same checkpoint; the optimizer follows the
last. Each run is interrupted after SAVED_AT steps. The state right after loading equals the one that was saved, tensor by
tensor. State and parameters at the end equal those of the run that was not interrupted: bitwise on the same layout, up to
rounding on another.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

import dist_clip
from dist_clip.memory.snapshot import snapshot
from tests.harness import WorkerError, pool

from .layouts import LAYOUTS, Config, Setup
from .model import make_net
from .training import POLICIES, WARMUP, make_clipper, remember_gradients

SAVED_AT, END = WARMUP + 1, WARMUP + 4  # a spike is the last step
DENSE, UNEVEN, TIED, MOE = Config(blocks=4), Config(blocks=4, odd=True), Config(blocks=4, tied=True), Config(experts=4)

# As pipeline stages need it, each with an optimizer of its own.
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class Training:
    """One run of a layout, with an AdamW over whatever parameters the layout has."""

    def __init__(
        self, layout: str, config: Config, policies: tuple[str, ...], own: dist_clip.Policy | None = None
    ) -> None:
        """`own`: a policy that is not in POLICIES, to be followed."""
        self.setup: Setup = LAYOUTS[layout].build(make_net(config, torch.float64), config)
        made = {policy: POLICIES[policy].ours() for policy in policies} | ({"own": own} if own is not None else {})
        self.clippers = {name: make_clipper(self.setup, policy) for name, policy in made.items()}
        (*_, self.clipper) = self.clippers.values()
        params = [param for _, param in self.setup.named]
        self.optimizer = torch.optim.AdamW(params, lr=3e-3, eps=1e-5, foreach=False)
        self.model = self.setup.modules[0] if len(self.setup.modules) == 1 else nn.ModuleList(self.setup.modules)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.optimizer.zero_grad()
            self.setup.backward(step)
            restore = remember_gradients(self.setup.modules) if len(self.clippers) > 1 else None
            for clipper in self.clippers.values():
                if restore is not None:
                    restore()
                clipper.clip_()
            self.optimizer.step()

    def checkpoint(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=OPTIONS)
        *others, _ = self.clippers
        return {
            "model": model,
            "optimizer": optimizer,
            "clipper": self.clipper,
            **{p: self.clippers[p] for p in others},
        }

    def load(self, path: str) -> None:
        state = self.checkpoint()
        dcp.load(state, checkpoint_id=path)
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **parts, options=OPTIONS)

    def outcome(self) -> dict[str, Any]:
        params = {}
        for name, param in self.setup.named:
            value = param.detach()
            params[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        return {"state": self.states(), "params": params}

    def states(self) -> dict[str, Any]:
        """Of all policies, mergeable over pipeline stages."""
        return {f"{policy}: {name}": v for policy, each in self.clippers.items() for name, v in plain(each).items()}


def plain(clipper: Any) -> dict[str, Any]:
    """The state as plain numbers, mergeable over pipeline stages."""
    taken = snapshot(clipper.memory)
    out = {f"{n}/{slot}": value.tolist() for n, entry in taken["tensors"].items() for slot, value in entry.items()}
    out |= {f"{n}/{slot}": value.tolist() for n, entry in taken["global"].items() for slot, value in entry.items()}
    return {**out, "step": taken["step"]}


def save_and_go_on(
    layout: str, config: Config, policies: tuple[str, ...], path: str, saved_at: int = SAVED_AT, end: int = END
) -> dict[str, Any]:
    training = Training(layout, config, policies)
    assert isinstance(training.clipper, Stateful)
    training.steps(1, saved_at)
    saved = training.states()
    dcp.save(training.checkpoint(), checkpoint_id=path)
    training.steps(saved_at + 1, end)
    return {"saved": saved, **training.outcome()}


def load_and_go_on(
    layout: str, config: Config, policies: tuple[str, ...], path: str, saved_at: int = SAVED_AT
) -> dict[str, Any]:
    training = Training(layout, config, policies)
    training.steps(1, 2)  # a past of its own, which loading has to replace
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training.load(path)
    loaded = training.states()
    training.steps(saved_at + 1, END)
    told = [str(w.message) for w in caught if "scope 'shard'" in str(w.message)]
    return {"loaded": loaded, "warnings": told, **training.outcome()}


def merged(ranks: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """One state of all stages; ranks that know the same value know the same bits."""
    out: dict[str, Any] = {}
    for rank in ranks:
        for name, value in rank[key].items():
            assert str(out.setdefault(name, value)) == str(value), name
    return out


PAIRS = [
    (("ddp", 2), ("fsdp", 4), UNEVEN),
    (("fsdp", 4), ("ddp", 2), UNEVEN),
    (("fsdp", 2), ("hsdp", 4), UNEVEN),
    (("hsdp", 4), ("tp-fsdp", 4), DENSE),
    (("tp-fsdp", 4), ("ddp", 2), DENSE),
    (("ddp", 2), ("pp", 4), DENSE),
    (("pp", 4), ("fsdp", 2), DENSE),
    (("pp", 2), ("pp", 4), DENSE),
    (("pp-fsdp", 4), ("tp-fsdp", 4), DENSE),
    (("tp-fsdp", 4), ("pp-fsdp", 4), DENSE),
    (("tp", 2), ("fsdp-dim1", 4), DENSE),
    (("fsdp-offload", 2), ("tp-sequence-fsdp", 4), DENSE),
    (("pp-tied", 4), ("fsdp-tied", 2), TIED),
    (("ddp-tied", 2), ("pp-tied-fsdp", 4), TIED),
    (("ep", 4), ("ddp", 2), MOE),
    (("ep", 2), ("ep", 4), MOE),
]
# Beside adagc-median, which the optimizer follows, each pair of layouts has another policy, in turn.
TURNS = ("logclip", "logclip-post", "zclip", "zclip-tensor", "adagc-global")


@pytest.mark.parametrize(
    ("first", "second", "config"), PAIRS, ids=lambda v: f"{v[0]}{v[1]}" if type(v) is tuple else None
)
def test_another_layout(first: tuple[str, int], second: tuple[str, int], config: Config, tmp_path: Path) -> None:
    policies = (TURNS[PAIRS.index((first, second, config)) % len(TURNS)], "adagc-median")
    before = pool(first[1]).run(save_and_go_on, first[0], config, policies, str(tmp_path))
    after = pool(second[1]).run(load_and_go_on, second[0], config, policies, str(tmp_path))
    saved = merged(before, "saved")
    assert str(merged(after, "loaded")) == str({name: saved[name] for name in merged(after, "loaded")})
    assert merged(after, "loaded").keys() == saved.keys()
    assert all(rank["warnings"] == [] for rank in after)
    end, straight = merged(after, "state"), merged(before, "state")
    assert end == {name: pytest.approx(value, rel=1e-5, nan_ok=True) for name, value in straight.items()}
    params = {name: param for rank in before for name, param in rank["params"].items()}
    for rank in after:
        for name, param in rank["params"].items():
            torch.testing.assert_close(param, params[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("saved_at", [WARMUP - 2, SAVED_AT])
def test_resuming_on_the_same_layout_is_exact(saved_at: int, tmp_path: Path) -> None:
    """Every policy, within the warm-up and after it."""
    everything = (UNEVEN, tuple(POLICIES), str(tmp_path), saved_at)
    before = pool(2).run(save_and_go_on, "fsdp", *everything)
    after = pool(2).run(load_and_go_on, "fsdp", *everything)
    for interrupted, straight in zip(after, before, strict=True):
        assert str(interrupted["loaded"]) == str(straight["saved"])
        assert str(interrupted["state"]) == str(straight["state"])
        for name, param in interrupted["params"].items():
            assert torch.equal(param, straight["params"][name]), name


def save_packed(layout: str, config: Config, path: str, saved_at: int) -> dict[str, Any]:
    training = Training(layout, config, PACKED)
    training.steps(1, saved_at)
    dcp.save({name: clipper.packed() for name, clipper in training.clippers.items()}, checkpoint_id=path)
    return training.states()


def load_packed(layout: str, config: Config, path: str) -> dict[str, Any]:
    training = Training(layout, config, PACKED)
    training.steps(1, 2)
    dcp.load({name: clipper.packed() for name, clipper in training.clippers.items()}, checkpoint_id=path)
    return training.states()


PACKED = ("logclip", "zclip", "adagc-median")


@pytest.mark.parametrize("saved_at", [WARMUP - 2, SAVED_AT])
@pytest.mark.parametrize(
    ("first", "second", "config"),
    [
        (("pp", 4), ("fsdp", 2), DENSE),
        (("fsdp", 2), ("pp", 2), DENSE),
        (("pp", 2), ("pp", 4), DENSE),
        (("pp-tied", 4), ("fsdp-tied", 2), TIED),
    ],
    ids=lambda v: f"{v[0]}{v[1]}" if type(v) is tuple else None,
)
def test_a_packed_state_loads_under_another_layout(
    first: tuple[str, int], second: tuple[str, int], config: Config, saved_at: int, tmp_path: Path
) -> None:
    """One entry a clipper, with what all stages know; each stage takes its part of it."""
    ranks = pool(first[1]).run(save_packed, first[0], config, str(tmp_path), saved_at)
    entries = dcp.FileSystemReader(str(tmp_path)).read_metadata().state_dict_metadata
    assert sorted(entries) == sorted(f"{policy}.packed" for policy in PACKED)
    saved = merged([{"state": rank} for rank in ranks], "state")
    ranks = pool(second[1]).run(load_packed, second[0], config, str(tmp_path))
    loaded = merged([{"state": rank} for rank in ranks], "state")
    assert loaded.keys() == saved.keys()
    assert {name: str(value) for name, value in loaded.items()} == {name: str(value) for name, value in saved.items()}


def shards_elsewhere(path: str) -> dict[str, Any]:
    training = Training("fsdp", DENSE, ("adagc-shard",))
    saved = training.clipper.state_dict()
    before = plain(training.clipper)
    error = ""
    try:
        dcp.load({"clipper": training.clipper}, checkpoint_id=path)
    except BaseException as caught:
        error = str(caught)
    unchanged = str(plain(training.clipper)) == str(before)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        dcp.load({"clipper": training.clipper}, checkpoint_id=path, planner=planner)
    state = plain(training.clipper)
    training.steps(SAVED_AT + 1, SAVED_AT + 2)
    texts = [str(w.message) for w in told if "scope 'shard'" in str(w.message)]
    return {"error": error, "unchanged": unchanged, "state": state, "told": texts, "cuts": len(saved["shards"])}


def test_shards_of_another_layout_start_afresh_and_say_so(tmp_path: Path) -> None:
    """What a shard remembers is of no use to a shard of another cut. By default the checkpoint's reader refuses."""
    pool(2).run(save_and_go_on, "fsdp", DENSE, ("adagc-shard",), str(tmp_path), end=SAVED_AT)
    for rank in pool(4).run(shards_elsewhere, str(tmp_path)):
        assert "Missing key in checkpoint state_dict: clipper.shards." in rank["error"]
        assert rank["unchanged"]
        assert len(rank["told"]) == 1
        assert f"{rank['cuts']} tensors" in rank["told"][0]
        assert rank["state"].pop("step") == SAVED_AT
        assert set(rank["state"].values()) == {0.0}


@pytest.mark.parametrize(("first", "second"), [(("hsdp", 4), ("fsdp", 2)), (("fsdp", 2), ("hsdp", 4))])
@pytest.mark.report(
    "mosaicml/composer#3313",
    "pytorch/torchtitan#561",
    situation="HSDP resumes with another number of replicas",
    right='the state goes on, also at scope "shard"',
)
def test_shards_of_the_same_cut_load_whatever_the_mesh(
    first: tuple[str, int], second: tuple[str, int], tmp_path: Path
) -> None:
    """As when HSDP resumes with another number of replicas: rank k of two holds the same shards."""
    before = pool(first[1]).run(save_and_go_on, first[0], DENSE, ("adagc-shard",), str(tmp_path))
    after = pool(second[1]).run(load_and_go_on, second[0], DENSE, ("adagc-shard",), str(tmp_path))
    for number, rank in enumerate(after):
        twin = before[number % 2]
        assert rank["warnings"] == []
        assert rank["loaded"] == twin["saved"]
        for key, value in rank["state"].items():
            assert value == pytest.approx(twin["state"][key], rel=1e-5), key


def damaged(layout: str, path: str) -> dict[str, Any]:
    training = Training(layout, DENSE, ("adagc-median",))
    training.steps(1, 3)
    before = str(plain(training.clipper))
    error = ""
    try:
        dcp.load({"clipper": training.clipper}, checkpoint_id=path)
    except BaseException as caught:
        error = f"{type(caught).__name__}: {caught}"
    return {"error": error, "unchanged": str(plain(training.clipper)) == before}


@pytest.mark.parametrize("damage", ["cut short", "lost", "overwritten"])
def test_a_damaged_checkpoint_changes_nothing(damage: str, tmp_path: Path) -> None:
    pool(2).run(save_and_go_on, "fsdp", DENSE, ("adagc-median",), str(tmp_path), WARMUP - 1, WARMUP - 1)
    for file in tmp_path.glob("*.distcp"):
        content = file.read_bytes()
        if damage == "cut short":
            file.write_bytes(content[: len(content) // 2])
        elif damage == "lost":
            file.unlink()
        else:
            file.write_bytes(b"\x00" * len(content))
    for rank in pool(2).run(damaged, "fsdp", str(tmp_path)):
        assert rank["error"]
        assert rank["unchanged"]


def other_model(path: str, config: Config) -> None:
    setup = LAYOUTS["fsdp"].build(make_net(config, torch.float64), config)
    clipper = make_clipper(setup, POLICIES["adagc-median"].ours())
    dcp.load({"clipper": clipper}, checkpoint_id=path)


def test_another_model_is_named_on_every_rank(tmp_path: Path) -> None:
    """Fewer tensors than were saved: the checkpoint's reader would load that in silence."""
    pool(2).run(save_and_go_on, "fsdp", DENSE, ("adagc-median",), str(tmp_path), end=SAVED_AT)
    with pytest.raises(WorkerError) as caught:
        pool(2).run(other_model, str(tmp_path), Config(blocks=4, tied=True))
    assert not caught.value.timed_out
    assert str(caught.value).count("unknown ['head.bias', 'head.weight']") == 2
    with pytest.raises(WorkerError) as caught:
        pool(2).run(other_model, str(tmp_path), Config(blocks=5))
    assert not caught.value.timed_out
    assert str(caught.value).count("clipper.tensors.blocks.4.") >= 2


def what_fits(path: str) -> dict[str, Any]:
    setup = LAYOUTS["fsdp"].build(make_net(Config(blocks=5), torch.float64), Config(blocks=5))
    clipper = make_clipper(setup, POLICIES["adagc-median"].ours())
    for step in range(1, WARMUP + 2):  # a past of its own, of which nothing must be left
        setup.backward(step)
        clipper.clip_()
    state = clipper.state_dict()
    dcp.load({"clipper": state}, checkpoint_id=path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clipper.load_state_dict(state, strict=False)
    return {"loaded": plain(clipper), "told": [str(w.message) for w in caught]}


def test_what_fits_can_be_loaded(tmp_path: Path) -> None:
    before = pool(2).run(save_and_go_on, "fsdp", DENSE, ("adagc-median",), str(tmp_path), end=SAVED_AT)
    saved = {name.removeprefix("adagc-median: "): value for name, value in before[0]["saved"].items()}
    for rank in pool(2).run(what_fits, str(tmp_path)):
        assert len(rank["told"]) == 1
        assert "missing ['blocks.4.down.bias'," in rank["told"][0]
        fresh = {name: value for name, value in rank["loaded"].items() if name.startswith("blocks.4.")}
        assert len(fresh) == 6
        assert set(fresh.values()) == {0.0}
        assert {name: value for name, value in rank["loaded"].items() if name not in fresh} == saved


def alone_and_together(path: str) -> list[str]:
    """torch.save on rank 0, loaded everywhere with weights_only=True."""
    training = Training("fsdp", UNEVEN, ("adagc-mean",))
    training.steps(1, 3)
    if dist.get_rank() == 0:
        torch.save(training.clipper.state_dict(), path)
    dist.barrier()
    other = Training("ddp", UNEVEN, ("adagc-mean",))
    other.clipper.load_state_dict(torch.load(path, weights_only=True))
    return [str(plain(training.clipper)), str(plain(other.clipper))]


def test_plain_files(tmp_path: Path) -> None:
    for before, after in pool(2).run(alone_and_together, str(tmp_path / "clipper.pt")):
        assert after == before


def test_a_plain_file_cut_short(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC())
    before = clipper.state_dict()
    path = tmp_path / "clipper.pt"
    torch.save(before, path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RuntimeError):
        clipper.load_state_dict(torch.load(path, weights_only=True))
    assert str(clipper.state_dict()) == str(before)
