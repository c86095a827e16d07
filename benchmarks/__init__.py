"""Benchmarks: how fast, next to which peers and which limit. `python -m benchmarks.attend --help` teaches.

Importing this package lets torch's OpenMP threads sleep between ops (GOMP_SPINCOUNT=0), for ours and for peers: that
has to be chosen before torch is imported. A setting of the user's own stands.
"""

from tandemkv.machine import set_passive_spin

set_passive_spin()
