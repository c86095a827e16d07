"""What Linux says of this process."""

import os
from pathlib import Path


def resident_bytes() -> int:
    """Memory that this process holds, of all kinds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
