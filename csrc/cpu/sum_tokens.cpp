#include <algorithm>

#include "dispatch.h"
#include "loops.h"
#include "passes.h"
#include "rows.h"
#include "runtime.h"

namespace rlrr {

namespace {

// Tokens that are summed before they join the total: long float32 sums lose digits
constexpr int64_t block_tokens = 128;
// Columns that a thread sums at a time: they stay in the first cache
constexpr int64_t block_cols = 512;

template <class T>
void sum(const Matrix& dy, Wide<T>* df) {
  const auto add = add_row(T{});
  const int64_t blocks = (dy.cols + block_cols - 1) / block_cols;
  const int64_t workers = useful_threads(8 * dy.rows * dy.cols, thread_count());  // loads, not products, take time
  share(blocks, workers, [&](int64_t b, int64_t) {
    ContiguousRow<T> row(dy);
    Wide<T> part[block_cols];
    double total[block_cols];
    const int64_t col = b * block_cols, count = std::min(block_cols, dy.cols - col);
    std::fill_n(total, count, 0.0);
    for (int64_t first = 0; first < dy.rows; first += block_tokens) {
      std::fill_n(part, count, Wide<T>{0});
      const int64_t last = std::min(first + block_tokens, dy.rows);
      for (int64_t m = first; m < last; ++m) add(row(m, col, count), count, part);
      for (int64_t i = 0; i < count; ++i) total[i] += part[i];
    }
    for (int64_t i = 0; i < count; ++i) df[col + i] = static_cast<Wide<T>>(total[i]);
  });
}

}  // namespace

void sum_tokens(const Matrix& dy, void* df) {
  dispatch(dy.dtype, dy.dtype, [&](auto t, auto) { sum<decltype(t)>(dy, static_cast<Wide<decltype(t)>*>(df)); });
}

}  // namespace rlrr
