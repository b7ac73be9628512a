"""FSDP2 (fully_shard): which gradients it reduces together, so that they are final at once."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def reduced_together(modules: Iterable[nn.Module]) -> tuple[tuple[Tensor, ...], ...]:
    """The sharded parameters of each of FSDP2's parameter groups, by module.

    Read off private attributes: nothing public says which parameters one reduce-scatter serves.
    """
    groups = {}
    for module in modules:
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            several = getattr(state, "_fsdp_param_groups", None)
            if several is None:  # before torch 2.12 a module had one at most
                several = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
            groups.update({id(group): group for group in several})  # modules wrapped together share theirs
    return tuple(tuple(param.sharded_param for param in group.fsdp_params) for group in groups.values())
