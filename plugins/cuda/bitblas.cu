// A kernel that BitBLAS generated (plugins/bitblas.py, plugins/kernels/bitblas.py), as a source like the others.
#include "generated.cuh"
