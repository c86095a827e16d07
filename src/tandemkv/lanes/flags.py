"""What a device's kernels found out of order, told without waiting for them."""

import torch
from torch import Tensor

from tandemkv.kernels.checks import raise_for


class DeviceFlags:
    """Bits that kernels of a step set on the device. When the step is over they are sent for, and read when they have
    come, by the next step at the latest: nobody waits. Takes memory from its first use on."""

    def __init__(self) -> None:
        self._bits: Tensor | None = None
        self._is_asked = False

    def bits(self, device: torch.device) -> Tensor:
        """int32 `[1]` on the device, for the kernels of this step."""
        if self._bits is None or self._bits.device != device:
            is_cuda = device.type == "cuda"
            with torch.inference_mode(False):  # they are written again, maybe outside of it
                self._bits = torch.zeros(1, dtype=torch.int32, device=device)
                self._told = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=is_cuda)
            self._came = torch.cuda.Event() if is_cuda else None
            self._is_asked = False
        return self._bits

    def send(self) -> None:
        """The step is over: let its bits come to the host, behind its kernels. Raises as `look` does."""
        self.look()
        if self._bits is None or self._is_asked:  # those of a step before are under way: this one's come with the next
            return
        self._told.copy_(self._bits, non_blocking=True)
        self._bits.zero_()
        if self._came is not None:
            self._came.record(torch.cuda.current_stream(self._bits.device))
        self._is_asked = True
        self.look()

    def look(self) -> None:
        """Raise for what has come: InputError for NaN in q, AssertionError for a slot that is none."""
        if self._is_asked and (self._came is None or self._came.query()):
            self._is_asked = False
            raise_for(self._told)
