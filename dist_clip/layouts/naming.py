"""Fully qualified names (FQNs) of the parameters of modules, parameter lists and optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_clip.errors import LayoutError

# Submodule names that wrappers put between the model author's own: torch.compile, activation checkpointing, FSDP1, Fabric.
_WRAPPER_NAMES = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"})


def named_parameters(target: Any) -> list[tuple[str, Tensor]]:
    """Return the (FQN, parameter) pairs of `target`, each parameter once under its first name.

    Args:
        target: a module, a list of modules, (name, parameter) pairs, parameters, optimizer param_groups or an
            optimizer.

    Raises:
        LayoutError: `target` has no parameters of this form, or gives one name to two of them.
    """
    if isinstance(target, nn.Module):
        return _unique(_module_parameters(target))
    if isinstance(target, torch.optim.Optimizer):
        return _unique(_unwrapped(_param_group_parameters(target.param_groups)))
    if isinstance(target, Tensor):
        raise LayoutError("pass a list of parameters or a module, not a single tensor")
    if isinstance(target, Mapping):
        return _unique(_unwrapped(list(target.items())))
    try:
        items = list(target)
    except TypeError:
        raise LayoutError(
            f"cannot find parameters in {type(target).__name__!r}: pass a module, a list of modules, named_parameters(), "
            "parameters(), optimizer.param_groups or an optimizer"
        ) from None
    if items and all(isinstance(item, nn.Module) for item in items):
        return _unique([pair for module in items for pair in _module_parameters(module)])
    if items and all(isinstance(item, Mapping) for item in items):
        return _unique(_unwrapped(_param_group_parameters(items)))
    if all(isinstance(item, tuple) and len(item) == 2 for item in items):
        return _unique(_unwrapped(items))
    return _unique([(f"param_{i}", item) for i, item in enumerate(items)])


def modules_of(target: Any) -> list[nn.Module]:
    """Return all modules reachable from `target` if it is a module or a list of them, else none."""
    if isinstance(target, nn.Module):
        return list(target.modules())
    if isinstance(target, (list, tuple)) and target and all(isinstance(m, nn.Module) for m in target):
        return [sub for module in target for sub in module.modules()]
    return []


def _module_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, param in module._parameters.items():
        if param is not None:
            yield prefix + name, param
    data_parallel = isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or (
        type(module).__name__ == "MegatronFSDP"
    )
    for name, child in module._modules.items():
        if child is not None:
            wrapper = name in _WRAPPER_NAMES or (data_parallel and name == "module")
            yield from _module_parameters(child, prefix if wrapper else f"{prefix}{name}.")


def _param_group_parameters(groups: Iterable[Mapping[str, Any]]) -> list[tuple[str, Tensor]]:
    pairs: list[tuple[str, Tensor]] = []
    for group in groups:
        if "params" not in group:
            raise LayoutError(f"a parameter group needs the key 'params', got the keys {sorted(group)}")
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        names = group.get("param_names") or [None] * len(params)
        for name, param in zip(names, params, strict=True):
            if isinstance(param, tuple):
                name, param = param
            pairs.append((name if name is not None else f"param_{len(pairs)}", param))
    return pairs


def without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES)


def _unwrapped(pairs: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Return the pairs with the names that they would have without wrappers.

    A leading ``module.`` is taken for DDP's wrapper only if all names have it; else it may be an attribute of that
    name.
    """
    if not all(isinstance(name, str) for name, _ in pairs):
        return pairs  # _unique raises for them
    names = [without_wrappers(name) for name, _ in pairs]
    if names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return [(name, param) for name, (_, param) in zip(names, pairs, strict=True)]


def _unique(pairs: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    by_name: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, param in pairs:
        if not isinstance(name, str) or not isinstance(param, Tensor):
            raise LayoutError(f"expected parameters, got {type(param).__name__} under the name {name!r}")
        if id(param) in seen:
            continue
        if name in by_name:
            raise LayoutError(
                f"duplicate name {name!r} for two different parameters: names key the clipper's state; when several "
                "modules are passed, pass (name, parameter) pairs with distinct prefixes instead"
            )
        by_name[name] = param
        seen.add(id(param))
    return list(by_name.items())
