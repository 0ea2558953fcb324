"""`get_accelerator()`: DeepSpeed's view of the device, over `torch.cuda` or the CPU."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch


class DeepSpeedAccelerator(ABC):
    """What scripts ask about the device; one object for the process.

    Whatever differs between CPU and GPU is abstract; the rest answers from it.
    """

    _name: str
    _communication_backend_name: str

    # devices --------------------------------------------------------------------------------------------------

    @abstractmethod
    def is_available(self) -> bool: ...

    @abstractmethod
    def device_count(self) -> int: ...

    @abstractmethod
    def current_device(self) -> int: ...

    @abstractmethod
    def set_device(self, device_index: int) -> None: ...

    @abstractmethod
    def device_name(self, device_index: int | None = None) -> str:
        """`cpu`, `cuda` or `cuda:1`."""

    @abstractmethod
    def device(self, device_index: int | None = None) -> Any:
        """A context in which `device_index` is the current device."""

    @abstractmethod
    def current_device_name(self) -> str: ...

    @abstractmethod
    def synchronize(self, device_index: int | None = None) -> None: ...

    def is_synchronized_device(self) -> bool:
        """Whether operations are over when their call returns."""
        return self._name == "cpu"

    use_host_timers = resolves_data_dependency = handles_memory_backpressure = is_synchronized_device

    def communication_backend_name(self) -> str:
        return self._communication_backend_name

    # random numbers -------------------------------------------------------------------------------------------

    def random(self) -> Any:
        return torch.random

    def manual_seed(self, seed: int) -> Any:
        return torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def initial_seed(self) -> int:
        return torch.initial_seed()

    @abstractmethod
    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor: ...

    @abstractmethod
    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None: ...

    @abstractmethod
    def default_generator(self, device_index: int | None = None) -> torch.Generator: ...

    # memory ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]: ...

    @abstractmethod
    def memory_allocated(self, device_index: int | None = None) -> int:
        """Bytes in use by this process."""

    @abstractmethod
    def max_memory_allocated(self, device_index: int | None = None) -> int: ...

    @abstractmethod
    def total_memory(self, device_index: int | None = None) -> int: ...

    @abstractmethod
    def available_memory(self, device_index: int | None = None) -> int: ...

    def memory_reserved(self, device_index: int | None = None) -> int:
        return self.memory_allocated(device_index)

    memory_cached = memory_reserved

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        return self.max_memory_allocated(device_index)

    max_memory_cached = max_memory_reserved

    def empty_cache(self) -> None:
        return None

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        return None

    reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats

    # dtypes and tensors ---------------------------------------------------------------------------------------

    def is_bf16_supported(self) -> bool:
        return True

    is_fp16_supported = is_fp64_supported = is_bf16_supported

    def supported_dtypes(self) -> list[torch.dtype]:
        half = [torch.half] if self.is_fp16_supported() else []
        return [torch.float, *half, torch.bfloat16]

    def _tensor(self, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        def make(*args: Any) -> torch.Tensor:
            if args and not isinstance(args[0], int):
                return torch.tensor(args[0], dtype=dtype, device=self.current_device_name())
            return torch.empty(args, dtype=dtype, device=self.current_device_name())

        return make

    @property
    def FloatTensor(self) -> Any:
        return self._tensor(torch.float32)

    @property
    def HalfTensor(self) -> Any:
        return self._tensor(torch.float16)

    @property
    def BFloat16Tensor(self) -> Any:
        return self._tensor(torch.bfloat16)

    @property
    def DoubleTensor(self) -> Any:
        return self._tensor(torch.float64)

    @property
    def ByteTensor(self) -> Any:
        return self._tensor(torch.uint8)

    @property
    def IntTensor(self) -> Any:
        return self._tensor(torch.int32)

    @property
    def LongTensor(self) -> Any:
        return self._tensor(torch.int64)

    def pin_memory(
        self, tensor: torch.Tensor, make_copy: bool = True, match_shape: bool = True
    ) -> torch.Tensor:
        return tensor.pin_memory() if torch.cuda.is_available() else tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return torch.cuda.is_available() and tensor.is_pinned()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self._name

    # streams and graphs ---------------------------------------------------------------------------------------

    Stream: Any = None
    Event: Any = None

    def stream(self, stream: Any) -> Any:
        return nullcontext()

    def current_stream(self, device_index: int | None = None) -> Any:
        return None

    default_stream = current_stream

    def create_graph(self) -> Any:
        return None

    def capture_to_graph(self, graph: Any, pool: Any = None, stream: Any = None) -> Any:
        return nullcontext()

    def replay_graph(self, graph: Any) -> None:
        return None

    def is_current_stream_capturing(self) -> bool:
        return False

    # environment ----------------------------------------------------------------------------------------------

    def range_push(self, msg: str, *args: Any) -> Any:
        return None

    def range_pop(self, *args: Any) -> Any:
        return None

    def lazy_call(self, callback: Callable[[], Any]) -> Any:
        return callback()

    def is_triton_supported(self) -> bool:
        return False

    def op_builder_dir(self) -> str:
        return "deepspeed.ops.op_builder"

    def create_op_builder(self, class_name: str) -> Any:
        """An object that builds the operation `class_name`: here, that tells whether its kernel is there."""
        builder = self.get_op_builder(class_name)
        return None if builder is None else builder()

    def get_op_builder(self, class_name: str) -> Any:
        from unishard.deepspeed.parts.op_builders import BUILDERS

        return BUILDERS.get(class_name)

    def export_envs(self) -> list[str]:
        return []

    def visible_devices_envs(self) -> list[str]:
        return ["CUDA_VISIBLE_DEVICES"]

    def set_visible_devices_envs(self, current_env: dict[str, str], local_accelerator_ids: list[int]) -> None:
        for name in self.visible_devices_envs():
            current_env[name] = ",".join(map(str, local_accelerator_ids))

    def get_compile_backend(self) -> str:
        return "inductor"

    def set_compile_backend(self, backend: str) -> None:
        if backend != "inductor":
            raise ValueError(f"compile backend {backend!r}: pass it to engine.compile(backend=...)")


class CPU_Accelerator(DeepSpeedAccelerator):
    """The CPU, with gloo."""

    _name = "cpu"
    _communication_backend_name = "gloo"

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        # LOCAL_SIZE is DeepSpeed's name, LOCAL_WORLD_SIZE torchrun's.
        named = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "0"
        return int(named) or os.cpu_count() or 1

    def is_fp16_supported(self) -> bool:
        """Whether the processor computes in fp16. Training in fp16 runs without it too, slowly."""
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())

    def current_device(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    def set_device(self, device_index: int) -> None:
        return None

    def device_name(self, device_index: int | None = None) -> str:
        return "cpu"

    def device(self, device_index: int | None = None) -> Any:
        return nullcontext()

    def current_device_name(self) -> str:
        return "cpu"

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        torch.set_rng_state(new_state)

    def default_generator(self, device_index: int | None = None) -> torch.Generator:
        return torch.default_generator

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        used = self.memory_allocated()
        return {"allocated_bytes.all.current": used, "allocated_bytes.all.peak": self.max_memory_allocated()}

    def memory_allocated(self, device_index: int | None = None) -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def total_memory(self, device_index: int | None = None) -> int:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")

    def available_memory(self, device_index: int | None = None) -> int:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE")


class CUDA_Accelerator(DeepSpeedAccelerator):
    """NVIDIA GPUs, with NCCL."""

    _name = "cuda"
    _communication_backend_name = "nccl"
    Stream = torch.cuda.Stream
    Event = torch.cuda.Event

    def is_available(self) -> bool:
        return torch.cuda.is_available()

    def device_count(self) -> int:
        return torch.cuda.device_count()

    def current_device(self) -> int:
        return torch.cuda.current_device()

    def set_device(self, device_index: int) -> None:
        torch.cuda.set_device(device_index)

    def device_name(self, device_index: int | None = None) -> str:
        return "cuda" if device_index is None else f"cuda:{device_index}"

    def device(self, device_index: int | None = None) -> Any:
        return torch.cuda.device(self.current_device() if device_index is None else device_index)

    def current_device_name(self) -> str:
        return f"cuda:{torch.cuda.current_device()}"

    def synchronize(self, device_index: int | None = None) -> None:
        torch.cuda.synchronize(device_index)

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        return torch.cuda.get_rng_state(*([] if device_index is None else [device_index]))

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        torch.cuda.set_rng_state(new_state, *([] if device_index is None else [device_index]))

    def manual_seed(self, seed: int) -> Any:
        return torch.cuda.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> Any:
        return torch.cuda.manual_seed_all(seed)

    def default_generator(self, device_index: int | None = None) -> torch.Generator:
        return torch.cuda.default_generators[device_index or 0]

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        return dict(torch.cuda.memory_stats(device_index))

    def memory_allocated(self, device_index: int | None = None) -> int:
        return torch.cuda.memory_allocated(device_index)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return torch.cuda.max_memory_allocated(device_index)

    def memory_reserved(self, device_index: int | None = None) -> int:
        return torch.cuda.memory_reserved(device_index)

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        return torch.cuda.max_memory_reserved(device_index)

    def total_memory(self, device_index: int | None = None) -> int:
        return torch.cuda.get_device_properties(device_index or self.current_device()).total_memory

    def available_memory(self, device_index: int | None = None) -> int:
        return torch.cuda.mem_get_info(device_index)[0]

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        torch.cuda.reset_peak_memory_stats(device_index)

    def is_bf16_supported(self) -> bool:
        return torch.cuda.is_bf16_supported()

    def stream(self, stream: Any) -> Any:
        return torch.cuda.stream(stream)

    def current_stream(self, device_index: int | None = None) -> Any:
        return torch.cuda.current_stream(device_index)

    def default_stream(self, device_index: int | None = None) -> Any:
        return torch.cuda.default_stream(device_index)

    def range_push(self, msg: str, *args: Any) -> Any:
        return torch.cuda.nvtx.range_push(msg)

    def range_pop(self, *args: Any) -> Any:
        return torch.cuda.nvtx.range_pop()

    def is_triton_supported(self) -> bool:
        return torch.cuda.get_device_capability()[0] >= 8


SUPPORTED_ACCELERATOR_LIST = ["cuda", "cpu"]
_chosen: DeepSpeedAccelerator | None = None


def get_accelerator() -> DeepSpeedAccelerator:
    """The device of this process: what DS_ACCELERATOR names (cpu or cuda), else a GPU if there is one, else the CPU."""
    global _chosen
    if _chosen is None:
        name = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")
        if name not in SUPPORTED_ACCELERATOR_LIST:
            raise ValueError(f"DS_ACCELERATOR={name!r}: use one of {', '.join(SUPPORTED_ACCELERATOR_LIST)}")
        _chosen = CUDA_Accelerator() if name == "cuda" else CPU_Accelerator()
    return _chosen


def set_accelerator(accel_obj: DeepSpeedAccelerator) -> None:
    """Let `get_accelerator()` return `accel_obj`."""
    global _chosen
    if not isinstance(accel_obj, DeepSpeedAccelerator):
        raise TypeError(f"set_accelerator needs a DeepSpeedAccelerator, not {type(accel_obj).__name__}")
    _chosen = accel_obj


def is_current_accelerator_supported() -> bool:
    """Whether the device of this process is one that the engine runs on."""
    return get_accelerator().device_name() in SUPPORTED_ACCELERATOR_LIST
