"""Autocast, as `scaled_dot_product_attention` has it: our kernels are no operators that it knows."""

import torch


def computed_in(x: torch.Tensor) -> torch.dtype:
    """What attention over `x` is computed in: autocast's dtype where that is on, but doubles stay doubles."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in what attention over them is computed in."""
    return tuple(x.to(computed_in(x)) for x in tensors)
