"""Forms of an answer: pure functions over the values in `sam3_runner.instances`."""
