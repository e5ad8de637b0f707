#include "gram.cuh"
