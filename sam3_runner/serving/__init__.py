"""The model as a server's process: batches of requests, its client, its GPU and its share of the CPU."""
