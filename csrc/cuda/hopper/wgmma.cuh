// wgmma: a warpgroup multiplies 64 rows by 256 columns, 16 deep, behind its own back.
//
// Each product is fenced and committed on its own, in one asm statement, so that the compiler cannot
// move the making of an operand past the fence, and `wait_products` counts products.
#pragma once

#include <cstdint>
#include <type_traits>

namespace rlrr::ptx {

// A lane's share of 64 x 256: of each 8 columns the pair 2t, 2t + 1 in row g, then in row g + 8, of the
// 16 rows of its warp.
using Products = float[128];

#define RLRR_PRODUCTS                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define RLRR_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RLRR_16(i) RLRR_4(i), RLRR_4(i + 4), RLRR_4(i + 8), RLRR_4(i + 12)
#define RLRR_64(i) RLRR_16(i), RLRR_16(i + 16), RLRR_16(i + 32), RLRR_16(i + 48)

// d += a b: a's 64 rows from registers, b's columns from shared memory, where depth runs along the rows.
// `a` must be left alone until the product has been waited for.
#define RLRR_WGMMA_REGISTERS(type)                                                    \
  asm volatile(                                                                       \
      "wgmma.fence.sync.aligned;\n"                                                   \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" RLRR_PRODUCTS \
      "}, "                                                                           \
      "{%128, %129, %130, %131}, %132, 1, 1, 1, 0;\n"                                 \
      "wgmma.commit_group.sync.aligned;"                                              \
      : RLRR_64(0), RLRR_64(64)                                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                            \
      : "memory")

// The same with both from shared memory, where depth runs down the columns.
#define RLRR_WGMMA_SHARED(type)                                                       \
  asm volatile(                                                                       \
      "wgmma.fence.sync.aligned;\n"                                                   \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" RLRR_PRODUCTS \
      "}, "                                                                           \
      "%128, %129, 1, 1, 1, 1, 1;\n"                                                  \
      "wgmma.commit_group.sync.aligned;"                                              \
      : RLRR_64(0), RLRR_64(64)                                                       \
      : "l"(a), "l"(b)                                                                \
      : "memory")

template <class T>
RLRR_DEVICE void multiply(Products& d, const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, bf16>) {
    RLRR_WGMMA_REGISTERS("bf16");
  } else {
    RLRR_WGMMA_REGISTERS("f16");
  }
}
template <class T>
RLRR_DEVICE void multiply_transposed(Products& d, uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, bf16>) {
    RLRR_WGMMA_SHARED("bf16");
  } else {
    RLRR_WGMMA_SHARED("f16");
  }
}

#undef RLRR_WGMMA_SHARED
#undef RLRR_WGMMA_REGISTERS
#undef RLRR_PRODUCTS

// Waits until at most kPending of this warp's products are under way.
template <int kPending>
RLRR_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Waits for all of them. Without a mention of the sums here the compiler could read them before.
RLRR_DEVICE void finish(Products& d) {
  wait_products<0>();
  asm volatile("" : RLRR_64(0), RLRR_64(64)::"memory");
}

#undef RLRR_64
#undef RLRR_16
#undef RLRR_4

}  // namespace rlrr::ptx
