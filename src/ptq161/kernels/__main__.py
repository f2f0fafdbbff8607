"""`python -m ptq161.kernels` says which native kernels run here: the last line of `make env`."""

from ptq161.kernels import cpu_kernels

names = cpu_kernels()
without = (
    "none, csrc was not built (no C++ compiler?): packed linears are unpacked at every call, or once to dense ones"
)
print(f"ptq161 CPU kernels: {', '.join(names) or without}")
