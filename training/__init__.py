"""Training of the model that tandemkv ships: `python -m training.train --help` teaches."""

from tandemkv.machine import set_passive_spin

set_passive_spin()
