"""GradClipper around the policies: names, targets, report, attach, groups and exclude, saving and loading, explain.

One process, plain tensors; the layouts that shard tensors are tested in tests/distributed.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

import dist_clip
from tests.unit.test_construction import set_grads
from tests.unit.test_host_syncs import fake_cuda
from tests.unit.test_state import Operators


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16, bias=False), nn.GELU(), nn.Linear(16, 8, bias=False))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(self.attn(x)))


class Net(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(seed: int = 0, blocks: int = 2) -> Net:
    torch.manual_seed(seed)
    return Net(blocks)


def fqns(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def backward(module: nn.Module, seed: int, factor: float = 1.0) -> None:
    gen = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (4, 6), generator=gen)
    module.zero_grad()
    (factor * nn.functional.cross_entropy(module(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())).backward()


def named_grads(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_same_state(a: Any, b: Any, where: str = "state") -> None:
    """Bitwise, through nested dicts and lists."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same_state(a[k], b[k], f"{where}[{k!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}[{i}]")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{where}: {m}")
    else:
        assert a == b or (a != a and b != b), where


# ---- targets and names -----------------------------------------------------------------------------------------------


def names_of(target: Any, **kwargs: Any) -> list[str]:
    return list(dist_clip.GradClipper(target, dist_clip.GlobalNorm(), **kwargs).clip_().names)


def test_a_module() -> None:
    model = net()
    assert names_of(model) == fqns(model)


def test_pipeline_chunks() -> None:
    model = net()
    first, last = nn.ModuleDict({"embed": model.embed}), nn.ModuleDict({"head": model.head})
    assert names_of([first, last]) == ["embed.weight", "head.weight"]


def test_named_parameters() -> None:
    model = net()
    assert names_of(model.named_parameters()) == fqns(model)
    assert names_of(list(model.named_parameters())) == fqns(model)
    assert names_of(dict(model.named_parameters()).items()) == fqns(model)


def test_unnamed_parameters() -> None:
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    assert names_of(params) == names_of(iter(params)) == ["param_0", "param_1", "param_2"]


@pytest.mark.report(
    "pytorch/torchtitan#1258",
    "ShusenTang/Dive-into-DL-PyTorch#101",
    situation="a generator of parameters is empty when gradients are to be scaled",
    right="every gradient is scaled, at each step",
)
def test_a_generator_of_parameters_is_materialised() -> None:
    model = net()
    clipper = dist_clip.GradClipper(model.parameters(), dist_clip.GlobalNorm(0.01))
    for seed in range(3):
        backward(model, seed)
        report = clipper.clip_()
        assert report.num_grads == len(fqns(model))
        assert report.scales.max() < 1


def test_an_optimizer_and_its_param_groups() -> None:
    model = net()
    unnamed = torch.optim.SGD(model.parameters(), lr=0.1)
    count = len(fqns(model))
    assert names_of(unnamed) == names_of(unnamed.param_groups) == [f"param_{i}" for i in range(count)]
    two_groups = torch.optim.SGD(
        [{"params": model.embed.parameters()}, {"params": model.head.parameters(), "lr": 0.2}], lr=0.1
    )
    assert names_of(two_groups) == ["param_0", "param_1"]


def test_an_optimizer_that_knows_the_names() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters())
    assert names_of(optimizer) == names_of(optimizer.param_groups) == fqns(model)
    decay = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
    rest = [(n, p) for n, p in model.named_parameters() if p.dim() <= 1]
    split = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}])
    assert names_of(split) == [n for n, _ in decay + rest]


def wrap_compile(m: nn.Module) -> nn.Module:
    return torch.compile(m)  # type: ignore[return-value]


def wrap_inner_compile(m: nn.Module) -> nn.Module:
    m.blocks[0] = torch.compile(m.blocks[0])  # type: ignore[index, operator]
    return m


def wrap_inner_checkpoint(m: nn.Module) -> nn.Module:
    for i in range(len(m.blocks)):  # type: ignore[arg-type]
        m.blocks[i] = checkpoint_wrapper(m.blocks[i])  # type: ignore[index, operator]
    return m


def wrap_all(m: nn.Module) -> nn.Module:
    for i in range(len(m.blocks)):  # type: ignore[arg-type]
        m.blocks[i].mlp = torch.compile(checkpoint_wrapper(m.blocks[i].mlp))  # type: ignore[index, operator]
        m.blocks[i] = checkpoint_wrapper(torch.compile(m.blocks[i]))  # type: ignore[index, operator]
    return torch.compile(checkpoint_wrapper(m))  # type: ignore[return-value]


