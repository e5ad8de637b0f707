#include "plain_torch.h"
