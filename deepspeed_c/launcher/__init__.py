"""The `deepspeed` command: one process per slot of this machine."""
