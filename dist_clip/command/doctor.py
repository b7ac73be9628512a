"""What is here: versions, devices, kernels, backends, and whether a clip works on each device."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch
import torch.distributed as dist
from torch import nn

import dist_clip
from dist_clip.kernels.choice import choose

_PACKAGES = (
    "numpy", "triton", "tyro", "plotly", "jinja2", "tensorboard", "wandb", "mlflow", "megatron-core", "transformers", "trl",
    "accelerate", "lightning", "ai2-olmo-core", "torchtitan",
)  # fmt: skip


def diagnose() -> tuple[str, bool]:
    """Return the findings, and whether clipping works on all devices that are here."""
    lines = [
        f"dist_clip   {dist_clip.__version__}",
        f"torch       {torch.__version__}",
        f"python      {platform.python_version()} ({sys.executable})",
        f"platform    {platform.platform()}",
        f"backends    {', '.join(_backends()) or 'none: torch.distributed is not built in'}",
        "",
        "packages (only torch and numpy are needed; the others are for adapters, writers and kernels)",
        *(f"  {name:<14} {_version(name)}" for name in _PACKAGES),
        "",
        "devices",
    ]
    healthy = True
    for device in _devices():
        works, text = _try(device)
        healthy &= works
        lines.append(f"  {device!s:<8} {text}")
    lines += ["", "clipping works here" if healthy else "clipping does not work here: see the device above"]
    return "\n".join(lines), healthy


def _backends() -> list[str]:
    if not dist.is_available():
        return []
    checks = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    return [name for name, available in checks.items() if available()]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    kinds = [torch.device("cpu")]
    if torch.cuda.is_available():
        kinds += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return kinds


def _try(device: torch.device) -> tuple[bool, str]:
    """Return whether a clip gives the scale of the formula on this device, and what was found."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    try:
        kernels = choose(None, device)
        model = nn.Linear(4, 4, bias=False, device=device)
        model.weight.grad = torch.full_like(model.weight, 3.0)  # norm 12
        report = dist_clip.GradClipper(model, dist_clip.GlobalNorm(6.0)).clip_()
        left = float(model.weight.grad.double().norm())
        if abs(left - 6.0) > 1e-4 or abs(float(report.tensor_norms[0]) - 12.0) > 1e-4:
            return (
                False,
                f"{name}: a gradient of norm 12 was measured as {report.tensor_norms[0]:g} and clipped to {left:g}",
            )
    except Exception as error:
        return False, f"{name}: {type(error).__name__}: {error}"
    return True, f"{name}: works; kernels: {kernels.name} ({kernels.why})"
