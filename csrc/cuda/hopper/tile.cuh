// Boxes: what the copy engine fetches at a time, 64 rows of 64 16-bit values, and how they lie.
//
// A row is 128 bytes, the width of the widest swizzle: the 16-byte chunks of row r are permuted by
// xor with r % 8. ldmatrix, stmatrix and the tensor cores then read rows and columns without bank
// conflicts, and nothing is padded.
#pragma once

#include "machine.cuh"

namespace rlrr::hopper {

constexpr int kBox = 64;
constexpr int kRowBytes = 128;
constexpr int kBoxBytes = kBox * kRowBytes;

// Of accumulators: a warpgroup's rows side by side with the other's. How many columns both have, each pass says.
constexpr int kTileRows = kConsumers * kBox;

// Where chunk `chunk` of row `row` lies.
RLRR_DEVICE int swizzled(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row % 8)) << 4); }

// A matrix in shared memory as wgmma takes it: start, two strides and the swizzle (PTX manual, "matrix
// descriptor"), in units of 16 bytes. Whichever way depth runs, 8 rows of 128 bytes are a unit and the
// next 8 follow it. `next_box` matters where depth runs down the columns: there the operand's rows fill
// a box, and the next 64 of them are in the next.
RLRR_DEVICE uint64_t matrix_descriptor(const char* shared, int next_box) {
  constexpr uint64_t kSwizzle128 = 1;
  // the field has 14 bits, and in a cluster addresses go on beyond it
  return (ptx::shared_address(shared) >> 4 & 0x3fff) | static_cast<uint64_t>(next_box >> 4) << 16 |
         static_cast<uint64_t>(8 * kRowBytes >> 4) << 32 | kSwizzle128 << 62;
}

// How far 16 of depth are, in a descriptor's units: within the row, or 16 rows on.
constexpr uint64_t kAlongRow = 16 * 2 >> 4;
constexpr uint64_t kDownRows = 16 * kRowBytes >> 4;

// A thread's place among the multiplying ones.
struct Lane {
  int index, g, t;  // g = row of 8, t = pair of 4, as in every fragment
  int warp;         // of its warpgroup
  int consumer;     // its warpgroup
};
RLRR_DEVICE Lane lane() {
  const int thread = ptx::thread(), index = thread % 32;
  return {index, index / 4, index % 4, thread / 32 % 4, thread / kWarpgroup - 1};
}

}  // namespace rlrr::hopper
