#include "kernels.h"

CF_KERNELS(avx512_bf16)
