"""Activations on the host, some of them: TRL sends all of them there or none."""

from typing import Any

import torch
from trl.models.activation_offloading import OffloadActivations


class PartialOffload(OffloadActivations):
    """[`~trl.models.activation_offloading.OffloadActivations`] of a share of what is saved, by bytes.

    What goes and what stays alternates, so that a transfer has more than one layer's time.

    Args:
        share: Of the bytes that are saved for the backward, above 0 and at most 1.
        kwargs: As there.
    """

    def __init__(self, share: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.share = share
        self._send, self._fetch = self.pack_hook, self.unpack_hook
        self.pack_hook, self.unpack_hook = self._pack, self._unpack
        self._seen = self._sent = 0

    def __enter__(self) -> Any:
        self._seen = self._sent = 0
        return super().__enter__()

    def _pack(self, tensor: torch.Tensor) -> Any:
        self._seen += tensor.nbytes
        if self._sent + tensor.nbytes > self.share * self._seen:
            return tensor
        self._sent += tensor.nbytes
        return self._send(tensor)

    def _unpack(self, packed: Any) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else self._fetch(packed)
