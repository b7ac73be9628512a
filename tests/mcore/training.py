"""Owns the comparison of a Megatron run, on any number of ranks, with a single process that clips by the reference.

`train` runs on every rank: real forward and backward, real ``optimizer.step()``, and a record of the main gradients just
before and just after clipping. `check` puts the pieces together by their flat indices within the logical tensor and
compares twice: step by step the reference is handed the very gradients that the ranks had; and as a whole, a single
process trains the same model with plain AdamW. Nothing of dist_clip takes part in either.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import dist_clip
from dist_clip.memory.snapshot import snapshot
from tests import reference
from tests.harness import pool

from . import cuts, muon, setups
from .setups import HEADS, HIDDEN, LR, Config, Setup, build

WARMUP = 5
STEPS = 15  # the last of the spikes of setups.py
RTOL = 1e-6
POLICIES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "global": (lambda: dist_clip.GlobalNorm(1.0), lambda: reference.GlobalGC(1.0)),
    "adagc": (lambda: dist_clip.AdaGC(warmup_steps=WARMUP), lambda: reference.AdaGC(warmup_steps=WARMUP)),
    "adagc-median": (
        lambda: dist_clip.AdaGC(warmup_steps=WARMUP, gamma_init="median"),
        lambda: reference.AdaGC(warmup_steps=WARMUP, gamma_init="median"),
    ),
    "adagc-shard": (
        lambda: dist_clip.AdaGC(warmup_steps=WARMUP, scope="shard"),
        lambda: reference.AdaGC(warmup_steps=WARMUP),
    ),
    "adagc-global": (
        lambda: dist_clip.AdaGC(warmup_steps=WARMUP, scope="global"),
        lambda: reference.AdaGCGlobal(warmup_steps=WARMUP),
    ),
    "zclip": (
        lambda: dist_clip.ZClip(warmup_steps=WARMUP, max_norm=5.0),
        lambda: reference.ZClip(warmup_steps=WARMUP, max_norm=5.0),
    ),
    "logclip": (
        lambda: dist_clip.LogClip(warmup_steps=WARMUP, ratio=1.2, power=1.0, patience=2, post_max_norm=0.5),
        lambda: reference.LogClip(warmup_steps=WARMUP, ratio=1.2, power=1.0, patience=2, post_max_norm=0.5),
    ),
    "adagc-rest": muon.rest(
        lambda: dist_clip.AdaGC(warmup_steps=WARMUP, gamma_init="median"),
        lambda: reference.AdaGC(warmup_steps=WARMUP, gamma_init="median"),
    ),
    "zclip-rest": muon.rest(
        lambda: dist_clip.ZClip(warmup_steps=WARMUP, max_norm=5.0),
        lambda: reference.ZClip(warmup_steps=WARMUP, max_norm=5.0),
    ),
    "global-rest": muon.rest(lambda: dist_clip.GlobalNorm(1.0), lambda: reference.GlobalGC(1.0)),
}
"""Name -> the policy and its reference. Those named "...-rest" go with overrides that only measure Muon's matrices."""


# ---------------------------------------------------------------- on every rank


def leaves(optimizer: Any) -> list[Any]:
    children = getattr(optimizer, "chained_optimizers", None)
    return [leaf for child in children for leaf in leaves(child)] if children is not None else [optimizer]


def main_params(setup: Setup) -> list[tuple[str, Tensor, Tensor]]:
    """(global name, flat indices within the logical tensor, main parameter) of all that this rank steps."""
    if setup.config.fsdp:
        return megatron_fsdp_params(setup)
    names = {}
    for number, chunk in enumerate(setup.chunks):
        inner = chunk.module.module if hasattr(chunk.module, "module") else chunk.module
        for name, param in cuts.named_parameters(inner, setup.config, number):
            names[id(param)] = (name, cuts.flat_index(name, param.shape, setup.config))
    out = []

    def add(param: Any, main: Tensor, start: int = 0, stop: int | None = None) -> None:
        name, index = names[id(param)]
        out.append((name, index[start:stop], main))

    for leaf in leaves(setup.optimizer):
        if hasattr(leaf, "shard_fp32_groups"):
            decoupled = leaf.config.use_precision_aware_optimizer
            for models, mains in (
                (
                    leaf.model_float16_groups,
                    leaf.shard_float16_groups if decoupled else leaf.shard_fp32_from_float16_groups,
                ),
                (leaf.model_fp32_groups, leaf.shard_fp32_groups),
            ):
                for model_group, main_group in zip(models, mains, strict=True):
                    for param, main in zip(model_group, main_group, strict=True):
                        part = leaf._get_model_param_range_map(param)["param"]
                        add(param, Decoupled(main, leaf.optimizer) if decoupled else main, part.start, part.end)
        elif hasattr(leaf, "float16_groups"):
            for model_group, main_group in zip(leaf.float16_groups, leaf.fp32_from_float16_groups, strict=True):
                for param, main in zip(model_group, main_group, strict=True):
                    add(param, main)
            for group in leaf.fp32_from_fp32_groups:
                for param in group:
                    add(param, param)
        else:
            for group in leaf.param_groups:
                for param in group["params"]:
                    add(param, param)
    return out