WRAPPERS = {
    "compile": wrap_compile,
    "checkpoint": checkpoint_wrapper,
    "compile inside": wrap_inner_compile,
    "checkpoint inside": wrap_inner_checkpoint,
    "nested": wrap_all,
    "twice": lambda m: checkpoint_wrapper(torch.compile(checkpoint_wrapper(checkpoint_wrapper(m)))),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapper_prefixes_are_no_part_of_a_name(wrapper: str) -> None:
    want = fqns(net())
    wrapped = WRAPPERS[wrapper](net())
    assert fqns(wrapped) != want or wrapper == "checkpoint"  # the checkpoint wrapper cleans named_parameters() itself
    assert names_of(wrapped) == want
    assert names_of(wrapped.named_parameters()) == want
    assert names_of(torch.optim.AdamW(wrapped.named_parameters())) == want


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("inner", [lambda m: m, *WRAPPERS.values()], ids=["plain", *WRAPPERS])
def test_ddp_prefix_is_no_part_of_a_name(inner: Callable[[nn.Module], nn.Module]) -> None:
    want = fqns(net())
    wrapped = DistributedDataParallel(inner(net()))
    assert names_of(wrapped) == want
    assert names_of(torch.compile(wrapped)) == want


@pytest.mark.usefixtures("world_of_one")
def test_ddp_named_parameters() -> None:
    wrapped = DistributedDataParallel(net())
    assert names_of(wrapped.named_parameters()) == fqns(net())


def test_an_attribute_called_module_is_part_of_the_name() -> None:
    """A name is what the model's author wrote; only DDP's own `module.` is a wrapper's."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.other = nn.Linear(2, 2)

    assert names_of(Inner()) == ["module.weight", "module.bias", "other.weight", "other.bias"]
    assert names_of(nn.ModuleDict({"a": Inner()})) == [f"a.{n}" for n in fqns(Inner())]


def test_wrapped_and_plain_models_share_their_state() -> None:
    plain, wrapped = net(), wrap_inner_checkpoint(net())
    clippers = [dist_clip.GradClipper(m, dist_clip.AdaGC(warmup_steps=2)) for m in (plain, wrapped)]
    for seed in range(5):
        backward(plain, seed)
        clippers[0].clip_()
    clippers[1].load_state_dict(clippers[0].state_dict())
    assert_same_state(clippers[1].state_dict(), clippers[0].state_dict())


def test_tied_weights_count_once() -> None:
    model = net()
    model.head.weight = model.embed.weight
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.01))
    backward(model, 0)
    grads = named_grads(model)
    assert "head.weight" not in grads
    report = clipper.clip_()
    want = math.hypot(*(g.double().norm().item() for g in grads.values()))
    assert list(report.names) == fqns(model)
    assert report.global_norm.item() == pytest.approx(want, rel=1e-6)
    torch.testing.assert_close(model.embed.weight.grad, grads["embed.weight"] * (0.01 / want), rtol=5e-6, atol=1e-9)


def test_tied_weights_over_pipeline_chunks_of_one_rank() -> None:
    embed, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embed.weight
    chunks = [nn.ModuleDict({"embed": embed}), nn.ModuleDict({"head": head})]
    clipper = dist_clip.GradClipper(chunks, dist_clip.GlobalNorm(1.0))
    embed.weight.grad = torch.ones(5, 4)
    assert clipper.clip_().global_norm.item() == pytest.approx(math.sqrt(20), rel=1e-6)
    assert embed.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_tied_weights_given_under_two_names() -> None:
    model = net()
    model.head.weight = model.embed.weight
    clipper = dist_clip.GradClipper(list(model.named_parameters(remove_duplicate=False)), dist_clip.GlobalNorm(0.01))
    backward(model, 0)
    want = math.hypot(*(g.double().norm().item() for g in named_grads(model).values()))
    assert clipper.clip_().global_norm.item() == pytest.approx(want, rel=1e-6)
    assert math.hypot(*(g.norm().item() for g in named_grads(model).values())) == pytest.approx(0.01, rel=1e-3)


def test_frozen_tensors_stay_and_may_be_unfrozen() -> None:
    model = net()
    model.embed.requires_grad_(False)
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(warmup_steps=2))
    for seed in range(4):
        backward(model, seed)
        report = clipper.clip_()
        assert list(report.names) == fqns(model)
        assert report.num_grads == len(fqns(model)) - 1
    model.embed.requires_grad_(True)
    backward(model, 9)
    norm = model.embed.weight.grad.double().norm().item()
    report = clipper.clip_()
    assert report.num_grads == len(fqns(model))
    assert report.scales[0].item() == 1.0
    assert clipper.state_dict()["tensors"]["embed.weight"]["gamma"].item() == pytest.approx(norm, rel=1e-6)


# ---- report ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [dist_clip.GlobalNorm(0.2), dist_clip.AdaGC(warmup_steps=2), dist_clip.ZClip(warmup_steps=2)], ids=repr
)
def test_report(policy: Any) -> None:
    model = net()
    clipper = dist_clip.GradClipper(model, policy)
    for seed in range(6):
        backward(model, seed, factor=10.0 if seed == 4 else 1.0)
        before = named_grads(model)
        report = clipper.clip_()
        assert report is clipper.last_report
        after = named_grads(model)
        assert isinstance(report.names, tuple)
        assert list(report.names) == fqns(model)
        norms = torch.stack([g.double().norm() for g in before.values()])
        assert report.tensor_norms.shape == report.scales.shape == (len(before),)
        assert report.tensor_norms.dtype == report.scales.dtype == torch.float32
        torch.testing.assert_close(report.tensor_norms.double(), norms, rtol=1e-6, atol=0)
        for value in (report.global_norm, report.clipped_global_norm, report.clipped_fraction):
            assert value.dtype == torch.float32
            assert value.dim() == 0
            assert type(value) is Tensor
        assert report.global_norm.item() == pytest.approx(norms.norm().item(), rel=1e-6)
        clipped = torch.stack([g.double().norm() for g in after.values()]).norm().item()
        assert report.clipped_global_norm.item() == pytest.approx(clipped, rel=2e-6)
        for name, s in zip(report.names, report.scales, strict=True):
            torch.testing.assert_close(after[name], before[name] * s, rtol=1e-6, atol=0)
        assert report.clipped_fraction.item() == pytest.approx((report.scales < 1).double().mean().item())
        assert report.nonfinite.dtype == torch.bool
        assert report.nonfinite.dim() == 0
        assert not report.nonfinite
        assert report.num_grads == len(before)
        assert isinstance(report.num_grads, int)
        assert report.empty is False


def test_a_report_is_a_snapshot() -> None:
    """Kept for logging some steps later, it still tells its own step."""
    model = net()
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(warmup_steps=2))
    kept = []
    for seed in range(6):
        backward(model, seed, factor=1.0 + seed)
        report = clipper.clip_()
        kept.append((report, report.tensor_norms.clone(), report.scales.clone(), report.global_norm.clone()))
    for report, norms, scales, total in kept:
        assert torch.equal(report.tensor_norms, norms)
        assert torch.equal(report.scales, scales)
        assert torch.equal(report.global_norm, total)


def test_clipped_fraction_counts_tensors_with_a_gradient() -> None:
    params = [nn.Parameter(torch.zeros(1)) for _ in range(5)]
    clipper = dist_clip.GradClipper(params, dist_clip.AdaGC(warmup_steps=1, max_norm=100.0))
    for p in params:
        p.grad = torch.ones(1)
    assert clipper.clip_().clipped_fraction.item() == 0.0
    for p, g in zip(params, [1.0, 2.0, 1.0, 5.0, None], strict=True):
        p.grad = None if g is None else torch.tensor([g])
    report = clipper.clip_()
    assert report.num_grads == 4
    assert report.clipped_fraction.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    "policy",
    [dist_clip.GlobalNorm(), dist_clip.AdaGC(warmup_steps=1), dist_clip.AdaGC(scope="global"), dist_clip.ZClip()],
    ids=repr,
)
@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "skip", "raise"])
def test_a_clip_before_any_backward(policy: Any, nonfinite: Any) -> None:
    model = net()
    clipper = dist_clip.GradClipper(model, policy, nonfinite=nonfinite)
    assert clipper.last_report is None
    for _ in range(3):
        report = clipper.clip_()
        assert report.empty is True
        assert report.num_grads == 0
        assert not report.nonfinite
        assert report.clipped_fraction.item() == 0.0
        assert report.global_norm is None or report.global_norm.item() == 0.0
        assert torch.equal(report.tensor_norms, torch.zeros(len(fqns(model))))
        assert all(p.grad is None for p in model.parameters())
    assert not any(
        math.isfinite(e["gamma"]) and e["gamma"] > 0 for e in clipper.state_dict()["tensors"].values() if "gamma" in e
    )
    backward(model, 0)
    assert clipper.clip_().empty is False


def test_gradients_are_scaled_in_place() -> None:
    model = net()
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1e-3))
    backward(model, 0)
    kept = {n: p.grad for n, p in model.named_parameters()}
    clipper.clip_()
    for n, p in model.named_parameters():
        assert p.grad is kept[n]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_that_require_grad() -> None:
    p = nn.Parameter(torch.full((3,), 2.0))
    clipper = dist_clip.GradClipper([p], dist_clip.AdaGC(warmup_steps=1))
    for _ in range(3):
        p.grad = None
        (p**2).sum().backward(create_graph=True)
        report = clipper.clip_()
        assert not report.scales.requires_grad
        assert not report.global_norm.requires_grad
    assert p.grad.norm().item() == pytest.approx(1.04 * (0.99 + 0.01 * 1.04), rel=1e-5)
    p.grad = None


# ---- groups and exclude ----------------------------------------------------------------------------------------------


def test_excluded_tensors_are_left_alone() -> None:
    model = net()
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1e-3), exclude=["*.bias", "embed.*"])
    backward(model, 0)
    before = named_grads(model)
    kept = [n for n in before if not n.endswith(".bias") and not n.startswith("embed.")]
    report = clipper.clip_()
    after = named_grads(model)
    assert list(report.names) == kept
    assert report.num_grads == len(kept)
    assert report.global_norm.item() == pytest.approx(
        math.hypot(*(before[n].double().norm().item() for n in kept)), rel=1e-6
    )
    for n in before:
        assert torch.equal(after[n], before[n]) != (n in kept), n


def test_excluded_tensors_may_be_anything() -> None:
    """NaN in a tensor nobody measures is nobody's business; a complex one can be excluded."""
    plain, odd = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    clipper = dist_clip.GradClipper([("plain", plain), ("odd", odd)], dist_clip.GlobalNorm(1.0), exclude=["odd"])
    plain.grad, odd.grad = torch.full((3,), 2.0), torch.full((3,), math.nan, dtype=torch.complex64)
    report = clipper.clip_()
    assert not report.nonfinite
    assert plain.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_groups_are_domains_of_their_own() -> None:
    model = net()
    groups = {"embed.*": dist_clip.GlobalNorm(0.02), "blocks.0.*": dist_clip.GlobalNorm(0.03)}
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.05), overrides=groups)
    backward(model, 0)
    before = named_grads(model)
    report = clipper.clip_()
    after = named_grads(model)

    def norm(grads: dict[str, Tensor], prefix: tuple[str, ...]) -> float:
        return math.hypot(*(g.double().norm().item() for n, g in grads.items() if n.startswith(prefix)))

    for prefix, limit in ((("embed.",), 0.02), (("blocks.0.",), 0.03), (("blocks.1.", "head."), 0.05)):
        n = norm(before, prefix)
        assert n > limit, "the test needs a group that is clipped"
        assert norm(after, prefix) == pytest.approx(limit * n / (n + 1e-6), rel=5e-6)
        scales = {s.item() for name, s in zip(report.names, report.scales, strict=True) if name.startswith(prefix)}
        assert len(scales) == 1
        assert scales.pop() == pytest.approx(limit / (n + 1e-6), rel=1e-6)
    assert set(report.names) == set(before)


