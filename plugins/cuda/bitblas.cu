// A kernel that BitBLAS generated (plugins/bitblas.py) as an instance of a source like the others.
#include "generated.cuh"
