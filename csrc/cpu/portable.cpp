#include "kernels.h"

CF_KERNELS(portable)
