"""The parts of the GPU kit, in the order in which data flows: record, values, capture, loader, trainer."""
