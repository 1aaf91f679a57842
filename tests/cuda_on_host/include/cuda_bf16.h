// Stands for the toolkit's header of this name.
#pragma once
#include "cuda_host.h"