class LocalPart:
    """This rank's part of a DTensor, with what the tests want of a main parameter."""

    def __init__(self, param: Any) -> None:
        self.param = param

    @property
    def grad(self) -> Tensor | None:
        return None if self.param.grad is None else self.param.grad._local_tensor

    def detach(self) -> Tensor:
        return self.param.detach()._local_tensor


class Decoupled:
    """A part that Megatron's precision-aware optimizer steps, with what the tests want of a main parameter."""

    def __init__(self, shard: Tensor, optimizer: Any) -> None:
        self.shard, self.optimizer = shard, optimizer

    @property
    def grad(self) -> Tensor | None:
        return getattr(self.shard, "decoupled_grad", None)

    def detach(self) -> Tensor:
        return self.optimizer.param_to_inner_param[self.shard].detach()


def megatron_fsdp_params(setup: Setup) -> list[tuple[str, Tensor, Any]]:
    """As `main_params`. Each part's place is found by its values: where in the whole tensor's weights they are."""
    out = []
    for number, chunk in enumerate(setup.chunks):
        buffer = chunk.module.param_and_grad_buffer
        named = [(name.removeprefix("module."), p) for name, p in buffer.optimizer_named_parameters]
        for name, param in cuts.named_parameters(
            SimpleNamespace(named_parameters=lambda n=named: n), setup.config, number
        ):
            shape = param.orig_param.shape
            index = cuts.flat_index(name, shape, setup.config)
            whole = setups.start_value(name, cuts.whole_shape(name, shape, setup.config), setup.config).flatten()[index]
            mine = LocalPart(param).detach().flatten()
            places = (whole == mine[0]).nonzero().flatten().tolist() if mine.numel() else [0]
            found = [p for p in places if torch.equal(whole[p : p + mine.numel()], mine)]
            assert len(found) == 1, f"{name}: the part's values are at {found} of the whole tensor"
            out.append((name, index[found[0] : found[0] + mine.numel()], LocalPart(param)))
    return out


def flat(tensors: list[Tensor | None]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.float64)] + [t.double().flatten() for t in tensors if t is not None])


