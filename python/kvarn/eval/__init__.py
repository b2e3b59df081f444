"""Measuring what a quantised cache costs: text, tasks, tensors. Measurement, not the product: plain PyTorch, no kernels.

Every cache is simulated: K and V lie in full precision, and each completed tile is replaced by what its quantiser makes of it. That gives
the same attention as the real cache up to rounding, serves methods that have no kernels here, and runs on any device.
"""
