"""From the graph of a bundle to a TensorRT plan and compiled kernels. Imports no torch: it runs on the box."""