def train(
    config: Config,
    policies: tuple[str, ...],
    steps: int = STEPS,
    select: Callable[[Setup], Any] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Train on this rank, following the last of `policies`; everything that happened, as plain data.

    `select` makes the overrides from what was built.
    """
    setup = build(config)
    if select is not None:
        kwargs["overrides"] = select(setup)
    pieces = main_params(setup)
    clippers: dict[str, Any] = {}
    for policy in policies:
        if clippers:
            clippers[policies[len(clippers) - 1]].attachment.remove()
        clippers[policy] = dist_clip.megatron.attach(
            setup.optimizer, POLICIES[policy][0](), model=setup.chunks, **kwargs
        )
    clipped: list[dict[str, Any]] = []
    record_clips(clippers, pieces, clipped.append)
    records = []
    for step in range(1, steps + 1):
        loss = setup.backward(step)
        success, norm, _ = setup.optimizer.step()
        record: dict[str, Any] = {"loss": loss, "success": success, "norm": None if norm is None else float(norm)}
        record["clipped"] = clipped.pop()
        for policy in policies[:-1]:  # the optimizer returns the norm of the one that it follows
            record["clipped"][policy]["norm"] = None
        records.append(record)
    return {
        "names": [name for name, _, _ in pieces],
        "index": [index for _, index, _ in pieces],
        "records": records,
        "params": flat([main.detach() for _, _, main in pieces]),
    }


def measure(config: Config) -> dict[str, Any]:
    """One step: the gradients as Megatron has them for its optimizer, and what dist_clip makes of them."""
    setup = build(config)
    pieces = main_params(setup)
    clipper = dist_clip.megatron.attach(setup.optimizer, dist_clip.GlobalNorm(1.0), model=setup.chunks)
    record: dict[str, Any] = {"error": None}
    clip = clipper.clip_

    def recording() -> Any:
        record["before"] = flat([main.grad for _, _, main in pieces])
        return clip()

    clipper.clip_ = recording  # type: ignore[method-assign]
    setup.backward(1)
    try:
        _, norm, _ = setup.optimizer.step()
        report = clipper.last_report
        record |= {"norm": float(norm), "names": report.names}
        record |= {"norms": report.tensor_norms.tolist(), "scales": report.scales.tolist()}
    except dist_clip.LayoutError as error:
        record["error"] = str(error)
    return {
        "names": [name for name, _, _ in pieces],
        "index": [index for _, index, _ in pieces],
        "records": [record],
    }


def record_clips(
    clippers: dict[str, Any], pieces: list[tuple[str, Tensor, Tensor]], keep: Callable[[dict[str, Any]], None]
) -> None:
    """Have the last clipper's clip run them all, each on the gradients that are there; `keep` gets what each of them did."""
    (*_, followed) = clippers.values()
    clip = {policy: clipper.clip_ for policy, clipper in clippers.items()}

    def recording() -> Any:
        before = [main.grad.clone() if main.grad is not None else None for _, _, main in pieces]
        out = {}
        for policy, clipper in clippers.items():
            for (_, _, main), grad in zip(pieces, before, strict=True):
                if grad is not None:
                    main.grad.copy_(grad)
            report = clip[policy]()
            out[policy] = {
                "before": flat(before),
                "after": flat([main.grad for _, _, main in pieces]),
                "names": report.names,
                "norms": report.tensor_norms.tolist(),
                "scales": report.scales.tolist(),
                "state": plain_state(clipper),
            }
        keep(out)
        return report

    followed.clip_ = recording


def of_policy(ranks: list[dict[str, Any]], policy: str) -> list[dict[str, Any]]:
    """The ranks' records as if only that policy had been run."""
    return [
        {**rank, "records": [{**record, **record["clipped"][policy]} for record in rank["records"]]} for rank in ranks
    ]


def plain_state(clipper: Any) -> dict[str, Any]:
    """What is remembered of each tensor, and of the one domain that these tests have, without a warm-up's record."""
    state = snapshot(clipper.memory)
    return {
        "tensors": {name: _scalars(entry) for name, entry in state["tensors"].items()},
        "global": _scalars(next(iter(state["global"].values()), {})),
    }


def _scalars(entry: dict[str, Tensor]) -> dict[str, float]:
    return {slot: value.item() for slot, value in entry.items() if value.numel() == 1}


# ---------------------------------------------------------------- a single process


@functools.cache
def alone(config: Config, policy: str | None, steps: int = STEPS) -> dict[str, Any]:
    return pool(1, "megatron").run(train_alone, config, policy, steps)[0]


def train_alone(config: Config, policy: str | None, steps: int) -> dict[str, Any]:
    """The whole model in one process: Megatron's model, autograd, the reference's clipping, torch's AdamW."""
    setup = build(config)
    model = setup.chunks[0].module
    live = dict(cuts.named_parameters(model, config, 0))
    params = {name: param.detach().clone() for name, param in live.items()}
    steppers = optimizers(params, config)
    rule = POLICIES[policy][1]() if policy else None
    records = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            for name, param in params.items():
                live[name].copy_(param)
        loss = setup.backward(step)
        grads = {name: param.main_grad.clone() for name, param in live.items()}
        # Later ones belong to weights that have drifted apart by rounding.
        records.append({"loss": loss, "grads": grads if step == 1 else None})
        if rule is not None:
            grads = reference.clip(rule, grads).grads
        for name, param in params.items():
            param.grad = grads[name]
        for optimizer in steppers:
            optimizer.step()
    return {"records": records, "params": params}


def optimizers(params: dict[str, Tensor], config: Config) -> list[Any]:
    """Those of a single process: torch's AdamW and, where it is asked for, Muon for its matrices."""
    blocks = config.blocks
    matrices = {name: param for name, param in params.items() if blocks is not None and muon.is_muons(name)}
    rest = [param for name, param in params.items() if name not in matrices]
    adamw = torch.optim.AdamW(rest, lr=LR, weight_decay=0.0, eps=1e-5)
    size = HIDDEN // HEADS
    return [adamw, muon.Muon(matrices, LR, blocks, (size, size, size))] if blocks is not None else [adamw]


# ---------------------------------------------------------------- in the test's process


class Run:
    """The ranks' records, put together."""

    def __init__(self, ranks: list[dict[str, Any]], shapes: dict[str, torch.Size]) -> None:
        self.ranks, self.shapes = ranks, shapes
        self.sizes = {name: shape.numel() for name, shape in shapes.items()}
        self.pieces: dict[tuple[str, int], Tensor] = {}
        self.piece_of: list[list[tuple[str, int]]] = []
        numbers: dict[Any, int] = {}
        for rank in ranks:
            mine = []
            for name, index in zip(rank["names"], rank["index"], strict=True):
                number = numbers.setdefault((name, tuple(index.tolist())), len(numbers))
                mine.append((name, number))
                self.pieces[name, number] = index
            self.piece_of.append(mine)

    def split(self, rank: int, vector: Tensor) -> dict[str, Tensor]:
        sizes = [index.numel() for index in self.ranks[rank]["index"]]
        return dict(zip(self.ranks[rank]["names"], torch.split(vector, sizes), strict=True))

    def join(self, vectors: list[Tensor]) -> dict[str, Tensor]:
        """Whole flat tensors. Every element must be there, and copies must be bitwise the same."""
        whole = {name: torch.full((size,), math.nan, dtype=torch.float64) for name, size in self.sizes.items()}
        for rank, vector in enumerate(vectors):
            for (name, number), values in zip(self.piece_of[rank], self.split(rank, vector).values(), strict=True):
                index = self.pieces[name, number]
                known = whole[name][index]
                same = known.isnan() | (known == values)
                assert same.all(), f"copies of {name} differ on rank {rank}"
                whole[name][index] = values
        for name, tensor in whole.items():
            assert not tensor.isnan().any(), f"{name}: not every element is held by some rank"
        return whole

    def at(self, step: int, key: str) -> dict[str, Tensor]:
        return self.join([rank["records"][step - 1][key] for rank in self.ranks])


def close(actual: float, expected: float, rtol: float = RTOL) -> bool:
    return math.isclose(actual, expected, rel_tol=rtol, abs_tol=1e-12)


def run(config: Config, world: int, policies: tuple[str, ...], **kwargs: Any) -> list[dict[str, Any]]:
    return pool(world, "megatron").run(train, config, policies, timeout=240, **kwargs)


def check(config: Config, ranks: list[dict[str, Any]], policies: tuple[str, ...]) -> None:
    """Each policy step by step; of the last one, which the optimizer followed, the path and the parameters too."""
    *others, followed = policies
    # A shard's path depends on the layout, and bfloat16 hides the true one: there a single process is handed the gradients.
    follows = followed != "adagc-shard" and not config.bf16
    single = alone(config.single, followed if follows else None, len(ranks[0]["records"]))
    shapes = {name: param.shape for name, param in single["params"].items()}
    for policy in others:
        check_each_step(Run(of_policy(ranks, policy), shapes), policy, config)
    together = Run(of_policy(ranks, followed), shapes)
    check_gradients(together, single, 0.1 if config.bf16 else 1e-5)
    shadow = check_each_step(together, followed, config)
    if follows:
        check_path(together, single)
    check_params(together, single["params"] if follows else shadow)


def check_each_step(together: Run, policy: str, config: Config) -> dict[str, Tensor]:
    """The reference is handed the ranks' own gradients: what differs can only be the clipping.

    Returns the parameters of a single process that steps with what the reference made of them.
    """
    rule = POLICIES[policy][1]()
    shard = policy == "adagc-shard"
    shadow = {name: setups.start_value(name, shape, config) for name, shape in together.shapes.items()}
    steppers = optimizers(shadow, config.single)
    clipped = False
    for step in range(1, len(together.ranks[0]["records"]) + 1):
        whole = together.at(step, "before")
        grads: dict[Any, Tensor] = whole
        if shard:
            grads = {key: whole[key[0]][index] for key, index in together.pieces.items() if index.numel()}
        outcome = reference.clip(rule, grads)
        clipped |= step > WARMUP and min(outcome.scales.values()) < 1
        for rank, entry in enumerate(together.ranks):
            check_rank(together, rank, step, entry["records"][step - 1], outcome, shard)
            check_state(together, rank, entry["records"][step - 1]["state"], rule, shard, f"rank {rank}, step {step}")
        check_agreement(together, step, shard)
        for name, param in shadow.items():
            param.grad = torch.zeros_like(param) if shard else outcome.grads[name].view(param.shape).float()
        for key, grad in outcome.grads.items() if shard else ():
            shadow[key[0]].grad.view(-1)[together.pieces[key]] = grad.float()
        for optimizer in steppers:
            optimizer.step()
    assert clipped, "the test is to blame: nothing was clipped after the warm-up"
    return shadow


def check_rank(
    together: Run, rank: int, step: int, record: dict[str, Any], outcome: reference.Outcome, shard: bool
) -> None:
    where = f"rank {rank}, step {step}"
    assert record["success"]
    if record["norm"] is not None:
        # Megatron's loop logs it: what went into clipping.
        assert close(record["norm"], outcome.global_norm), f"{where}: {record['norm']}, not {outcome.global_norm}"
    mine = dict(together.piece_of[rank])
    for name, norm, scale in zip(record["names"], record["norms"], record["scales"], strict=True):
        key: Any = (name, mine[name]) if shard and name in mine else name
        if shard and (name not in mine or key not in outcome.norms):
            assert norm == 0
            continue
        assert close(norm, outcome.norms[key]), f"{where}, {name}: norm {norm}, not {outcome.norms[key]}"
        assert close(scale, outcome.scales[key]), f"{where}, {name}: scale {scale}, not {outcome.scales[key]}"
    after = together.split(rank, record["after"])
    for (name, number), values in zip(together.piece_of[rank], after.values(), strict=True):
        expected = outcome.grads[name, number] if shard else outcome.grads[name][together.pieces[name, number]]
        torch.testing.assert_close(values, expected, rtol=2e-6, atol=1e-30, msg=lambda m, n=name: f"{where}, {n}: {m}")


def check_state(together: Run, rank: int, state: dict[str, Any], rule: reference.Rule, shard: bool, where: str) -> None:
    if state["global"]:
        check_memory(state["global"], rule.memory(None), where)
    mine = dict(together.piece_of[rank])
    for name, entry in state["tensors"].items():
        check_memory(entry, rule.memory((name, mine.get(name)) if shard else name), f"{where}, {name}")


def check_memory(actual: dict[str, float], expected: dict[str, float], where: str) -> None:
    for slot, value in expected.items():
        # The variance is that of norms that agree to RTOL: a difference of nearly equal numbers, squared.
        atol = RTOL * expected["mean"] ** 2 if slot == "var" else 0.0
        good = math.isclose(actual[slot], value, rel_tol=1e-4 if slot == "var" else RTOL, abs_tol=atol)
        assert good, f"{where}: {slot} {actual[slot]}, not {value}"


def check_agreement(together: Run, step: int, shard: bool) -> None:
    """Ranks that take part in the same tensor have bitwise the same scale, norm and state; and the same norm is logged."""
    seen: dict[Any, Any] = {}
    norms = {entry["records"][step - 1]["norm"] for entry in together.ranks}
    assert len(norms) == 1, f"step {step}: ranks report the norms {norms}"
    for rank, entry in enumerate(together.ranks):
        record = entry["records"][step - 1]
        mine = dict(together.piece_of[rank])
        for name, norm, scale in zip(record["names"], record["norms"], record["scales"], strict=True):
            key = (name, mine.get(name)) if shard else name
            found = (norm, scale, record["state"]["tensors"].get(name), record["state"]["global"])
            if not shard or name in mine:
                assert seen.setdefault(key, found) == found, f"step {step}, {name}: rank {rank} disagrees"


def check_gradients(together: Run, single: dict[str, Any], rtol: float = 1e-5) -> None:
    """The first step's whole gradients, put together as cuts.py says, are a single process's, element by element."""
    whole = together.at(1, "before")
    for name, expected in single["records"][0]["grads"].items():
        expected = expected.double().flatten()
        atol = rtol * expected.abs().max().item()
        torch.testing.assert_close(whole[name], expected, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def check_path(together: Run, single: dict[str, Any]) -> None:
    """The loss, on every step, of a single process on its own path."""
    for step, (record, expected) in enumerate(
        zip(together.ranks[0]["records"], single["records"], strict=True), start=1
    ):
        assert close(record["loss"], expected["loss"], 1e-5), (
            f"step {step}: loss {record['loss']}, not {expected['loss']}"
        )


def check_params(together: Run, expected: dict[str, Tensor]) -> None:
    params = together.join([rank["params"] for rank in together.ranks])
    for name, param in expected.items():
        torch.testing.assert_close(
            params[name], param.double().flatten(), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n} at the end: {m}"
        )
