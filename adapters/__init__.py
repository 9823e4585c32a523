"""Connections to annotation tools and agents. Each calls a running server through `sam3_client`."""
