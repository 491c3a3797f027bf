"""The device that really runs, the dtype its hardware supports, and why."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A device name for torch, the dtype for frozen weights, and why."""

    name: str
    dtype: str
    reason: str
    gpu: str
    memory_gb: float


def _runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether torch has kernels for a GPU: same major and no newer minor, or PTX to compile."""
    major, minor = capability
    for arch in architectures:
        kind, _, number = arch.partition("_")
        if not number.isdigit():  # sm_90a and the like bind to one chip
            continue
        built = int(number[:-1]), int(number[-1])
        if kind == "sm" and built[0] == major and built[1] <= minor:
            return True
        if kind == "compute" and built <= (major, minor):
            return True
    return False


def dtype_of(capability: tuple[int, int]) -> str:
    """The half precision that a GPU has in hardware: "bfloat16" from compute capability 8.0 on, else "float16"."""
    return "bfloat16" if capability >= (8, 0) else "float16"


def pick_device() -> Device:
    """The best device that really runs, with the dtype its hardware supports.

    torch says that a T4 supports bfloat16 (it emulates it) and that a P100 is available (its
    kernels are not in the build), so both are decided by compute capability here.
    """
    import psutil
    import torch

    ram = psutil.virtual_memory().total / 2**30
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(0)
        major, minor = torch.cuda.get_device_capability(0)
        if not _runs_on((major, minor), torch.cuda.get_arch_list()):
            why = f"float32: on the CPU, as this torch has no kernels for {gpu} (sm_{major}{minor})"
            return Device("cpu", "float32", why, gpu, ram)
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        if dtype_of((major, minor)) == "bfloat16":
            return Device(
                "cuda",
                "bfloat16",
                f"bfloat16: {gpu} is sm_{major}{minor}, which has it",
                gpu,
                memory,
            )
        why = f"float16: {gpu} is sm_{major}{minor}, and bfloat16 in hardware begins with sm_80"
        return Device("cuda", "float16", why, gpu, memory)
    if torch.backends.mps.is_available():
        return Device(
            "mps",
            "float32",
            "float32: half precision is not reliable on Apple's GPUs",
            "Apple",
            ram,
        )
    return Device("cpu", "float32", "float32: no GPU here, and the CPU is exact in it", "", ram)


def gpu_count() -> int:
    """How many CUDA GPUs torch can train on here; 0 where `pick_device` chooses anything else."""
    import torch

    return torch.cuda.device_count() if pick_device().name == "cuda" else 0
