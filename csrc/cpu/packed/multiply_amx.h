// The innermost loop by AMX: two by two of the tiles that an instruction multiplies, their sums in tile registers.
// The same names as in multiply.h. What passes through memory, the tile of sums, is 4 KiB in the first cache.
#pragma once

#include "units.h"

namespace rlrr {
namespace {

// An instruction multiplies 16 rows of 16 units by 16 columns of them; 4 sums and 2 operands of each side are all of
// the 8 registers
constexpr int64_t tile_rows = 32, tile_vectors = 2, tile_cols = tile_vectors * lanes;
constexpr int64_t unit_multiple = 16;
constexpr int64_t panel_tiles = 2;
constexpr int64_t strip_tiles = 1;

// The shape of this thread's tile registers, as long as it multiplies: other libraries set their own
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

// tile += sum over p of left[i * row_step + p] * right[p][j], or = if `fresh`; right is packed [units][tile_cols]
template <class Unit>
inline void add_product(const Word* left, int64_t row_step, const Word* right, int64_t units, bool fresh, Tile& tile) {
  constexpr int64_t sum_step = sizeof(tile.sum[0]), right_step = tile_cols * sizeof(Word);
  const int64_t left_step = row_step * int64_t{sizeof(Word)};
  asm volatile("" ::: "memory");  // g++ does not know that loads of tiles read what was stored before
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
  }
  _tile_stored(0, &tile.sum[0][0], sum_step);
  _tile_stored(1, &tile.sum[0][1], sum_step);
  _tile_stored(2, &tile.sum[16][0], sum_step);
  _tile_stored(3, &tile.sum[16][1], sum_step);
}

// A strip of dy is packed [strip_rows][units]
template <class Unit>
inline void multiply_strip(const Word* strip, int64_t row, const Word* right, int64_t units, Tile& tile) {
  add_product<Unit>(strip + row * units, units, right, units, true, tile);
}

}  // namespace
}  // namespace rlrr
