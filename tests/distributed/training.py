"""Owns the comparison of a distributed training run with the single-process reference.

`train` runs on every rank and records, step by step, the local gradients before and after clipping and the report.
Several policies are run side by side on the very same gradients, each with a clipper of its own; the optimizer follows
the last of them. (Training is nine tenths of the time.) `check` runs in the test's process, puts the shards together by
their recorded flat indices, and compares twice:
- step by step, the reference is fed the very gradients that the ranks had before clipping; what differs can only be
  the clipping. Norms, scales, gamma, clipped gradients.
- as a whole, for the policy that was followed, a single process trains the same model on the whole batch with the
  reference's clipping, in float64. Gradients, norms, scales, parameters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import dist_clip
from dist_clip.memory.snapshot import snapshot
from dist_clip.policies import modes, parse_mode
from tests import reference

from .layouts import LAYOUTS, Layout, Setup
from .model import backward, make_index_net, make_net

WARMUP = 5
STEPS = 14  # the warm-up, a few quiet steps, and the spikes of model.py
RTOL = 1e-6  # of norms, scales and gamma: a few roundings of float32, in which they are reported
PARAM_TOL = 1e-5
"""Of parameters in float64, and of those that a single process makes of the ranks' own gradients."""
ROUNDING_FACTOR = 4
"""How much larger than a single process's the rounding of a layout may be; at most 1.5 was seen over all layouts."""
CLIPPED_RTOL = {torch.float64: 2e-6, torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Of clipped gradients: the scale's RTOL and the rounding of the product to the gradient's dtype."""


@dataclass(frozen=True)
class Policy:
    """One policy under test; `tests/reference.py` has its reference."""

    ours: Callable[[], Any]
    rtol: float = RTOL
    """Of scales and state."""

    def theirs(self) -> Any:
        return reference.rule_of(self.ours())

    @functools.cached_property
    def scope(self) -> str:
        return self.ours().scope


def _made(name: str, rtol: float = RTOL, /, **settings: Any) -> Policy:
    """`name`: as registered, with a scope or without."""
    return Policy(lambda: dist_clip.policy(name, warmup_steps=WARMUP, **settings), rtol)


def _logclip(mode: str = "logclip", post_max_norm: float | None = None) -> Policy:
    """Sharper and less patient than by default, so that a short run meets every part of the rule."""
    # The scale is the square of a level, which is a product of moves: there the roundings of many steps may add up.
    return _made(mode, 4 * RTOL, ratio=1.2, patience=2, post_max_norm=post_max_norm)


POLICIES: dict[str, Policy] = {
    "global_norm": Policy(lambda: dist_clip.GlobalNorm(1.0)),
    "adagc": _made("adagc"),
    "adagc-median": _made("adagc", gamma_init="median"),
    "adagc-mean": _made("adagc", gamma_init="mean"),
    "adagc-last": _made("adagc", gamma_init="last"),
    "adagc-shard": _made("adagc-shard"),
    "adagc-global": _made("adagc-global"),
    "zclip": _made("zclip", max_norm=5.0),
    "zclip-tensor": _made("zclip-tensor", max_norm=2.0),
    "zclip-shard": _made("zclip-shard", max_norm=2.0),
    "logclip": _logclip(),
    "logclip-shard": _logclip("logclip-shard"),
    "logclip-global": _logclip("logclip-global"),
    "logclip-post": _logclip(post_max_norm=0.5),
    "logclip-shard-post": _logclip("logclip-shard", post_max_norm=0.5),
    "zclip-percentile": _made("zclip", mode="percentile", max_norm=None, skip_update_on_spike=True),
    # At the percentile of the paper, and in a history that a short run fills and goes beyond.
    "autoclip": Policy(lambda: dist_clip.AutoClip(history=8)),
    "autoclip-tensor": Policy(lambda: dist_clip.AutoClip(percentile=50.0, history=8, scope="tensor")),
    "autoclip-shard": Policy(lambda: dist_clip.AutoClip(percentile=35.0, history=40, scope="shard")),
    "agc": Policy(lambda: dist_clip.AGC()),
    "agc-shard": Policy(lambda: dist_clip.AGC(lam=0.02, scope="shard")),
    "agc-global": Policy(lambda: dist_clip.AGC(lam=0.05, scope="global")),
}
MAIN_POLICIES = (
    *("global_norm", "adagc", "adagc-shard", "adagc-global", "zclip", "zclip-tensor", "zclip-shard"),
    *("logclip", "logclip-post", "logclip-shard-post", "logclip-global"),
)
"""Each rule at each scope: the paths through the clipper that differ."""
ON_FEW_LAYOUTS = ("autoclip", "autoclip-tensor", "autoclip-shard", "agc", "agc-shard", "agc-global")
"""Rules whose paths through the clipper others have; test_weight_norms.py has AGC's inputs under more layouts."""


def forgotten() -> list[str]:
    """The modes of built-in policies that no layout or not the reference has; those that a test registers do not count."""
    here = {(type(ours), ours.scope) for ours in (POLICIES[name].ours() for name in (*MAIN_POLICIES, *ON_FEW_LAYOUTS))}
    builtin = [mode for mode in modes() if parse_mode(mode)[0].__module__.startswith("dist_clip.")]
    made = {mode: dist_clip.policy(mode) for mode in builtin}
    return [
        mode
        for mode, ours in made.items()
        if (type(ours), ours.scope) not in here or type(ours).__name__ not in reference.RULES
    ]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    # With the usual eps of 1e-8, AdamW turns the rounding of gradients that all but cancel into steps of full size.
    "adamw": lambda params: torch.optim.AdamW(params, lr=3e-3, eps=1e-5, foreach=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=3e-2, momentum=0.9, foreach=False),
}


