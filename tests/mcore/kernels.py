"""Stands in for the CUDA kernels of mamba_ssm and fla in plain torch, so that Megatron's modules run, with their marks.

Only the kernels: the projections, the convolution's weights, A_log, D, dt_bias, the norm and all their attributes are made
by Megatron's MambaMixer and GatedDeltaNet.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedRMSNorm(nn.Module):
    """mamba_ssm.ops.triton.layernorm_gated.RMSNorm, without a gate: a root-mean-square norm within groups."""

    def __init__(self, hidden_size: int, eps: float, group_size: int, **_: Any) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, self.group_size))
        return (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight


def split_conv_scan(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    D: Tensor,
    *,
    headdim: int,
    ngroups: int,
    **_: Any,
) -> Tensor:
    """mamba_ssm.ops.triton.ssd_combined.mamba_split_conv1d_scan_combined, one time step after the other."""
    heads = len(dt_bias)
    inner = heads * headdim
    z, xbc, dt = zxbcdt.split([inner, len(conv_weight), heads], -1)
    length = xbc.shape[1]
    padded = F.pad(xbc.transpose(1, 2), (conv_weight.shape[1] - 1, 0))
    xbc = F.silu(F.conv1d(padded, conv_weight[:, None], conv_bias, groups=len(conv_weight))).transpose(1, 2)
    x, b, c = xbc.split([inner, (len(conv_weight) - inner) // 2, (len(conv_weight) - inner) // 2], -1)
    x = x.unflatten(-1, (heads, headdim))
    b, c = (each.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, 2) for each in (b, c))
    dt = F.softplus(dt + dt_bias)
    state, out = x.new_zeros(len(x), heads, headdim, b.shape[-1]), []
    for t in range(length):
        decay = torch.exp(dt[:, t] * a)[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], b[:, t])
        out.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]) + D[:, None] * x[:, t])
    return torch.stack(out, 1).flatten(-2) * F.silu(z)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, **_: Any) -> tuple[Tensor, None]:
    """fla.modules.convolution.causal_conv1d: x [b, s, d], weight [d, w]."""
    assert activation == "silu"
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=len(weight))).transpose(1, 2), None


def l2norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def gated_delta_rule(*args: Any, **kwargs: Any) -> Any:
    """Megatron's own torch version of fla's kernel, which its deterministic mode uses."""
    from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule(*args, **kwargs)


class LatentAttention:
    """Megatron's local attention where only Transformer Engine's may have keys of another size than the values."""

    def __new__(cls, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> Any:
        from megatron.core.transformer.dot_product_attention import DotProductAttention

        assert k_channels == v_channels
        return DotProductAttention(*args, **kwargs)


KERNELS: dict[str, dict[str, Any]] = {
    "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": GatedRMSNorm},
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": None,  # for inference
        "mamba_split_conv1d_scan_combined": split_conv_scan,
    },
    "fla.modules.convolution": {"causal_conv1d": causal_conv1d},
    "fla.modules.l2norm": {"l2norm": l2norm},
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": gated_delta_rule},
}


def install() -> None:
    """Import Megatron's modules as if the kernels were there. The packages are gone again when this returns."""
    missing = {path: contents for path, contents in KERNELS.items() if find_spec(path.split(".")[0]) is None}
    made = []
    for path, contents in missing.items():
        names = path.split(".")
        for package in (".".join(names[: end + 1]) for end in range(len(names))):
            if package not in sys.modules:
                sys.modules[package] = ModuleType(package)
                made.append(package)
        vars(sys.modules[path]).update(contents)
    try:
        from megatron.core.ssm import gated_delta_net, mamba_block, mamba_mixer  # noqa: F401
    finally:
        for package in made:
            del sys.modules[package]
    from megatron.core.post_training.modelopt.layers import Linear
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    if not isinstance(multi_latent_attention.TELinear, type):  # a mock, of which nothing can be asked to be an instance
        multi_latent_attention.TELinear = type("TELinear", (), {})
    if multi_latent_attention.Linear is None:  # newer versions know ModelOpt's layers beside Transformer Engine's only
        multi_latent_attention.Linear = Linear
    # The last norm is Transformer Engine's, whatever the layers' are.
    sys.modules[mamba_block.MambaStack.__module__].TENorm = WrappedTorchNorm  # type: ignore[attr-defined]
