// The loop that forward and grad_input share: a tile of `left` times a tile of W * S, S = 1 + u v.
//
// To forward the depth is K, to grad_input it is N; features are the other one. S at a depth d and a
// feature f is 1 + depth_scale[d] * feature_scale[f] either way. Where groups of W's rows have a v
// each, the depth of grad_input falls into segments with feature scales of their own, and no step
// crosses from one into the next.
//
// All warps stand side by side along the features, so none rescales what another does too, and each
// rescaled value meets all the tokens of the block in registers.
#pragma once

#include "copy.cuh"
#include "fragments.cuh"
#include "pipeline.cuh"

namespace rlrr {

struct Product {
  Source left;    // [tokens, depth]
  Source weight;  // [features, depth] where depth is inner, else [depth, features]
  const float* depth_scale;
  const float* feature_scale;
  int feature_scale_stride;  // from a segment to the next
  int segment, segments;     // depth of one, and how many
  int token, tokens;         // first of the tile, and how many there are from it on
  int feature, features;
};

template <class Math, class Staged, Inner kInner, class Tile>
struct ProductStage {
  static constexpr bool kDepthInner = kInner == Inner::depth;
  static constexpr int kSize = sizeof(typename Math::Element);
  using Left = SharedTile<typename Math::Element, Tile::kRows, Tile::kDepth,
                          padding(kSize, kSize, Math::kTensorCores, Inner::depth)>;
  using Weight = SharedTile<Staged, kDepthInner ? Tile::kCols : Tile::kDepth, kDepthInner ? Tile::kDepth : Tile::kCols,
                            padding(sizeof(Staged), kSize, Math::kTensorCores, kInner)>;
  static constexpr int kBytes = Left::kBytes + Weight::kBytes + Tile::kDepth * 4;
  static constexpr int kTotalBytes = kBytes * Tile::kStages;

  Left left;
  Weight weight;
  char* depth_scale;

  RLRR_DEVICE explicit ProductStage(int stage)
      : left{ptx::shared_memory() + stage * kBytes},
        weight{left.data + Left::kBytes},
        depth_scale{weight.data + Weight::kBytes} {}
};

// W * S in float32, rounded once.
template <class Math>
RLRR_DEVICE typename Math::Right rescale(const float (&w)[Math::kColumns][Math::kDepths],
                                         const float (&feature_scale)[Math::kColumns],
                                         const float (&depth_scale)[Math::kDepths]) {
  float rescaled[Math::kColumns][Math::kDepths];
#pragma unroll
  for (int c = 0; c < Math::kColumns; ++c)
#pragma unroll
    for (int d = 0; d < Math::kDepths; ++d) rescaled[c][d] = w[c][d] * ptx::fma(feature_scale[c], depth_scale[d], 1.0f);
  return Math::right(rescaled);
}

template <class Math, class Tile>
RLRR_DEVICE void load_feature_scales(float (&to)[Tile::kColTiles][Math::kColumns], const Product& p, int segment,
                                     const Lane& l) {
  const float* from = p.feature_scale + static_cast<int64_t>(segment) * p.feature_scale_stride;
#pragma unroll
  for (int j = 0; j < Tile::kColTiles; ++j)
#pragma unroll
    for (int c = 0; c < Math::kColumns; ++c) {
      const int feature = Tile::warp_col() + 8 * j + Math::column(l, c);
      to[j][c] = feature < p.features ? ptx::load(from + feature) : 0.0f;
    }
}

// Walks the depth in steps of kDepth, segment after segment.
template <int kDepth>
struct Walk {
  int segment = 0, offset = 0;
  RLRR_DEVICE void next(const Product& p) {
    offset += kDepth;
    if (offset >= p.segment) offset = 0, ++segment;
  }
};

template <Inner kInner, class Stage, class Step>
RLRR_DEVICE void copy_stage(const Stage& to, const Product& p, const Step& at) {
  const int64_t depth = static_cast<int64_t>(at.segment) * p.segment + at.offset;
  const int left = p.segment - at.offset;
  copy_tile(to.left, p.left, p.token, depth, p.tokens, left);
  if constexpr (kInner == Inner::depth) {
    copy_tile(to.weight, p.weight, p.feature, depth, p.features, left);
  } else {
    copy_tile(to.weight, p.weight, depth, p.feature, left, p.features);
  }
  copy_floats<Stage::Left::kCols>(to.depth_scale, p.depth_scale + depth, left);
}

template <class Math, Inner kInner, class Tile, class Stage>
RLRR_DEVICE void multiply_stage(typename Tile::Accumulator& acc, const Stage& stage,
                                const float (&feature_scale)[Tile::kColTiles][Math::kColumns], const Lane& l) {
#pragma unroll
  for (int depth = 0; depth < Tile::kDepth; depth += Math::kDepth) {
    float depth_scale[Math::kDepths];
    Math::depth_values(depth_scale, stage.depth_scale + 4 * depth, l);
    typename Math::Right right[Tile::kColTiles];
#pragma unroll
    for (int j = 0; j < Tile::kColTiles; j += 2) {
      Values<Math> w;
      load_values<kInner>(Math{}, w, stage.weight, Tile::warp_col() + 8 * j, depth, l);
      right[j] = rescale<Math>(w[0], feature_scale[j], depth_scale);
      right[j + 1] = rescale<Math>(w[1], feature_scale[j + 1], depth_scale);
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
      auto left = load_left<Inner::depth>(Math{}, stage.left, Tile::warp_row() + 16 * i, depth, l);
      Math::round(left);
#pragma unroll
      for (int j = 0; j < Tile::kColTiles; ++j) Math::multiply_add(acc[i][j], left, right[j]);
    }
  }
}

template <class Math, class Staged, Inner kInner, class Tile>
RLRR_DEVICE void accumulate(typename Tile::Accumulator& acc, const Product& p) {
  using Stage = ProductStage<Math, Staged, kInner, Tile>;
  const Lane l = lane();
  const int steps = (p.segment + Tile::kDepth - 1) / Tile::kDepth * p.segments;
  Walk<Tile::kDepth> copying, multiplying;
  float feature_scale[Tile::kColTiles][Math::kColumns];
  load_feature_scales<Math, Tile>(feature_scale, p, 0, l);
  pipeline<Tile::kStages>(
      steps,
      [&](int stage) {
        copy_stage<kInner>(Stage(stage), p, copying);
        copying.next(p);
      },
      [&](int stage) {
        multiply_stage<Math, kInner, Tile>(acc, Stage(stage), feature_scale, l);
        const int segment = multiplying.segment;
        multiplying.next(p);
        if (multiplying.segment != segment && multiplying.segment < p.segments) {
          load_feature_scales<Math, Tile>(feature_scale, p, multiplying.segment, l);
        }
      });
}

}  // namespace rlrr
