"""What a device's kernels found out of order, told without waiting for them."""

import torch
from torch import Tensor

from tandemkv.errors import InputError
from tandemkv.kernels.checks import raise_for


class DeviceFlags:
    """Bits that kernels of a step set on the device. When the step is over they are sent for, and read when they have
    come, by the next step at the latest: nobody waits. Takes memory from its first use on.

    What was found stays until the tokens of that step are gone. Steps go by the number of tokens before them.
    """

    def __init__(self) -> None:
        self._bits: Tensor | None = None
        self._asked_from: int | None = None  # the first step whose bits are under way
        self._unsent_from: int | None = None  # the first whose bits wait for those
        self._spoilt_from: int | None = None  # the first in which something was found, `_error`
        self._error: Exception | None = None

    def bits(self, device: torch.device) -> Tensor:
        """int32 `[1]` on the device, for the kernels of this step."""
        if self._bits is None or self._bits.device != device:
            is_cuda = device.type == "cuda"
            with torch.inference_mode(False):  # they are written again, maybe outside of it
                self._bits = torch.zeros(1, dtype=torch.int32, device=device)
                self._told = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=is_cuda)
            self._came = torch.cuda.Event() if is_cuda else None
            self._asked_from = self._unsent_from = None
        return self._bits

    def send(self, seq_len: int) -> None:
        """The step behind seq_len tokens is over: let its bits come to the host, behind its kernels."""
        if self._bits is None:
            return
        self._collect()
        self._unsent_from = seq_len if self._unsent_from is None else min(self._unsent_from, seq_len)
        if self._asked_from is None:  # else this step's come with those of the next
            self._ask()

    def look(self) -> None:
        """Raise for what has come: InputError for NaN in q or lengths beyond a table, AssertionError for wild slots."""
        self._collect()
        if self._error is not None:
            spoilt = f"tokens from {self._spoilt_from} on are spoilt, crop the cache to those before or reset it"
            raise type(self._error)(f"{self._error}; {spoilt}")

    def wait(self) -> None:
        """`look` at the bits of all steps that are over."""
        while self._asked_from is not None:
            if self._came is not None:
                self._came.synchronize()
            self._collect()
            if self._unsent_from is not None:
                self._ask()
        self.look()

    def forget(self, seq_len: int) -> None:
        """Tokens from seq_len on are gone, with what was found in their steps."""
        if self._bits is not None and (self._unsent_from is None or self._unsent_from >= seq_len):
            self._bits.zero_()
            self._unsent_from = None
        if self._asked_from is not None and self._asked_from >= seq_len:
            self._asked_from = None
        if self._spoilt_from is not None and self._spoilt_from >= seq_len:
            self._spoilt_from = self._error = None

    def _ask(self) -> None:
        assert self._bits is not None
        self._told.copy_(self._bits, non_blocking=True)
        self._bits.zero_()
        if self._came is not None:
            self._came.record(torch.cuda.current_stream(self._bits.device))
        self._asked_from, self._unsent_from = self._unsent_from, None

    def _collect(self) -> None:
        if self._asked_from is None or (self._came is not None and not self._came.query()):
            return
        begin, self._asked_from = self._asked_from, None
        try:
            raise_for(self._told)
        except (InputError, AssertionError) as error:
            if self._error is None:
                self._error, self._spoilt_from = error, begin
