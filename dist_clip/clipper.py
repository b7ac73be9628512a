"""GradClipper: gradients -> norms -> reduction -> policy -> scales -> report, and the state that lasts between steps."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip import kernels, state
from dist_clip.agreement import Announcement, agree
from dist_clip.attachment import Attachment
from dist_clip.domains import Domain, Measured, NonFinite, checked_rules, make_domains
from dist_clip.errors import LayoutError
from dist_clip.explain import explain_table
from dist_clip.faults import any_rank, raise_nonfinite
from dist_clip.groups import checked_group, stage_of
from dist_clip.layout import Layout
from dist_clip.policies.base import Policy, is_finite, is_nonfinite
from dist_clip.readers import PartialReducer, build_layout, named_parameters
from dist_clip.reduction import PipelineReducer, ReductionPlan
from dist_clip.report import ClipReport


class GradClipper:
    """Clips gradients in place, knowing how they are sharded.

    Construct it where you construct the optimizer, after the model was parallelised. Construction is collective: every
    rank of `process_group` takes part, and layouts that differ are an error on all of them.

    Args:
        target: the model, a list of modules (pipeline chunks), (name, parameter) pairs, parameters, optimizer
            param_groups or an optimizer. Names key the state: with modules they are the same under every layout.
        policy: `GlobalNorm`, `AdaGC` or `ZClip`.
        pp_group: the process group across pipeline stages, if there are any. A tensor that several stages hold under one
            name (tied embeddings) counts once in the global norm.
        process_group: the ranks that train this model; default all.
        nonfinite: what a NaN or Inf norm does to gradients (it never enters the state). "propagate": what the formulas
            give, as in torch. "zero": that tensor's gradient becomes 0. "skip": nothing is clipped or remembered and
            ``report.nonfinite`` tells every rank that the step is to be skipped. "raise": `NonFiniteGradError` on every
            rank, before anything is touched; shares and reads the flag, so it costs a scalar all-reduce and a host sync.
        groups: {FQN pattern: policy}; the first match wins, the rest go to `policy`. Each has a global norm of its own.
        exclude: FQN patterns (`fnmatch`) of tensors that are neither measured nor clipped.
        log_global_norm: reduce the global norm for the report also where the policy has no need of it.

    Raises:
        LayoutError: no parameters, all frozen, duplicate names, complex or sparse gradients, a wrong process group,
            patterns that match nothing, ranks that differ. The same on every rank.
        TypeError: arguments of the wrong type.
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
    ) -> None:
        rules = checked_rules(policy, nonfinite, groups, exclude)
        if not isinstance(log_global_norm, bool):
            raise TypeError(f"log_global_norm must be a bool, got {log_global_norm!r}")
        self.policy = policy
        self.nonfinite: NonFinite = nonfinite
        self.log_global_norm = log_global_norm
        self.last_report: ClipReport | None = None
        self.attachment: Attachment | None = None
        self._exclude = tuple(exclude)
        process_group = checked_group(process_group, "process_group")

        if not isinstance(target, (torch.nn.Module, torch.optim.Optimizer, Tensor, Mapping)) and isinstance(
            target, Iterable
        ):
            target = list(target)  # a generator can be read once
        layout, announcement = self._announce(target, rules, pp_group)
        everyone = agree(announcement, process_group, pp_group)
        assert layout is not None  # agree() raises what went wrong above
        self._known = frozenset(id(param) for _, param in named_parameters(target))
        self.layout: Layout = layout
        self.pp_group = pp_group
        self.process_group = process_group
        self.device = layout.device

        world = dist.get_world_size(process_group) if dist.is_initialized() else 1
        stages = 1 if pp_group is None else pp_group.size()
        whole = None if pp_group is not None or world == 1 else (process_group or dist.group.WORLD)
        self._plan = ReductionPlan(layout, process_group=whole, copies_among=world // stages)
        self._pipeline = PipelineReducer(pp_group) if stages > 1 else None
        self._partial = PartialReducer(layout.tensors)
        self._counted = _counted_here(layout, announcement.stage, everyone)
        self._counts = torch.tensor(self._counted, dtype=torch.bool, device=self.device)
        self._t = torch.zeros((), dtype=torch.int64, device=self.device)
        self._calls = 0
        self._domains = make_domains(rules, layout, staged=self._pipeline is not None)
        shard_scope = {i for d in self._domains if d.policy.rule_scope == "shard" for i in d.indices}
        self._any_shard_scope = bool(shard_scope)
        self._shard_scope = torch.tensor(
            [i in shard_scope for i in range(len(layout))], dtype=torch.bool, device=self.device
        )

    # ------------------------------------------------------------------------------------------------- construction

    def _announce(
        self, target: Any, rules: list[tuple[str, Policy]], pp_group: Any
    ) -> tuple[Layout | None, Announcement]:
        """Read the layout; a failure becomes part of what this rank tells the others, so that all of them raise."""
        try:
            pp_group = checked_group(pp_group, "pp_group")
            stage = stage_of(pp_group)
            excluded: set[str] = set()

            def skip(name: str) -> bool:
                hits = {p for p in self._exclude if fnmatch.fnmatchcase(name, p)}
                excluded.update(hits)
                return bool(hits)

            layout = build_layout(target, allow_empty=pp_group is not None, skip=skip)
        except (LayoutError, TypeError, ValueError, RuntimeError) as error:
            return None, Announcement(error=str(error), stage=0)
        patterns = frozenset(self._exclude) | {pattern for pattern, _ in rules[:-1]}
        matched = excluded | {p for p in patterns for name in layout.names if fnmatch.fnmatchcase(name, p)}
        policies = ", ".join(f"{pattern!r}: {rule!r}" for pattern, rule in rules)
        config = (
            f"{policies}; nonfinite={self.nonfinite!r}, log_global_norm={self.log_global_norm}, "
            f"pp_group={'given' if pp_group is not None else None}"
        )
        return layout, Announcement(
            error=None,
            stage=stage,
            tensors=tuple(layout.describe()),
            config=config,
            patterns=patterns,
            matched=frozenset(matched),
            names=layout.names,
            shapes=tuple(t.shape for t in layout),
        )

    # -------------------------------------------------------------------------------------------------------- a step

    @torch.no_grad()
    def clip_(self) -> ClipReport:
        """Clip all gradients in place. Call it once per optimizer step, on every rank, after backward (and unscaling).

        Returns:
            The report, also kept as ``last_report``.
        """
        self._partial.reduce_()
        shards = [tensor.read() for tensor in self.layout]
        measured = self._measure(shards)
        totals, flag = self._totals(measured)
        if self.nonfinite == "raise":
            flag = any_rank(flag, self.process_group)
            if bool(flag):
                raise_nonfinite(self.layout, measured.local, self.process_group)

        scales, uniform_scales = self._decide(measured, totals, flag)
        self._calls += 1
        uniform = len(self._domains) == 1 and self._domains[0].policy.rule_scope == "global"
        kernels.scale_(shards, scales, uniform=uniform)
        if self.nonfinite == "zero":
            kernels.zero_where_(shards, measured.bad)
        global_norm, clipped_global_norm = self._global_norms(measured, totals, scales, uniform_scales)
        self.last_report = ClipReport(
            names=self.layout.names,
            tensor_norms=measured.norms.float(),
            scales=scales.float(),
            global_norm=global_norm,
            clipped_global_norm=clipped_global_norm,
            nonfinite=flag,
            num_grads=sum(shard is not None for shard in shards),
        )
        return self.last_report

    def _measure(self, shards: Sequence[Tensor | None]) -> Measured:
        """Norms of the shards and, if anything this step needs them, of the whole tensors."""
        local = kernels.power_sums(shards, 2.0, self.device)
        if self._reduces():
            sums = local
            if self.nonfinite == "zero" and self._any_shard_scope:
                # Per shard: a faulty shard is left out, the tensor's other shards are not.
                sums = torch.where(self._shard_scope & is_nonfinite(local), 0.0, local)
            whole = self._plan.reduce(sums).sqrt()
            norms = torch.where(self._shard_scope, local.sqrt(), whole) if self._any_shard_scope else whole
        else:
            whole, norms = None, local.sqrt()
        bad = is_nonfinite(norms)
        if self.nonfinite == "zero":
            clean = torch.where(bad, 0.0, norms)
            whole = None if whole is None else torch.where(is_finite(whole), whole, 0.0)
            return Measured(local, whole, norms, clean, bad)
        return Measured(local, whole, norms, norms, bad)

    def _needs_total(self, domain: Domain) -> bool:
        # With "skip" the host cannot know how many steps were skipped, so how long the warm-up lasts; with "skip" the
        # stages talk anyway, to share the flag.
        return self.nonfinite == "skip" or domain.policy.needs_global_norm(self._calls + 1)

    def _reduces(self) -> bool:
        """Whether this step needs norms of whole tensors. Known to the host, the same on every rank."""
        return (
            not self._plan.stages
            or self.nonfinite == "skip"
            or self.log_global_norm
            or any(d.policy.rule_scope == "tensor" or self._needs_total(d) for d in self._domains)
        )

    def _totals(self, measured: Measured) -> tuple[list[Tensor | None], Tensor]:
        """Global norm of each domain that needs one, and the non-finite flag, over all stages where it decides.

        Every rank of a stage takes part in every tensor of it, so global norms follow from the reduced tensor norms;
        only pipeline stages have to ask each other, with one number a domain and one for the flag.
        """
        flag = measured.bad.any()
        needed = [self._needs_total(d) for d in self._domains]
        decides = self.nonfinite == "skip"
        if decides and measured.whole is not None:
            flag = is_nonfinite(measured.whole).any()
        if not any(needed) and not (decides and self._pipeline is not None):
            return [None] * len(needed), flag
        assert measured.whole is not None
        squares = torch.where(self._counts, measured.whole.square(), 0.0)
        sums = torch.stack([*(squares.index_select(0, d.index).sum() for d in self._domains), flag.double()])
        if self._pipeline is not None:
            sums = self._pipeline.sum(sums)
        *squared, flags = sums.unbind()
        if decides and self._pipeline is not None:
            flag = flags > 0
        return [total.sqrt() if need else None for total, need in zip(squared, needed, strict=True)], flag

    def _decide(
        self, measured: Measured, totals: list[Tensor | None], flag: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Run the policies: scales, float64 [n], and the one scale of each domain that has one; updates the state."""
        uniform: list[Tensor | None] = []
        ok = torch.logical_not(flag) if self.nonfinite == "skip" else None
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
            alike = domain.policy.rule_scope == "global" or (total is not None and self.nonfinite != "skip")
            uniform.append(domain_scales.unbind()[0] if alike and domain_scales.numel() else None)
            olds += domain.state.values()
            news += [new_state[name] for name in domain.state]
        if ok is not None:
            news = [torch.where(ok, new, old) for new, old in zip(news, olds, strict=True)]
        # Copied into place: the state's memory never moves, as a captured CUDA graph needs it.
        torch._foreach_copy_(olds, news)
        if ok is not None:
            scales = torch.where(ok, scales, 1.0)
            uniform = [None if scale is None else torch.where(ok, scale, 1.0) for scale in uniform]
        if self.nonfinite == "zero":
            scales = torch.where(measured.bad, 0.0, scales)
        return scales, uniform

    def _global_norms(
        self, measured: Measured, totals: list[Tensor | None], scales: Tensor, uniform: list[Tensor | None]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Global norm before and after clipping, where known without a collective of their own or asked for."""
        sharded_scales = self._any_shard_scope and bool(self._plan.stages)
        if not self.log_global_norm and (self._pipeline is not None or sharded_scales):
            # Other ranks' scales are not known here, but where a domain has one scale it is the same everywhere.
            pairs = [(total, scale) for total, scale in zip(totals, uniform, strict=True) if total is not None]
            if len(pairs) < len(totals):
                return None, None
            before = torch.stack([total.square() for total, _ in pairs]).sum().sqrt().float()
            after = [(total * scale).square() for total, scale in pairs if scale is not None]
            return before, torch.stack(after).sum().sqrt().float() if len(after) == len(pairs) else None
        assert measured.whole is not None
        squares = torch.where(self._counts, measured.whole.square(), 0.0)
        if sharded_scales:
            # Shards of one tensor have scales of their own: the clipped norm needs one more reduction.
            local = torch.where(measured.bad, 0.0, measured.local) if self.nonfinite == "zero" else measured.local
            clipped = torch.where(self._counts, self._plan.reduce(local * scales.square()), 0.0)
        else:
            clipped = torch.where(self._counts, (measured.whole * scales).square(), 0.0)
        sums = torch.stack([squares.sum(), clipped.sum()])
        if self._pipeline is not None:
            sums = self._pipeline.sum(sums)
        norm, clipped_norm = sums.sqrt().float().unbind()
        return norm, clipped_norm

    # --------------------------------------------------------------------------------- optimizers, state, explanation

    def attach(self, *optimizers: torch.optim.Optimizer) -> Attachment:
        """Clip in a pre-hook of ``optimizer.step``, so that the training loop stays as it is.

        With several optimizers (Muon and AdamW) gradients are clipped once a round, before the first of them steps.
        With ``nonfinite="skip"`` a fused optimizer gets the flag as its ``found_inf``; for others the flag is read on
        the host and the gradients are dropped, so that their step does nothing.

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
        """State by FQN, as CPU tensors, with the policies' configuration: what this rank's stage knows."""
        return state.state_dict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned. Nothing changes unless all of it fits.

        Raises:
            ValueError: another format, another policy, missing or unknown tensors, each named.
        """
        state.load_state_dict(self, state_dict)

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
    def reduction_plan(self) -> ReductionPlan:
        return self._plan

    @property
    def known_parameters(self) -> frozenset[int]:
        """ids of all parameters of the target, excluded ones included."""
        return self._known

    def policy_label(self, index: int) -> str:
        """The policy of tensor `index`, with its scope."""
        policy = next(d.policy for d in self._domains if index in d.indices)
        return f"{type(policy).__name__}[{policy.rule_scope}]"

    def counts(self, index: int) -> bool:
        """Whether this stage's copy of tensor `index` counts in the global norm."""
        return self._counted[index]


def _counted_here(layout: Layout, stage: int, everyone: Sequence[tuple[int, Announcement]]) -> list[bool]:
    """Whether this stage's copy of a tensor counts in the global norm: the first stage that holds the name counts."""
    earlier = {name for _, a in everyone if a.stage < stage for name in a.names}
    return [name not in earlier for name in layout.names]
