"""Makes the real megatron-core run on CPU with gloo, for tests and for trying things out.

    from launch import megatron_cpu
    megatron_cpu.install()             # before the first import of megatron.core
    import megatron.core
    megatron_cpu.patch_megatron()      # after it

    python -m launch.megatron_cpu pretrain_gpt.py ...   # python -m dist_clip.megatron, for Megatron-LM's own scripts

megatron-core asks for CUDA at every turn: ``install`` sends ``device="cuda"`` to the CPU, makes streams and events do
nothing, and gives gloo the two collectives that it lacks; ``patch_megatron`` mends what assumes CUDA, or Transformer
Engine, inside it. Numbers are those that a GPU would give, up to rounding; only speed is not. Works with 0.16.1, 0.19
and the main branch (0.20).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def install() -> None:
    """Redirect torch.cuda to the CPU for the rest of this process."""
    # Megatron fuses with torch.compile, which would take minutes here.
    torch._dynamo.config.disable = True
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda device: None
    cuda.synchronize = cuda.empty_cache = lambda *args, **kwargs: None
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _STREAM
    cuda.set_stream = lambda *args: None
    cuda.stream = lambda *args: contextlib.nullcontext()
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.default_generator.get_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.default_generator.set_state(
        state
    )
    cuda.get_device_capability = lambda *args: (8, 0)
    cuda.get_device_properties = lambda *args: SimpleNamespace(name="CPU", major=8, minor=0, multi_processor_count=1)
    cuda.max_memory_allocated = cuda.memory_allocated = lambda *args, **kwargs: 0
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: None
    _complete_gloo()
    _CudaToCpu().__enter__()  # type: ignore[no-untyped-call]  # for the life of this thread, in which CPU autograd runs


def patch_megatron() -> None:
    """Mend megatron-core where it takes CUDA or Transformer Engine for granted. After ``import megatron.core``."""
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter
    from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import torch_norm
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.default_generator.get_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.default_generator.set_state(state)
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # without Transformer Engine the name is never defined

    # torch's norms are refused under sequence parallelism only because nobody marks their parameters: mark them.
    make_norm = torch_norm.WrappedTorchNorm.__new__

    def marked_norm(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        sequence_parallel, config.sequence_parallel = config.sequence_parallel, False
        try:
            norm = make_norm(cls, config, hidden_size, eps, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
        for param in norm.parameters():
            param.sequence_parallel = sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = marked_norm

    # Passes over tensors that are not .is_cuda, and so leaves the split sizes of an all-to-all as tensors.
    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = moe_utils.maybe_move_tensor_to_cpu = moved
    wait_for_gathers(param_and_grad_buffer)
    _shard_fully_on_cpu()
    if not isinstance(getattr(mcore_fsdp_adapter, "TELinear", type), type):
        mcore_fsdp_adapter.TELinear = type(
            "TELinear", (), {}
        )  # a mock, of which nothing can be asked to be an instance

    # torch's AdamW, unlike Transformer Engine's, has a "step" in each parameter's state. Megatron initialises the state of
    # a distributed optimizer without it, and the tensors of its checkpoints are without it.
    make = DistributedOptimizer.__init__

    def with_step(
        self: Any, optimizer: Any, config: Any, grad_scaler: Any, init_state: Any, *args: Any, **kwargs: Any
    ) -> None:
        def init_state_and_step(inner: Any, config: Any = None) -> None:
            init_state(inner, config)
            for state in inner.state.values():
                state.setdefault("step", torch.tensor(0.0))

        make(self, optimizer, config, grad_scaler, init_state and init_state_and_step, *args, **kwargs)

    # And it asks for the step of a state that is not there before the first optimizer step.
    describe = DistributedOptimizer.state_dict

    def state_dict(self: Any) -> Any:
        if not self.is_stub_optimizer and not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
        return describe(self)

    DistributedOptimizer.__init__, DistributedOptimizer.state_dict = with_step, state_dict
    load_states = DistributedOptimizer._set_main_param_and_optimizer_states

    class WithStep(dict[str, Any]):
        def __init__(self, tensors: Any, optimizer: Any) -> None:
            super().__init__(tensors)
            self.optimizer = optimizer

        def __missing__(self, key: str) -> Any:
            if key != "step":
                raise KeyError(key)
            return next(state["step"] for state in self.optimizer.state.values() if "step" in state)

    # Loading also leaves all parameters one and the same "step" tensor, which torch then counts up once a parameter.
    load = DistributedOptimizer.load_state_dict

    def load_state_dict(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        for state in getattr(self.optimizer, "state", {}).values():
            if "step" in state:
                state["step"] = state["step"].clone()

    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = lambda self, param, tensors: load_states(
        self, param, WithStep(tensors, self.optimizer)
    )


def patch_training() -> None:
    """Have Megatron-LM's training loop start without CUDA. After ``patch_megatron``."""
    from megatron.training import training

    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    # It initialises parallelism only where there are devices. No CUDA is "available" still: kernels ask for that.
    torch.cuda.device_count = lambda: torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _shard_fully_on_cpu() -> None:
    """Have Megatron-FSDP v2 (newer versions), which insists on a CUDA device for its streams, take the CPU for one."""
    try:
        from megatron.core.distributed.fsdp import mcore_fsdp_adapter as adapter
        from megatron.core.distributed.fsdp.src.megatron_fsdp.experimental.dbuffer import DBuffer
    except ImportError:
        return
    context = getattr(adapter, "fully_shard_context", None)
    if context is None:
        return

    def on_cpu(device: Any = None, **kwargs: Any) -> Any:
        return context(device=SimpleNamespace(type="cuda"), **kwargs)

    adapter.fully_shard_context = on_cpu
    DBuffer.allocation_stream = property(lambda buffer: _STREAM, lambda buffer, stream: None)


