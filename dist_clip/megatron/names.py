"""Global names of tensors, the same in every pipeline stage, model chunk and expert-parallel rank."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor, nn

from dist_clip.errors import LayoutError
from dist_clip.megatron import compat

TIED_EMBEDDING = "embedding.word_embeddings.weight"

_EXPERT_NUMBERS = (
    re.compile(r"(\.experts\.local_experts\.)(\d+)(\..+)"),  # SequentialMLP
    re.compile(r"(\.experts\.linear_fc\d\.(?:weight|bias))(\d+)()$"),  # TEGroupedMLP
)


def global_names(
    chunks: Sequence[nn.Module], ep: dist.ProcessGroup | None
) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield (global name, owning module, parameter) of each trainable parameter of the chunks, in order and each once.

    Where Megatron-FSDP has put a DTensor in its place, the parameter is the one that Megatron made and marked.

    Layers get their number in the whole model (`layer_number`, which Megatron counts over all stages), and experts
    their number over all expert-parallel ranks. The tied copy of the word embedding gets the embedding's name. The
    leading ``module.`` of wrappers is removed.

    Args:
        ep: the expert-parallel group; None without one.

    Raises:
        LayoutError: a name from which an expert's number cannot be read.
    """
    seen: set[int] = set()
    for chunk in chunks:
        numbers = dict(_layer_numbers(chunk))
        experts = _experts_before(chunk, ep)
        for prefix, module in chunk.named_modules():
            for leaf, param in module._parameters.items():
                if param is None or not param.requires_grad:
                    continue
                param = compat.model_param(param)
                if id(param) in seen:
                    continue
                seen.add(id(param))
                name = f"{prefix}.{leaf}" if prefix else leaf
                yield _global(name, param, numbers, experts), module, param


def _global(name: str, param: Tensor, numbers: dict[str, int], experts: int) -> str:
    for layer, number in numbers.items():
        if name.startswith(layer + "."):
            name = f"{layer.rsplit('.', 1)[0]}.{number}{name[len(layer) :]}"
            break
    while name.startswith("module."):
        name = name.removeprefix("module.")
    if compat.is_tied_copy(param):
        # The prefix, a multimodal model's, stays, because both copies belong to the same language model.
        return re.sub(r"(output_layer\.weight|embedding\.word_embeddings\.weight)$", TIED_EMBEDDING, name)
    if compat.is_routed_expert(name) and compat.is_expert_parallel(param):
        for pattern in _EXPERT_NUMBERS:
            numbered = pattern.sub(lambda m: f"{m[1]}{int(m[2]) + experts}{m[3]}", name)
            if pattern.search(name):
                return numbered
        raise LayoutError(
            f"{name!r} is split over expert-parallel ranks, but its name does not tell which expert it is: dist_clip knows "
            "SequentialMLP (local_experts.N) and TEGroupedMLP (linear_fc1.weightN)"
        )
    return name


def _layer_numbers(chunk: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield (prefix of a layer, its index in the whole model), without layers of multi-token prediction.

    Megatron counts those by themselves.
    """
    for prefix, module in chunk.named_modules():
        number = getattr(module, "layer_number", None)
        if isinstance(number, int) and re.search(r"(^|\.)layers\.\d+$", prefix) and ".mtp." not in f".{prefix}.":
            yield prefix, number - 1


def _experts_before(chunk: nn.Module, ep: dist.ProcessGroup | None) -> int:
    """Return how many experts of a layer the lower expert-parallel ranks hold."""
    if ep is None or ep.size() == 1:
        return 0
    for module in chunk.modules():
        total = getattr(getattr(module, "config", None), "num_moe_experts", None)
        if total:
            return int(ep.rank()) * (int(total) // int(ep.size()))
    return 0
