// The innermost loop: one tile of a product, its sums in vector registers or, with AMX, in tile registers.
#pragma once

#include "vectors.h"

namespace rlrr {
namespace {

#if defined(RLRR_AMX)

// Two by two of the tiles that an instruction multiplies, which have 16 rows of 16 units and 16 columns: 4 sums and 2
// operands of each side take all 8 tile registers. The sums pass through memory, 4 KiB in the L1 cache.
constexpr int64_t tile_rows = 32, tile_vectors = 2, tile_cols = tile_vectors * lanes;
constexpr int64_t unit_multiple = 16;
constexpr int64_t panel_tiles = 2;
constexpr int64_t strip_tiles = 1;
// Lines that a product prefetches for each step of unit_multiple units
constexpr int lines_per_step = 6;

// Sets the shapes of the tile registers of this thread while it multiplies; other libraries set their own
struct Multiplier {
  Multiplier() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Multiplier() { _tile_release(); }
};

struct Tile {
  Vector sum[tile_rows][tile_vectors];
};

// tile += sum over p of left[i * row_step + p] * right[p][j], or = if `fresh`; right is packed [units][tile_cols].
// Calls prefetch() several times for each step.
template <class Unit, class Prefetch>
inline void add_product(const Word* left, int64_t row_step, const Word* right, int64_t units, bool fresh, Tile& tile,
                        const Prefetch& prefetch) {
  constexpr int64_t sum_step = sizeof(tile.sum[0]), right_step = tile_cols * sizeof(Word);
  const int64_t left_step = row_step * int64_t{sizeof(Word)};
  asm volatile("" ::: "memory");  // g++ does not know that loads of tiles read memory
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, &tile.sum[0][0], sum_step);
    _tile_loadd(1, &tile.sum[0][1], sum_step);
    _tile_loadd(2, &tile.sum[16][0], sum_step);
    _tile_loadd(3, &tile.sum[16][1], sum_step);
  }
  for (int64_t p = 0; p < units; p += unit_multiple) {
    _tile_loadd(4, left + p, left_step);
    _tile_loadd(6, right + p * tile_cols, right_step);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + p * tile_cols + lanes, right_step);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + 16 * row_step + p, left_step);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    for (int i = 0; i < lines_per_step; ++i) prefetch();
  }
  _tile_stored(0, &tile.sum[0][0], sum_step);
  _tile_stored(1, &tile.sum[0][1], sum_step);
  _tile_stored(2, &tile.sum[16][0], sum_step);
  _tile_stored(3, &tile.sum[16][1], sum_step);
}

// A strip of dy is packed [strip_rows][units]
template <class Unit, class Prefetch>
inline void multiply_strip(const Word* strip, int64_t row, const Word* right, int64_t units, Tile& tile,
                           const Prefetch& prefetch) {
  add_product<Unit>(strip + row * units, units, right, units, true, tile, prefetch);
}

#else

// AVX2: 12 sums, 2 columns of operands and a broadcast row take 15 of 16 registers.
// AVX-512: 24 sums, 3 columns and a row take 28 of 32.
constexpr int64_t tile_rows = lanes == 8 ? 6 : 8, tile_vectors = lanes == 8 ? 2 : 3, tile_cols = tile_vectors * lanes;
// Tiles of W' that a thread forms at a time, side by side
constexpr int64_t panel_tiles = lanes == 8 ? 3 : 1;
// Tiles of G that share a packed dy, one below the other
constexpr int64_t strip_tiles = 4;
// Sums are padded to a multiple of this number of units
constexpr int64_t unit_multiple = 1;
// Units that are summed one after another: float32 sums of thousands of terms lose two bits that a BLAS keeps
constexpr int64_t max_units = 256;
// Units after which a product prefetches a line: as many instructions as fit beside the multiplications
constexpr int64_t units_per_line = lanes == 8 ? 8 : 2;

// Nothing has to be set up for vector registers
struct Multiplier {};

struct Tile {
  Vector sum[tile_rows][tile_vectors];
};

inline void clear(Tile& tile) {
  for (auto& row : tile.sum) std::fill_n(row, tile_vectors, zero());
}

// sum over p of left[i * row_step + p * unit_step] * right[p][j]; right is packed [units][tile_cols]. Calls prefetch()
// every units_per_line units.
template <class Unit, int64_t unit_step, class Prefetch>
inline __attribute__((always_inline)) void multiply(const Word* left, int64_t row_step, const Word* right,
                                                    int64_t units, Tile& tile, const Prefetch& prefetch) {
  constexpr int half = tile_rows / 2;
  Vector sum[tile_rows][tile_vectors];
#pragma GCC unroll 8
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < tile_vectors; ++j) sum[i][j] = zero();
  }
  // two base addresses: x86 can address half of the rows from each without further instructions
  const Word *near = left, *far = left + half * row_step;
  for (int64_t p = 0; p < units; ++p) {
    if (p % units_per_line == 0) prefetch();
    Vector cols[tile_vectors];
#pragma GCC unroll 3
    for (int j = 0; j < tile_vectors; ++j) cols[j] = load(right + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < tile_rows; ++i) {
      const Vector row = broadcast((i < half ? near : far) + (i % half) * row_step);
#pragma GCC unroll 3
      for (int j = 0; j < tile_vectors; ++j) sum[i][j] = Unit::multiply(row, cols[j], sum[i][j]);
    }
    near += unit_step;
    far += unit_step;
    right += tile_cols;
  }
#pragma GCC unroll 8
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < tile_vectors; ++j) tile.sum[i][j] = sum[i][j];
  }
}

// total += left right, or = if `fresh`, for sums of any length along rows of `left`, in parts of max_units
template <class Unit, class Prefetch>
void add_product(const Word* left, int64_t row_step, const Word* right, int64_t units, bool fresh, Tile& total,
                 const Prefetch& prefetch) {
  if (fresh) clear(total);
  for (int64_t done = 0; done < units; done += max_units) {
    Tile part;
    multiply<Unit, 1>(left + done, row_step, right + done * tile_cols, std::min(units - done, max_units), part,
                      prefetch);
    for (int i = 0; i < tile_rows; ++i) {
      for (int j = 0; j < tile_vectors; ++j) total.sum[i][j] = total.sum[i][j] + part.sum[i][j];
    }
  }
}

// A strip of dy is packed [units][strip_rows]
template <class Unit, class Prefetch>
inline void multiply_strip(const Word* strip, int64_t row, const Word* right, int64_t units, Tile& tile,
                           const Prefetch& prefetch) {
  multiply<Unit, strip_tiles * tile_rows>(strip + row, 1, right, units, tile, prefetch);
}

#endif

}  // namespace
}  // namespace rlrr