def test_the_first_matching_group_wins() -> None:
    params = {n: nn.Parameter(torch.zeros(1)) for n in ("a.weight", "a.bias", "b.weight", "b.bias")}
    groups = {"a.*": dist_clip.GlobalNorm(0.1), "*.bias": dist_clip.GlobalNorm(0.01)}
    clipper = dist_clip.GradClipper(params.items(), dist_clip.GlobalNorm(0.5), overrides=groups)
    for p in params.values():
        p.grad = torch.ones(1)
    clipper.clip_()
    got = {n: p.grad.item() for n, p in params.items()}
    r = 0.1 / math.sqrt(2)
    assert got == {
        k: pytest.approx(v, rel=1e-5) for k, v in {"a.weight": r, "a.bias": r, "b.weight": 0.5, "b.bias": 0.01}.items()
    }


def test_groups_of_different_policies() -> None:
    """Each group does what a clipper of its own would do."""
    groups: dict[str, Any] = {
        "embed.*": dist_clip.AdaGC(warmup_steps=3),
        "*.bias": dist_clip.ZClip(warmup_steps=4),
        "head.*": dist_clip.AdaGC(warmup_steps=2, scope="global"),
    }
    rest = dist_clip.AdaGC(warmup_steps=2, gamma_init="median")
    together, apart = net(), net()
    one = dist_clip.GradClipper(together, rest, overrides=groups)
    members: dict[str, list[tuple[str, nn.Parameter]]] = {k: [] for k in [*groups, ""]}
    for n, p in apart.named_parameters():
        members[
            "embed.*"
            if n.startswith("embed")
            else "*.bias"
            if n.endswith("bias")
            else "head.*"
            if n.startswith("head")
            else ""
        ].append((n, p))
    several = [dist_clip.GradClipper(m, groups.get(k, rest)) for k, m in members.items()]
    for seed in range(12):
        for model in (together, apart):
            backward(model, seed, factor=20.0 if seed % 5 == 4 else 1.0)
        one.clip_()
        for clipper in several:
            clipper.clip_()
        for n, g in named_grads(together).items():
            torch.testing.assert_close(g, named_grads(apart)[n], rtol=1e-6, atol=0, msg=lambda m, n=n: f"{n}: {m}")  # type: ignore[misc]


