"""How a pass runs on a device: its precision, its CUDA graphs, its times and its memory."""
