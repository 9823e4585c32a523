"""Mask logits on a device to the instances of an image.

draw.py         the entry: logits of all kept queries to instances
windows.py      the part of the image in which a mask can be positive
torch_form.py   draws windows by PyTorch's operations: on a CPU, and where the kernels do not compile
cuda_form.py    the same by the kernels of kernels.cu
nvrtc.py        compiles CUDA C without a C compiler
"""
