// What wgmma and stmatrix compute. The layouts are those of the PTX manual, written independently of the kernels.
#include <algorithm>

#include "state.h"

namespace rlrr::model {
namespace {

// The "matrix descriptor" of the manual.
struct Matrix {
  uint32_t start, leading, stride;

  explicit Matrix(uint64_t bits)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) machine.failure = "a matrix that is not in the 128-byte swizzle";
    if (bits >> 49 & 7) machine.failure = "a base offset";
  }

  // Eight neighbouring elements from outer index `i` and depth `k` on. The strides lead to the next 8 rows of 128 bytes
  // and, if the outer index runs along a row, to its next 64 elements.
  const char* at(int i, int k, bool transposed) const {
    const uint32_t offset = transposed ? i % 64 * 2 + i / 64 * leading + k % 8 * 128 + k / 8 * stride
                                       : i % 8 * 128 + i / 8 * stride + k * 2;
    uint32_t address = start + offset;
    address ^= (address >> 7 & 7) << 4;
    if (address + 16 <= static_cast<uint32_t>(machine.shared_bytes)) return machine.shared + address;
    machine.failure = "a matrix outside shared memory";
    return machine.shared;
  }

  // Reads `count` of the outer index, 16 deep.
  template <int kMost>
  void read(float (&to)[16][kMost], int first, int count, bool transposed, bool is_bf16) const {
    for (int i = 0; i < count; i += transposed ? 8 : 1)
      for (int k = 0; k < 16; k += transposed ? 1 : 8) {
        uint16_t raw[8];
        std::memcpy(raw, at(first + i, k, transposed), 16);
        for (int e = 0; e < 8; ++e) (transposed ? to[k][i + e] : to[k + e][i]) = value(raw[e], is_bf16);
      }
  }

  static float value(uint16_t raw, bool is_bf16) {
    if (is_bf16) return widen(bf16{raw});
    static const std::vector<float> table = [] {
      std::vector<float> all(1 << 16);
      for (int i = 0; i < 1 << 16; ++i) all[i] = widen(fp16{static_cast<uint16_t>(i)});
      return all;
    }();
    return table[raw];
  }
};

// Computes the 16 of 64 rows that belong to a warp, by up to 256 columns, 16 deep.
void compute(const IssuedProduct& product, int warp) {
  static float a[16][16], b[16][256], d[16][256];  // a and b by depth, then row or column
  const Product& first = product.lanes[0];
  Matrix(first.b_matrix).read(b, 0, first.columns, first.transposed, first.is_bf16);
  if (first.a) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 8; ++i) {
        const int row = lane / 4 + (i / 2 % 2) * 8, depth = lane % 4 * 2 + i % 2 + i / 4 * 8;
        const auto raw = static_cast<uint16_t>(product.lanes[lane].a[i / 2] >> (i % 2 * 16));
        a[depth][row] = Matrix::value(raw, first.is_bf16);
      }
  } else {
    Matrix(first.a_matrix).read(a, 16 * warp, 16, true, first.is_bf16);
  }
  const auto each = [&](auto&& visit) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < first.columns / 2; ++i)
        visit(product.lanes[lane].sums[i], d[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2]);
  };
  each([](float& of_lane, float& of_tile) { of_tile = of_lane; });
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < first.columns; ++n) d[row][n] += a[k][row] * b[k][n];
  each([](float& of_lane, float& of_tile) { of_lane = of_tile; });
}

}  // namespace

void Product::run(Product* const* lanes) {
  const int warp = machine.current / 32;
  IssuedProduct issued;
  for (int lane = 0; lane < 32; ++lane) {
    issued.lanes[lane] = *lanes[lane];
    if (lanes[lane]->a_matrix != lanes[0]->a_matrix || lanes[lane]->b_matrix != lanes[0]->b_matrix ||
        lanes[lane]->columns != lanes[0]->columns)
      fail("lanes that multiply different matrices");
  }
  auto& matrices = machine.warpgroups[warp / 4].matrices;
  const std::pair<uint64_t, uint64_t> pair{lanes[0]->a_matrix, lanes[0]->b_matrix};
  const size_t index = machine.warps[warp].issued++;
  if (index == matrices.size()) matrices.push_back(pair);
  if (matrices[index] != pair) fail("warps of a warpgroup that multiply different matrices");
  machine.warps[warp].products.push_back(issued);
}

void Wait::run(Wait* const* lanes) {
  const int warp = machine.current / 32;
  auto& products = machine.warps[warp].products;
  for (; static_cast<int>(products.size()) > lanes[0]->pending; products.pop_front())
    compute(products.front(), warp % 4);
}

void Stmatrix::run(Stmatrix* const* lanes) {
  uint16_t matrix[4][8][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half)
        // transposed: a lane's pair stands in one column, of two rows
        matrix[i][lane % 4 * 2 + half][lane / 4] = static_cast<uint16_t>(lanes[lane]->r[i] >> 16 * half);
  for (int lane = 0; lane < 32; ++lane) {
    check_shared(lanes[lane]->address, 16, 16);
    std::memcpy(lanes[lane]->address, matrix[lane / 8][lane % 8], 16);
  }
}

}  // namespace rlrr::model
