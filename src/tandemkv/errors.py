"""The exceptions a user can meet.

TandemError
├── InputError        a value that cannot be right: shape, dtype, NaN, an unknown name (also a ValueError)
├── CapacityError     it would not fit: needed, available, and the knob to turn (also a MemoryError)
├── UnsupportedError  right, but not supported here: a model family, a keyword (also a NotImplementedError)
├── UnavailableError  this machine or installation lacks it: an instruction set, the native module
├── CacheError        a cache used against its rules: closed, held, or fed by a model that is not attached
├── LaneError         no way is left by which far tokens could take part in a step
└── ProfileError      a machine profile that is damaged, or of another machine (also a ValueError)

PrecisionWarning: some tokens are kept in full precision, because they cannot be quantised.

ProfileWarning: a stored machine profile was of no use, and the machine was measured again.
BackendWarning: our kernels do not work on a device, and slower ones attend there.
LaneWarning: a lane has stalled or failed, and steps go on without it.

A broken invariant of our own is an AssertionError, never one of these.
"""


class TandemError(Exception):
    """Base of everything that tandemkv raises on purpose."""


class InputError(TandemError, ValueError):
    """A value that cannot be right."""


class CapacityError(TandemError, MemoryError):
    """A request that would not fit; raised before anything is written."""


class UnsupportedError(TandemError, NotImplementedError):
    """A request that is sensible, but that this version refuses rather than answers wrongly."""


class UnavailableError(TandemError, RuntimeError):
    """Something that this machine or this installation does not have."""


class CacheError(TandemError, RuntimeError):
    """A cache used against its rules."""


class LaneError(TandemError, RuntimeError):
    """Processors or links that a step needs have stalled or failed."""


class ProfileError(TandemError, ValueError):
    """Numbers that were not measured here, or not as they are written."""


class ProfileWarning(UserWarning):
    """A stored machine profile was of no use, and the machine was measured again."""


class BackendWarning(UserWarning):
    """Our kernels do not work on a device: slower ones attend there."""


class LaneWarning(RuntimeWarning):
    """A lane has stalled or failed; steps go on without it."""


class PrecisionWarning(UserWarning):
    """Tokens take more memory than was asked for, because a number among theirs is not finite."""
