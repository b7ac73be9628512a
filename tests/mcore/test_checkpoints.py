"""The clipping state in Megatron's distributed checkpoints: saved under one layout, loaded under another.

Training goes on as if nothing had happened: losses after loading are those of the run that was not interrupted, and the
state after loading is the saved one, tensor by tensor.
"""

from __future__ import annotations

import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dist_clip
from dist_clip.memory.snapshot import snapshot
from tests.harness import WorkerError, pool

from .setups import Config, Setup, build
from .training import POLICIES

STATES_V1 = Path(__file__).parents[1] / "data" / "states_v1.pt"
SAVED_AT, END = 6, 10  # after the warm-up of 5, before the spike at 9
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def state_of(setup: Setup, *, loading: bool) -> dict[str, Any]:
    """As Megatron-LM's generate_state_dict puts a checkpoint together."""
    state: dict[str, Any] = {}
    for i, chunk in enumerate(setup.chunks):
        state["model" if len(setup.chunks) == 1 else f"model{i}"] = chunk.module.sharded_state_dict()
    state["optimizer"] = setup.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=METADATA)
    return state


def make(config: Config, policy: str | None, seed: int = 0, **kwargs: Any) -> tuple[Setup, Any]:
    setup = build(config, seed=seed)
    if policy is None:
        return setup, None
    return setup, dist_clip.megatron.attach(setup.optimizer, POLICIES[policy][0](), model=setup.chunks, **kwargs)


def steps(setup: Setup, clipper: Any, first: int, last: int) -> list[dict[str, Any]]:
    out = []
    for step in range(first, last + 1):
        loss = setup.backward(step)
        _, norm, _ = setup.optimizer.step()
        record: dict[str, Any] = {"loss": loss, "norm": float(norm)}
        if clipper is not None:
            record["scales"] = dict(zip(clipper.last_report.names, clipper.last_report.scales.tolist(), strict=True))
        out.append(record)
    return out


def values(clipper: Any) -> dict[str, Any]:
    """The state as plain numbers, mergeable over stages."""
    state = snapshot(clipper.memory)
    out = {
        f"{name}/{slot}": value.tolist() for name, entry in state["tensors"].items() for slot, value in entry.items()
    }
    out |= {f"{key}/{slot}": value.tolist() for key, entry in state["global"].items() for slot, value in entry.items()}
    return {**out, "step": state["step"]}


def train_and_save(config: Config, policy: str | None, path: str, last: int = END) -> dict[str, Any]:
    setup, clipper = make(config, policy)
    from megatron.core import dist_checkpointing

    records = steps(setup, clipper, 1, SAVED_AT)
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        Path(path).mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state_of(setup, loading=False), path)
    saved = values(clipper) if clipper is not None else {}
    return {"records": records + steps(setup, clipper, SAVED_AT + 1, last), "state": saved}


def load_and_train(config: Config, policy: str, path: str) -> dict[str, Any]:
    setup, clipper = make(config, policy, seed=7)  # other weights: those of the checkpoint have to replace them
    from megatron.core import dist_checkpointing

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = dist_checkpointing.load(state_of(setup, loading=True), path)
        for i, chunk in enumerate(setup.chunks):
            chunk.module.load_state_dict(loaded["model" if len(setup.chunks) == 1 else f"model{i}"])
        setup.optimizer.load_state_dict(loaded["optimizer"])
    state = values(clipper)
    told = [str(w.message) for w in caught if "dist_clip" in str(w.message) or "shard" in str(w.message)]
    return {"state": state, "records": steps(setup, clipper, SAVED_AT + 1, END), "warnings": told}


def merged(ranks: list[dict[str, Any]], key: str = "state") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for rank in ranks:
        for name, value in rank[key].items():
            assert out.setdefault(name, value) == value, name
    return out


PAIRS = [
    (Config(tp=2, pp=2), 4, Config(), 2),
    (Config(), 2, Config(tp=2, pp=2), 4),
    (Config(tp=2, pp=2, tied=True, zero=True), 4, Config(zero=True, tied=True), 2),
    (Config(zero=True, layers=4), 2, Config(pp=2, vpp=2, zero=True, layers=4), 2),
    (Config(ep=2, experts=4, zero=True), 2, Config(pp=2, ep=2, experts=4, zero=True), 4),
    (Config(tp=2, ep=2, etp=1, experts=4, sequence_parallel=True), 4, Config(ep=2, experts=4), 2),
]


@pytest.mark.parametrize(("first", "ranks", "second", "others"), PAIRS, ids=lambda value: str(value)[:60])
def test_a_change_of_layout(first: Config, ranks: int, second: Config, others: int, tmp_path: Path) -> None:
    saved = pool(ranks, "megatron").run(train_and_save, first, "adagc-median", str(tmp_path / "ckpt"), timeout=240)
    loaded = pool(others, "megatron").run(load_and_train, second, "adagc-median", str(tmp_path / "ckpt"), timeout=240)
    assert merged(loaded) == merged(saved)
    assert len([name for name in merged(saved) if name.endswith("/gamma")]) > 20
    straight = saved[0]["records"][SAVED_AT:]
    for rank in loaded:
        assert rank["warnings"] == []
        for record, expected in zip(rank["records"], straight, strict=True):
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert record["norm"] == pytest.approx(expected["norm"], rel=1e-4)
            for name, scale in record["scales"].items():
                known = next((r["scales"][name] for r in [expected] if name in r["scales"]), scale)
                assert scale == pytest.approx(known, rel=1e-3), name


