// The warp-wide instructions of sm_80, computed from the operands of all 32 lanes. The layouts are those of the PTX
// manual (ldmatrix; matrix fragments for mma.m16n8k16 and mma.m16n8k8), written independently of the kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "model.h"

namespace rlrr::model {

// The number of rows that ldmatrix could not load together with another row of their matrix. Shared memory has 32 banks
// of 4 bytes: two rows of 16 bytes collide if their addresses are equal modulo 128.
inline int64_t bank_conflicts = 0;

inline uint32_t bits(float value) {
  uint32_t raw;
  std::memcpy(&raw, &value, 4);
  return raw;
}
inline float from_bits(uint32_t raw) {
  float value;
  std::memcpy(&value, &raw, 4);
  return value;
}

inline float widen(bf16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(fp16 value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                     : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return value.bits >> 15 ? -size : size;
}

// To the nearest, ties to even.
inline uint16_t narrow(float value, bf16) {
  const uint32_t raw = bits(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((raw + 0x7fff + (raw >> 16 & 1)) >> 16);
}
inline uint16_t narrow(float value, fp16) {
  const uint16_t sign = bits(value) >> 31 << 15;
  if (std::isnan(value)) return 0x7fff;
  const float size = std::fabs(value);
  if (size == 0) return sign;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(size, &exponent);
  // steps of 2^-24 among the subnormals, of 11 significant bits above
  const int step = exponent < -13 ? -24 : exponent - 11;
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, -step)));
  // counting on from the first value of a binade continues with the next one
  return sign | static_cast<uint16_t>(step == -24 ? steps : ((step + 25) << 10) + steps - 1024);
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r has the address of row r of matrix i.
template <bool kTrans>
struct Ldmatrix {
  uint32_t* r;
  const char* address;

  static void run(Ldmatrix* const* lanes) {
    uint16_t matrix[4][8][8];
    for (int lane = 0; lane < 32; ++lane) {
      check_shared(lanes[lane]->address, 16, 16);
      std::memcpy(matrix[lane / 8][lane % 8], lanes[lane]->address, 16);
      for (int other = lane / 8 * 8; other < lane; ++other)
        bank_conflicts += (lanes[lane]->address - lanes[other]->address) % 128 == 0;
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, col = lane % 4 * 2;
        const uint32_t low = kTrans ? matrix[i][col][row] : matrix[i][row][col];
        const uint32_t high = kTrans ? matrix[i][col + 1][row] : matrix[i][row][col + 1];
        lanes[lane]->r[i] = low | high << 16;
      }
  }
};

// c += a b, with exact products, whose sum is rounded to float32 once.
template <int kDepth>
void multiply_add(const float (&a)[16][kDepth], const float (&b)[kDepth][8], float* const (&c)[32]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), col = lane % 4 * 2 + (i & 1);
      double sum = c[lane][i];
      for (int k = 0; k < kDepth; ++k) sum += static_cast<double>(a[row][k]) * b[k][col];
      c[lane][i] = static_cast<float>(sum);
    }
}

template <class T>
struct MmaHalf {
  float* c;
  const uint32_t *a, *b;

  static float element(const uint32_t* registers, int i) {
    return widen(T{static_cast<uint16_t>(registers[i / 2] >> (i % 2 * 16))});
  }
  static void run(MmaHalf* const* lanes) {
    float a[16][16], b[16][8];
    float* c[32];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane >> 2, in_group = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
        const int col = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        a[row][col] = element(lanes[lane]->a, i);
      }
      for (int i = 0; i < 4; ++i) b[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = element(lanes[lane]->b, i);
      c[lane] = lanes[lane]->c;
    }
    multiply_add<16>(a, b, c);
  }
};

struct MmaTf32 {
  float* c;
  const uint32_t *a, *b;

  // the tensor cores ignore the last 13 bits
  static float element(uint32_t raw) { return from_bits(raw & ~0x1fffu); }
  static void run(MmaTf32* const* lanes) {
    float a[16][8], b[8][8];
    float* c[32];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane >> 2, in_group = lane % 4;
      for (int i = 0; i < 4; ++i)
        a[group + (i == 0 || i == 2 ? 0 : 8)][in_group + (i < 2 ? 0 : 4)] = element(lanes[lane]->a[i]);
      for (int i = 0; i < 2; ++i) b[in_group + 4 * i][group] = element(lanes[lane]->b[i]);
      c[lane] = lanes[lane]->c;
    }
    multiply_add<8>(a, b, c);
  }
};

struct ShuffleXor {
  float value;
  int distance;
  float* received;

  static void run(ShuffleXor* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) *lanes[lane]->received = lanes[lane ^ lanes[lane]->distance]->value;
  }
};

}  // namespace rlrr::model
