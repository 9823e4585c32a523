"""How a pass runs on a device: its times, its memory, and the masks that leave it."""
