"""What was measured of a machine, and the file it is kept in: with a checksum, and with what it was measured on."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tandemkv.errors import ProfileError
from tandemkv.schedule.speeds import Machine, Products, Speed

_FORMAT = 3

AGAIN = "measure again with `tandemkv profile --again`"


@dataclass(frozen=True)
class Kernels:
    """Speeds of the kernels over one format of far tokens, with so many threads: bytes of K and V, of K, of V."""

    attend: Speed
    logits: Speed
    weigh: Speed


@dataclass(frozen=True)
class Tier:
    """A memory: plain reads by all threads, copies within it by one, and how long one load that depends on the one
    before takes."""

    name: str
    read_gbps: float
    copy_gbps: float
    latency_ns: float


@dataclass(frozen=True)
class Transfers:
    """Between host and device, each way, from pageable and from pinned memory; None where there is no such thing."""

    up: Speed
    down: Speed
    pinned_up: Speed | None
    pinned_down: Speed | None


@dataclass(frozen=True)
class Profile:
    """Speeds of one machine. All are medians.

    measured_on: names and versions that it holds for. kernels: by format ("bfloat16", "float32", "int8", "int4") and
    threads. products: of a layer's inputs with the weights of K and V, by dtype and hidden size; one thread.
    handoff_us: from a ticket being done to the thread that waits for it.
    """

    measured_on: Mapping[str, str]
    date: str
    kernels: Mapping[str, Mapping[int, Kernels]]
    products: Mapping[str, Mapping[int, Products]]
    memory_gbps: float
    tiers: tuple[Tier, ...]
    transfers: Transfers
    handoff_us: float

    def machine(self, dtype: str, hidden: int, links: tuple[Speed, Speed], far_format: str | None = None) -> Machine:
        """Speeds for costs on a rig whose device is one thread and whose host are the others.

        dtype: of the model. links: up and down. far_format: of far tokens, None for the model's dtype.
        """
        far, num_threads = self.kernels[far_format or dtype], max(self.kernels[dtype])
        device, streamed, host = self.kernels[dtype][1], far[1], far[_next_fewer(far, num_threads - 1)]
        by_hidden = self.products[dtype]
        nearest = min(by_hidden, key=lambda size: abs(math.log(size / max(1, hidden))))
        return Machine(
            device_attend=min(device.attend, streamed.attend, key=lambda speed: speed.gbps),
            host_attend=host.attend,
            up=links[0],
            down=links[1],
            products=by_hidden[nearest],
            host_logits=host.logits,
            device_weigh=streamed.weigh,
            memory_gbps=self.memory_gbps,
            handoff_us=self.handoff_us,
        )

    def to_dict(self) -> dict[str, Any]:
        """In plain types, ready for JSON."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Written whole or not at all."""
        content = self.to_dict()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        text = json.dumps({"format": _FORMAT, "checksum": _checksum(content), "profile": content}, indent=1)
        temporary.write_text(text)
        temporary.replace(path)

    @staticmethod
    def load(path: Path) -> "Profile":
        """ProfileError for a file that is no profile, is damaged, or is of another version of this format."""
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ProfileError(f"the profile {path} cannot be read ({error}); {AGAIN}") from error
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            was = found.get("format") if isinstance(found, dict) else None
            raise ProfileError(f"{path} is no profile of format {_FORMAT}, got {was!r}; {AGAIN}")
        if found.get("checksum") != _checksum(found.get("profile")):
            raise ProfileError(f"the profile {path} is damaged: its checksum does not fit its numbers; {AGAIN}")
        return _profile_of(found["profile"])

    def differs_from(self, here: Mapping[str, str]) -> str:
        """What of this machine the profile was not measured on, in words; '' where it was measured here."""
        changed = [
            f"{name} {self.measured_on.get(name, 'unknown')!r}, here {here.get(name, 'unknown')!r}"
            for name in sorted(self.measured_on.keys() | here.keys())
            if self.measured_on.get(name) != here.get(name)
        ]
        return "; ".join(changed)


def _next_fewer(by_threads: Mapping[int, Kernels], num: int) -> int:
    """Of the numbers of threads that were measured, the largest that is not more."""
    return max(measured for measured in by_threads if measured <= max(1, num))


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _profile_of(content: Mapping[str, Any]) -> Profile:
    def speed(found: Mapping[str, float] | None) -> Speed | None:
        return None if found is None else Speed(**found)

    transfers = content["transfers"]
    return Profile(
        measured_on=content["measured_on"],
        date=content["date"],
        kernels={
            name: {
                int(num): Kernels(*(Speed(**each[part]) for part in ("attend", "logits", "weigh")))
                for num, each in by_threads.items()
            }
            for name, by_threads in content["kernels"].items()
        },
        products={
            dtype: {
                int(size): Products(tuple((num, rate) for num, rate in each["points"])) for size, each in sizes.items()
            }
            for dtype, sizes in content["products"].items()
        },
        memory_gbps=content["memory_gbps"],
        tiers=tuple(Tier(**each) for each in content["tiers"]),
        transfers=Transfers(
            Speed(**transfers["up"]),
            Speed(**transfers["down"]),
            speed(transfers["pinned_up"]),
            speed(transfers["pinned_down"]),
        ),
        handoff_us=content["handoff_us"],
    )
