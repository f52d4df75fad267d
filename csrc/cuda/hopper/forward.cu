// y = x W'^T + bias + shift: the rows of the product are N, its depth is K.
#include "persistent_product.cuh"

namespace rlrr::hopper {

bool supports(const Forward& f) {
  const Layer& layer = f.layer;
  return fits_layer(layer, f.x.dtype) && fits_boxes(f.x, layer.m, layer.k) && fits_boxes(f.y, layer.m, layer.n) &&
         f.y.dtype == f.x.dtype && layer.n / layer.groups % 8 == 0;
}

cudaError_t forward(const Forward& f, cudaStream_t stream) {
  const Layer& layer = f.layer;
  Product p = {};
  cudaError_t error = describe(p.weight, layer.weight, layer.n, layer.k, kBox);
  if (error == cudaSuccess) error = describe(p.depth_scales, layer.v, layer.groups, layer.k);
  if (error != cudaSuccess) return error;
  p.row_scales = layer.u;
  p.row_groups = static_cast<int>(layer.groups);
  p.group_rows = static_cast<int>(layer.n / layer.groups);
  p.segments = 1;
  p.segment = static_cast<int>(layer.k);
  p.token_count = layer.m;
  p.bias = f.bias;
  p.shift = f.shift;
  p.out = static_cast<char*>(f.y.data);
  p.out_stride = f.y.row_stride;
  return launch_product<Weight::rows>(p, f.x, layer.device, stream);
}

}  // namespace rlrr::hopper
