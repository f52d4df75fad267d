#include <algorithm>

#include "blocks.h"
#include "passes.h"

namespace rlrr::avx512 {

namespace {

int64_t units(Dtype dtype, int64_t length) { return dtype == Dtype::bfloat16 ? up(length, 2) : length; }

// a tile of W' and of the left operand, 32 bits a unit
int64_t tile_bytes(Dtype dtype, int64_t length) { return (tile_cols + tile_rows) * 4 * units(dtype, length); }

}  // namespace

int64_t scratch_bytes(Dtype dtype, int64_t length, int64_t threads) { return threads * tile_bytes(dtype, length); }

int64_t gram_scratch_bytes(const Matrix& x, const Layer& layer) {
  const int64_t least = tile_cols * 4 * (std::min(units(x.dtype, x.rows), max_units) + gram_tasks(layer));
  return std::max(std::clamp<int64_t>(12 * layer.n() * layer.k() / 25, 64 << 10, 2 << 20), least);
}

bool fits_cache(Dtype dtype, int64_t length) { return tile_bytes(dtype, length) <= 1 << 20; }

}  // namespace rlrr::avx512