def test_one_policy_object_may_serve_several_groups() -> None:
    """A policy is pure maths: sharing the object shares no state."""
    policy = dist_clip.ZClip(warmup_steps=2)
    params = {n: nn.Parameter(torch.zeros(1)) for n in ("a", "b")}
    clipper = dist_clip.GradClipper(params.items(), policy, overrides={"a": policy})
    for step in range(6):
        params["a"].grad, params["b"].grad = torch.tensor([0.01 * (1 + step % 2)]), torch.tensor([0.4 * (1 + step % 2)])
        report = clipper.clip_()
        assert report.scales.tolist() == [1.0, 1.0]
    alone = nn.Parameter(torch.zeros(1))
    for shared_again in (dist_clip.GradClipper([alone], policy), dist_clip.GradClipper([alone], policy)):
        assert shared_again.state_dict()["step"] == 0


@pytest.mark.parametrize("where", ["overrides", "exclude"])
def test_a_pattern_that_matches_nothing(where: str) -> None:
    kwargs: dict[str, Any] = (
        {"overrides": {"blokcs.*": dist_clip.GlobalNorm()}} if where == "overrides" else {"exclude": ["blokcs.*"]}
    )
    with pytest.raises(ValueError, match=r"blokcs\.\*"):
        dist_clip.GradClipper(net(), dist_clip.GlobalNorm(), **kwargs)


