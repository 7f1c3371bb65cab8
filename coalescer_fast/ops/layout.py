"""Memory layout of results: channels innermost where the first argument has them innermost, else contiguous."""

from __future__ import annotations

import torch

# torch.vmap does not have memory formats
transforms_active = torch._C._are_functorch_transforms_active
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether x (N, C, *spatial) is dense with channels innermost, and not contiguous too (as it is for C = 1)."""
    if x.is_contiguous() or not 3 <= x.ndim <= 5:
        return False
    if x.ndim == 3 or transforms_active():
        return x.movedim(1, -1).is_contiguous()
    return x.is_contiguous(memory_format=_FORMATS[x.ndim])


def arrange(y: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """y itself if it is dense in the layout, else a copy that is."""
    if not channels_last:
        return y.contiguous()
    if y.ndim == 3 or transforms_active():
        return y.movedim(1, -1).contiguous().movedim(-1, 1)
    return y.contiguous(memory_format=_FORMATS[y.ndim])


def empty(x: torch.Tensor, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised (N, channels, *spatial) in the layout, and on the device, of x."""
    channels_last = is_channels_last(x)
    if channels_last and x.ndim == 3:
        return torch.empty((x.shape[0], x.shape[2], channels), dtype=dtype, device=x.device).transpose(1, 2)
    memory_format = _FORMATS[x.ndim] if channels_last else torch.contiguous_format
    return torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=dtype, device=x.device, memory_format=memory_format)
