// dx = dy W': the rows of the product are K, its depth is N.
#include "persistent_product.cuh"

namespace rlrr::hopper {

bool supports(const GradInput& g) {
  const Layer& layer = g.layer;
  // a box that crossed into the next group would add its rows to the sum
  const bool whole_segments = layer.groups == 1 || layer.n / layer.groups % kBox == 0;
  return fits_layer(layer, g.dy.dtype) && fits_boxes(g.dy, layer.m, layer.n) && fits_boxes(g.dx, layer.m, layer.k) &&
         g.dx.dtype == g.dy.dtype && whole_segments;
}

cudaError_t grad_input(const GradInput& g, cudaStream_t stream) {
  const Layer& layer = g.layer;
  Product p = {};
  cudaError_t error = describe(p.weight, layer.weight, layer.n, layer.k, kBox);
  if (error == cudaSuccess) error = describe(p.depth_scales, layer.u, 1, layer.n);
  if (error != cudaSuccess) return error;
  p.row_scales = layer.v;
  p.row_scale_stride = layer.k;
  p.row_groups = 1;
  p.group_rows = static_cast<int>(layer.k);
  p.segments = static_cast<int>(layer.groups);
  p.segment = static_cast<int>(layer.n / layer.groups);
  p.token_count = layer.m;
  p.out = static_cast<char*>(g.dx.data);
  p.out_stride = g.dx.row_stride;
  return launch_product<Weight::columns>(p, g.dy, layer.device, stream);
}

}  // namespace rlrr::hopper