# ---- attach ----------------------------------------------------------------------------------------------------------


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_attach_is_a_clip_before_each_step(optimizer: str) -> None:
    by_hand, hooked = net(), net()
    policies = [dist_clip.AdaGC(warmup_steps=3, max_norm=0.1) for _ in range(2)]
    clipper, attached = (dist_clip.GradClipper(m, p) for m, p in zip((by_hand, hooked), policies, strict=True))
    opts = [OPTIMIZERS[optimizer](m.parameters()) for m in (by_hand, hooked)]
    attached.attach(opts[1])
    for seed in range(10):
        backward(by_hand, seed)
        clipper.clip_()
        opts[0].step()
        backward(hooked, seed)
        opts[1].step()
        assert attached.last_report is not None
        assert torch.equal(attached.last_report.scales, clipper.last_report.scales)
    for p, q in zip(by_hand.parameters(), hooked.parameters(), strict=True):
        assert torch.equal(p, q)
    assert_same_state(attached.state_dict(), clipper.state_dict())


def muon_and_adamw(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("blocks")]
    rest = [p for n, p in model.named_parameters() if not (p.dim() == 2 and n.startswith("blocks"))]
    return torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_several_optimizers_are_clipped_once_a_round(order: tuple[int, int]) -> None:
    by_hand, hooked = net(), net()
    clipper = dist_clip.GradClipper(by_hand, dist_clip.AdaGC(warmup_steps=3, max_norm=0.1))
    attached = dist_clip.GradClipper(hooked, dist_clip.AdaGC(warmup_steps=3, max_norm=0.1))
    opts, hooked_opts = muon_and_adamw(by_hand), muon_and_adamw(hooked)
    attached.attach(*hooked_opts)
    for seed in range(8):
        backward(by_hand, seed)
        clipper.clip_()
        backward(hooked, seed)
        for i in order:
            opts[i].step()
            hooked_opts[i].step()
        assert attached.state_dict()["step"] == seed + 1
        assert attached.last_report.num_grads == len(fqns(hooked))
        for (n, g), h in zip(named_grads(by_hand).items(), named_grads(hooked).values(), strict=True):
            assert torch.equal(g, h), n
    for p, q in zip(by_hand.parameters(), hooked.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_optimizer_that_steps_twice_starts_a_new_round() -> None:
    """An optimizer left out of a round (frozen for a while) must not leave the next round unclipped."""
    model = net()
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1e-3))
    muon, adamw = muon_and_adamw(model)
    clipper.attach(muon, adamw)
    for rounds in range(1, 4):
        backward(model, rounds)
        muon.step()
        assert clipper.state_dict()["step"] == rounds
        assert math.hypot(*(g.norm().item() for g in named_grads(model).values())) == pytest.approx(1e-3, rel=1e-2)
    adamw.step()
    assert clipper.state_dict()["step"] == 3


def test_removing_the_handle_ends_the_clipping() -> None:
    model = net()
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1e-3))
    opts = muon_and_adamw(model)
    handle = clipper.attach(*opts)
    backward(model, 0)
    for opt in opts:
        opt.step()
    assert clipper.state_dict()["step"] == 1
    handle.remove()
    backward(model, 1)
    before = named_grads(model)
    for opt in opts:
        opt.step()
    assert clipper.state_dict()["step"] == 1
    assert all(torch.equal(g, before[n]) for n, g in named_grads(model).items())
    handle.remove()  # once more is no error
    again = clipper.attach(*opts)
    backward(model, 2)
    for opt in opts:
        opt.step()
    assert clipper.state_dict()["step"] == 2
    again.remove()


def test_a_closure_is_an_error() -> None:
    """The hook runs before the closure computes the gradients: what it clipped would be the last step's."""
    model = net()
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper.attach(optimizer)
    calls = []

    def closure() -> float:
        calls.append(1)
        return 0.0

    with pytest.raises((RuntimeError, ValueError, TypeError), match="closure"):
        optimizer.step(closure)
    with pytest.raises((RuntimeError, ValueError, TypeError), match="closure"):
        optimizer.step(closure=closure)
    assert not calls
    assert clipper.state_dict()["step"] == 0
    backward(model, 0)
    optimizer.step()
    optimizer.step(None)
    assert clipper.state_dict()["step"] == 2


def test_attaching_twice_is_an_error() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm())
    handle = clipper.attach(optimizer)
    with pytest.raises((RuntimeError, ValueError), match="attach"):
        clipper.attach(optimizer)
    handle.remove()
    clipper.attach(optimizer)
    backward(model, 0)
    optimizer.step()
    assert clipper.state_dict()["step"] == 1