# ---------------------------------------------------------------- on every rank


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a plain tensor or DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_grad(param: nn.Parameter) -> Tensor | None:
    """A copy of the gradient of this rank's piece; sums over ranks that are still due are made.

    DTensor leaves some gradients Partial, and some whole on every rank though the parameter is sharded.
    """
    grad = param.grad
    if grad is None:
        return None
    if isinstance(grad, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return local(grad).detach().clone()


@functools.cache
def held(layout: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """FQN -> flat indices, within the logical tensor, of the elements that this rank holds.

    `dtype`: FSDP1 aligns its original tensors in the flat parameter to so many bytes, so the cut depends on it.
    """
    chosen = LAYOUTS[layout]
    setup = chosen.build(make_index_net(chosen.config).to(dtype), chosen.config)
    return {name: local(param).detach().flatten().long() for name, param in setup.named}


def build(layout: str, dtype: torch.dtype) -> Setup:
    chosen = LAYOUTS[layout]
    return chosen.build(make_net(chosen.config, chosen.dtype or dtype), chosen.config)


def make_clipper(setup: Setup, policy: Any, **kwargs: Any) -> Any:
    target = setup.modules if len(setup.modules) > 1 else setup.modules[0]
    return dist_clip.GradClipper(target, policy, pp_group=setup.pp_group, **kwargs)


def flat(tensors: list[Tensor | None]) -> Tensor:
    """All tensors in one float64 vector: cheap to send, and exact."""
    return torch.cat([torch.empty(0, dtype=torch.float64)] + [t.double().flatten() for t in tensors if t is not None])


def train(
    layout: str, policies: tuple[str, ...], optimizer: str, dtype: torch.dtype, steps: int = STEPS
) -> dict[str, Any]:
    """Train on this rank, following the last of `policies`; everything that happened, as plain data."""
    index = held(layout, dtype if layout.startswith("fsdp1") else torch.float64)
    setup = build(layout, dtype)
    names, params = zip(*setup.named, strict=True)
    clippers = {policy: make_clipper(setup, POLICIES[policy].ours()) for policy in policies}
    # AdamW is elementwise: on the local tensors it is the same, and without DTensor's dispatch for each of its many
    # operations. SGD runs on what users hand to their optimizer.
    direct = optimizer != "adamw" and all(isinstance(param, nn.Parameter) for param in params)
    owned = params if direct else [nn.Parameter(local(param.detach())) for param in params]
    optim = OPTIMIZERS[optimizer](owned)
    records = []
    for step in range(1, steps + 1):
        for param in params:
            param.grad = None
        setup.backward(step)
        record = clip_with_each(setup, clippers, functools.partial(clip_once, with_state=step >= WARMUP))
        if any(name.startswith("agc") for name in policies):
            record["weights"] = {name: local(param).detach().clone() for name, param in setup.named}
        records.append(record)
        if owned is not params:
            for mine, param in zip(owned, params, strict=True):
                mine.grad = local_grad(param)
        optim.step()
    return {
        "names": names,
        "index": index,
        "grad_dtypes": [None if p.grad is None else local(p.grad).dtype for p in params],
        "records": records,
        "params": {name: local(param).detach().clone() for name, param in setup.named},
    }


def clip_with_each(setup: Setup, clippers: Mapping[Any, Any], clip: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """A step's record. Each clipper gets the gradients that are there now; `clip(clipper)` clips and says what to record."""
    params = [param for _, param in setup.named]
    before = [local_grad(param) for param in params]
    restore = remember_gradients(setup.modules) if len(clippers) > 1 else lambda: None
    clipped = {}
    for policy, clipper in clippers.items():
        restore()
        clipped[policy] = {**clip(clipper), "after": flat([local_grad(param) for param in params])}
    return {"present": [grad is not None for grad in before], "before": flat(before), "clipped": clipped}


def clip_once(clipper: Any, with_state: bool = True) -> dict[str, Any]:
    out = {"report": plain_report(clipper.clip_())}
    if with_state:
        out["tensors"], out["global"] = state_of(clipper)
    return out


def remember_gradients(modules: list[nn.Module]) -> Callable[[], None]:
    """Returns what puts all gradients back as they are now: the same tensors, with the same bits."""
    params = {id(param): param for module in modules for param in module.parameters()}.values()
    kept = [(param, param.grad, local(param.grad).detach().clone()) for param in params if param.grad is not None]

    def restore() -> None:
        for param, grad, copy in kept:
            local(grad).copy_(copy)
            if param.grad is not grad:
                param.grad = grad

    return restore


def plain_report(report: Any) -> dict[str, Any]:
    fields = ("names", "tensor_norms", "scales", "global_norm", "clipped_global_norm", "clipped_fraction")
    fields += ("nonfinite", "num_grads", "empty")
    values = {field: getattr(report, field) for field in fields}
    assert values["tensor_norms"].dtype == values["scales"].dtype == torch.float32
    # Numbers are much cheaper to send than tensors; every float32 is exactly one Python float.
    return {field: value.tolist() if isinstance(value, Tensor) else value for field, value in values.items()}


def state_of(clipper: Any) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """What is remembered of each tensor, and of the one domain that these tests have, without a warm-up's record."""
    state = snapshot(clipper.memory)
    domain = next(iter(state["global"].values()), {})
    return {name: _scalars(entry) for name, entry in state["tensors"].items()}, _scalars(domain)


def _scalars(entry: dict[str, Tensor]) -> dict[str, float]:
    return {slot: value.item() for slot, value in entry.items() if value.numel() == 1}


# ---------------------------------------------------------------- in the test's process


def assert_close(actual: Tensor, expected: Tensor, where: str, **tolerances: Any) -> None:
    torch.testing.assert_close(actual, expected, msg=lambda text: f"{where}: {text}", **tolerances)


def close(actual: float, expected: float, rtol: float = RTOL) -> bool:
    return math.isclose(actual, expected, rel_tol=rtol, abs_tol=1e-12)


def of_policy(ranks: list[dict[str, Any]], policy: Hashable) -> list[dict[str, Any]]:
    """The ranks' records as if only that policy had been run."""
    return [
        {**rank, "records": [{**record, **record["clipped"][policy]} for record in rank["records"]]} for rank in ranks
    ]


def in_turn(policies: tuple[str, ...], number: int) -> tuple[str, ...]:
    """The policies in an order that ends, and so is followed, with another one for each number."""
    turn = number % len(policies)
    return (*policies[turn + 1 :], *policies[: turn + 1])


class Run:
    """The ranks' records of one run, put together."""

    def __init__(self, ranks: list[dict[str, Any]], layout: Layout) -> None:
        self.ranks, self.layout = ranks, layout
        self.shapes = {name: p.shape for name, p in make_net(layout.config).named_parameters()}
        # Distinct pieces of each tensor, empty ones left out: key -> flat indices.
        self.pieces: dict[tuple[str, int], Tensor] = {}
        self.piece_of: list[dict[str, tuple[str, int]]] = []
        numbers: dict[tuple[str, tuple[int, ...]], int] = {}
        for rank in ranks:
            mine = {}
            for name, index in rank["index"].items():
                if index.numel():
                    number = numbers.setdefault((name, tuple(index.tolist())), len(numbers))
                    mine[name] = (name, number)
                    self.pieces[(name, number)] = index
            self.piece_of.append(mine)

    def verify_cover(self) -> None:
        """The layout under test holds every element of every tensor; a mistake in the test would show here."""
        for name, shape in self.shapes.items():
            index = torch.cat([rank["index"][name] for rank in self.ranks if name in rank["index"]])
            assert index.unique().numel() == shape.numel(), f"{name}: not every element is held by some rank"

    def split(self, rank: int, record: dict[str, Any], key: str) -> dict[str, Tensor | None]:
        """One rank's flat gradient vector back as tensors, by name; None where there was no gradient."""
        out: dict[str, Tensor | None] = {}
        offset = 0
        entry = self.ranks[rank]
        for name, present in zip(entry["names"], record["present"], strict=True):
            size = entry["index"][name].numel()
            out[name] = record[key][offset : offset + size] if present else None
            offset += size if present else 0
        return out

    def local_grads(self, step: int, key: str) -> list[dict[str, Tensor | None]]:
        return [self.split(i, rank["records"][step - 1], key) for i, rank in enumerate(self.ranks)]

    def join(self, parts: list[dict[str, Tensor | None]]) -> dict[str, Tensor]:
        """Whole tensors from all ranks' pieces; names without any piece are left out, a piece that lacks is zero."""
        whole: dict[str, Tensor] = {}
        seen: dict[tuple[str, int], Tensor] = {}
        for rank, tensors in enumerate(parts):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                full = whole.setdefault(name, torch.zeros(self.shapes[name].numel(), dtype=torch.float64))
                piece = self.piece_of[rank].get(name)
                if piece is None:
                    continue
                full[self.pieces[piece]] = tensor.double().flatten()
                assert torch.equal(seen.setdefault(piece, tensor), tensor), f"copies of {name} differ on rank {rank}"
        return whole

    def whole_grads(self, step: int, key: str = "before") -> dict[str, Tensor]:
        return self.join(self.local_grads(step, key))

    def whole_weights(self, step: int) -> dict[str, Tensor]:
        """The parameters before a step; empty where no policy looks at them."""
        return self.join([rank["records"][step - 1].get("weights", {}) for rank in self.ranks])

    def cut(self, whole: dict[str, Tensor]) -> dict[tuple[str, int], Tensor]:
        """The distinct pieces of whole tensors."""
        return {key: whole[key[0]].flatten()[index] for key, index in self.pieces.items() if key[0] in whole}


def train_alone(
    layout: Layout, policy: str | None, optimizer: str, dtype: torch.dtype, steps: int, run: Run | None = None
) -> dict[str, Any]:
    """A single process trains on the whole batch with the reference's clipping: of whole tensors, or of `run`'s pieces."""
    net = make_net(layout.config, dtype)
    named = dict(net.named_parameters())
    optim = OPTIMIZERS[optimizer](list(named.values()))
    rule = POLICIES[policy].theirs() if policy else None
    records = []
    for step in range(1, steps + 1):
        optim.zero_grad(set_to_none=True)
        backward(net, layout.config, step)
        grads = {name: param.grad for name, param in named.items() if param.grad is not None}
        records.append({"grads": {name: grad.clone() for name, grad in grads.items()}})
        if rule is not None:
            weights = {name: param.detach() for name, param in named.items()}
            if run is None:
                outcome = reference.clip(rule, grads, weights=weights)
                for name, grad in outcome.grads.items():
                    named[name].grad = grad
            else:
                outcome = reference.clip(rule, run.cut(grads), weights=run.cut(weights))
                for (name, number), grad in outcome.grads.items():
                    named[name].grad.view(-1)[run.pieces[(name, number)]] = grad
            records[-1]["outcome"] = outcome
        optim.step()
    return {"records": records, "params": {name: param.detach() for name, param in named.items()}}


def check_path(run: Run, alone: dict[str, Any], dtype: torch.dtype) -> None:
    """The layout's gradients are the single process's, as long as the two are on one path: the other checks stand on it.

    In float64 that is the whole run, in float32 the first step.
    """
    for step, record in enumerate(alone["records"] if dtype == torch.float64 else alone["records"][:1], start=1):
        whole = run.whole_grads(step)
        assert whole.keys() == record["grads"].keys(), f"step {step}"
        for name, grad in record["grads"].items():
            scale = float(grad.double().abs().max())
            assert_close(whole[name], grad.double().flatten(), f"step {step}, {name}", rtol=1e-4, atol=1e-5 * scale)


def check_policies(
    ranks: list[dict[str, Any]], layout: str, policies: tuple[str, ...], optimizer: str, dtype: torch.dtype
) -> None:
    """`check` of what `train` recorded, for each of its policies."""
    for policy in policies:
        run = Run(of_policy(ranks, policy), LAYOUTS[layout])
        check(run, layout, policy, optimizer, dtype, followed=policy == policies[-1])


def check(
    run: Run, layout_name: str, policy_name: str, optimizer: str, dtype: torch.dtype, *, followed: bool = True
) -> None:
    """`followed`: the optimizer took this policy's gradients, so that its whole path can be compared."""
    layout, policy = LAYOUTS[layout_name], POLICIES[policy_name]
    run.verify_cover()
    rule = policy.theirs()
    shadow = Shadow(layout, optimizer, dtype) if followed and layout.same_params and not layout.trajectory else None
    clipped_something = False
    for step in range(1, len(run.ranks[0]["records"]) + 1):
        whole = run.whole_grads(step)
        shown = run.cut if policy.scope == "shard" else dict[Any, Tensor]
        outcome = reference.clip(rule, shown(whole), weights=shown(run.whole_weights(step)))
        clipped_something |= step > WARMUP and min(outcome.scales.values()) < 1
        for rank in range(len(run.ranks)):
            check_report(run, rank, step, policy, outcome, rule)
            check_global_norms(run, rank, step, policy, outcome)
            check_clipped(run, rank, step, policy, outcome)
        check_agreement(run, step, policy)
        if shadow is not None:
            shadow.step(run, outcome, policy)
    assert clipped_something, "the test is to blame: nothing was clipped after the warm-up"

    if followed and layout.trajectory:
        # Pieces differ between world sizes, so only whole-tensor runs can be shared between tests.
        pieces = run if policy.scope == "shard" else None
        steps = len(run.ranks[0]["records"])
        alone = train_alone(layout, policy_name, optimizer, torch.float64, steps, pieces)
        check_path(run, alone, dtype)
        check_trajectory(run, alone, trajectory_rtol(rule, dtype))
        if dtype == torch.float64:
            check_params(run, alone["params"])
        else:
            check_rounding(run, alone, train_alone(layout, policy_name, optimizer, dtype, steps, pieces))
    elif shadow is not None:
        check_params(run, shadow.params)


class Shadow:
    """A single process that is handed the ranks' own gradients: the oracle where low precision hides the true path."""

    def __init__(self, layout: Layout, optimizer: str, dtype: torch.dtype) -> None:
        self.params = dict(make_net(layout.config, layout.dtype or dtype).named_parameters())
        self.optim = OPTIMIZERS[optimizer](list(self.params.values()))

    def step(self, run: Run, outcome: reference.Outcome, policy: Policy) -> None:
        self.optim.zero_grad(set_to_none=True)
        for key, grad in outcome.grads.items():
            if policy.scope != "shard":
                self.params[key].grad = grad.view(run.shapes[key]).to(self.params[key].dtype)
                continue
            param = self.params[key[0]]
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            param.grad.view(-1)[run.pieces[key]] = grad.to(param.dtype)
        self.optim.step()


def check_report(run: Run, rank: int, step: int, policy: Policy, outcome: reference.Outcome, rule: Any) -> None:
    entry = run.ranks[rank]
    record = entry["records"][step - 1]
    report = record["report"]
    where = f"rank {rank}, step {step}"
    names = report["names"]
    assert set(names) == set(entry["names"]), where
    assert len(names) == len(entry["names"]), where
    present = dict(zip(entry["names"], record["present"], strict=True))
    for name, norm, scale in zip(names, report["tensor_norms"], report["scales"], strict=True):
        key = run.piece_of[rank].get(name) if policy.scope == "shard" else name
        here = f"{where}, {name}"
        if key not in outcome.norms:  # no gradient anywhere, or an empty shard
            assert norm == 0, f"{here}: norm {norm} where there is no gradient"
            continue
        if not present[name]:
            continue  # this rank's piece is missing while others have theirs
        assert close(norm, outcome.norms[key]), f"{here}: norm {norm}, not {outcome.norms[key]}"
        if outcome.norms[key] > 0:
            good = close(scale, outcome.scales[key], policy.rtol)
            assert good, f"{here}: scale {scale}, not {outcome.scales[key]}"
    check_state(run, rank, step, policy, rule)
    assert report["num_grads"] == sum(record["present"]), where
    assert report["empty"] == (not any(record["present"])), where
    assert not report["nonfinite"], where
    # A tensor counts where any rank's gradient of it is not zero; a shard that is a tensor of its own, where this one's is.
    if policy.scope == "shard":
        counted = {n for n, key in run.piece_of[rank].items() if present[n] and outcome.norms[key] > 0}
    else:
        counted = {name for name in names if outcome.norms.get(name, 0.0) > 0}
    clipped = sum(scale < 1 for name, scale in zip(names, report["scales"], strict=True) if name in counted)
    fraction = clipped / max(1, len(counted))
    assert close(report["clipped_fraction"], fraction), f"{where}: {report['clipped_fraction']} {fraction}"


def check_global_norms(run: Run, rank: int, step: int, policy: Policy, outcome: reference.Outcome) -> None:
    """N before and after clipping, wherever they are reported; where they must be is tested in test_collectives.py."""
    report = run.ranks[rank]["records"][step - 1]["report"]
    where = f"rank {rank}, step {step}"
    if report["global_norm"] is None:
        return
    actual = report["global_norm"]
    assert close(actual, outcome.global_norm), f"{where}: global norm {actual}, not {outcome.global_norm}"
    expected = math.sqrt(sum((outcome.scales[k] * n) ** 2 for k, n in outcome.norms.items()))
    if report["clipped_global_norm"] is None:
        # It needs no communication where every scale is the same.
        different = len({outcome.scales[k] for k, n in outcome.norms.items() if n > 0})
        assert different > 1, f"{where}: no clipped global norm, though it is the scale times the global norm"
        return
    actual = report["clipped_global_norm"]
    assert close(actual, expected, 2 * policy.rtol), f"{where}: clipped global norm {actual}, not {expected}"


def check_state(run: Run, rank: int, step: int, policy: Policy, rule: reference.Rule) -> None:
    """State from the end of the warm-up on; a tensor that has none in the reference has none (or 0) here."""
    if step < WARMUP:
        return
    record = run.ranks[rank]["records"][step - 1]
    where = f"rank {rank}, step {step}"
    check_memory(record["global"], rule.memory(None) if record["global"] else {}, policy.rtol, where)
    for name in run.ranks[rank]["names"]:
        key: Any = run.piece_of[rank].get(name) if policy.scope == "shard" else name
        if name in record["tensors"]:
            check_memory(record["tensors"][name], rule.memory(key), policy.rtol, f"{where}, {name}")


def check_memory(actual: dict[str, float], expected: dict[str, float], usual_rtol: float, where: str) -> None:
    for slot, value in expected.items():
        # The variance is that of norms that agree to RTOL: a difference of nearly equal numbers, squared.
        rtol, atol = (1e-4, RTOL * expected["mean"] ** 2) if slot == "var" else (usual_rtol, 1e-12)
        good = math.isclose(actual[slot], value, rel_tol=rtol, abs_tol=atol)
        assert good, f"{where}: {slot} {actual[slot]}, not {value}"


def check_clipped(run: Run, rank: int, step: int, policy: Policy, outcome: reference.Outcome) -> None:
    entry = run.ranks[rank]
    clipped = run.split(rank, entry["records"][step - 1], "after")
    for name, tensor, dtype in zip(clipped, clipped.values(), entry["grad_dtypes"], strict=True):
        key: Any = run.piece_of[rank].get(name)
        if tensor is None or key is None:
            continue
        expected = outcome.grads[key] if policy.scope == "shard" else outcome.grads[name].flatten()[run.pieces[key]]
        rtol = CLIPPED_RTOL[dtype] - RTOL + policy.rtol if dtype is not None else 8e-3
        # Partial gradients are sums over ranks in an order of their own, which shows where terms cancel.
        atol = 2e-7 * float(expected.abs().max()) if run.layout.partial else 1e-30
        if not torch.allclose(tensor, expected, rtol=rtol, atol=atol):  # ten times as fast as the next line
            assert_close(tensor, expected, f"rank {rank}, step {step}, {name}", rtol=rtol, atol=atol)


def check_agreement(run: Run, step: int, policy: Policy) -> None:
    """Ranks that hold the same tensor agree bitwise on its scale and state, and ranks with the same piece on that."""
    seen: dict[Any, tuple[int, Any]] = {}
    for rank, entry in enumerate(run.ranks):
        record = entry["records"][step - 1]
        report = record["report"]
        for i, name in enumerate(report["names"]):
            key = run.piece_of[rank].get(name) if policy.scope == "shard" else name
            if key is None:
                continue
            mine = [report["scales"][i], report["tensor_norms"][i], record.get("tensors", {}).get(name)]
            mine += record.get("global", {}).values()
            first, theirs = seen.setdefault(key, (rank, mine))
            assert mine == theirs, f"step {step}, {name}: {theirs} on rank {first}, {mine} on rank {rank}"


def check_agreement_of_state(run: Run, step: int) -> None:
    """All ranks remember the same bits of the tensors they share."""
    seen: dict[str, Any] = {}
    for rank, entry in enumerate(run.ranks):
        record = entry["records"][step - 1]
        for name, value in {**record["tensors"], **record["global"]}.items():
            assert seen.setdefault(name, value) == value, f"step {step}: rank {rank} remembers another {name}"


def trajectory_rtol(rule: Any, dtype: torch.dtype) -> float:
    """How far norms and scales of two paths may differ that were rounded differently from the first step on.

    A sum that all but cancels (the gradient of a tensor of one element) shows a path's rounding many times enlarged.
    In float32 the gradients are rounded; in float64 only what AdaGC and LogClip remember is, a float32 by definition (6e-8
    of a scale became 5e-6 of such a norm). `check` compares each single step to RTOL in all cases.
    """
    if dtype != torch.float64:
        return 1e-2
    return 2e-5 if isinstance(rule, reference.AdaGC | reference.LogClip) else RTOL


def check_trajectory(run: Run, alone: dict[str, Any], rtol: float) -> None:
    """The single process's own norms and scales along its own path."""
    scope_shard = any(isinstance(key, tuple) for key in alone["records"][0]["outcome"].norms)
    for step, expected in enumerate(alone["records"], start=1):
        outcome = expected["outcome"]
        for rank, entry in enumerate(run.ranks):
            report = entry["records"][step - 1]["report"]
            for i, name in enumerate(report["names"]):
                key = run.piece_of[rank].get(name) if scope_shard else name
                if key not in outcome.norms or outcome.norms[key] == 0:
                    continue
                here = f"rank {rank}, step {step}, {name}, on its own path"
                norm, scale = report["tensor_norms"][i], report["scales"][i]
                assert close(norm, outcome.norms[key], rtol), f"{here}: norm {norm}, not {outcome.norms[key]}"
                assert close(scale, outcome.scales[key], rtol), f"{here}: scale {scale}, not {outcome.scales[key]}"


def check_params(run: Run, params: dict[str, Tensor]) -> None:
    whole = run.join([dict(entry["params"]) for entry in run.ranks])  # asserts that copies are bitwise equal
    for name, param in params.items():
        expected = param.detach().double().flatten()
        assert_close(whole[name], expected, f"{name} after the last step", rtol=PARAM_TOL, atol=PARAM_TOL)


def check_rounding(run: Run, exact: dict[str, Any], rounded: dict[str, Any]) -> None:
    """Parameters of a float32 run are about as far from the float64 path as those of a single process in float32.

    AdamW divides by the root of the second moment. Where a gradient's terms all but cancel, their rounding becomes a
    visible part of a step, and its sign depends on the order of summation. Under pp-tp the first gradient of one element
    is 2e-6, of terms of 0.4, so that rounding is 1.5 % of it: a single process ended 6e-6 from the float64 path, and the
    pipeline 7e-6 to the other side. The two differ by more than either error, so neither is the other's measure.
    """
    whole = run.join([dict(entry["params"]) for entry in run.ranks])  # asserts that copies are bitwise equal
    truth = {name: param.double().flatten() for name, param in exact["params"].items()}
    ours = {name: float((whole[name] - param).abs().max()) for name, param in truth.items()}
    usual = max(
        float((rounded["params"][name].double().flatten() - param).abs().max()) for name, param in truth.items()
    )
    worst = max(ours, key=ours.__getitem__)
    assert ours[worst] <= ROUNDING_FACTOR * usual, f"{worst}: off by {ours[worst]:.1e}, a single process by {usual:.1e}"
