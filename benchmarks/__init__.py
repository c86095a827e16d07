"""Benchmarks: how fast, next to which peers and which limit. `python -m benchmarks.attend --help` teaches.

Importing this package lets torch's OpenMP threads sleep between ops (GOMP_SPINCOUNT=0), for ours and for peers: that
has to be chosen before torch is imported. A setting of the user's own stands. In a checkout where tandemkv is not
installed its source is found beside this package.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("tandemkv") is None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from tandemkv.machine import set_passive_spin

set_passive_spin()