def test_attaching_one_optimizer_twice_in_one_call_is_an_error() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm())
    with pytest.raises((RuntimeError, ValueError)):
        clipper.attach(optimizer, optimizer)


def test_attach_without_an_optimizer_is_an_error() -> None:
    clipper = dist_clip.GradClipper(net(), dist_clip.GlobalNorm())
    with pytest.raises((TypeError, ValueError)):
        clipper.attach()
    with pytest.raises((TypeError, ValueError), match="sgd"):
        clipper.attach("sgd")


def test_attach_to_parameters_the_clipper_does_not_know() -> None:
    model, other = net(), nn.Linear(3, 3)
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm())
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    backward(model, 0)

    def attach_and_step() -> None:
        clipper.attach(optimizer)
        optimizer.step()

    with pytest.raises((ValueError, RuntimeError), match=r"(?i)param"):
        attach_and_step()


def test_parameters_added_to_an_attached_optimizer() -> None:
    """A parameter the clipper never measures would be trained unclipped without a word."""
    model, late = net(), nn.Parameter(torch.ones(3))
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper.attach(optimizer)
    backward(model, 0)
    optimizer.step()
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.full((3,), 100.0)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)param"):
        optimizer.step()
    assert torch.equal(late, torch.ones(3))


def test_attach_knows_excluded_parameters() -> None:
    model = net()
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(), exclude=["*.bias"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper.attach(optimizer)
    backward(model, 0)
    optimizer.step()
    assert clipper.state_dict()["step"] == 1


def test_attach_with_a_scheduler_and_accumulation() -> None:
    model = net()
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    clipper.attach(optimizer)
    for step in range(1, 5):
        optimizer.zero_grad()
        for micro in range(3):
            tokens = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(10 * step + micro))
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        scheduler.step()
        assert clipper.state_dict()["step"] == step


# ---- saving and loading ----------------------------------------------------------------------------------------------

STATEFUL: dict[str, Callable[[], dict[str, Any]]] = {
    "GlobalNorm": lambda: {"policy": dist_clip.GlobalNorm(0.5)},
    **{
        f"AdaGC-{scope}-{init}": lambda scope=scope, init=init: {  # type: ignore[misc]
            "policy": dist_clip.AdaGC(warmup_steps=6, scope=scope, gamma_init=init)
        }
        for scope in ("tensor", "shard", "global")
        for init in ("min", "median", "mean", "last")
    },
    **{
        f"LogClip-{scope}": lambda scope=scope: {  # type: ignore[misc]
            "policy": dist_clip.LogClip(warmup_steps=6, scope=scope, ratio=1.2, patience=1, post_max_norm=1.0)
        }
        for scope in ("tensor", "shard", "global")
    },
    "ZClip": lambda: {"policy": dist_clip.ZClip(warmup_steps=6)},
    "ZClip-tensor": lambda: {"policy": dist_clip.ZClip(warmup_steps=6, scope="tensor")},
    "ZClip-percentile": lambda: {"policy": dist_clip.ZClip(warmup_steps=6, mode="percentile", max_norm=None)},
    "overrides": lambda: {
        "policy": dist_clip.AdaGC(warmup_steps=6, gamma_init="median"),
        "overrides": {
            "embed.*": dist_clip.ZClip(warmup_steps=6),
            "blocks.0.*": dist_clip.AdaGC(warmup_steps=6, scope="global"),
        },
        "exclude": ["head.*"],
    },
}


def synthetic_grads(model: nn.Module, step: int) -> None:
    gen = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(model.parameters()):
        level = torch.rand((), generator=gen).item() * (100 if (step + i) % 9 == 0 else 1)
        p.grad = level * torch.randn(p.shape, generator=gen)
    if step % 4 == 1:
        next(model.parameters()).grad = None


@pytest.mark.parametrize("saved_at", [0, 3, 6, 7])  # the warm-up ends at 6
@pytest.mark.parametrize("case", STATEFUL)
def test_a_round_trip_continues_bitwise(case: str, saved_at: int) -> None:
    make = STATEFUL[case]
    model, resumed = net(), net()
    straight = dist_clip.GradClipper(model, **make())
    for step in range(saved_at):
        synthetic_grads(model, step)
        straight.clip_()
    buffer = io.BytesIO()
    torch.save(straight.state_dict(), buffer)
    buffer.seek(0)
    second = dist_clip.GradClipper(resumed, **make())
    synthetic_grads(resumed, 77)  # what it saw before loading is forgotten
    second.clip_()
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_state(second.state_dict(), straight.state_dict())
    for step in range(saved_at, saved_at + 14):
        for m, c in ((model, straight), (resumed, second)):
            synthetic_grads(m, step)
            c.clip_()
        assert torch.equal(straight.last_report.scales, second.last_report.scales), f"step {step}"
        for (n, g), h in zip(named_grads(model).items(), named_grads(resumed).values(), strict=True):
            assert torch.equal(g, h), f"step {step}: {n}"
        assert_same_state(second.state_dict(), straight.state_dict(), f"state at step {step}")


