"""clip_grad_norm_ is torch's own wherever torch's works: norm types, foreach, what may be passed, what comes back.

Tolerance 1e-6 (fp32 sums in another order) for the norm, 2e-6 for gradients; bf16 and fp16 gradients, which torch
scales by a rounded scale, are compared with float64 instead.
"""

from __future__ import annotations

import gc
import inspect
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_clip
from dist_clip import functional
from dist_clip.kernels import TORCH, Kernels

SHAPES = [(17, 5), (3,), (), (2, 3, 4), (1,)]
NORM_TYPES = [1.0, 2.0, 3.0, math.inf]


def params(scale: float = 1.0, dtype: torch.dtype = torch.float32, missing: bool = False) -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(3)
    made = []
    for shape in SHAPES:
        p = nn.Parameter(torch.zeros(shape, dtype=dtype))
        p.grad = (torch.randn(shape, generator=gen) * scale).to(dtype)
        made.append(p)
    if missing:
        made[1].grad = None
    return made


def compare(ours: Tensor, theirs: Tensor, mine: list[nn.Parameter], twins: list[nn.Parameter]) -> None:
    assert type(ours) is Tensor
    assert ours.dim() == 0
    assert not ours.requires_grad
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0, equal_nan=True)
    for p, q in zip(mine, twins, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-6, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("missing", [False, True], ids=["", "missing"])
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e4, math.inf])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_equals_torch(norm_type: float, max_norm: float, foreach: bool | None, missing: bool) -> None:
    for scale in (1.0, 1e-3, 1e3, 0.0):
        mine, twins = params(scale, missing=missing), params(scale, missing=missing)
        ours = dist_clip.clip_grad_norm_(mine, max_norm, norm_type, foreach=foreach)
        theirs = torch.nn.utils.clip_grad_norm_(twins, max_norm, norm_type, foreach=foreach)
        compare(ours, theirs, mine, twins)


@pytest.mark.parametrize("norm_type", ["inf", 2, 1, 3, "2"])
def test_norm_types_as_torch_takes_them(norm_type: Any) -> None:
    mine, twins = params(), params()
    compare(
        dist_clip.clip_grad_norm_(mine, 0.5, norm_type),
        torch.nn.utils.clip_grad_norm_(twins, 0.5, norm_type),
        mine,
        twins,
    )


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_gradients_propagate_as_in_torch(bad: float, norm_type: float) -> None:
    mine, twins = params(), params()
    for p in (mine[0], twins[0]):
        assert p.grad is not None
        p.grad[2, 1] = bad
    compare(
        dist_clip.clip_grad_norm_(mine, 0.5, norm_type),
        torch.nn.utils.clip_grad_norm_(twins, 0.5, norm_type),
        mine,
        twins,
    )


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_error_if_nonfinite(bad: float, norm_type: float) -> None:
    mine = params()
    assert mine[3].grad is not None
    mine[3].grad[0, 0, 0] = bad
    before = [p.grad.clone() for p in mine]  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"(?i)non-?finite"):
        dist_clip.clip_grad_norm_(mine, 0.5, norm_type, error_if_nonfinite=True)
    for p, g in zip(mine, before, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)


def test_error_if_nonfinite_with_finite_gradients() -> None:
    mine, twins = params(), params()
    compare(
        dist_clip.clip_grad_norm_(mine, 0.5, error_if_nonfinite=True),
        torch.nn.utils.clip_grad_norm_(twins, 0.5, error_if_nonfinite=True),
        mine,
        twins,
    )


def test_a_single_tensor() -> None:
    for norm_type in NORM_TYPES:
        mine, twins = params()[:1], params()[:1]
        compare(
            dist_clip.clip_grad_norm_(mine[0], 0.5, norm_type),
            torch.nn.utils.clip_grad_norm_(twins[0], 0.5, norm_type),
            mine,
            twins,
        )


def test_a_single_tensor_of_several_rows_is_one_tensor() -> None:
    """Iterating over it would give views without gradients."""
    p = nn.Parameter(torch.zeros(4, 4))
    p.grad = torch.ones(4, 4)
    assert dist_clip.clip_grad_norm_(p, 1.0).item() == pytest.approx(4.0)
    assert p.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    "container", [tuple, list, iter, lambda ps: (p for p in ps), lambda ps: dict(enumerate(ps)).values()]
)
@pytest.mark.report("pytorch/torchtitan#1258")
def test_any_iterable(container: Any) -> None:
    mine, twins = params(), params()
    compare(dist_clip.clip_grad_norm_(container(mine), 0.5), torch.nn.utils.clip_grad_norm_(twins, 0.5), mine, twins)


