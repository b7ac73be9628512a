"""No host sync on a step: shown with fake CUDA tensors, which need no GPU.

Under FakeTensorMode a tensor "on cuda" has no data, so whatever would read it back (.item(), bool(), tolist(),
unique(), a boolean mask) raises. Two kinds of sync get past that: a copy from device to host, and a host tensor made
and copied to the device (from pageable memory, which waits for the stream). `Copies` sees both as operators that cross
devices. The tests at the end show that each kind of sync is caught.

What `GradClipper` does is shown with the torch kernels and with Triton's. Of these the host's part runs: which tensors go
where, tables, buffers, arguments. A fake tensor has no address and no kernel can run on it, so addresses are made up, and
launches and the copies of addresses (from pinned memory, which a CPU build of torch lacks) are recorded in their stead.
That neither waits for the device is for test_triton_kernels.py to show on a GPU.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dist_clip
from dist_clip.kernels import tables
from dist_clip.layouts.dtensor import MeshGroups
from dist_clip.reduction import pipeline, plan

WARMUP = 3
READ_BACK = (DataDependentOutputException, DynamicOutputShapeException)


class HostSync(AssertionError):
    pass


class Copies(TorchDispatchMode):
    """Raises at any operator that takes a tensor from one device to another."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            if len(devices) > 1:
                raise HostSync(f"{func} between {sorted(devices)}")
        return out


@contextmanager
def fake_cuda(strict: bool = True) -> Iterator[None]:
    with torch.no_grad(), FakeTensorMode():
        if strict:
            with Copies():
                yield
        else:
            yield


