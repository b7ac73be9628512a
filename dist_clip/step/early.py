"""Tensors that are clipped before the step's `clip_`, inside backward, and what `clip_` must know of them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_clip.errors import LayoutError
from dist_clip.kernels import Kernels
from dist_clip.layouts.dtensor import wait
from dist_clip.layouts.gradient import usable
from dist_clip.layouts.layout import LogicalTensor
from dist_clip.memory import Memory, PolicyGroup
from dist_clip.memory.memory import UnderWay
from dist_clip.policies.base import StepInputs, is_nonfinite
from dist_clip.policies.trial import acts_on_each_alone
from dist_clip.reduction.grad_version import ClippedGradients
from dist_clip.step.fault import naming_what_fails
from dist_clip.step.nonfinite import NonFiniteMode


class EarlyClips:
    """Measures and clips single tensors while backward runs. It never communicates and never syncs the host.

    A policy that looks at each tensor alone gives a part of the tensors the same scales as all of them together. So only
    squared norms are remembered: `clip_` decides on all tensors once more, stores the states and makes the report, and
    scales those that were not clipped yet.

    Args:
        why_never: why nothing can be clipped early with the clipper's options; None if it can.
        known: ids of all parameters of the clipper's target, excluded ones included.
        averaged_later: whether other ranks may hold copies of plain tensors, whose gradients backward leaves as they are.
        communicates: whether `decide_all` would take a collective.
        decide_all: returns the scales of all tensors, float64 [n], from their squared norms.
        decide_few: returns the scales of some tensors of a policy group by its kernel, as `OneLaunch.scales_of` does.
        after_clip: knows the gradients that the last `clip_` left.

    Attributes:
        used: whether a gradient was ever measured or clipped early.
        lock: to be held in a call, because DDP's communication hooks end in threads of their own.
    """

    def __init__(
        self,
        memory: Memory,
        kernels: Kernels,
        nonfinite: NonFiniteMode,
        *,
        why_never: str | None,
        known: frozenset[int],
        averaged_later: bool,
        communicates: bool,
        decide_all: Callable[[Tensor], Tensor],
        decide_few: Callable[[int, Tensor, Tensor], Tensor | None],
        after_clip: ClippedGradients,
    ) -> None:
        self._memory, self._kernels, self._nonfinite = memory, kernels, nonfinite
        self._why_never, self._averaged_later = why_never, averaged_later
        self._communicates, self._after_clip = communicates, after_clip
        self._decide_all, self._decide_few = decide_all, decide_few
        self.used = False
        self.lock = threading.Lock()
        self._clipped = ClippedGradients()
        self._of: dict[int, list[int]] = {}  # the id of a parameter -> the numbers of its tensors
        for i, tensor in enumerate(memory.layout):
            if tensor.param is not None:
                self._of.setdefault(id(tensor.param), []).append(i)
        self._left_out = known - self._of.keys()
        n = len(memory.layout)
        self._place = [(0, 0)] * n  # the number of a tensor's policy group, and its position there
        for k, group in enumerate(memory.groups):
            for position, i in enumerate(group.indices):
                self._place[i] = (k, position)
        self._squares = torch.zeros(n, dtype=torch.float64, device=memory.device)
        self._weight_squares = torch.zeros_like(self._squares)
        self._remembered = torch.zeros(n, dtype=torch.bool, device=memory.device)
        self._numbers = torch.arange(n, device=memory.device).unbind()
        self._scales: Tensor | None = None

    # ------------------------------------------------------------------------------------------------ what can be done

    @property
    def possible(self) -> bool:
        """Whether `clip_` serves the next step, as far as it serves a tensor at all. No host sync."""
        if self._why_never is not None:
            return False
        if self._step.measured:
            return True
        return bool(self._served) and not any(self._needs_all(k) for k in self._served)

    @property
    def _step(self) -> UnderWay:
        return self._memory.under_way

    @functools.cached_property
    def _served(self) -> frozenset[int]:
        """The numbers of the policy groups of which a tensor can be clipped early at some step."""
        return frozenset(self._place[i][0] for i, why in enumerate(self._never) if why is None)

    @functools.cached_property
    def _never(self) -> list[str | None]:
        """Why each tensor can be clipped early at no step; None where it can."""
        alone = [acts_on_each_alone(group.policy) for group in self._memory.groups]
        return [
            self._why_not(tensor, self._memory.groups[k], alone=alone[k])
            for tensor, (k, _) in zip(self._memory.layout, self._place, strict=True)
        ]

    @staticmethod
    def _why_not(tensor: LogicalTensor, group: PolicyGroup, *, alone: bool) -> str | None:
        name = type(group.policy).__name__
        if "(FSDP1)" in tensor.placement:
            return "FSDP1 puts its gradient in place after backward. Use fully_shard (FSDP2), or leave it to clip_()"
        if group.one_element:
            return f"{name} clips by the norm of all gradients, which is known after backward. Leave it to clip_()"
        if group.policy.post_max_norm is not None:
            return f"{name}'s post_max_norm needs the norm of all gradients. Leave post_max_norm out, or leave it to clip_()"
        if tensor.norm_groups and not group.per_shard:
            return (
                "its norm is added over the ranks that hold its shards, and backward is no place for a collective. Use "
                f'{name}(scope="shard"), or leave it to clip_()'
            )
        if not alone:
            return f"{name}'s scale of one tensor depends on the norms of others. Leave it to clip_()"
        return None

    def _needs_all(self, k: int) -> bool:
        return "global_norm" in self._memory.needs()[k]

    def _check_rule(self, i: int) -> None:
        if self._step.measured:
            return
        name, k, why = self._memory.layout.names[i], self._place[i][0], self._never[i]
        if why is not None:
            raise RuntimeError(f"{name!r} cannot be clipped early: {why}")
        if self._needs_all(k):
            raise RuntimeError(
                f"{name!r} cannot be clipped early at step {self._memory.calls + 1}: "
                f"{type(self._memory.groups[k].policy).__name__} needs the norm of all gradients there, as in a warm-up. "
                "Ask clipper.can_clip_early; where it is False, step after clip_(), or run backward twice (measure_early_)"
            )

    # ------------------------------------------------------------------------------------------------------- in backward

    def measure_(self, parameters: Iterable[Tensor], gradients: Iterable[Tensor] | None) -> None:
        """Remember the gradients' norms for a second backward, as `GradClipper.measure_early_` documents."""
        if self._why_never is None and self._communicates:
            raise RuntimeError(
                "measure_early_() cannot serve this clipper: the norm of all gradients takes a collective here. Step after "
                "clip_() while can_clip_early is False"
            )
        chosen = self._chosen("measure_early_", parameters, gradients)
        for i, _ in chosen:
            if i in self._step.measured:
                raise RuntimeError(
                    f"{self._memory.layout.names[i]!r} was measured already in this step: its gradient came in parts "
                    "(accumulation, or a weight shared by two reentrant checkpoints). Measure it after its last part, and "
                    "use checkpoint(use_reentrant=False)"
                )
        if chosen:
            self._remember(chosen)
        self._scales = None
        self._step.measured.update(i for i, _ in chosen)

    def clip_(self, parameters: Iterable[Tensor], gradients: Iterable[Tensor] | None) -> None:
        """Clip, as `GradClipper.clip_early_` documents."""
        chosen = self._chosen("clip_early_", parameters, gradients)
        if not chosen:
            return
        for i, _ in chosen:
            self._check_rule(i)
        index, grads = self._index(i for i, _ in chosen), [grad for _, grad in chosen]
        if self._step.measured:
            self._check_measured(chosen)
            if self._scales is None:
                self._scales = self._decide_all(self.with_remembered(torch.zeros_like(self._squares)))
            scales, squares = self._scales.index_select(0, index), self._squares.index_select(0, index)
        else:
            squares = self._remember(chosen)
            scales = self._decide([i for i, _ in chosen], squares)
        bad = is_nonfinite(squares.sqrt())
        self._kernels.scale_(grads, self._nonfinite.clean(scales, bad))
        self._nonfinite.zero_(self._kernels, grads, bad, None)
        self._step.clipped.update(i for i, _ in chosen)
        if gradients is None:
            self._clipped.mark(self._memory.layout.tensors[i] for i, _ in chosen)
        else:
            self._step.elsewhere.update(i for i, _ in chosen)

    def _chosen(
        self, method: str, parameters: Iterable[Tensor], gradients: Iterable[Tensor] | None
    ) -> list[tuple[int, Tensor]]:
        """Return the number and this rank's shard of each gradient, or raise and leave everything as it was."""
        if self._why_never is not None:
            raise RuntimeError(f"{method}() cannot serve this clipper: {self._why_never}. Call clip_() after backward")
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        given: Sequence[Tensor | None] = [None] * len(params)
        if gradients is not None:
            given = [gradients] if isinstance(gradients, Tensor) else list(gradients)
            if [tuple(g.shape) if isinstance(g, Tensor) else None for g in given] != [tuple(p.shape) for p in params]:
                raise ValueError(
                    "gradients= must hold the gradient of each parameter, in the same order and of its shape"
                )
        chosen: dict[int, Tensor] = {}
        for number, (param, passed) in enumerate(zip(params, given, strict=True)):
            if id(param) not in self._of:
                if id(param) in self._left_out:
                    continue
                raise LayoutError(
                    f"{method}() got a parameter that the clipper does not know (number {number}, "
                    f"{type(param).__name__} of shape {list(getattr(param, 'shape', []))}): construct the clipper from the "
                    "same parameters after the model was parallelised, call refresh() after they were replaced, or name it "
                    "in exclude="
                )
            for i in self._of[id(param)]:
                grad = self._read(self._memory.layout.tensors[i], passed)
                if grad is None:
                    continue
                if i in self._step.clipped or i in chosen:
                    raise RuntimeError(
                        f"{self._memory.layout.names[i]!r} was clipped early already in this step: its gradient came in "
                        "parts (accumulation, or a weight shared by two reentrant checkpoints), or clip_() was not called "
                        "after the backward before. Clip it after its last part, use checkpoint(use_reentrant=False), and "
                        "call clip_() once a step. If a part was stepped with, go back to a checkpoint"
                    )
                chosen[i] = grad
        # Later a part of the model may be without a gradient; a loop that is wrong is so from its first call.
        in_backward = torch._C._current_graph_task_id() != -1
        if not chosen and not in_backward and not self.used and not any(id(p) in self._left_out for p in params):
            raise RuntimeError(
                f"{method}() got {len(params)} parameters, and none has a gradient: call it in backward once the gradient "
                "is there, as a hook of register_post_accumulate_grad_hook does, and before .grad is set to None"
            )
        self.used = self.used or bool(chosen)
        return list(chosen.items())

    def _read(self, tensor: LogicalTensor, passed: Tensor | None) -> Tensor | None:
        """Return this rank's shard of a gradient, if it is final; None if there is no gradient."""
        assert tensor.param is not None
        grad = tensor.param.grad if passed is None else passed
        if grad is None:
            return None
        if isinstance(grad, DTensor) and grad.placements != getattr(tensor.param, "placements", None):
            raise RuntimeError(
                f"{tensor.name!r} cannot be clipped early: its gradient is placed {grad.placements}, and reducing it "
                "takes a collective. Leave it to clip_()"
            )
        if passed is not None:
            local = wait(passed.to_local()) if isinstance(passed, DTensor) else passed
            return usable(tensor.name, local, _refuse_copy)
        plain = not tensor.norm_groups and not isinstance(tensor.param, DTensor)
        if self._averaged_later and plain and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{tensor.name!r} cannot be clipped early: other ranks have copies, and inside backward its .grad is not "
                "averaged over them yet. Under DDP call clip_early_ in a communication hook (docs/in-backward.md), with "
                "gradients=bucket.gradients(); if it is averaged, say so by gradients=[param.grad]"
            )
        if not self._after_clip.is_new(tensor.param):
            raise RuntimeError(
                f"the gradient of {tensor.name!r} was clipped by clip_() already, and no backward came since: call "
                "clip_early_() inside backward, before the step's clip_()"
            )
        return tensor.grad()

    def _check_measured(self, chosen: Sequence[tuple[int, Tensor]]) -> None:
        for i, _ in chosen:
            if i not in self._step.measured:
                raise RuntimeError(
                    f"{self._memory.layout.names[i]!r} has a gradient in the second backward of this step, and had none in "
                    "the first: run both on the same batch, with the same random numbers"
                )

    def _remember(self, chosen: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Measure the gradients, and remember and return their squares, float64 [k]."""
        if not self._step.measured and not self._step.clipped:
            self._remembered.zero_()
        numbers = [i for i, _ in chosen]
        index, grads = self._index(numbers), [grad for _, grad in chosen]
        with naming_what_fails([self._memory.layout.names[i] for i in numbers], grads):
            squares = self._kernels.power_sums(grads, 2.0, self._memory.device)
        self._squares.index_copy_(0, index, squares)
        if any("weight_norms" in needs for needs in self._memory.needs()):
            weights = [self._memory.layout.tensors[i].weight() for i in numbers]
            self._weight_squares.index_copy_(0, index, self._kernels.power_sums(weights, 2.0, self._memory.device))
        self._remembered.index_fill_(0, index, True)
        return squares

    def _decide(self, numbers: Sequence[int], squares: Tensor) -> Tensor:
        """Return the scales, float64 [k], that the policies of these tensors give them."""
        norms = squares.sqrt()
        clean = self._nonfinite.clean(norms, is_nonfinite(norms))
        scales = torch.ones_like(norms)
        by_group: dict[int, list[int]] = {}
        for position, i in enumerate(numbers):
            by_group.setdefault(self._place[i][0], []).append(position)
        for k, members in by_group.items():
            group, here = self._memory.groups[k], self._index(members)
            columns = self._index(self._place[numbers[position]][1] for position in members)
            found = self._decide_few(k, squares.index_select(0, here), columns)
            if found is not None:
                scales.index_copy_(0, here, found)
                continue
            weight_norms = None
            if "weight_norms" in self._memory.needs()[k]:
                index = self._index(numbers[position] for position in members)
                weight_norms = self._weight_squares.index_select(0, index).sqrt()
            inputs = StepInputs(
                norms=clean.index_select(0, here),
                numel=group.numel.index_select(0, columns),
                t=self._memory.t + 1,
                steps_done=self._memory.steps_done,
                weight_norms=weight_norms,
            )
            state = {slot: value.index_select(-1, columns) for slot, value in group.state.items()}
            scales.index_copy_(0, here, group.policy.step(state, inputs)[0].double())
        return scales

    def _index(self, numbers: Iterable[int]) -> Tensor:
        """Return whole numbers below n as int64 [k] on the device, without sending them, which would sync the host."""
        return torch.stack([self._numbers[i] for i in numbers])

    # --------------------------------------------------------------------------------------------------------- in clip_

    def begin_clip(self) -> frozenset[int]:
        """Return the numbers of the tensors that are clipped already.

        Raises:
            RuntimeError: one of them has got another gradient since, or a tensor that was measured has none now.
        """
        step, tensors = self._step, self._memory.layout.tensors
        for i in step.clipped - step.elsewhere:
            param = tensors[i].param
            if param is not None and self._clipped.is_new(param):
                raise RuntimeError(
                    f"the gradient of {tensors[i].name!r} was written to after clip_early_(): a further backward added to "
                    "it, or it was set to zero in place. Call clip_early_() after the last backward of the step only, and "
                    "set .grad to None after the optimizer's step"
                )
        for i in step.measured - step.clipped:
            param = tensors[i].param
            if param is not None and param.grad is None:
                raise RuntimeError(
                    f"{tensors[i].name!r} was measured in the first backward of this step, and has no gradient to clip now: "
                    "run backward again on the same batch, with the same random numbers, before clip_()"
                )
        return frozenset(step.clipped)

    def end_clip(self) -> None:
        """End the step: the next one has nothing clipped."""
        if self._step.clipped or self._step.measured:
            self._memory.under_way = UnderWay()

    def with_remembered(self, squares: Tensor) -> Tensor:
        """Return the squared norms, float64 [n], with those that were remembered in this step in their places."""
        return self._over(squares, self._squares)

    def with_remembered_weights(self, squares: Tensor) -> Tensor:
        """Return the parameters' squared norms, float64 [n], as they were when the gradients were clipped."""
        return self._over(squares, self._weight_squares)

    def _over(self, squares: Tensor, remembered: Tensor) -> Tensor:
        if not self._step.measured and not self._step.clipped:
            return squares
        return torch.where(self._remembered, remembered, squares)


def _refuse_copy(grad: Tensor) -> None:
    raise RuntimeError("gradients= holds a tensor that cannot be written to in place: pass .contiguous() ones")
