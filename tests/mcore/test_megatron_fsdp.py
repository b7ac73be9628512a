"""Megatron-FSDP against a single process: norms, scales, state and parameters after 20 steps, and checkpoints.

Megatron-FSDP runs on gloo where it does not fuse the division into the reduction (setups.megatron_fsdp_config).
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dist_clip
from dist_clip.megatron.checkpoint import KEY
from tests.harness import pool

from . import test_checkpoints, training
from .setups import Config, Setup, build, megatron_version
from .test_checkpoints import END, METADATA, SAVED_AT, merged, steps, values

STEPS = 20
POLICIES = ("adagc-median", "adagc-global", "logclip", "zclip", "global")
ZERO_3 = Config(fsdp="optim_grads_params")
CONFIGS: dict[str, tuple[int, Config]] = {
    "zero-3": (2, ZERO_3),
    "zero-3-bf16-tied": (2, Config(fsdp="optim_grads_params", bf16=True, tied=True)),
    "zero-3-in-two-instances": (4, Config(fsdp="optim_grads_params", instances=2)),
    "zero-3-ep2": (4, Config(fsdp="optim_grads_params", experts=4, ep=2)),
}
NEWER: dict[str, tuple[int, Config]] = {
    "no-sharding": (2, Config(fsdp="no_shard")),
    "zero-1": (2, Config(fsdp="optim")),
    "zero-1-in-two-instances": (4, Config(fsdp="optim", instances=2, overlap=True)),
    "zero-2": (2, Config(fsdp="optim_grads")),
    "zero-3-over-two-instances": (4, Config(fsdp="optim_grads_params", instances=2, outer="optim")),
    "zero-3-tp2-sp-tied": (4, Config(fsdp="optim_grads_params", tp=2, sequence_parallel=True, tied=True)),
    "zero-1-tp2-ep2-etp1": (4, Config(fsdp="optim", tp=2, ep=2, etp=1, experts=4, sequence_parallel=True)),
    "zero-3-pp2": (4, Config(fsdp="optim_grads_params", pp=2)),
    "zero-3-cp2": (4, Config(fsdp="optim_grads_params", cp=2)),
}
needs_0_19 = pytest.mark.skipif(
    megatron_version() < (0, 19),
    reason="run on megatron-core 0.19 (scripts/test_megatron_latest.sh): 0.16.1 steps without sharding on no CPU",
)


def check(name: str, world: int, config: Config) -> None:
    policies = POLICIES if name == "zero-3" else POLICIES[:1]
    training.check(config, training.run(config, world, policies, steps=STEPS), policies)


@pytest.mark.parametrize("name", CONFIGS)
def test_training(name: str) -> None:
    check(name, *CONFIGS[name])


@needs_0_19
@pytest.mark.parametrize("name", NEWER)
def test_training_on_0_19(name: str) -> None:
    check(name, *NEWER[name])


# ---- verify, decoupled gradients -------------------------------------------------------------------------------------


def verified(config: Config) -> tuple[list[str], str]:
    setup = build(config)
    clipper = dist_clip.megatron.attach(setup.optimizer, dist_clip.AdaGC(), model=setup.chunks)
    clipper.attachment.verify_next()
    setup.backward(1)
    setup.optimizer.step()
    return list(clipper.last_report.names), str(clipper.explain())


def test_verify_and_global_names() -> None:
    world, config = CONFIGS["zero-3-ep2"]
    results = pool(world, "megatron").run(verified, config)
    for names, table in results:
        assert names == results[0][0]
        assert sorted(n for n in names if ".experts." in n) == sorted(
            f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc{fc}.weight"
            for layer in range(2)
            for expert in range(4)
            for fc in (1, 2)
        )
        assert "Megatron-FSDP" in table


def ones(config: Config) -> dict[str, Any]:
    """Gradients of ones: Megatron-FSDP itself cannot reduce those of an embedding that two stages share."""
    setup = build(config)
    clipper = dist_clip.megatron.attach(setup.optimizer, dist_clip.GlobalNorm(1.0), model=setup.chunks)
    for _, param in setup.chunks[0].module.param_and_grad_buffer.optimizer_named_parameters:
        param.grad = torch.ones_like(param) if param.to_local().numel() else None
    report = clipper.clip_()
    return {
        "norms": dict(zip(report.names, report.tensor_norms.tolist(), strict=True)),
        "norm": float(report.global_norm),
    }


@pytest.mark.report(
    "NVIDIA/Megatron-LM#7227",
    "NVIDIA/Megatron-LM#7228",
    situation="a tied weight counted twice under Megatron-FSDP with pipeline stages",
    right="counted once",
)
def test_a_weight_tied_across_stages_counts_once() -> None:
    ranks = pool(4, "megatron").run(ones, Config(fsdp="optim_grads_params", pp=2, tied=True))
    sizes = {name: param.numel() for name, param in training.alone(Config(tied=True), None, 1)["params"].items()}
    for rank in ranks:
        assert "embedding.word_embeddings.weight" in rank["norms"]
        assert rank["norm"] == pytest.approx(sum(sizes.values()) ** 0.5, rel=1e-6)
        for name, norm in rank["norms"].items():
            assert norm == pytest.approx(sizes[name] ** 0.5, rel=1e-6)
    assert set().union(*(rank["norms"] for rank in ranks)) == set(sizes)


def decoupled(config: Config) -> dict[str, Any]:
    """Megatron-FSDP hands gradients over as `decoupled_grad`; its own optimizers for that need Transformer Engine."""
    setup = build(config)
    buffer = setup.chunks[0].module.param_and_grad_buffer
    buffer.use_decoupled_grad = buffer.use_precision_aware_optimizer = True
    clipper = dist_clip.megatron.attach(setup.optimizer, dist_clip.GlobalNorm(0.5), model=setup.chunks)
    setup.backward(1)
    params = [param for _, param in buffer.optimizer_named_parameters if param.to_local().numel()]
    before = [param.decoupled_grad.to_local().clone() for param in params]
    report = clipper.clip_()
    return {
        "grads": [param.grad is None for param in params],
        "squares": float(sum(grad.double().square().sum() for grad in before)),
        "norm": float(report.global_norm),
        "scale": float(report.scales[0]),
        "scaled": all(
            torch.allclose(
                param.decoupled_grad.to_local().float(), grad.float() * 0.5 / float(report.global_norm), rtol=1e-2
            )
            for param, grad in zip(params, before, strict=True)
        ),
    }


def test_decoupled_gradients() -> None:
    ranks = pool(2, "megatron").run(decoupled, Config(fsdp="optim_grads_params", bf16=True))
    norm = sum(rank["squares"] for rank in ranks) ** 0.5
    for rank in ranks:
        assert all(rank["grads"])
        assert rank["norm"] == pytest.approx(norm, rel=1e-5)
        assert rank["scale"] == pytest.approx(0.5 / norm, rel=1e-5)
        assert rank["scaled"]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def make(config: Config, policy: str | None, seed: int = 0) -> tuple[Setup, Any]:
    setup, clipper = test_checkpoints.make(config, policy, seed)
    if config.fsdp:  # torch's Adam makes no moments of empty parts, which this format wants on every rank in one order
        for group in setup.optimizer.optimizer.param_groups:
            for param in group["params"]:
                moments_of(setup, param)
    return setup, clipper


def moments_of(setup: Setup, param: Tensor) -> list[Tensor]:
    (leaf,) = training.leaves(setup.optimizer)
    state = leaf.optimizer.state.setdefault(param, {})
    state.setdefault("step", torch.tensor(0.0))
    return [state.setdefault(slot, torch.zeros_like(param)) for slot in ("exp_avg", "exp_avg_sq")]


def state_of(setup: Setup, *, loading: bool) -> dict[str, Any]:
    """As Megatron-LM puts a checkpoint of the format fsdp_dtensor together."""
    from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import preprocess_state_dict_for_uneven_dtensor

    (chunk,) = setup.chunks
    chunk.stop_communication()  # puts its DTensors into the modules
    state = {"model": chunk.state_dict_for_save_checkpoint()}
    metadata = {"distrib_optim_sharding_type": "fsdp_dtensor"}
    state["optimizer"] = setup.optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata)
    preprocess_state_dict_for_uneven_dtensor(state)
    return state


def train_and_save(config: Config, policy: str | None, path: str) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp

    setup, clipper = make(config, policy)
    steps(setup, clipper, 1, SAVED_AT)
    for state in setup.optimizer.optimizer.state.values():  # torch's Adam does not count the steps of empty parts
        state["step"].fill_(SAVED_AT)
    dcp.save(state_of(setup, loading=False), checkpoint_id=path)
    saved = values(clipper) if clipper is not None else {}
    return {"records": steps(setup, clipper, SAVED_AT + 1, END), "state": saved}


def load_and_train(config: Config, policy: str, path: str) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp

    setup, clipper = make(config, policy, seed=7)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)  # as Megatron-LM
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = state_of(setup, loading=True)
        dcp.load(state, checkpoint_id=path, planner=planner)
        setup.chunks[0].module.load_state_dict(state["model"])
        setup.optimizer.load_state_dict(state["optimizer"])
    told = [str(w.message) for w in caught if "dist_clip" in str(w.message)]
    state = values(clipper)
    return {"state": state, "records": steps(setup, clipper, SAVED_AT + 1, END), "warnings": told}


def same_path(loaded: list[dict[str, Any]], straight: list[dict[str, Any]]) -> None:
    for rank in loaded:
        for record, expected in zip(rank["records"], straight, strict=True):
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert record["norm"] == pytest.approx(expected["norm"], rel=1e-4)
            assert record["scales"] == pytest.approx(expected["scales"], rel=1e-3)


def test_its_checkpoints_contain_the_state(tmp_path: Path) -> None:
    path = str(tmp_path / "ckpt")
    saved = pool(2, "megatron").run(train_and_save, ZERO_3, "adagc-median", path)
    loaded = pool(4, "megatron").run(load_and_train, ZERO_3, "adagc-median", path)
    assert merged(loaded) == merged(saved)
    assert [rank["warnings"] for rank in loaded] == [[]] * 4
    same_path(loaded, saved[0]["records"])


def test_a_checkpoint_from_before_the_clipper_loads_with_a_warning(tmp_path: Path) -> None:
    path = str(tmp_path / "ckpt")
    pool(2, "megatron").run(train_and_save, ZERO_3, None, path)
    for rank in pool(2, "megatron").run(load_and_train, ZERO_3, "adagc-median", path):
        assert len(rank["warnings"]) == 1
        assert "starts afresh" in rank["warnings"][0]
        assert rank["state"]["step"] == 0


def tensors_of(setup: Setup, pieces: list[tuple[str, Tensor, Any]]) -> list[tuple[str, Tensor, list[Tensor]]]:
    """(name, flat indices within the logical tensor, [weights, first and second moments] of this rank's part)."""
    out = []
    for name, index, main in pieces:
        moments = moments_of(setup, main.param if isinstance(main, training.LocalPart) else main)
        parts = [main.detach(), *(getattr(moment, "_local_tensor", moment) for moment in moments)]
        out.append((name, index, [part.view(-1) for part in parts]))
    return out


def optimizer_state(setup: Setup) -> dict[str, Any]:
    if not setup.config.fsdp:
        described = {"model": setup.chunks[0].module.sharded_state_dict()}
        return setup.optimizer.sharded_state_dict(described, metadata=METADATA)
    return state_of(setup, loading=False)["optimizer"]


def train_and_tell(config: Config) -> dict[str, Any]:
    """Train, and return what a converter between Megatron's checkpoint formats carries over."""
    setup, clipper = make(config, "adagc-median")
    pieces = training.main_params(setup)
    records = steps(setup, clipper, 1, SAVED_AT)
    tensors = [(name, index, [part.clone() for part in parts]) for name, index, parts in tensors_of(setup, pieces)]
    out = {"tensors": tensors, "clipping": optimizer_state(setup)[KEY], "state": values(clipper)}
    return {**out, "records": records + steps(setup, clipper, SAVED_AT + 1, END)}


def go_on(config: Config, whole: dict[str, list[Tensor]], clipping: Any) -> dict[str, Any]:
    setup, clipper = make(config, "adagc-median")
    for name, index, parts in tensors_of(setup, training.main_params(setup)):
        for part, value in zip(parts, whole[name], strict=True):
            part.copy_(value[index])
    (leaf,) = training.leaves(setup.optimizer)
    for state in leaf.optimizer.state.values():
        state["step"].fill_(SAVED_AT)
    if config.fsdp:
        setup.chunks[0].module.install_optimized_model_weights()
    elif config.zero:
        leaf._copy_main_params_to_model_params()
        setup.chunks[0].start_param_sync(force_sync=True)
    own = optimizer_state(setup) if config.fsdp else setup.optimizer.state_dict()
    setup.optimizer.load_state_dict({**own, KEY: clipping})
    return {"state": values(clipper), "records": steps(setup, clipper, SAVED_AT + 1, END)}


KINDS = {"megatron-fsdp": (2, ZERO_3), "zero-1": (2, Config(zero=True)), "one process": (1, Config())}


@functools.cache
def told(kind: str) -> list[dict[str, Any]]:
    world, config = KINDS[kind]
    return pool(world, "megatron").run(train_and_tell, config)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("megatron-fsdp", "zero-1"),
        ("zero-1", "megatron-fsdp"),
        ("megatron-fsdp", "one process"),
        ("one process", "megatron-fsdp"),
    ],
)
def test_from_one_optimizer_to_another(first: str, second: str) -> None:
    """What Megatron's own tool does for weights and moments is done by hand; the state goes through both optimizers."""
    ranks = told(first)
    whole: dict[str, list[Tensor]] = {}
    for rank in ranks:
        for name, index, parts in rank["tensors"]:
            shape = training.alone(Config(), None, 1)["params"][name].shape
            full = whole.setdefault(name, [torch.full((shape.numel(),), torch.nan) for _ in parts])
            for tensor, part in zip(full, parts, strict=True):
                tensor[index] = part
    assert not any(tensor.isnan().any() for parts in whole.values() for tensor in parts)
    world, config = KINDS[second]
    loaded = pool(world, "megatron").run(go_on, config, whole, ranks[0]["clipping"])
    assert merged(loaded) == merged(ranks)
    same_path(loaded, ranks[0]["records"][SAVED_AT:])
