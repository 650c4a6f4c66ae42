"""The kernels in Numba, for users of Numba to read, call and change."""