def test_module_parameters() -> None:
    mine, twins = nn.Linear(3, 4), nn.Linear(3, 4)
    twins.load_state_dict(mine.state_dict())
    x = torch.randn(5, 3)
    for m in (mine, twins):
        m(x).square().sum().backward()
    compare(
        dist_clip.clip_grad_norm_(mine.parameters(), 0.5),
        torch.nn.utils.clip_grad_norm_(twins.parameters(), 0.5),
        list(mine.parameters()),
        list(twins.parameters()),
    )


def test_an_empty_generator_warns_as_torch_does() -> None:
    with pytest.warns(UserWarning, match="empty generator") as theirs:
        torch.nn.utils.clip_grad_norm_((p for p in []), 1.0)
    with pytest.warns(UserWarning, match="empty generator") as ours:
        total = dist_clip.clip_grad_norm_((p for p in []), 1.0)
    assert total.item() == 0.0
    assert len(ours) == len(theirs) == 1
    assert ours[0].filename == __file__, "the warning should point at the caller"


@pytest.mark.report("pytorch/torchtitan#1258")
def test_an_exhausted_generator_warns() -> None:
    """The mistake the warning is for: the same generator used for the norm of the log line and for the clip."""
    model = nn.Linear(2, 2)
    generator = model.parameters()
    list(generator)
    with pytest.warns(UserWarning, match="empty generator"):
        dist_clip.clip_grad_norm_(generator, 1.0)