class Recorded:
    """What the host's part of the Triton kernels did."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.sent = 0


def record_triton(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Triton for fake CUDA tensors: everything but what needs memory or a device. Addresses are other ones every time."""
    from dist_clip.kernels.triton_kernels import TritonKernels

    recorded = Recorded()
    addresses = itertools.count(1)

    def launch(self: Any, kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
        assert programs > 0
        assert all(arg.device == device for arg in args if isinstance(arg, Tensor))
        recorded.launches.append(kernel.__name__)

    def send(self: Any, buffer: Tensor, device: torch.device) -> Tensor:
        recorded.sent += 1
        return torch.empty(buffer.shape, dtype=buffer.dtype, device=device)

    monkeypatch.setattr(TritonKernels, "_launch", launch)
    monkeypatch.setattr(tables.Tables, "_served", (FakeTensor, nn.Parameter))
    monkeypatch.setattr(tables.Tables, "_addresses", lambda self, shards: tuple(next(addresses) for _ in shards))
    monkeypatch.setattr(tables.Tables, "_stream", lambda self, device: (0, False))
    monkeypatch.setattr(tables.Tables, "_pinned", lambda self, values, device: torch.tensor(values, device="cpu"))
    monkeypatch.setattr(tables.Tables, "_send", send)
    return recorded


@pytest.fixture(params=["torch", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded | None]:
    """The kernels that the clippers of a test choose; with Triton's, what they did."""
    monkeypatch.setenv("DIST_CLIP_KERNELS", request.param)
    if request.param == "torch":
        yield None
        return
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    recorded = record_triton(monkeypatch)
    yield recorded
    assert {"chunk_squares", "add_chunks", "scale_chunks"} <= set(recorded.launches)


SHAPES = {
    "embed": (64, 16),
    "proj": (16, 16),
    "norm": (16,),
    "scalar": (),
    "empty": (0, 4),
    "absent": (8,),
    "half": (32, 16),
}


def fake_params() -> dict[str, nn.Parameter]:
    dtypes = {"half": torch.bfloat16}
    return {n: nn.Parameter(torch.empty(s, device="cuda", dtype=dtypes.get(n))) for n, s in SHAPES.items()}


def set_grads(params: dict[str, nn.Parameter]) -> None:
    for name, p in params.items():
        p.grad = None if name == "absent" else torch.empty(p.shape, device="cuda", dtype=p.dtype)
    params["proj"].grad = torch.empty(16, 16, device="cuda").t()


POLICIES: dict[str, Callable[[], Any]] = {
    "GlobalNorm": lambda: dist_clip.GlobalNorm(),
    **{
        f"AdaGC-{scope}-{init}": lambda scope=scope, init=init: dist_clip.AdaGC(  # type: ignore[misc]
            warmup_steps=WARMUP, scope=scope, gamma_init=init
        )
        # What the record of a warm-up comes to is worked out alike at every scope.
        for scope, inits in (("tensor", ("min", "median", "mean", "last")), ("shard", ("min",)), ("global", ("min",)))
        for init in inits
    },
    **{
        f"LogClip-{scope}": lambda scope=scope: dist_clip.LogClip(  # type: ignore[misc]
            warmup_steps=WARMUP, scope=scope, post_max_norm=1.0
        )
        for scope in ("tensor", "shard", "global")
    },
    "ZClip": lambda: dist_clip.ZClip(warmup_steps=WARMUP),
    "ZClip-tensor": lambda: dist_clip.ZClip(warmup_steps=WARMUP, scope="tensor"),
    "ZClip-mean": lambda: dist_clip.ZClip(warmup_steps=WARMUP, clip_option="mean"),
    "ZClip-percentile": lambda: dist_clip.ZClip(warmup_steps=WARMUP, mode="percentile", max_norm=None),
    "ZClip-skip": lambda: dist_clip.ZClip(warmup_steps=WARMUP, skip_update_on_spike=True),
    "AutoClip": lambda: dist_clip.AutoClip(),
    "AGC": lambda: dist_clip.AGC(),
    "MeasureOnly": lambda: dist_clip.MeasureOnly(guarded=False),
}


# "zero" launches every kernel that there is.
KERNELS_AND_NONFINITE = [("torch", "propagate"), ("torch", "zero"), ("torch", "skip"), ("triton", "zero")]


def steps_without_sync(
    clipper: dist_clip.GradClipper, params: dict[str, nn.Parameter], steps: int = WARMUP + 4
) -> None:
    """The first step may put the state on the device; no step may read back, and none after it may copy at all."""
    for step in range(steps):
        set_grads(params)
        with Copies() if step > 0 else torch.no_grad():
            report = clipper.clip_()
            assert report.num_grads == len(params) - 1
            assert not report.empty
            for device_side in (report.tensor_norms, report.scales, report.clipped_fraction, report.nonfinite):
                assert device_side.device.type == "cuda"
            assert report.global_norm is not None
            assert report.global_norm.device.type == "cuda"
            assert report.clipped_global_norm is not None
            assert report.clipped_global_norm.device.type == "cuda"


@pytest.mark.parametrize(("kernels", "nonfinite"), KERNELS_AND_NONFINITE, indirect=["kernels"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.usefixtures("kernels")
def test_a_step_has_no_host_sync(policy: str, nonfinite: Any) -> None:
    with fake_cuda(strict=False):
        params = fake_params()
        clipper = dist_clip.GradClipper(list(params.items()), POLICIES[policy](), nonfinite=nonfinite)
        steps_without_sync(clipper, params)


@pytest.mark.parametrize(("kernels", "nonfinite"), [("torch", "zero"), ("triton", "zero")], indirect=["kernels"])
@pytest.mark.parametrize("policy", ["AdaGC-tensor-median", "LogClip-early", "AGC"])
@pytest.mark.usefixtures("kernels")
def test_clipping_early_has_no_host_sync(policy: str, nonfinite: Any) -> None:
    """One tensor, several, measured in a first backward or not, and the clip_() after them."""
    made = POLICIES.get(policy, lambda: dist_clip.LogClip(warmup_steps=WARMUP))
    with fake_cuda(strict=False):
        params = fake_params()
        present = [param for name, param in params.items() if name != "absent"]
        clipper = dist_clip.GradClipper(list(params.items()), made(), nonfinite=nonfinite)
        for step in range(WARMUP + 4):
            with Copies() if step > 0 else torch.no_grad():
                if not clipper.can_clip_early:
                    set_grads(params)
                    clipper.measure_early_(present)
                set_grads(params)
                clipper.clip_early_(present[:1])
                clipper.clip_early_(present[1:4])
                present[1].grad = None
                assert clipper.clip_().num_grads == len(present)


GUARDS: dict[str, Callable[[], Any]] = {
    "SkipAbove": lambda: dist_clip.SkipAbove(1.0, max_skips_in_a_row=2),
    "SkipAbove-raise": lambda: dist_clip.SkipAbove(1.0, max_skips_in_a_row=2, when_stuck="raise"),
    "SkipStep": lambda: dist_clip.SkipStep(window=4),
    "SkipStep-norm": lambda: dist_clip.SkipStep(window=4, loss=False),
    "DropNorm": dist_clip.DropNorm,
    "DropNorm-std": lambda: dist_clip.DropNorm("std", min_steps=2),
    "MedianGuard": lambda: dist_clip.MedianGuard(warmup_steps=2, window=3),
    "all": lambda: [dist_clip.MedianGuard(), dist_clip.SkipStep(), dist_clip.DropNorm()],
}


@pytest.mark.parametrize("kernels", ["torch"], indirect=True)
@pytest.mark.parametrize("policy", ["GlobalNorm", "LogClip-tensor", "LogClip-shard", "MeasureOnly"])
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.usefixtures("kernels")
def test_guards_have_no_host_sync(guard: str, policy: str) -> None:
    """Nor has the loss, which is on the device."""
    with fake_cuda(strict=False):
        params = fake_params()
        clipper = dist_clip.GradClipper(list(params.items()), POLICIES[policy](), guard=GUARDS[guard]())
        loss = torch.empty((), device="cuda")
        for step in range(6):
            set_grads(params)
            with Copies() if step > 0 else torch.no_grad():
                clipper.observe_loss(loss)
                report = clipper.clip_(loss if step % 2 else None)
                assert report.skip.device.type == "cuda"


class NoCopy:
    """A copy to the host that never arrives."""

    made: ClassVar[list[torch.Size]] = []
    arrived = False

    def __init__(self, tensor: Tensor) -> None:
        self.made.append(tensor.shape)


@pytest.mark.parametrize("kernels", ["torch"], indirect=True)
@pytest.mark.parametrize(
    "policy", ["GlobalNorm", "AdaGC-tensor-median", "LogClip-tensor", "LogClip-shard", "ZClip-tensor"]
)
@pytest.mark.usefixtures("kernels")
def test_a_monitor_copies_once_in_k_steps_and_waits_for_nothing(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_clip.monitor.monitor.HostCopy", NoCopy)
    monkeypatch.setattr(NoCopy, "made", made := [])
    with fake_cuda(strict=False):
        params = fake_params()
        guard = dist_clip.SkipAbove(1.0)
        clipper = dist_clip.GradClipper(list(params.items()), POLICIES[policy](), guard=guard)
        monitor = dist_clip.ClipMonitor(clipper, [], every=4, tensors_every=2)
        loss = torch.empty((), device="cuda")
        copies = []
        for step in range(1, 13):
            set_grads(params)
            with Copies() if step > 1 else torch.no_grad():
                clipper.clip_()
                monitor.step(step, loss if step % 2 else 2.0, scalars={"lr": 0.1, "other": loss})
            copies.append(len(made))
        assert copies == [0] * 3 + [1] * 4 + [2] * 4 + [3]


@pytest.mark.parametrize("policy", ["GlobalNorm", "AdaGC-tensor-median", "ZClip"])
@pytest.mark.usefixtures("kernels")
def test_groups_and_exclude_have_no_host_sync(policy: str) -> None:
    with fake_cuda(strict=False):
        params = fake_params()
        clipper = dist_clip.GradClipper(
            list(params.items()),
            POLICIES[policy](),
            overrides={"proj": dist_clip.AdaGC(warmup_steps=2), "n*": dist_clip.ZClip(warmup_steps=2)},
            exclude=["scalar"],
        )
        for step in range(8):
            set_grads(params)
            with Copies() if step > 0 else torch.no_grad():
                clipper.clip_()


@pytest.mark.usefixtures("kernels")
def test_changing_gradients_have_no_host_sync() -> None:
    """Which tensors have a gradient differs from step to step; the host knows that without asking the device."""
    with fake_cuda(strict=False):
        params = fake_params()
        clipper = dist_clip.GradClipper(list(params.items()), dist_clip.AdaGC(warmup_steps=WARMUP))
        names = list(params)
        set_grads(params)
        clipper.clip_()
        for step in range(len(names) + 3):
            set_grads(params)
            params[names[step % len(names)]].grad = None
            report = (
                clipper.clip_()
            )  # an index for a new set of tensors may be copied to the device: reading back may not be
            assert report.num_grads < len(names)
        for p in params.values():
            p.grad = None
        assert clipper.clip_().empty


@pytest.mark.parametrize("policy", ["GlobalNorm", "AdaGC-tensor-min", "ZClip"])
@pytest.mark.usefixtures("kernels")
def test_attached_to_an_optimizer(policy: str) -> None:
    with fake_cuda(strict=False):
        params = fake_params()
        clipper = dist_clip.GradClipper(list(params.items()), POLICIES[policy]())
        optimizer = torch.optim.SGD(params.values(), lr=0.1, momentum=0.9, foreach=True)
        clipper.attach(optimizer)
        for step in range(WARMUP + 3):
            set_grads(params)
            with Copies() if step > 0 else torch.no_grad():
                optimizer.step()


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_clip_grad_norm(norm_type: float, foreach: bool | None) -> None:
    with fake_cuda(strict=False):
        params = fake_params()
        del params["empty"]  # torch's own infinity norm of an empty tensor is an error
        for _ in range(2):
            set_grads(params)
            with Copies():
                total = dist_clip.clip_grad_norm_(params.values(), 1.0, norm_type, foreach=foreach)
            assert total.device.type == "cuda"
            assert total.dim() == 0


# ---- sharded over the ranks of a fake process group ------------------------------------------------------------------

WORLD = 8


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is rank 0 of 8, whose collectives return at once. Construction, which may sync, is made to work."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    replica_ranks = MeshGroups.replica_ranks

    def real_replica_ranks(self: MeshGroups, *args: Any) -> frozenset[int]:
        with unset_fake_temporarily():  # a mesh's own tensor of ranks is no fake
            return replica_ranks(self, *args)

    def echo(everyone: list[Any], mine: Any, group: Any = None) -> None:
        everyone[:] = [mine] * len(everyone)

    monkeypatch.setattr(MeshGroups, "replica_ranks", real_replica_ranks)
    monkeypatch.setattr(dist, "all_gather_object", echo)
    monkeypatch.setattr("dist_clip.construction.draft.agree", lambda mine, *groups: {0: mine})
    monkeypatch.setattr("dist_clip.construction.draft.check_coverage", lambda *args: None)
    for name, answer in (("current_device", 0), ("device_count", 1), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    yield
    dist.destroy_process_group()


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return DeviceMesh("cuda", torch.arange(WORLD).view(shape), mesh_dim_names=names)


def sharded(shape: tuple[int, ...], mesh: DeviceMesh, placements: list[Any]) -> DTensor:
    local = list(shape)
    for size, placement in zip(mesh.shape, placements, strict=True):
        if placement.is_shard():
            local[placement.dim] //= size
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        torch.empty(local, device="cuda"), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def sharded_specs(layout: str) -> tuple[dict[str, tuple[tuple[int, ...], DeviceMesh | None, list[Any]]], Any]:
    """Name -> shape, mesh and placements; and the pipeline group."""
    line = mesh_of((8,), ("fsdp",))
    grid = mesh_of((4, 2), ("outer", "inner"))
    whole, halves = (16, 8), (16,)
    if layout == "fsdp":
        return {"w": (whole, line, [Shard(0)]), "b": (halves, line, [Shard(0)])}, None
    if layout == "hsdp":
        return {"w": (whole, grid, [Replicate(), Shard(0)]), "b": (halves, grid, [Replicate(), Shard(0)])}, None
    if layout == "tp":
        return {"w": (whole, line, [Shard(1)]), "norm": (halves, line, [Replicate()]), "b": (halves, None, [])}, None
    if layout == "tp-fsdp":
        return {"w": (whole, grid, [Shard(0), Shard(1)]), "b": (halves, grid, [Shard(0), Replicate()])}, None
    if layout == "ep":
        return {"w": (whole, line, [Shard(0)]), "experts": ((2, 16, 4), grid, [Shard(1), Shard(0)])}, None
    if layout == "pp":
        return {"w": (whole, None, []), "b": (halves, None, [])}, grid.get_group("inner")
    assert layout == "pp-fsdp"
    return {"w": (whole, grid["outer"], [Shard(0)]), "b": (halves, grid["outer"], [Shard(0)])}, grid.get_group("inner")


SHARDED_POLICIES = [
    "GlobalNorm",
    "AdaGC-tensor-median",
    "AdaGC-shard-min",
    "AdaGC-global-min",
    "LogClip-tensor",
    "LogClip-shard",
    "ZClip",
]
SHARDED_LAYOUTS = ["fsdp", "hsdp", "tp", "tp-fsdp", "ep", "pp", "pp-fsdp"]


def sharded_cases() -> Iterator[Any]:
    """Each policy under each layout: once plainly, and once with other kernels or another mode, by turns."""
    first, *others = KERNELS_AND_NONFINITE
    for row, layout in enumerate(SHARDED_LAYOUTS):
        for column, policy in enumerate(SHARDED_POLICIES):
            for kernels, nonfinite in (first, others[(row + column) % len(others)]):
                yield pytest.param(layout, policy, kernels, nonfinite, id=f"{layout}-{policy}-{kernels}-{nonfinite}")


@pytest.mark.parametrize(("layout", "policy", "kernels", "nonfinite"), [*sharded_cases()], indirect=["kernels"])
@pytest.mark.usefixtures("ranks", "kernels")
def test_a_sharded_step_has_no_host_sync(layout: str, policy: str, nonfinite: Any) -> None:
    sharded_steps(layout, policy, nonfinite)


def make_sharded(specs: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: torch.empty(shape, device="cuda") if mesh is None else sharded(shape, mesh, placements)
        for name, (shape, mesh, placements) in specs.items()
    }


def set_sharded_grads(layout: str, specs: dict[str, Any], params: dict[str, Tensor]) -> None:
    for name, grad in make_sharded(specs).items():
        if layout == "tp" and name == "norm":  # as SequenceParallel leaves it
            grad = DTensor.from_local(grad.to_local(), grad.device_mesh, [Partial()], run_check=False)
        params[name].grad = grad


def sharded_steps(layout: str, policy: str, nonfinite: Any) -> None:
    specs, pp_group = sharded_specs(layout)
    with fake_cuda(strict=False):
        # Not nn.Parameter: of a DTensor on a fake CUDA device it aborts the process.
        params = {name: tensor.requires_grad_() for name, tensor in make_sharded(specs).items()}
        clipper = dist_clip.GradClipper(
            list(params.items()),
            POLICIES[policy](),
            pp_group=pp_group,
            nonfinite=nonfinite,
            check_replicas=False,  # the clips 1, 2, 4, ... sync, which its docstring says
        )
        for step in range(WARMUP + 3):
            set_sharded_grads(layout, specs, params)
            with Copies() if step > 0 else torch.no_grad():
                report = clipper.clip_()
            assert report.num_grads == len(params)
            assert report.scales.device.type == report.tensor_norms.device.type == "cuda"
            assert not any(
                p.is_partial() for g in params.values() if isinstance(g.grad, DTensor) for p in g.grad.placements
            )


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "tp", "tp-fsdp", "ep", "pp", "pp-fsdp"])
@pytest.mark.usefixtures("ranks")
def test_sharded_clip_grad_norm(layout: str, norm_type: float) -> None:
    """The first call for a list of parameters may look around; later ones may not."""
    specs, pp_group = sharded_specs(layout)
    with fake_cuda(strict=False):
        params = {name: tensor.requires_grad_() for name, tensor in make_sharded(specs).items()}
        for call in range(3):
            set_sharded_grads(layout, specs, params)
            with Copies() if call > 0 else torch.no_grad():
                total = dist_clip.clip_grad_norm_(params.values(), 1.0, norm_type, pp_group=pp_group)
            assert total.device.type == "cuda"


@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "tp-fsdp", "ep", "pp-fsdp"])
@pytest.mark.usefixtures("ranks")
def test_a_sync_in_the_reduction_is_caught(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    all_reduce, gather = dist.all_reduce, plan.all_gather

    def nosy(collective: Callable[..., Any], buffer: Tensor, *args: Any, **kwargs: Any) -> Any:
        buffer.sum().item()
        return collective(buffer, *args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: nosy(all_reduce, *args, **kwargs))
    for module in (plan, pipeline):
        monkeypatch.setattr(module, "all_gather", lambda *args, **kwargs: nosy(gather, *args, **kwargs))
    with pytest.raises(READ_BACK):
        sharded_steps(layout, "AdaGC-tensor-median", "propagate")


# ---- the method catches what it should ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 1),
        lambda x: x.tolist(),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
    ],
    ids=["item", "bool", "tolist", "unique", "masked_select", "equal"],
)
def test_reading_back_is_caught(sync: Callable[[Tensor], Any]) -> None:
    with fake_cuda(strict=False), pytest.raises(READ_BACK):
        sync(torch.ones(3, device="cuda"))


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.tensor([1.0, 2.0], device="cuda"),
        lambda x: torch.as_tensor(0.5, device="cuda"),
    ],
    ids=["cpu", "to", "tensor of a list", "as_tensor"],
)
def test_copies_are_caught(sync: Callable[[Tensor], Any]) -> None:
    with fake_cuda(), pytest.raises(HostSync):
        sync(torch.ones(3, device="cuda"))


