#include "passes.h"

namespace rlrr::avx512 {

namespace {

// a tile of W' [48 columns] and of the left operand [8 rows], 32 bits a unit
int64_t tile_bytes(Dtype dtype, int64_t length) {
  const int64_t elements = dtype == Dtype::bfloat16 ? 2 : 1;
  return (48 + 8) * 4 * ((length + elements - 1) / elements);
}

}  // namespace

int64_t scratch_bytes(Dtype dtype, int64_t length, int64_t threads) { return threads * tile_bytes(dtype, length); }

bool fits_cache(Dtype dtype, int64_t length) { return tile_bytes(dtype, length) <= 1 << 20; }

}  // namespace rlrr::avx512
