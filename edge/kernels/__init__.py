"""The CUDA kernels of the line and how they are launched: preprocess, match, combine."""