def wait_for_gathers(buffers: Any) -> None:
    """Have Megatron-FSDP's module of buffers wait for collectives, as it frees memory in the order of CUDA's streams."""
    coalesce = buffers._coalescing_manager

    @contextlib.contextmanager
    def waiting(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with coalesce(*args, **kwargs) as work:
            yield work
        work.wait()

    buffers._coalescing_manager = waiting


class _CudaToCpu(TorchFunctionMode):
    """device="cuda" becomes the CPU, Tensor.cuda() the tensor itself, and Tensor.type() says "torch.cuda...."."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device and args and _is_cuda(args[0]):
            return CPU
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            return name if name.startswith("torch.cuda") else name.replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if device is None or isinstance(device, bool):
        return False
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


def _complete_gloo() -> None:
    """Collectives that NCCL has and gloo lacks: lists of tensors of unequal sizes (experts, layer-wise optimizers)."""
    barrier, gather = dist.barrier, dist.all_gather
    module: Any = dist

    def plain_barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return barrier(group=group, async_op=async_op)

    def all_gather(out: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({o.numel() for o in out}) == 1:
            return gather(out, tensor, group=group, async_op=async_op)
        for i, source in enumerate(dist.get_process_group_ranks(group or dist.group.WORLD)):
            if i == dist.get_rank(group):
                out[i].copy_(tensor)
            if out[i].numel():
                dist.broadcast(out[i], source, group=group)
        return None

    def reduce_scatter(
        out: torch.Tensor,
        inputs: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> None:
        for i, tensor in enumerate(inputs):
            total = tensor.clone()
            dist.all_reduce(total, op=op, group=group)
            if i == dist.get_rank(group):
                out.copy_(total)

    module.barrier, module.all_gather, module.reduce_scatter = plain_barrier, all_gather, reduce_scatter


class _Stream:
    cuda_stream = 0
    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        return 0.0


_STREAM = _Stream()


if __name__ == "__main__":  # the same module is imported again by the processes that save a checkpoint
    from launch.parallel import end_program

    install()
    patch_megatron()
    patch_training()
    from dist_clip.megatron import launcher

    launcher.main()
    end_program()
