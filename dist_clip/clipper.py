"""GradClipper: gradients -> norms -> reduction -> policy -> scales -> report, and the state that lasts between steps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from dist_clip import state
from dist_clip.attachment import Attachment, Detachable
from dist_clip.construction import Arguments, Construction, construct
from dist_clip.cover import check_cover
from dist_clip.desync import DesyncDetector, Standing, compare, shared_state
from dist_clip.domains import Domain, Measured, NonFinite, make_domains, rule_for
from dist_clip.explain import explain_table
from dist_clip.faults import any_rank, raise_nonfinite
from dist_clip.freshness import ClippedGradients
from dist_clip.groups import distributed
from dist_clip.kernels import Kernels, Preference
from dist_clip.layout import Layout
from dist_clip.overlap import Overlap
from dist_clip.policies.base import Policy, is_finite, is_nonfinite
from dist_clip.readers import PartialReducer
from dist_clip.reduction import PipelineReducer, ReductionPlan
from dist_clip.report import ClipReport
from dist_clip.scaling import found_inf, tell
from dist_clip.totals import Totals


class GradClipper:
    """Clips gradients in place, knowing how they are sharded.

    Construct it where you construct the optimizer, after the model was parallelised. Construction is collective: every
    rank of `process_group` takes part, and layouts that differ are an error on all of them.

    Args:
        target: the model, a list of modules (pipeline chunks), (name, parameter) pairs, parameters, optimizer
            param_groups or an optimizer. Names key the state: with modules they are the same under every layout.
        policy: `GlobalNorm`, `AdaGC`, `LogClip` or `ZClip`.
        pp_group: the process group across pipeline stages, if there are any. A tensor that several stages hold under one
            name (tied embeddings) counts once in the global norm.
        process_group: the ranks that train this model, every rank of its device meshes among them; default all.
        nonfinite: what a NaN or Inf norm does to gradients (it never enters the state). "propagate": what the formulas
            give, as in torch. "zero": that tensor's gradient becomes 0. "skip": nothing is clipped or remembered and
            ``report.skip`` tells every rank that the step is to be skipped. "raise": `NonFiniteGradError` on every
            rank, before anything is touched; shares and reads the flag, so it costs a scalar all-reduce and a host sync.
        groups: {FQN pattern: policy}; the first match wins, the rest go to `policy`. Each has a global norm of its own.
        exclude: FQN patterns (`fnmatch`) of tensors that are neither measured nor clipped.
        log_global_norm: reduce the global norm for the report also where the policy has no need of it. It is on its way
            while the optimizer steps: only reading it waits.
        skip_above: a step whose global norm exceeds this is to be skipped, as with ``nonfinite="skip"``; default none is.
        kernels: what measures and scales CUDA tensors: "triton", "torch", "apex" or "transformer_engine" (docs/kernels.md);
            default, the environment variable DIST_CLIP_KERNELS, else Triton if it is installed, else torch. The same on
            all ranks.
        scaler: the GradScaler of fp16 training, if there is one. Clipping before ``scaler.unscale_`` is then an error, and a
            step that the scaler skips leaves the state as it was: as with ``nonfinite="skip"``, which this implies. The
            scaler is told what other ranks found, so that all of them skip; with `attach` under tensor or pipeline
            parallelism that comes too late, so clip by hand there.
        detect_desync: look, at each step that reduces anything, whether all ranks have clipped equally often and share
            one state. It rides along with the packed vector and is no collective more; see `check_in_sync`.
        overlap: with FSDP2: how many groups of tensors, as large as what remains, may be measured and reduced while backward
            runs, inside of `last_backward`. Makes a process group of its own; construction is collective over all ranks.

    Raises:
        LayoutError: no parameters, all frozen, duplicate names, complex or sparse gradients, a wrong process group,
            patterns that match nothing, ranks that differ. The same on every rank.
        TypeError, ValueError: arguments of the wrong type or value, on one rank or on all; the same on every rank.
        ImportError: kernels that were asked for by name are not installed or do not work, on one rank or on all.
    """

    def __init__(
        self,
        target: Any,
        policy: Policy,
        *,
        pp_group: Any = None,
        process_group: Any = None,
        nonfinite: NonFinite = "propagate",
        groups: Mapping[str, Policy] | None = None,
        exclude: Sequence[str] = (),
        log_global_norm: bool = False,
        skip_above: float = math.inf,
        kernels: str | Kernels | Preference | None = None,
        scaler: GradScaler | None = None,
        detect_desync: bool = False,
        overlap: int = 0,
    ) -> None:
        self.policy = policy
        self.nonfinite: NonFinite = nonfinite
        self.log_global_norm = log_global_norm
        self.skip_above = skip_above
        self.last_report: ClipReport | None = None
        self.attachment: Detachable | None = None
        arguments = Arguments(
            policy,
            pp_group,
            process_group,
            nonfinite,
            groups,
            exclude,
            log_global_norm,
            skip_above,
            kernels,
            scaler,
            detect_desync,
            overlap,
        )
        # The state is updated in place, which autograd's inference mode would forbid ever after.
        with torch.inference_mode(False), torch.no_grad():
            self._build(construct(target, arguments))

    def _build(self, made: Construction) -> None:
        self._made = made
        self.layout: Layout = made.layout
        self.device = made.device
        self.kernels = made.kernels
        self.pp_group = made.pp_group
        self.process_group = made.process_group
        self.scaler = made.scaler
        if made.scaler is not None:
            self.nonfinite = "skip"
        self.may_skip = self.nonfinite == "skip" or self.skip_above < math.inf

        world = dist.get_world_size(made.process_group) if dist.is_available() and dist.is_initialized() else 1
        stages = 1 if made.pp_group is None else made.pp_group.size()
        self._overlap = Overlap(made) if made.overlap and world > 1 else None
        self._plan: ReductionPlan | Overlap = self._overlap or _plan(made, world, stages)
        self._clipped = ClippedGradients()
        self._detector = DesyncDetector(self._standing, made.device) if made.detect_desync else None
        check_cover(made.layout, self._plan, made.process_group)
        self._pipeline = PipelineReducer(made.pp_group) if stages > 1 else None
        self._partial = PartialReducer(made.layout.tensors)
        self._t = torch.zeros((), dtype=torch.int64, device=self.device)
        self._calls = 0
        self._domains = make_domains(made.rules, made.layout, self.device)
        self._totals = Totals(
            self._domains,
            torch.tensor(made.counted, dtype=torch.bool, device=self.device),
            self._plan,
            self._pipeline,
            self._sum_over_stages,
            zero=self.nonfinite == "zero",
            may_skip=self.may_skip,
        )
        shard_scope = {i for d in self._domains if d.policy.rule_scope == "shard" for i in d.indices}
        self._any_shard_scope = bool(shard_scope)
        self._shard_scope = torch.tensor(
            [i in shard_scope for i in range(len(made.layout))], dtype=torch.bool, device=self.device
        )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError(
            "a GradClipper cannot be copied: it would clip the original's gradients. Construct another one from the copied "
            "model, and load_state_dict(clipper.state_dict())"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a GradClipper holds process groups and cannot be pickled: save clipper.state_dict()")

    # -------------------------------------------------------------------------------------------------------- a step

    @torch.no_grad()
    def clip_(self) -> ClipReport:
        """Clip all gradients in place. Call it once per optimizer step, on every rank, after backward (and unscaling).

        Returns:
            The report, also kept as ``last_report``.

        Raises:
            RuntimeError: with ``scaler``: the gradients are not unscaled yet.
            DesyncError: with ``detect_desync``: ranks are out of step. On the CPU before anything is clipped; elsewhere at
                the call after, so that the host need not wait.
            EarlyGradientError: with ``overlap``: see `last_backward`.
            NonFiniteGradError: with ``nonfinite="raise"``.
            LayoutError: parameters were replaced since the construction.
        """
        overflow = None if self.scaler is None else found_inf(self.scaler, self.device)
        if self._detector is not None:
            self._detector.raise_if_found()
        if self._overlap is not None:
            self._overlap.raise_if_found()
        self._partial.reduce_(self.layout.tensors)
        shards = [tensor.read() for tensor in self.layout]
        num_grads = sum(shard is not None for shard in shards)
        if self._calls == 0 or num_grads == 0:
            self._made.check_not_stale()
        self._totals.finish()
        measured = self._measure(shards)
        totals, flag, skip = self._find_totals(measured, overflow)
        if self._overlap is not None:
            self._overlap.judge()
        if self.scaler is not None:
            tell(self.scaler, skip)
        if self.nonfinite == "raise":
            flag = any_rank(flag, self.process_group)
            if bool(flag):
                raise_nonfinite(self.layout, measured.local, self.process_group)

        scales, uniform_scales = self._decide(measured, totals, skip)
        self._calls += 1
        # With "zero" a faulty tensor has a scale of its own, 0.
        uniform = (
            len(self._domains) == 1 and self._domains[0].policy.rule_scope == "global" and self.nonfinite != "zero"
        )
        self.kernels.scale_(shards, scales, uniform=uniform)
        if self.nonfinite == "zero":
            # Not where the step is to be skipped, for skip_above: then nothing is touched.
            zeroed = measured.bad if not self.may_skip else torch.logical_and(measured.bad, torch.logical_not(skip))
            self.kernels.zero_where_(shards, zeroed)
        if self._detector is not None:
            self._clipped.remember(self.layout)
        self.last_report = ClipReport(
            names=self.layout.names,
            tensor_norms=measured.norms.float(),
            scales=scales.float(),
            nonfinite=flag,
            skip=skip,
            num_grads=num_grads,
            _global_norms=self._totals.report(measured, totals, scales, uniform_scales, asked=self.log_global_norm),
        )
        return self.last_report

    def last_backward(self) -> contextlib.AbstractContextManager[None]:
        """``with clipper.last_backward(): loss.backward()``, around the last backward of a step: with ``overlap``, norms of
        the tensors that FSDP2 has done with are measured and reduced while it runs. Otherwise it does nothing.

        Gradients must not be changed between it and `clip_`. It may be left out, on any step and on any rank. Under pipeline
        parallelism it goes around ``schedule.step()``.

        Raises:
            EarlyGradientError: not here, but from `clip_`: a gradient is not the one that was measured. On the CPU before
                anything is clipped; elsewhere at the call after, so that the host need not wait.
        """
        return contextlib.nullcontext() if self._overlap is None else self._overlap.backward()

    def _measure(self, shards: Sequence[Tensor | None]) -> Measured:
        """Norms of the shards and, if anything this step needs them, of the whole tensors."""
        overlap = self._overlap
        local = overlap.measure(shards) if overlap else self.kernels.power_sums(shards, 2.0, self.device)
        if self._reduces():
            sums = local
            if self.nonfinite == "zero" and self._any_shard_scope:
                # Per shard: a faulty shard is left out, the tensor's other shards are not.
                sums = torch.where(self._shard_scope & is_nonfinite(local), 0.0, local)
            whole = self._reduce(sums).sqrt()
            norms = torch.where(self._shard_scope, local.sqrt(), whole) if self._any_shard_scope else whole
        else:
            whole, norms = None, local.sqrt()
        bad = is_nonfinite(norms)
        if self.nonfinite == "zero":
            clean = torch.where(bad, 0.0, norms)
            whole = None if whole is None else torch.where(is_finite(whole), whole, 0.0)
            return Measured(local, whole, norms, clean, bad)
        return Measured(local, whole, norms, norms, bad)

    def _reduce(self, sums: Tensor) -> Tensor:
        """The shards' squared norms added over the norm groups; what tells whether ranks are in step goes with them."""
        riders = None
        if self._detector is not None and self._plan.stages:
            # Scope "shard" is left out: there each rank remembers something else.
            common = [value for d in self._domains if d.policy.rule_scope != "shard" for value in d.state.values()]
            riders = self._detector.riders(self._calls, self._clipped.all_clipped(self.layout), [self._t, *common])
        added, arrived = self._plan.reduce_with(sums, riders)
        if self._detector is not None and riders is not None:
            self._detector.judge(riders, arrived)
        return added

    def _sum_over_stages(self, sums: Tensor) -> Tensor:
        if self._pipeline is None:
            return sums
        if self._detector is None and self._overlap is None:
            return self._pipeline.sum(sums)
        riders = flag = sums.new_empty(0)
        if self._detector is not None:  # stages have states of their own
            riders = self._detector.riders(self._calls, self._clipped.all_clipped(self.layout))
        if self._overlap is not None:
            flag = self._overlap.flag
        added = self._pipeline.sum(torch.cat([sums, riders, flag]))
        added, their_riders, their_flag = torch.split(added, [len(sums), len(riders), len(flag)])
        if self._overlap is not None:
            self._overlap.hear(their_flag)
        if self._detector is not None:
            self._detector.judge(riders, [(self.pp_group, their_riders)])
        return added

    def _standing(self) -> Standing:
        again = self._clipped.all_clipped(self.layout)
        return Standing(self._calls, again, self.layout.names, shared_state(state.snapshot(self)))

    def check_in_sync(self) -> None:
        """Compare all ranks' step and state, whatever the layout. Collective over `process_group`; reads the state.

        For now and then (after loading a checkpoint, every thousand steps). ``detect_desync=True`` does the same at
        each step and for free, but only where there is a packed vector to ride along with: not under DDP, nor, after
        AdaGC's warm-up, from one pipeline stage to another.

        Raises:
            DesyncError: the same on every rank, naming the ranks and the first tensor whose state differs.
        """
        if distributed():
            compare(self._standing(), self.process_group)

    def _needs_total(self, domain: Domain) -> bool:
        # Where steps may be skipped the host cannot know how many were, so how long the warm-up lasts; and the stages
        # talk anyway, to skip together.
        return self.may_skip or domain.policy.needs_global_norm(self._calls + 1)

    def _reduces(self) -> bool:
        """Whether this step needs norms of whole tensors. Known to the host, the same on every rank."""
        return (
            not self._plan.stages
            or self._overlap is not None
            or self.may_skip
            or self.log_global_norm
            or any(d.policy.rule_scope == "tensor" or self._needs_total(d) for d in self._domains)
        )

    def _find_totals(self, measured: Measured, overflow: Tensor | None) -> tuple[list[Tensor | None], Tensor, Tensor]:
        """Global norm of each domain that needs one, the non-finite flag, and whether the step is to be skipped.

        `overflow`: whether a GradScaler will skip the step on this rank.

        Pipeline stages ask each other with one number a domain and one for the flag.
        """
        flag = measured.bad.any()
        needed = [self._needs_total(d) for d in self._domains]
        if self.may_skip and measured.whole is not None:
            flag = is_nonfinite(measured.whole).any()
        if overflow is not None:
            flag = torch.logical_or(flag, overflow)  # also of gradients that the clipper does not look at
        if not any(needed):
            return [None] * len(needed), flag, torch.zeros_like(flag)
        sums = self._sum_over_stages(torch.stack([*self._totals.squares(measured), flag.double()]))
        *squared, flags = sums.unbind()
        totals = [total.sqrt() if need else None for total, need in zip(squared, needed, strict=True)]
        skip = torch.zeros_like(flag)
        if self.may_skip:
            flag = flags > 0
            if self.nonfinite == "skip":
                skip = flag
            if self.skip_above < math.inf:
                # A NaN compares false: what a non-finite norm does is for `nonfinite` to say.
                skip = torch.logical_or(skip, torch.stack(squared).sum() > float(self.skip_above) ** 2)
        return totals, flag, skip

    def _decide(
        self, measured: Measured, totals: list[Tensor | None], skip: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Run the policies: scales, float64 [n], and the one scale of each domain that has one; updates the state."""
        uniform: list[Tensor | None] = []
        ok = torch.logical_not(skip) if self.may_skip else None
        t = self._t + 1
        scales = torch.ones(len(self.layout), dtype=torch.float64, device=self.device)
        olds, news = [self._t], [t]
        for domain, total in zip(self._domains, totals, strict=True):
            if domain.policy.rule_scope == "global":
                assert total is not None
                elements = total.unsqueeze(0)
            else:
                elements = measured.clean.index_select(0, domain.index)
            domain_scales, new_state = domain.policy.step(domain.state, elements, total, t)
            scales.index_copy_(0, domain.index, domain_scales.expand(len(domain.indices)))
            one = self._totals.one_scale(domain, total) and domain_scales.numel() > 0
            uniform.append(domain_scales.unbind()[0] if one else None)
            # What a policy no longer returns (the record of a warm-up that is over) is let go.
            domain.state = {name: value for name, value in domain.state.items() if name in new_state}
            olds += domain.state.values()
            news += [new_state[name] for name in domain.state]
        if ok is not None:
            news = [torch.where(ok, new, old) for new, old in zip(news, olds, strict=True)]
        # Copied into place: the state's memory never moves, as a captured CUDA graph needs it.
        torch._foreach_copy_(olds, news)
        if self.nonfinite == "zero":
            scales = torch.where(measured.bad, 0.0, scales)
        scales, uniform = self._totals.clip_result(measured, totals, scales, uniform)
        if ok is not None:
            scales = torch.where(ok, scales, 1.0)
            uniform = [None if scale is None else torch.where(ok, scale, 1.0) for scale in uniform]
        return scales, uniform

    # --------------------------------------------------------------------------------- optimizers, state, explanation

    def attach(self, *optimizers: torch.optim.Optimizer) -> Attachment:
        """Clip in a pre-hook of ``optimizer.step``, so that the training loop stays as it is.

        With several optimizers (Muon and AdamW) gradients are clipped once a round, before the first of them steps; an
        optimizer whose gradients have changed since the last clip starts a new round. Where steps may be skipped
        (``nonfinite="skip"``, ``skip_above``) a fused optimizer gets the flag as its ``found_inf``; for others the flag is
        read on the host and the gradients are dropped, so that their step does nothing.

        Returns:
            A handle; ``handle.remove()`` detaches.

        Raises:
            LayoutError: an optimizer holds parameters this clipper does not know.
            RuntimeError: already attached. At a step: a closure, or gradients that are still scaled by a GradScaler.
        """
        return Attachment(self, optimizers)

    def explain(self) -> str:
        """A table: tensor, shape, placement, norm groups, collectives, policy."""
        return explain_table(self)

    def state_dict(self) -> dict[str, Any]:
        """State by FQN, with the policies' configuration: what this rank's stage knows. See `dist_clip.state`.

        For ``torch.save``. A clipper is also a Stateful of `torch.distributed.checkpoint`: put it into what is saved and
        loaded, beside model and optimizer.
        """
        return state.state_dict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> None:
        """Load what `state_dict` returned, under this layout or another. Nothing changes unless all of it fits.

        Args:
            strict: with False, missing and unknown tensors and changed hyper-parameters are a warning that names them: what
                fits is loaded, the rest starts afresh. With other rules than those that made the state, all of it does.

        Raises:
            ValueError: another format, other policies, missing or unknown tensors, each named.
        """
        state.load_state_dict(self, state_dict, strict=strict)

    @property
    def steps(self) -> int:
        """Steps taken (with ``nonfinite="skip"``: that were not skipped). Reads a device tensor."""
        return int(self._t)

    def set_steps(self, steps: int) -> None:
        self._calls = steps
        self._t.fill_(steps)

    @property
    def domains(self) -> Sequence[Domain]:
        """The policies with their tensors and states, the default last."""
        return self._domains

    @property
    def reduction_plan(self) -> ReductionPlan | Overlap:
        return self._plan

    @property
    def known_parameters(self) -> frozenset[int]:
        """ids of all parameters of the target, excluded ones included."""
        return self._made.known

    @property
    def names_elsewhere(self) -> frozenset[str]:
        """FQNs of the tensors that other pipeline stages hold."""
        return self._made.elsewhere

    def policy_for(self, name: str) -> Policy:
        """The policy that rules a tensor of that FQN, of this stage or another."""
        return rule_for(self._made.rules, name)[1]

    def policy_label(self, index: int) -> str:
        """The policy of tensor `index`, with its scope."""
        policy = next(d.policy for d in self._domains if index in d.indices)
        return f"{type(policy).__name__}[{policy.rule_scope}]"

    def counts(self, index: int) -> bool:
        """Whether this stage's copy of tensor `index` counts in the global norm."""
        return self._made.counted[index]


def _plan(made: Construction, world: int, stages: int) -> ReductionPlan:
    whole = made.layout.stage_group
    if whole is None and world > 1 and made.pp_group is None:
        whole = made.process_group or dist.group.WORLD
    return ReductionPlan(
        made.layout,
        process_group=whole,
        copies_among=world // stages,
        shared=made.elsewhere,
        meet=made.detect_desync,
    )
