"""Refuses, on any device, what torch refuses on CUDA where ``deterministic: true`` is set, so that a CPU shows it."""

import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# of the list under torch.use_deterministic_algorithms (torch 2.11 to 2.14): operations without a deterministic CUDA kernel
FORBIDDEN = (
    "histc", "kthvalue", "median.dim", "nanmedian.dim", "put_", "put", "_ctc_loss_backward", "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "adaptive_max_pool2d_backward", "max_unpool2d",
    "fractional_max_pool2d_backward", "upsample_linear1d_backward", "upsample_bilinear2d_backward",
    "_upsample_bilinear2d_aa_backward", "upsample_bicubic2d_backward", "_upsample_bicubic2d_aa_backward",
    "upsample_trilinear3d_backward", "reflection_pad1d_backward", "reflection_pad2d_backward", "replication_pad1d_backward",
    "replication_pad2d_backward", "grid_sampler_2d_backward", "nll_loss2d_forward", "_embedding_bag_dense_backward",
)  # fmt: skip


class CudaDeterminism(TorchDispatchMode):
    """While it is on, an operation that CUDA has no deterministic kernel for is an error that names it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::")
        if name in FORBIDDEN or name.split(".")[0] in FORBIDDEN:
            raise RuntimeError(f"{name} has no deterministic CUDA kernel")
        in_running_sum = any(frame.name == "running_sum" for frame in traceback.extract_stack(limit=6))  # on the CPU
        if name.split(".")[0] in ("cumsum", "cumsum_") and args[0].is_floating_point() and not in_running_sum:
            raise RuntimeError("cumsum of floating-point numbers has no deterministic CUDA kernel")
        if name.split(".")[0] == "bincount" and (
            (len(args) > 1 and args[1] is not None) or kwargs.get("weights") is not None
        ):
            raise RuntimeError("bincount with weights has no deterministic CUDA kernel")
        return func(*args, **kwargs)


def refuses(call: Any) -> bool:
    """Whether a call is refused."""
    try:
        with CudaDeterminism():
            call()
    except RuntimeError as error:
        return "deterministic" in str(error)
    return False


assert refuses(lambda: torch.histc(torch.rand(3))) and refuses(lambda: torch.rand(3).kthvalue(1))