def test_the_state_is_keyed_by_name_and_free_of_the_clipper() -> None:
    model = net()
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(warmup_steps=2))
    for step in range(4):
        synthetic_grads(model, step)
        clipper.clip_()
    state = clipper.state_dict()
    assert state["format_version"] == 2
    assert state["step"] == 4
    assert set(state["tensors"]) == set(fqns(model))
    for name, entry in state["tensors"].items():
        gamma = entry["gamma"]
        assert (gamma.dtype, gamma.dim(), gamma.device.type) == (torch.float32, 0, "cpu"), name
    kept = copy.deepcopy(state)
    synthetic_grads(model, 9)
    clipper.clip_()
    assert_same_state(state, kept)  # a clone: later steps do not reach it
    for entry in state["tensors"].values():
        entry["gamma"].fill_(123.0)  # and writing to it does not reach the clipper
    assert all(e["gamma"].item() != 123.0 for e in clipper.state_dict()["tensors"].values())


def test_a_loaded_state_is_copied() -> None:
    model = net()
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(warmup_steps=2))
    for step in range(4):
        synthetic_grads(model, step)
        clipper.clip_()
    state = clipper.state_dict()
    kept = copy.deepcopy(state)
    clipper.load_state_dict(state)
    synthetic_grads(model, 9)
    clipper.clip_()
    assert_same_state(state, kept)


def test_names_in_another_order_load() -> None:
    params = {n: nn.Parameter(torch.zeros(3)) for n in ("a", "b", "c")}
    first = dist_clip.GradClipper(list(params.items()), dist_clip.AdaGC(warmup_steps=1))
    for n, p in params.items():
        p.grad = torch.full((3,), {"a": 0.1, "b": 0.2, "c": 0.3}[n])
    first.clip_()
    second = dist_clip.GradClipper(list(reversed(params.items())), dist_clip.AdaGC(warmup_steps=1))
    second.load_state_dict(first.state_dict())
    for n in params:
        assert torch.equal(second.state_dict()["tensors"][n]["gamma"], first.state_dict()["tensors"][n]["gamma"])


def trained_state(policy: Any) -> dict[str, Any]:
    model = net()
    clipper = dist_clip.GradClipper(model, policy)
    for step in range(5):
        synthetic_grads(model, step)
        clipper.clip_()
    return clipper.state_dict()


def test_mismatched_names_are_an_error() -> None:
    state = trained_state(dist_clip.AdaGC(warmup_steps=2))
    larger = dist_clip.GradClipper(net(blocks=3), dist_clip.AdaGC(warmup_steps=2))
    before = larger.state_dict()
    with pytest.raises(ValueError, match=r"blocks\.2\."):
        larger.load_state_dict(state)
    assert_same_state(larger.state_dict(), before)  # refused as a whole
    smaller = dist_clip.GradClipper(net(blocks=1), dist_clip.AdaGC(warmup_steps=2))
    with pytest.raises(ValueError, match=r"blocks\.1\."):
        smaller.load_state_dict(state)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (dist_clip.AdaGC(warmup_steps=2), dist_clip.ZClip()),
        (dist_clip.ZClip(), dist_clip.AdaGC(warmup_steps=2)),
        (dist_clip.GlobalNorm(), dist_clip.AdaGC(warmup_steps=2)),
        (dist_clip.AdaGC(warmup_steps=2, scope="global"), dist_clip.AdaGC(warmup_steps=2)),
    ],
    ids=str,
)
def test_another_policy_is_an_error(saved: Any, loaded: Any) -> None:
    clipper = dist_clip.GradClipper(net(), loaded)
    before = clipper.state_dict()
    with pytest.raises(ValueError, match=r"(?i)AdaGC|ZClip|GlobalNorm|policy|policies"):
        clipper.load_state_dict(trained_state(saved))
    assert_same_state(clipper.state_dict(), before)


@pytest.mark.parametrize("damage", ["format_version", "step", "tensors"])
def test_a_damaged_state_is_an_error(damage: str) -> None:
    clipper = dist_clip.GradClipper(net(), dist_clip.AdaGC(warmup_steps=2))
    state = trained_state(dist_clip.AdaGC(warmup_steps=2))
    del state[damage]
    with pytest.raises((ValueError, KeyError), match=damage):
        clipper.load_state_dict(state)


def test_a_state_of_another_version_is_an_error() -> None:
    clipper = dist_clip.GradClipper(net(), dist_clip.AdaGC(warmup_steps=2))
    with pytest.raises(ValueError, match="99"):
        clipper.load_state_dict({**trained_state(dist_clip.AdaGC(warmup_steps=2)), "format_version": 99})


# ---- explain ---------------------------------------------------------------------------------------------------------


