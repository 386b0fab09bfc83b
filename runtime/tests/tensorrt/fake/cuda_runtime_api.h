/* See cuda.h. */
#ifndef HYWU_FAKE_CUDA_RUNTIME_API_H
#define HYWU_FAKE_CUDA_RUNTIME_API_H
#include "cuda.h"
typedef CUstream cudaStream_t;
#endif
