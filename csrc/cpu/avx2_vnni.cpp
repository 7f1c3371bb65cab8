#include "kernels.h"

CF_KERNELS(avx2_vnni)
