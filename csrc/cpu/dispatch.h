// From the dtypes of a call to the types of a loop.
#pragma once

#include "types.h"

namespace rlrr {

// body(T{}, W{}) for x's dtype and W's; the caller has refused other pairs.
template <class F>
void dispatch(Dtype x, Dtype weight, const F& body) {
  if (x == Dtype::float64) {
    body(double{}, double{});
  } else if (x == Dtype::float32) {
    weight == Dtype::float32 ? body(float{}, float{}) : body(float{}, bfloat16{});
  } else {
    weight == Dtype::float32 ? body(bfloat16{}, float{}) : body(bfloat16{}, bfloat16{});
  }
}

}  // namespace rlrr