def test_a_sync_in_the_triton_kernels_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales read back, or addresses sent the slow way: planted in the host's part."""
    pytest.importorskip("triton")
    monkeypatch.setenv("DIST_CLIP_KERNELS", "triton")
    send = tables.Tables._send

    def nosy(self: Any, kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
        [arg.sum().item() for arg in args if isinstance(arg, Tensor)]

    for method, planted, error in (("_launch", nosy, READ_BACK), ("_send", send, HostSync)):
        with monkeypatch.context() as patch, fake_cuda(strict=False):
            record_triton(patch)
            owner = tables.Tables if method == "_send" else dist_clip.kernels.triton_kernels.TritonKernels
            patch.setattr(owner, method, planted)
            params = fake_params()
            clipper = dist_clip.GradClipper(list(params.items()), dist_clip.GlobalNorm())
            with pytest.raises(error):
                steps_without_sync(clipper, params)


def test_what_the_triton_kernels_send_and_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with gradients elsewhere: one copy of addresses, and two launches for each of two dtypes and one more."""
    pytest.importorskip("triton")
    recorded = record_triton(monkeypatch)
    with fake_cuda(strict=False):
        params = fake_params()
        clipper = dist_clip.GradClipper(list(params.items()), dist_clip.GlobalNorm(), kernels="triton")
        sent = []
        for _ in range(4):
            set_grads(params)
            recorded.launches.clear()
            clipper.clip_()
            sent.append(recorded.sent)
            assert recorded.launches == ["chunk_squares"] * 2 + ["add_chunks", "decide"] + ["scale_chunks"] * 2
    assert [b - a for a, b in itertools.pairwise(sent)] == [1, 1, 1]


class Operators(TorchDispatchMode):
    """Records the operators that launch something: all but views and memory that is not filled."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and not func.is_view and func is not torch.ops.aten.empty.memory_format:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("policy", "tensors", "guard"),
    [("LogClip-tensor", 2000, False), ("GlobalNorm", 148, True)]
    + [(p, 148, False) for p in ("GlobalNorm", "AdaGC-tensor-median", "LogClip-tensor", "ZClip", "ZClip-tensor")],
)
def test_a_step_is_four_launches(policy: str, tensors: int, guard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a warm-up, of gradients of one dtype: four kernels of ours, none of torch's, and one copy to the device.

    `MedianGuard` is one kernel more.
    """
    pytest.importorskip("triton")
    recorded = record_triton(monkeypatch)
    with fake_cuda(strict=False):
        params = [(f"p{i}", nn.Parameter(torch.empty(4, device="cuda"))) for i in range(tensors)]
        clipper = dist_clip.GradClipper(
            params,
            POLICIES[policy](),
            guard=dist_clip.MedianGuard() if guard else None,
            kernels="triton",
            check_replicas=False,
        )
        for step in range(WARMUP + 4):
            for _, param in params:
                param.grad = torch.empty(4, device="cuda")
            recorded.launches.clear()
            sent, operators = recorded.sent, Operators()
            with operators:
                report = clipper.clip_()
            if step > WARMUP:
                guards = ["median_guard"] if guard else []
                assert recorded.launches == ["chunk_squares", "add_chunks", *guards, "decide", "scale_chunks"]
                assert operators.seen == []
                assert recorded.sent - sent == 1
    for value, dtype in (
        (report.scales, torch.float32),
        (report.tensor_norms, torch.float32),
        (report.skip, torch.bool),
    ):
        assert value.dtype == dtype
    assert report.global_norm is not None


def test_a_policy_that_syncs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.where with a synced condition, planted where every step passes."""
    where = torch.where

    def nosy(condition: Tensor, *args: Any) -> Tensor:
        condition.any().item()
        return where(condition, *args)

    with fake_cuda(strict=False):
        params = fake_params()
        clipper = dist_clip.GradClipper(list(params.items()), dist_clip.AdaGC(warmup_steps=WARMUP))
        steps_without_sync(clipper, params)
        monkeypatch.setattr(torch, "where", nosy)
        with pytest.raises(READ_BACK):
            steps_without_sync(clipper, params)


def test_what_may_sync_does() -> None:
    """nonfinite="raise" and error_if_nonfinite must read a flag back: if these pass unnoticed, the method is blind."""
    with fake_cuda(strict=False):
        params = fake_params()
        set_grads(params)
        clipper = dist_clip.GradClipper(list(params.items()), dist_clip.GlobalNorm(), nonfinite="raise")
        with pytest.raises(READ_BACK):
            clipper.clip_()
        with pytest.raises(READ_BACK):
            dist_clip.clip_grad_norm_(params.values(), 1.0, error_if_nonfinite=True)
