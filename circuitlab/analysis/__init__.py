"""Numbers on torch: what a circuit says of a module's parameters, and what batches say of its wires. No drawing."""