@pytest.mark.parametrize("policy", ["zclip", "adagc-global", "adagc-shard", "logclip"])
def test_other_policies_on_the_same_layout(policy: str, tmp_path: Path) -> None:
    config = Config(pp=2, zero=True, tied=True)
    saved = pool(4, "megatron").run(train_and_save, config, policy, str(tmp_path / "ckpt"), timeout=240)
    loaded = pool(4, "megatron").run(load_and_train, config, policy, str(tmp_path / "ckpt"), timeout=240)
    for before, after in zip(saved, loaded, strict=True):
        assert after["state"] == before["state"], "each rank has its own state back"
        assert after["records"] == before["records"][SAVED_AT:], "bitwise as if nothing had happened"


def test_shards_start_afresh_under_another_layout_and_say_so(tmp_path: Path) -> None:
    path = str(tmp_path / "ckpt")
    pool(2, "megatron").run(train_and_save, Config(zero=True), "adagc-shard", path)
    for rank in pool(2, "megatron").run(load_and_train, Config(tp=2, zero=True), "adagc-shard", path):
        assert any("another layout" in text for text in rank["warnings"])
        gammas = [value for name, value in rank["state"].items() if name.endswith("/gamma")]
        assert gammas
        assert set(gammas) == {0.0}
        assert rank["state"]["step"] == SAVED_AT
        assert all(r["loss"] > 0 for r in rank["records"])


def test_a_checkpoint_from_before_the_clipper_loads_with_a_warning(tmp_path: Path) -> None:
    path = str(tmp_path / "ckpt")
    pool(2, "megatron").run(train_and_save, Config(tp=2), None, path)
    for rank in pool(2, "megatron").run(load_and_train, Config(), "adagc", path):
        assert len(rank["warnings"]) == 1
        assert "starts afresh" in rank["warnings"][0]
        assert rank["state"]["step"] == 0


def test_tensors_that_do_not_fit_are_named_on_every_rank(tmp_path: Path) -> None:
    """A model with tied embeddings loads the state of one without: its output layer is unknown."""
    path = str(tmp_path / "ckpt")
    pool(2, "megatron").run(train_and_save, Config(pp=2), "adagc", path)
    with pytest.raises(WorkerError) as caught:
        pool(2, "megatron").run(load_other_model, path)
    assert not caught.value.timed_out
    assert str(caught.value).count("unknown ['output_layer.weight']") == 2


def load_other_model(path: str) -> None:
    _, clipper = make(Config(pp=2, tied=True), "adagc")
    from megatron.core import dist_checkpointing

    common = dist_checkpointing.load_common_state_dict(path)
    from dist_clip.megatron import checkpoint

    checkpoint.load(clipper.memory, common["optimizer"][checkpoint.KEY])


def torch_format(config: Config) -> list[bool]:
    """The "torch" format: state_dict and load_state_dict, one file a rank, on the layout that saved it."""
    setup, clipper = make(config, "adagc-median")
    steps(setup, clipper, 1, SAVED_AT)
    saved = setup.optimizer.state_dict()
    before = str(clipper.state_dict())
    steps(setup, clipper, SAVED_AT + 1, END)
    changed = str(clipper.state_dict()) != before
    setup.optimizer.load_state_dict(saved)
    return [changed, str(clipper.state_dict()) == before]


@pytest.mark.parametrize("config", [Config(tp=2), Config(bf16=True), Config(ep=2, experts=4)], ids=str)
def test_torch_format(config: Config) -> None:
    assert pool(2, "megatron").run(torch_format, config) == [[True, True]] * 2


def test_packing_is_exact() -> None:
    from dist_clip.megatron.checkpoint import pack, unpack

    tensors = {f"t{i}": {"gamma": torch.tensor(float(i)), "count": torch.tensor(i)} for i in range(5)}
    tensors["other"] = {"gamma": torch.tensor(7.0)}
    tensors["in its warm-up"] = {"gamma": torch.tensor(1.0), "history": torch.tensor([1.0, math.nan, 0.5])}
    packed = pack(tensors)
    assert len(packed) == 3, "one tensor a slot, not one a tensor"
    # Megatron compares what the ranks save, and NaN differs from itself.
    assert not any(rows.isnan().any() for part in packed for rows in part["slots"].values())
    again = unpack(packed, coded=False)
    assert list(again) == list(tensors)
    for name, entry in tensors.items():
        assert entry.keys() == again[name].keys()
        for slot, value in entry.items():
            torch.testing.assert_close(again[name][slot], value, rtol=0, atol=0, equal_nan=True)


def test_what_0_1_0_packed_is_unpacked() -> None:
    """Format version 1 had -1 for NaN. The file was written by that version."""
    from dist_clip.megatron.checkpoint import unpack

    packed = torch.load(STATES_V1)["packed for Megatron"]
    again = unpack(packed, coded=True)
    assert {name: float(entry["gamma"]) for name, entry in again.items()} == {
        "t0": 0.0,
        "t1": 1.0,
        "t2": 2.0,
        "in its warm-up": 1.0,
    }
    torch.testing.assert_close(
        again["in its warm-up"]["history"], torch.tensor([1.0, math.nan, 0.5]), rtol=0, atol=0, equal_nan=True
    )


def test_a_negative_state_is_packed_as_it_is() -> None:
    from dist_clip.megatron.checkpoint import pack, unpack

    tensors = {"a": {"log_level": torch.tensor(-3.5)}, "b": {"log_level": torch.tensor(math.nan)}}
    again = unpack(pack(tensors), coded=False)
    assert float(again["a"]["log_level"]) == -3.5
    assert math.isnan(again["b"]["log_level"])