@pytest.mark.report(
    "NVIDIA/Megatron-LM#2263",
    "NVIDIA/Megatron-LM#785",
    situation="over which groups of ranks a norm is added up, is hard to tell",
    right="`explain()` says it for each tensor",
)
def test_explain_is_a_readable_table() -> None:
    model = net()
    clipper = dist_clip.GradClipper(
        model, dist_clip.AdaGC(warmup_steps=2), overrides={"embed.*": dist_clip.GlobalNorm(0.25)}, exclude=["head.*"]
    )
    text = clipper.explain()
    assert isinstance(text, str)
    lines = text.splitlines()
    for name, p in model.named_parameters():
        if name.startswith("head."):
            continue
        rows = [line for line in lines if name in line]
        assert rows, f"{name} is not in the table:\n{text}"
        numbers = str(list(p.shape))[1:-1]
        assert any(numbers in row or numbers.replace(", ", "x") in row for row in rows), rows
    assert "AdaGC" in text
    assert "GlobalNorm" in text
    assert "norm group" in text.lower()
    assert max(map(len, lines)) < 240
    assert "collective" in text.lower()


def test_explain_says_how_long_the_warm_up_is() -> None:
    param = nn.Parameter(torch.zeros(2))
    clipper = dist_clip.GradClipper([("w", param)], dist_clip.LogClip(warmup_steps=2))
    for clips in range(2):
        assert f"'*': the rule begins after a warm-up of 2 steps; {clips} clips so far" in clipper.explain()
        param.grad = torch.ones(2)
        clipper.clip_()
    assert "warm-up" not in clipper.explain()


def test_explain_needs_no_gradients_and_changes_nothing() -> None:
    clipper = dist_clip.GradClipper(net(), dist_clip.ZClip())
    before = clipper.state_dict()
    assert clipper.explain() == clipper.explain()
    assert_same_state(clipper.state_dict(), before)


# ---- what is worked out only once --------------------------------------------------------------------------------------


def test_the_reports_global_norms_are_computed_once() -> None:
    model = nn.Linear(3, 2)
    set_grads(model, 1.0)
    report = dist_clip.GradClipper(model, dist_clip.LogClip()).clip_()
    assert report.global_norm is not None
    with Operators() as operators:
        assert report.global_norm is report.global_norm
        assert report.clipped_global_norm is report.clipped_global_norm
    assert operators.seen == []


@pytest.mark.parametrize("kwargs", [{"nonfinite": "skip"}, {"guard": dist_clip.SkipAbove(1e6)}], ids=str)
def test_a_warm_up_ends_where_steps_may_be_skipped(kwargs: Any) -> None:
    """AdaGC's median sorts its record on each step of the warm-up, and on none after it. A skipped step does not count."""
    model = nn.Linear(3, 2)
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(warmup_steps=3, gamma_init="median"), **kwargs)
    sorts = []
    for value in (1.0, 2.0, math.inf if "nonfinite" in kwargs else 1e8, 3.0, 1.0, 1.0):
        set_grads(model, value)
        with Operators() as operators:
            clipper.clip_()
        sorts.append(sum("sort" in name for name in operators.seen))
    assert sorts == [1, 1, 1, 1, 0, 0]
    assert "history" not in clipper.memory.groups[0].state
    assert clipper.steps == 5


def test_on_a_device_the_host_learns_of_the_end_of_a_warm_up_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA, where the copy to the host is a stand-in: made every 32 steps and read 32 steps later, on every rank
    at the same step, however fast its device is. Ranks that drop a record at different steps would look out of step."""
    made: list[int] = []

    class Copy:
        def __init__(self, t: torch.Tensor) -> None:
            assert t.device.type == "cuda"
            made.append(clipper.memory.calls)
            self.value = clipper.memory.calls

        def read(self) -> int:
            assert clipper.memory.calls == self.value + 32, "long done: nobody waits"
            return self.value

    monkeypatch.setattr("dist_clip.memory.memory.HostCopy", Copy)
    with fake_cuda(strict=False):
        param = nn.Parameter(torch.empty(4, device="cuda"))
        param.grad = torch.empty(4, device="cuda")
        policy = dist_clip.AdaGC(warmup_steps=30, gamma_init="median")
        clipper = dist_clip.GradClipper([("p", param)], policy, nonfinite="skip", kernels="torch")
        known, kept = [], []
        for _ in range(70):
            clipper.clip_()
            known.append(clipper.memory.steps_done)
            kept.append("history" in clipper.memory.groups[0].state)
    assert known == [0] * 63 + [32] * 7
    assert kept == [True] * 64 + [False] * 6
    assert made == [32, 64]


def test_a_captured_graph_computes_its_reports_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replays compute only what was captured, so the norms cannot wait for a reader. Capturing is a stand-in here."""
    monkeypatch.setattr("dist_clip.step.global_norms.capturing", lambda device: True)
    model = nn.Linear(3, 2)
    set_grads(model, 1.0)
    report = dist_clip.GradClipper(model, dist_clip.LogClip()).clip_()
    with Operators() as operators:
        assert report.global_norm is not None
    assert operators.seen == []
