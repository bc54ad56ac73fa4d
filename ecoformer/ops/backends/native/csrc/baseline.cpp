// Vectors that every processor has.
#include "problem.h"

#define W 4
#define MAX_GROUP 6

namespace ecoformer::baseline {
#include "kernels.h"
}
