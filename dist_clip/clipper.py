"""GradClipper, which reads the gradients, measures them, asks the policies for scales, scales, and reports."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh

from dist_clip.attachment import Attachment, Detachable
from dist_clip.construction import Options, Overrides, construct
from dist_clip.errors import DesyncError
from dist_clip.explain import explain_table
from dist_clip.guards import Guard
from dist_clip.kernels import Kernels
from dist_clip.layouts import Gradients, LayoutReader, PartialReducer, UsualGradients
from dist_clip.layouts.meeting import meet
from dist_clip.layouts.process_groups import distributed, stage_of
from dist_clip.layouts.sharded import ShardedBy
from dist_clip.memory import Memory, state_dict
from dist_clip.memory.packed import PackedState
from dist_clip.policies import Policy
from dist_clip.reduction import Channel, DesyncDetector
from dist_clip.step import ClipReport, EarlyClips, GlobalNorms, Guards, Meter, NonFinite, Usage, decide, raise_nonfinite
from dist_clip.step.fault import naming_what_fails
from dist_clip.step.grad_scaler import found_inf, share_skip
from dist_clip.step.one_launch import Decided, OneLaunch
from dist_clip.verify import VerifyReport, verify


class GradClipper:
    """Clips gradients in place, knowing how they are sharded.

    Construct it where you construct the optimizer, after the model was parallelised. Construction is collective: every
    rank of `process_group` takes part, and layouts that differ raise on all of them.

    Args:
        target: the model, a list of modules (pipeline chunks), (name, parameter) pairs, parameters, optimizer
            param_groups or an optimizer. Names key the state; those of modules are the same under every layout.
        policy: `LogClip`, `GlobalNorm`, `AdaGC`, `ZClip`, or a policy of your own (docs/policies.md).
        pp_group: the process group, or the 1-D device mesh, across pipeline stages, if there are any. A tensor that
            several stages hold under one name (tied embeddings) counts once in the global norm.
        process_group: the process group, or the 1-D device mesh, of all ranks that train this model. It must contain
            all ranks of the model's device meshes. None: all ranks.
        nonfinite: what a NaN or Inf norm does to gradients (it never enters the state). "propagate": what the formulas
            give, as in torch. "zero": that tensor's gradient becomes 0. "skip": nothing is clipped or remembered, and
            ``report.skip`` is set on every rank, so that all skip the step. "raise": raises `NonFiniteGradError` on
            every rank, before anything is changed, at the cost of a scalar all-reduce and a host sync a step.
        overrides: {FQN pattern: policy}, or a list of (selector, policy) pairs; the first match wins, and `policy` clips
            the rest. Each policy has its own global norm. A selector is a pattern, a function (name, parameter) -> bool,
            an optimizer, or its param_groups or some of them. It must select the same tensors on every rank. States know
            a function by its qualified name and an optimizer by its class, so keep both when you resume.
        exclude: FQN patterns (`fnmatch`) of tensors that are neither measured nor clipped.
        log_global_norm: reduce the global norm for the report also where no policy needs it. The reduction overlaps
            with the optimizer step; only reading the norm waits for it.
        guard: what decides whether a step is taken at all: `MedianGuard`, `SkipStep`, `DropNorm`, `SkipAbove`, a guard of
            your own (docs/guards.md), or a list of them, any of which may skip it. A step is skipped as by
            ``nonfinite="skip"``. None: no guard.
        kernels: what measures and scales CUDA tensors, "triton" or "torch" (docs/kernels.md), the same on all ranks.
            None: the environment variable DIST_CLIP_KERNELS, else Triton if it works, else torch.
        scaler: the GradScaler of fp16 training, if there is one. Clipping before ``scaler.unscale_`` then raises. It
            implies ``nonfinite="skip"``: a step that the scaler skips leaves the state as it was. The clipper shares
            the overflow with the scalers of all ranks, so that all of them skip. With `attach` under tensor or pipeline
            parallelism that comes too late, so call `clip_` yourself there.
        detect_desync: check, at each step that reduces anything, that all ranks have clipped equally often and share
            one state. The check travels with the packed vector and costs no collective; see `check_in_sync`.
        sharded: {FQN pattern: how}, for tensors that are divided among ranks although nothing marks them so. The first
            match wins. A process group or 1-D mesh: its ranks hold parts of one tensor, or tensors of their own (plain
            experts under one name), which are measured and clipped as one. (dim, group): parts along that dimension. A
            dimension alone: parts over `process_group`, or under Megatron over the tensor-parallel group. None: a
            replicated tensor that Megatron marks as divided.
        check_replicas: compare the norms of tensors that should have copies on several ranks at the clips 1, 2, 4, 8, ...
            of this clipper, at the cost of a host sync and a few collectives. False where ranks train apart on purpose.

    Attributes:
        policy: the policy of all tensors that no override matches.
        last_report: what the last `clip_` returned; None before it.
        attachment: what `attach` returned last; None before it.
        layout: the logical tensors, in the report's order.
        memory: the policies with their tensors and states.

    Raises:
        LayoutError: no parameters, all frozen, duplicate names, sparse gradients, a wrong process group,
            patterns that match nothing, ranks that differ, ranks that do not construct one within the group's timeout.
        TypeError, ValueError: an argument of the wrong type or value, or a policy that breaks its contract.
        ImportError: kernels that were asked for by name are not installed or do not work.

    Each of these errors is raised on every rank, also where only one rank is at fault.

    Example:
        >>> import dist_clip
        >>> model = torch.nn.Linear(4, 4)  # in training, after fully_shard(model) or whatever lays it out
        >>> clipper = dist_clip.GradClipper(model, dist_clip.LogClip())
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> report = clipper.clip_()  # then optimizer.step()
    """

    def __init__(
        self,
        target: Any,
        policy: Policy,
        *,
        pp_group: dist.ProcessGroup | DeviceMesh | None = None,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        nonfinite: NonFinite = "propagate",
        overrides: Overrides | None = None,
        exclude: Sequence[str] = (),
        log_global_norm: bool = False,
        guard: Guard | Sequence[Guard] | None = None,
        kernels: str | Kernels | None = None,
        scaler: GradScaler | None = None,
        detect_desync: bool = False,
        sharded: Mapping[str, ShardedBy] | None = None,
        check_replicas: bool = True,
    ) -> None:
        options = Options(
            pp_group,
            process_group,
            nonfinite,
            overrides,
            exclude,
            log_global_norm,
            guard,
            kernels,
            scaler,
            detect_desync,
            sharded,
            check_replicas,
        )
        self.policy = policy
        self._target, self._arguments = target, options
        self.last_report: ClipReport | None = None
        self.attachment: Detachable | None = None
        self._losses: list[Any] = []
        self._usage = Usage()
        # The state is updated in place, which torch forbids for tensors that were made in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self._build(target, policy, options)

    def _build(self, target: Any, policy: Policy, options: Options) -> None:
        made = self._made = construct(target, policy, options)
        checked = self._options = made.options
        self.layout = made.layout
        self.memory = Memory(
            made.rules,
            made.numbers,
            made.layout,
            made.elsewhere,
            made.device,
            may_skip=checked.may_skip,
            guards=checked.guards,
        )
        self._detector = DesyncDetector(self.memory)
        detector = self._detector if checked.detect_desync else None
        self._channel = Channel(made.plan, checked.pp_group, checked.process_group, detector)
        self._partial = PartialReducer(made.layout.tensors)
        self._gradients, self._params = Gradients(made.layout.tensors), [tensor.param for tensor in made.layout]
        self._early = EarlyClips(
            self.memory,
            made.kernels,
            checked.nonfinite,
            why_never=checked.why_not_early(megatron=isinstance(target, LayoutReader)),
            known=made.known,
            averaged_later=made.ranks_a_stage > 1,
            communicates=self._channel.reduces_shards or self._channel.has_stages,
            decide_all=self._scales_of,
            decide_few=lambda k, squares, columns: self._one_launch.scales_of(k, squares, columns),
            after_clip=self._usage.clipped,
        )
        self._meter = Meter(
            self.memory,
            self._channel,
            made.kernels,
            checked.nonfinite,
            every_norm=checked.may_skip or checked.log_global_norm,
            early=self._early,
        )
        counted = torch.tensor(made.counted, dtype=torch.bool, device=made.device)
        self._guards = Guards(
            self.memory,
            self._channel,
            counted,
            checked.process_group,
            stage_of(checked.pp_group),
            made.ranks_a_stage,
        )
        self._global_norms = GlobalNorms(
            self.memory,
            self._channel,
            counted,
            checked.nonfinite,
            may_skip=checked.may_skip,
            every_norm=checked.log_global_norm,
        )
        self._one_launch = OneLaunch(
            self.memory,
            self._channel,
            self._meter,
            made.kernels,
            plain=checked.nonfinite.propagates and checked.scaler is None and not checked.log_global_norm,
        )
        # With "zero" a faulty tensor has its own scale, 0.
        self._uniform = (
            len(self.memory.groups) == 1 and self.memory.groups[0].one_element and not checked.nonfinite.zeroes
        )

    def __repr__(self) -> str:
        policies = ", ".join(f"{group.pattern!r}: {group.policy!r}" for group in self.memory.groups)
        return (
            f"{type(self).__name__}({{{policies}}}, {len(self.layout)} tensors, {self.memory.calls} clips, "
            f"{len(self._made.plan.collectives)} collectives for tensor norms, {self._made.kernels.name} kernels)"
        )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError(
            "a GradClipper cannot be copied: it would clip the original's gradients. Construct another one from the copied "
            "model, and load_state_dict(clipper.state_dict())"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a GradClipper holds process groups and cannot be pickled: save clipper.state_dict()")

    # -------------------------------------------------------------------------------------------------------- a step

    @_disable_dynamo  # tracing takes torch.compile minutes and makes nothing faster
    @torch.no_grad()
    def clip_(self, loss: Tensor | float | None = None) -> ClipReport:
        """Clip all gradients in place. Call it once per optimizer step, on every rank, after backward (and unscaling).

        Args:
            loss: this rank's own loss, a number or a tensor of one element, for a guard that looks at the loss; other
                clippers ignore it. The guard sees the mean over the ranks. Under pipeline parallelism the ranks of the last
                stage pass it. In place of `observe_loss`.

        Returns:
            The report, also kept as ``last_report``.

        Raises:
            RuntimeError: a gradient is not ready to be clipped: still scaled by the ``scaler``, sparse, not yet
                reduced, not laid out like its parameter, or of numbers that torch cannot scale; or it changed after
                `clip_early_`. The message names it, and the state is as it was.
            DesyncError: with ``detect_desync``: ranks are out of step. Raised on the CPU before anything is clipped,
                and elsewhere at the next call, so that the host need not wait.
            NonFiniteGradError: with ``nonfinite="raise"``: a gradient is NaN or Inf.
            StuckError: a guard with ``when_stuck="raise"`` has skipped too many steps in a row. Raised on the CPU before
                anything is clipped, and elsewhere up to 64 clips later, so that the host need not wait.
            TypeError, ValueError: a guard looks at the loss, and a rank passed none, or no scalar. On accelerators raised
                at the clips 1, 2, 4, 8 and 16 at once, and later up to 64 clips late.
            LayoutError: the modules have a parameter with a gradient that came after the construction: see `refresh`. The
                first call, and calls without gradients, look at parameters without one as well.
            LayoutError: copies of a tensor have gradients of different norms: see `sharded`. Raised on every rank before
                anything is changed.

        Example:
            >>> import dist_clip
            >>> model = torch.nn.Linear(2, 2)
            >>> clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1.0))
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> clipper.clip_().global_norm
            tensor(2.4495)
        """
        early = self._early.begin_clip()
        scaler = self._options.scaler
        overflow = None if scaler is None else found_inf(scaler, self._made.device)
        self._channel.begin()
        losses, self._losses = self._losses if loss is None else [loss], []
        about_loss = self._guards.begin(losses)
        grads, num_grads = self._read(early)
        attached = self.attachment is not None and self.attachment.attached
        self._usage.before(self.layout, num_grads, self.last_report, self._made.device, attached=attached, early=early)
        squares = self._meter.squares(grads)
        self._made.replicas.check(squares, self._meter.weight_squares)
        if not self.memory.under_way.measured and self._one_launch.serves(grads, all_early=num_grads == len(early) > 0):
            decided = self._one_launch.decide(squares)
            with naming_what_fails(self.layout.names, grads):
                self._made.kernels.scale_(grads, decided.scales, uniform=self._uniform)
        else:
            decided = self._decide(grads, squares, about_loss, overflow)
        self._early.end_clip()
        self._channel.clipped()
        self._usage.after(self.layout, mark=self._early.used)
        self.last_report = ClipReport(
            names=self.layout.names,
            tensor_norms=decided.norms,
            scales=decided.scales,
            nonfinite=decided.nonfinite,
            skip=decided.skip,
            num_grads=num_grads,
            _global_norms=decided.global_norms,
        )
        return self.last_report

    def _decide(
        self, grads: list[Tensor | None], squares: Tensor, about_loss: Tensor | None, overflow: Tensor | None
    ) -> Decided:
        """Decide the step with torch's operators, whatever the options, and carry it out."""
        scaler, nonfinite = self._options.scaler, self._options.nonfinite
        measured = self._meter.measure(squares, about_loss)
        totals = self._global_norms.before(measured, overflow, self._guards.extra(measured))
        guarded = self._guards.decide(measured, totals)
        if scaler is not None and totals.skip is not None:
            share_skip(scaler, totals.skip, totals.nonfinite)
        if nonfinite.raises:
            self._raise_if_nonfinite(measured.local, totals.nonfinite)
        scales, states = decide(measured, totals, self.memory, self._global_norms, nonfinite)
        with naming_what_fails(self.layout.names, grads):
            self._made.kernels.scale_(grads, scales.each, uniform=self._uniform)
            nonfinite.zero_(self._made.kernels, grads, measured.bad, totals.skip)
        self.memory.advance(states, totals.skip, guarded)
        return Decided(
            norms=measured.norms.float(),
            scales=scales.each.float(),
            nonfinite=totals.nonfinite,
            skip=self._one_launch.never if totals.skip is None else totals.skip,
            global_norms=self._global_norms.for_report(measured, totals, scales),
        )

    def observe_loss(self, loss: Tensor | float) -> None:
        """Pass this rank's loss for the next `clip_`, as before the step of an attached optimizer; never syncs the host.

        Call it once for each micro-batch, or once with their mean: the guards see the mean over calls and ranks. Without a
        guard that looks at the loss it does nothing.

        Args:
            loss: a number or a tensor of one element. The next `clip_` raises for anything else, on every rank.

        Example:
            >>> import torch, dist_clip
            >>> model = torch.nn.Linear(2, 2)
            >>> optimizer = torch.optim.AdamW(model.parameters())
            >>> clipper = dist_clip.GradClipper(model, dist_clip.LogClip(), guard=dist_clip.SkipStep())
            >>> handle = clipper.attach(optimizer)
            >>> loss = model(torch.ones(1, 2)).square().mean()
            >>> loss.backward()
            >>> clipper.observe_loss(loss)
            >>> optimizer.step()
        """
        if self._guards.needs_loss:
            self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def forget_loss(self) -> None:
        """Drop what `observe_loss` was given, for a step that is left out without a clip.

        Example:
            >>> import torch, dist_clip
            >>> dist_clip.GradClipper(torch.nn.Linear(2, 2), dist_clip.LogClip()).forget_loss()
        """
        self._losses.clear()

    @_disable_dynamo
    def clip_early_(self, parameters: Iterable[Tensor], gradients: Iterable[Tensor] | None = None) -> None:
        """Clip the gradients of these parameters now, in backward, so that a hook may step with them and free them.

        The scales are those that `clip_` would give them. Call `clip_` after backward all the same, on every rank: it clips
        what is left, counts the step, stores the states, and its report has all tensors. It never communicates and never
        syncs the host. docs/in-backward.md has the loops.

        It serves tensors that are whole on this rank, or whose policy has scope "shard", under policies that look at each
        tensor alone (AdaGC, LogClip, AGC), after their global warm-up: see `can_clip_early`. Between it and `clip_` the
        clipper's state stays that of the step before, and cannot be saved.

        Args:
            parameters: parameters of the clipper's target; those without a gradient and excluded ones are left out.
            gradients: the gradients, where they are not in ``.grad`` yet, as in a communication hook of DDP.

        Raises:
            RuntimeError: nothing has a gradient; a gradient cannot be clipped early, is clipped already, or is not final.
            LayoutError: a parameter that the clipper does not know.
            ValueError: `gradients` does not fit `parameters`.

        Each message names the tensor and the way out, and nothing was clipped. It is raised on the ranks that call this.

        Example:
            >>> import dist_clip
            >>> model = torch.nn.Linear(2, 2)
            >>> optimizers = {param: torch.optim.AdamW([param]) for param in model.parameters()}
            >>> clipper = dist_clip.GradClipper(model, dist_clip.AGC())
            >>> def step_in_backward(param):
            ...     clipper.clip_early_([param])
            ...     optimizers[param].step()
            ...     param.grad = None
            >>> handles = [param.register_post_accumulate_grad_hook(step_in_backward) for param in model.parameters()]
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> clipper.clip_().num_grads
            2
        """
        with torch.no_grad(), self._early.lock:
            self._early.clip_(parameters, gradients)

    @_disable_dynamo
    def measure_early_(self, parameters: Iterable[Tensor], gradients: Iterable[Tensor] | None = None) -> None:
        """Measure these gradients in a first backward, so that `clip_early_` can clip by all norms in a second one.

        For steps whose rule needs the norm of all gradients: a global warm-up, or GlobalNorm at each step. Run forward and
        backward twice on the same batch with the same random numbers. In the first, call this and set ``.grad`` to None;
        in the second, call `clip_early_`; then call `clip_`. It serves models whose norms take no collective.

        Args:
            parameters, gradients: as for `clip_early_`.

        Raises:
            RuntimeError, LayoutError, ValueError: as `clip_early_`; or the norm of all gradients takes a collective.

        Example:
            >>> import dist_clip
            >>> model = torch.nn.Linear(2, 2)
            >>> clipper = dist_clip.GradClipper(model, dist_clip.LogClip())
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> clipper.can_clip_early
            False
            >>> clipper.measure_early_(model.parameters())
            >>> clipper.can_clip_early
            True
        """
        with torch.no_grad(), self._early.lock:
            self._early.measure_(parameters, gradients)

    @property
    def can_clip_early(self) -> bool:
        """Whether `clip_early_` serves the next step: no policy of the tensors that it serves needs the norm of all.

        The same on every rank of a pipeline stage, without a host sync. It may change once `clip_` was called (a warm-up is
        over), and after `measure_early_`. False for good where clip_early_ serves no tensor at all, and says why.
        """
        return self._early.possible

    def _scales_of(self, squares: Tensor) -> Tensor:
        measured = self._meter.measure(squares)
        totals = self._global_norms.before(measured, None)
        return decide(measured, totals, self.memory, self._global_norms, self._options.nonfinite)[0].each

    def _read(self, early: frozenset[int] = frozenset()) -> tuple[list[Tensor | None], int]:
        """Return this rank's shards of the gradients, in the layout's order, and how many tensors have a gradient.

        Args:
            early: the tensors that are clipped already, whose gradients may be gone. They are left out of the list.
        """
        self._partial.reduce_(self.layout.tensors)
        # What is usual of all gradients is asked at once; here some are gone.
        here = (
            [None if i in early else tensor.grad() for i, tensor in enumerate(self.layout)]
            if early
            else self._gradients.read(self.layout.tensors, self._params)
        )
        grads = self._made.kernels.read(here)
        all_there = isinstance(here, UsualGradients)
        num_grads = len(here) if all_there else sum(map(operator.is_not, grads, itertools.repeat(None))) + len(early)
        self._made.check_not_stale(thorough=self.memory.calls == 0 or num_grads == 0)
        return grads, num_grads

    def _raise_if_nonfinite(self, squares: Tensor, flag: Tensor) -> None:
        if bool(self._channel.any_rank(flag)):
            raise_nonfinite(self.layout, squares, self._options.process_group)

    @property
    def may_skip(self) -> bool:
        """Whether ``report.skip`` may ever be set. Code that calls `clip_` itself must then read it before the step."""
        return self._options.may_skip

    @property
    def steps(self) -> int:
        """Number of steps taken, without those that were skipped. Syncs the host."""
        return self.memory.steps

    @torch.no_grad()
    def verify(self, *, device: Literal["cpu"] | None = None, tolerance: float = 1e-5) -> VerifyReport:
        """Compare the norms that `clip_` would find with those of the whole gradients. Run it once on your own cluster.

        Call it on every rank, after backward (and unscaling) and before `clip_`. It changes neither gradients nor state
        nor the step count. Collective over `process_group`; the report is the same on every rank.

        Each gradient is put together whole, one copy at a time and in chunks: of the ranks that hold a copy, one
        receives the others' pieces and measures them in float64. Neither norm groups nor the kernels take part. The
        report says which tensor and which rank's shard differs, which copies differ, and whether copies are taken for
        parts. Which ranks hold a copy is what the layout says; Partial gradients are reduced as for `clip_`.

        Args:
            device: where the whole gradients are measured. None: where they are; "cpu": on the CPU.
            tolerance: the relative difference up to which norms count as the same, between 0 and 1. Copies of one
                tensor may differ by 1e-3, because kernels that are not deterministic round differently.

        Returns:
            The report: ``report.ok``, one row a tensor, and the table as ``print(report)``.

        Raises:
            RuntimeError: no rank has a gradient; a gradient cannot be read, as for `clip_`; or `clip_early_` has begun the
                step.
            TypeError, ValueError: an argument of the wrong type or value, or other arguments on another rank.
            LayoutError: the modules have a parameter that came after the construction.

        Each of these errors is raised on every rank.

        Example:
            >>> import dist_clip
            >>> model = torch.nn.Linear(2, 2)
            >>> clipper = dist_clip.GradClipper(model, dist_clip.LogClip())
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> clipper.verify().ok
            True
        """
        self.memory.check_between_steps("verify")
        return verify(self._made, self.memory, lambda: self._read()[0], device=device, tolerance=tolerance)

    def check_in_sync(self) -> None:
        """Compare the steps and states of all ranks, under any layout.

        Collective over `process_group`; syncs the host.
        Call it now and then (after loading a checkpoint, every thousand steps). ``detect_desync=True`` checks the same
        at each step for free, but only where a packed vector travels: not under DDP, nor, after AdaGC's warm-up, from
        one pipeline stage to another.

        Raises:
            DesyncError: ranks differ, or some do not call this within the group's timeout. The same on every rank, naming
                the ranks and the first tensor whose state differs.

        Example:
            >>> import dist_clip
            >>> clipper = dist_clip.GradClipper(torch.nn.Linear(2, 2), dist_clip.LogClip())
            >>> clipper.check_in_sync()  # a single process is always in sync
        """
        if distributed():
            meet(self._options.process_group, "call check_in_sync()", DesyncError)
            self._detector.compare(self._options.process_group)

    # --------------------------------------------------------------------------------- optimizers, state, explanation

    def attach(self, *optimizers: torch.optim.Optimizer, carry_state: bool = False) -> Attachment:
        """Clip in ``optimizer.step``, so that the training loop stays as it is.

        With several optimizers (Muon and AdamW) gradients are clipped once a round, before the first of them steps. An
        optimizer whose gradients changed since the last clip starts a new round. Where steps may be skipped
        (``nonfinite="skip"``, ``guard``) a fused optimizer gets the flag as its ``found_inf``. For other
        optimizers the host reads the flag and does not call their step.

        A clip belongs to a step that is taken, of real gradients: steps inside of a step are part of it, and the steps by
        which torch.distributed.checkpoint makes an optimizer's state are none.

        Args:
            optimizers: objects with ``step`` and ``param_groups`` that step parameters of the clipper's target, each once:
                torch optimizers, and wrappers of them. What a wrapper does around the step of the optimizer inside belongs
                to the step. Accelerate's and Lightning's wrappers only decide whether to step, and are unwrapped.
            carry_state: keep the clipper's state in ``optimizer.state_dict()``, as the entry "dist_clip" of the first
                optimizer, and load it with it. For loops that save an optimizer and nothing of yours. It does not survive
                `torch.distributed.checkpoint.state_dict`, which takes two entries of an optimizer's state and no more.

        Returns:
            A handle; ``handle.remove()`` detaches. (``dist_clip.<framework>.attach`` makes a clipper and returns it.)

        Raises:
            LayoutError: an optimizer holds a parameter that this clipper does not know.
            TypeError: no optimizer, or an object that is none, or one whose step cannot be replaced, or whose gradients
                are not complete before its step (Horovod's, ZeroRedundancyOptimizer with ``overlap_with_ddp``).
            RuntimeError: already attached, or the same optimizer twice. At a step: a closure, gradients that a GradScaler
                has not unscaled yet, a step that reaches the optimizer past the clipper, one inside backward, or one in
                which a wrapper did not step.

        Example:
            >>> import dist_clip
            >>> model = torch.nn.Linear(2, 2)
            >>> optimizer = torch.optim.AdamW(model.parameters())
            >>> handle = dist_clip.GradClipper(model, dist_clip.LogClip()).attach(optimizer)
        """
        if self.attachment is not None and self.attachment.attached:
            raise RuntimeError("this clipper is attached already: gradients would be clipped twice; remove() the first")
        attachment = Attachment(
            optimizers,
            clip_=self.clip_,
            layout=self.layout,
            known=self._made.known,
            may_skip=self.may_skip,
            scaler=self._options.scaler,
            process_group=self._options.process_group,
            fresh=lambda: self.memory.calls == 0,
            carry=(self.state_dict, self.load_state_dict) if carry_state else None,
        )
        self.attachment = attachment
        return attachment

    def refresh(self) -> None:
        """Read the model again, after parameters were added, replaced or removed. Collective, as the construction is.

        The step count and the states of tensors whose name and shape are as before stay; the others start afresh. An
        attached optimizer stays attached.

        Raises:
            LayoutError, TypeError, ValueError: as the constructor; the clipper is then as it was.
            TypeError: the clipper was constructed from parameters, and not from modules.
            RuntimeError: `clip_early_` has begun a step that `clip_` has not ended.

        Example:
            >>> import dist_clip
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))
            >>> clipper = dist_clip.GradClipper(model, dist_clip.LogClip())
            >>> model.append(torch.nn.Linear(2, 1))
            Sequential(
              (0): Linear(in_features=2, out_features=2, bias=True)
              (1): Linear(in_features=2, out_features=1, bias=True)
            )
            >>> clipper.refresh()
            >>> clipper.layout.names
            ('0.weight', '0.bias', '1.weight', '1.bias')
        """
        if self._made.watch is None:
            raise TypeError(
                "refresh() needs the modules, and this clipper was constructed from parameters: construct another one, and "
                "load_state_dict(clipper.state_dict(), strict=False)"
            )
        self.memory.check_between_steps("refresh")
        saved, shapes = self.state_dict(), {tensor.name: tensor.shape for tensor in self.layout}
        with torch.inference_mode(False), torch.no_grad():
            self._build(self._target, self.policy, self._arguments)
        kept = {tensor.name for tensor in self.layout if shapes.get(tensor.name) == tensor.shape}
        state_dict.carry_over(self.memory, saved, kept)
        if isinstance(self.attachment, Attachment):
            self.attachment.follow(self.layout, self._made.known)

    def explain(self) -> str:
        """Return a table of the tensors, how each is reduced and clipped, followed by what a step costs.

        The columns: tensor, shape, placement, norm groups, reduction, policy, and whether this pipeline stage counts
        the tensor in the global norm.

        Example:
            >>> import dist_clip
            >>> clipper = dist_clip.GradClipper(torch.nn.Linear(2, 2), dist_clip.LogClip())
            >>> print(clipper.explain())
            tensor  shape  placement  norm groups  reduction  policy           counts
            ------  -----  ---------  -----------  ---------  ---------------  ------
            weight  2x2    whole      none         none       LogClip[tensor]  yes
            bias    2      whole      none         none       LogClip[tensor]  yes
            no collective for tensor norms: every tensor is whole on this rank
            kernels: torch (the default)
            '*': the rule begins after a warm-up of 100 steps; 0 clips so far
        """
        return explain_table(self.memory, self._channel, self._made)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank's pipeline stage by FQN, with the policies' configuration.

        The result can be saved with ``torch.save``. A clipper is also a Stateful of `torch.distributed.checkpoint`: put
        it beside model and optimizer into the dict that is saved and loaded. `dist_clip.memory.state_dict` describes
        the entries.

        Returns:
            A dict of numbers, strings, lists, CPU tensors, and dicts of them.

        Raises:
            RuntimeError: `clip_early_` has begun a step that `clip_` has not ended.

        Example:
            >>> import dist_clip
            >>> clipper = dist_clip.GradClipper(torch.nn.Linear(2, 2), dist_clip.LogClip())
            >>> clipper.state_dict()["tensors"]["bias"]
            {'level': tensor(0.), 'count': tensor(0, dtype=torch.int32), 'streak': tensor(0, dtype=torch.int32)}
        """
        return state_dict.state_dict(self.memory)

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Load what `state_dict` returned, under this layout or another. Nothing changes unless all of it fits.

        A step that `clip_early_` has begun is forgotten.

        Args:
            state: what `state_dict` returned.
            strict: False turns missing tensors, unknown tensors and changed hyper-parameters into a warning that names
                them: what fits is loaded, and the rest starts afresh. If other rules made the state, all of it starts
                afresh.

        Raises:
            ValueError: another format, other policies, missing or unknown tensors, each named.

        Example:
            >>> import dist_clip
            >>> old = dist_clip.GradClipper(torch.nn.Linear(2, 2), dist_clip.LogClip())
            >>> new = dist_clip.GradClipper(torch.nn.Linear(2, 2), dist_clip.LogClip())
            >>> new.load_state_dict(old.state_dict())
        """
        state_dict.load_state_dict(self.memory, state, strict=strict)

    def packed(self, *, strict: bool = True) -> PackedState:
        """Return the state as a Stateful of `torch.distributed.checkpoint` that is one entry, whatever the model's size.

        Put it into the dict that is saved and loaded in place of the clipper. With thousands of tensors that takes a
        fraction of the time. Saving and loading are then collective over the pipeline stages, and a checkpoint saved this
        way loads this way only.

        Args:
            strict: as for `load_state_dict`.

        Raises:
            ValueError: a policy has scope "shard", whose states belong to ranks and not to the whole model.

        Example:
            >>> import dist_clip
            >>> clipper = dist_clip.GradClipper(torch.nn.Linear(2, 2), dist_clip.LogClip())
            >>> state = {"clipper": clipper.packed()}  # for dcp.save and dcp.load
            >>> list(state["clipper"].state_dict())
            ['packed']
        """
        return PackedState(self.memory, self._options.pp_group, strict=strict)
