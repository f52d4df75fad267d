// wgmma: a warpgroup multiplies 64 rows by 256 or 128 columns, 16 deep, behind its own back.
//
// Each product is fenced and committed on its own, in one asm statement, so that the compiler cannot
// move the making of an operand past the fence, and `wait_products` counts products.
#pragma once

#include <cstdint>
#include <type_traits>

namespace rlrr::ptx {

// A lane's share of 64 x kColumns: of each 8 columns the pair 2t, 2t + 1 in row g, then in row g + 8, of the
// 16 rows of its warp.
template <int kColumns>
using Products = float[kColumns / 2];

// The sums of 128 and of 256 columns, in the instruction and as operands of the asm statement.
#define RLRR_NAMES_128                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define RLRR_NAMES_256                                                                           \
  RLRR_NAMES_128                                                                                 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define RLRR_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RLRR_16(i) RLRR_4(i), RLRR_4(i + 4), RLRR_4(i + 8), RLRR_4(i + 12)
#define RLRR_SUMS_128 RLRR_16(0), RLRR_16(16), RLRR_16(32), RLRR_16(48)
#define RLRR_SUMS_256 RLRR_SUMS_128, RLRR_16(64), RLRR_16(80), RLRR_16(96), RLRR_16(112)

// `operands`: the instruction's after the sums. The rest: what they are.
#define RLRR_WGMMA(columns, type, names, sums, operands, ...)                                        \
  asm volatile(                                                                                      \
      "wgmma.fence.sync.aligned;\n"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names "}, " operands \
      ";\n"                                                                                          \
      "wgmma.commit_group.sync.aligned;"                                                             \
      : sums                                                                                         \
      : __VA_ARGS__                                                                                  \
      : "memory")
#define RLRR_256(type, operands, ...) RLRR_WGMMA("256", type, RLRR_NAMES_256, RLRR_SUMS_256, operands, __VA_ARGS__)
#define RLRR_128(type, operands, ...) RLRR_WGMMA("128", type, RLRR_NAMES_128, RLRR_SUMS_128, operands, __VA_ARGS__)

// d += a b: a's 64 rows from registers, b's columns from shared memory, where depth runs along the rows.
// `a` must be left alone until the product has been waited for.
#define RLRR_OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
template <class T>
RLRR_DEVICE void multiply(Products<256>& d, const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, bf16>) {
    RLRR_256("bf16", "{%128, %129, %130, %131}, %132, 1, 1, 1, 0", RLRR_OPERANDS);
  } else {
    RLRR_256("f16", "{%128, %129, %130, %131}, %132, 1, 1, 1, 0", RLRR_OPERANDS);
  }
}
template <class T>
RLRR_DEVICE void multiply(Products<128>& d, const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, bf16>) {
    RLRR_128("bf16", "{%64, %65, %66, %67}, %68, 1, 1, 1, 0", RLRR_OPERANDS);
  } else {
    RLRR_128("f16", "{%64, %65, %66, %67}, %68, 1, 1, 1, 0", RLRR_OPERANDS);
  }
}

// The same with both from shared memory, where depth runs down the columns.
template <class T>
RLRR_DEVICE void multiply_transposed(Products<256>& d, uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, bf16>) {
    RLRR_256("bf16", "%128, %129, 1, 1, 1, 1, 1", "l"(a), "l"(b));
  } else {
    RLRR_256("f16", "%128, %129, 1, 1, 1, 1, 1", "l"(a), "l"(b));
  }
}

// Waits until at most kPending of this warp's products are under way.
template <int kPending>
RLRR_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Waits for all of them. Without a mention of the sums here the compiler could read them before.
RLRR_DEVICE void finish(Products<256>& d) {
  wait_products<0>();
  asm volatile("" : RLRR_SUMS_256::"memory");
}
RLRR_DEVICE void finish(Products<128>& d) {
  wait_products<0>();
  asm volatile("" : RLRR_SUMS_128::"memory");
}

#undef RLRR_OPERANDS
#undef RLRR_128
#undef RLRR_256
#undef RLRR_WGMMA
#undef RLRR_SUMS_256
#undef RLRR_SUMS_128
#undef RLRR_16
#undef RLRR_4
#undef RLRR_NAMES_256
#undef RLRR_NAMES_128

}  // namespace rlrr::ptx
