"""The machine that measures: time and memory of a device, energy meters, and contention by other processes."""
