"""Readable NumPy and SciPy versions of the kernels, which the fast ones are compared with."""
