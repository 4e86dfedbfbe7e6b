// One file for the compiler: nvcc -cubin kernels.cu
#include "combine.cuh"
#include "match.cuh"
#include "preprocess.cuh"
