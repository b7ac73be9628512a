"""What torchtitan 0.3 lacks to train on CPUs, put in its place. Import this module before torchtitan.

torchtitan takes "cuda" where it finds no accelerator, asks the device for memory and properties that a CPU does not have,
and needs a nightly build of torch for two calls: torch.distributed.set_timeout, and a pipeline schedule's step that takes
microbatches. None of this concerns clipping, so what the tests of this folder find holds on accelerators as well; but the
pipeline's step here is a stand-in. Not covered: CUDA graphs, nccl, torchtitan's default spmd_backend.
"""

from __future__ import annotations

import time
import types
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import schedules

torch._utils._get_available_device_type = lambda: "cpu"

for _name, _stand_in in {
    "set_device": lambda device: None,
    "get_device_name": lambda device=None: "cpu",
    "get_device_properties": lambda device=None: types.SimpleNamespace(total_memory=2**34),
    "memory_stats": lambda device=None: {},
    "reset_peak_memory_stats": lambda: None,
    "empty_cache": lambda: None,
}.items():
    setattr(torch.cpu, _name, _stand_in)

from torchtitan import trainer  # noqa: E402
from torchtitan.distributed import fsdp, utils  # noqa: E402
from torchtitan.models.llama3 import parallelize  # noqa: E402

utils.set_pg_timeouts = lambda timeout, parallel_dims: None
trainer.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})  # for 2 s after each run

_apply_fsdp = fsdp.apply_fsdp_to_decoder


def _apply_fsdp_of_sums(model: Any, *args: Any, **kwargs: Any) -> None:
    _apply_fsdp(model, *args, **kwargs)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that also multiplies


parallelize.apply_fsdp_to_decoder = _apply_fsdp_of_sums


def _step_of_microbatches(
    self: Any, *, arg_mbs: Any, kwarg_mbs: Any, target_mbs: Any, losses: Any, loss_kwargs: Any, return_outputs: bool
) -> None:
    for stage in getattr(self, "_stages", None) or [self._stage]:
        stage.has_backward = self._has_backward
        stage.clear_runtime_states()
    self._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, losses, return_outputs, loss_kwargs=loss_kwargs)


schedules.PipelineScheduleSingle.step = _step_of_microbatches
schedules.PipelineScheduleMulti.step = _step_of_microbatches
