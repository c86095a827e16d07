"""Far tokens over every lane, on a device and a host that are two processors of this machine: what splitting gains."""
