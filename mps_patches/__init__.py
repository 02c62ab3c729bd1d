"""Known defects of the MPS backend, one file each, with a probe, a cure and a plain reference for every one."""