@pytest.mark.parametrize("nothing", [[], (), filter(None, []), {}.values()], ids=lambda n: type(n).__name__)
def test_nothing_to_clip_is_said_whatever_it_came_in(nothing: Any) -> None:
    """torch says so of generators alone."""
    with pytest.warns(UserWarning, match="no gradient clipping will occur"):
        total = dist_clip.clip_grad_norm_(nothing, 1.0)
    assert total.item() == 0.0
    assert total.dtype == torch.float32
    assert total.dim() == 0


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_no_gradients(norm_type: float) -> None:
    mine = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    total = dist_clip.clip_grad_norm_(mine, 1.0, norm_type)
    assert total.item() == 0.0
    assert total.dtype == torch.float32
    assert type(total) is Tensor
    assert all(p.grad is None for p in mine)
    assert dist_clip.clip_grad_norm_(mine, 1.0, norm_type, error_if_nonfinite=True).item() == 0.0


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_mixed_dtypes(norm_type: float, foreach: bool | None) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.bfloat16, torch.float32]
    mine = [nn.Parameter(torch.zeros(s, dtype=d)) for s, d in zip(SHAPES, dtypes, strict=True)]
    for p in mine:
        p.grad = torch.randn(p.shape).to(p.dtype)
    before = [p.grad.double() for p in mine]  # type: ignore[union-attr]
    want = torch.linalg.vector_norm(torch.cat([g.flatten() for g in before]), norm_type)
    total = dist_clip.clip_grad_norm_(mine, 0.5, norm_type, foreach=foreach)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(want.item(), rel=1e-6)
    for p, g in zip(mine, before, strict=True):
        assert p.grad is not None
        assert p.grad.dtype == p.dtype
        ulp = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[p.dtype]
        torch.testing.assert_close(p.grad.double(), g * (0.5 / (want + 1e-6)), rtol=ulp, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_low_precision_gives_an_fp32_norm(norm_type: float, dtype: torch.dtype) -> None:
    mine = params(dtype=dtype)
    want = torch.linalg.vector_norm(torch.cat([p.grad.double().flatten() for p in mine]), norm_type)  # type: ignore[union-attr]
    total = dist_clip.clip_grad_norm_(mine, 0.5, norm_type)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_fp64_equals_torch(norm_type: float) -> None:
    mine, twins = params(dtype=torch.float64), params(dtype=torch.float64)
    ours = dist_clip.clip_grad_norm_(mine, 0.5, norm_type)
    theirs = torch.nn.utils.clip_grad_norm_(twins, 0.5, norm_type)
    assert ours.dtype == theirs.dtype == torch.float64
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-13)
    for p, q in zip(mine, twins, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_squares_and_cubes_outside_the_range_of_fp32(size: float, norm_type: float) -> None:
    mine = params(size)
    want = torch.linalg.vector_norm(torch.cat([p.grad.double().flatten() for p in mine]), norm_type)  # type: ignore[union-attr]
    assert dist_clip.clip_grad_norm_(mine, 1e35, norm_type).item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_empty_tensors_have_no_norm(norm_type: float) -> None:
    """torch raises for the infinity norm of an empty tensor; a shard may be empty."""
    mine, twins = [*params(), nn.Parameter(torch.zeros(0, 3))], params()
    mine[-1].grad = torch.zeros(0, 3)
    ours = dist_clip.clip_grad_norm_(mine, 0.5, norm_type)
    compare(ours, torch.nn.utils.clip_grad_norm_(twins, 0.5, norm_type), mine[:-1], twins)


def test_gradients_stay_where_they_are() -> None:
    mine = params()
    where = [p.grad.data_ptr() for p in mine]  # type: ignore[union-attr]
    dist_clip.clip_grad_norm_(mine, 0.5)
    assert [p.grad.data_ptr() for p in mine] == where  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_under_autograd() -> None:
    """A call outside no_grad must not record the scaling, nor fail on a gradient that requires grad (create_graph=True)."""
    p = nn.Parameter(torch.ones(3))
    (p**2).sum().backward(create_graph=True)
    total = dist_clip.clip_grad_norm_([p], 1.0)
    assert not total.requires_grad
    assert p.grad is not None
    assert p.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
    p.grad = None


def test_the_same_tensor_twice_is_scaled_once() -> None:
    """torch counts and scales it twice; a tied weight that is passed under two names is one gradient."""
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    assert dist_clip.clip_grad_norm_([p, p], 1.0).item() == pytest.approx(2.0)
    assert p.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_the_signature_is_torchs() -> None:
    ours = list(inspect.signature(dist_clip.clip_grad_norm_).parameters.values())
    theirs = list(inspect.signature(torch.nn.utils.clip_grad_norm_).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    extra = {p.name: p for p in ours[len(theirs) :]}
    assert set(extra) == {"pp_group"}
    assert extra["pp_group"].kind is inspect.Parameter.KEYWORD_ONLY


def test_what_is_remembered_of_a_model_does_not_keep_it_alive() -> None:
    model = nn.Linear(3, 2)
    params = list(model.parameters())
    for p in params:
        p.grad = torch.ones_like(p)
    dist_clip.clip_grad_norm_(model.parameters(), 1.0)
    dist_clip.clip_grad_norm_(model.parameters(), 1.0)
    refs = [weakref.ref(p) for p in params]
    del model, params, p
    gc.collect()
    assert all(ref() is None for ref in refs)


def test_another_list_that_starts_with_the_same_parameter() -> None:
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    for p in (a, b, c):
        p.grad = torch.ones(2)
    assert dist_clip.clip_grad_norm_([a, b], 1e9).item() == pytest.approx(2.0)
    assert dist_clip.clip_grad_norm_([a, b, c], 1e9).item() == pytest.approx(math.sqrt(6))
    assert dist_clip.clip_grad_norm_([a, c], 1e9).item() == pytest.approx(2.0)


def test_a_model_that_moved_is_prepared_anew() -> None:
    """What is known of a list holds a device and its kernels. Moving a model changes no parameter object."""
    layout = functional.layout_of_parameters([("weight", nn.Parameter(torch.ones(2)))])
    before = functional._prepare(layout, 1, torch.device("cpu"))
    assert functional._prepare(layout, 1, torch.device("cpu")) is before
    after = functional._prepare(layout, 1, torch.device("meta"))
    assert (after.device, after is before) == (torch.device("meta"), False)


def test_kernels_are_chosen_once_for_a_list_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for GradClipper: by the environment, or the device; trying them costs too much for every call."""
    calls: list[str] = []

    def choose(wanted: object, device: torch.device) -> Kernels:
        calls.append(f"choose {wanted} {device}")
        spied = {name: getattr(TORCH, name) for name in ("power_sums", "scale_", "zero_where_")}
        return Kernels("spy", "a test", **{name: spy(name, run) for name, run in spied.items()})

    def spy(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return run(*args, **kwargs)

        return call

    monkeypatch.setattr(functional, "choose", choose)
    params = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    for _ in range(2):
        for param in params:
            param.grad = torch.ones(3)
        norm = dist_clip.clip_grad_norm_(params, 1.0)
        assert norm.item() == pytest.approx(6**0.5)
        assert params[0].grad.tolist() == pytest.approx([6**-0.5] * 3)
    assert calls == ["choose None cpu", *["power_sums", "scale_"] * 2]
