// The loop that forward and grad_input share: a tile of `left` times a tile of W * S, S = 1 + u v.
//
// The depth is K in forward and N in grad_input; features are the other dimension of W. In both, S at a depth d and a
// feature f is 1 + depth_scale[d] * feature_scale[f]. If W has groups of rows, each with a v of its own, the depth of
// grad_input consists of segments with different feature scales; no step crosses the end of a segment.
//
// The warps of a block lie side by side along the features: each value of W is rescaled by one warp only, and
// multiplied by all tokens of the block.
#pragma once

#include "math.cuh"

namespace rlrr {

struct Product {
  Source left;    // [tokens, depth]
  Source weight;  // [features, depth] where depth is inner, else [depth, features]
  const float* depth_scale;
  const float* feature_scale;
  int feature_scale_stride;  // from one segment to the next
  int segment, segments;     // depth of a segment, and their number
  int first_step, steps;     // of this block, among the steps of all segments
  int token, tokens;         // first of the tile, and how many are left from there on
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

// Where the steps of a block begin. Steps have a depth of kDepth and go through one segment after another.
template <int kDepth>
struct Start {
  int of_segment, segment, step;  // number of steps in a segment; segment of the first step, and its index there
  RLRR_DEVICE explicit Start(const Product& p)
      : of_segment((p.segment + kDepth - 1) / kDepth),
        segment(p.first_step / of_segment),
        step(p.first_step % of_segment) {}
};

// Copies the operands of one step after another, for any strides and at any edge.
template <Inner kInner, class Stage, class Tile>
class EdgeCopies {
 public:
  RLRR_DEVICE explicit EdgeCopies(const Product& p) : p_(p) {
    const Start<Tile::kDepth> start(p);
    segment_ = start.segment, offset_ = start.step * Tile::kDepth;
  }
  RLRR_DEVICE void copy_next(const Stage& to) {
    const int64_t depth = static_cast<int64_t>(segment_) * p_.segment + offset_;
    const int left = p_.segment - offset_;
    copy_tile(to.left, p_.left, p_.token, depth, p_.tokens, left);
    if constexpr (kInner == Inner::depth) {
      copy_tile(to.weight, p_.weight, p_.feature, depth, p_.features, left);
    } else {
      copy_tile(to.weight, p_.weight, depth, p_.feature, left, p_.features);
    }
    copy_floats<Tile::kDepth>(to.depth_scale, p_.depth_scale + depth, left);
    offset_ += Tile::kDepth;
    if (offset_ >= p_.segment) offset_ = 0, ++segment_;
  }

 private:
  const Product& p_;
  int segment_, offset_;
};

// The same for blocks whose tiles are all whole: nearly all blocks of a large layer.
template <Inner kInner, class Stage, class Tile>
class WholeCopies {
 public:
  RLRR_DEVICE static bool suit(const Product& p) {
    return p.left.vectors && p.weight.vectors && p.tokens >= Tile::kRows && p.features >= Tile::kCols &&
           p.segment % Tile::kDepth == 0;
  }
  RLRR_DEVICE explicit WholeCopies(const Product& p)
      : left_(p.left, p.token, first(p), Tile::kDepth),
        weight_(p.weight, kInner == Inner::depth ? p.feature : first(p), kInner == Inner::depth ? first(p) : p.feature,
                kInner == Inner::depth ? Tile::kDepth : Tile::kDepth * p.weight.row_stride),
        depth_scale_(p.depth_scale + first(p) + ptx::thread()) {}
  RLRR_DEVICE void copy_next(const Stage& to) {
    left_.copy_next(to.left);
    weight_.copy_next(to.weight);
    if (ptx::thread() < Tile::kDepth) ptx::copy_async<4>(to.depth_scale + 4 * ptx::thread(), depth_scale_, 4);
    depth_scale_ += Tile::kDepth;
  }

 private:
  // segments consist of whole steps
  RLRR_DEVICE static int64_t first(const Product& p) { return static_cast<int64_t>(p.first_step) * Tile::kDepth; }

  Stream<typename Stage::Left> left_;
  Stream<typename Stage::Weight> weight_;
  const float* depth_scale_;
};

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

template <class Math, Inner kInner, class Tile, class Stage, class Copies>
RLRR_DEVICE void accumulate_steps(typename Tile::Accumulator& acc, const Product& p) {
  const Lane l = lane();
  const Start<Tile::kDepth> start(p);
  int segment = start.segment, left_in_segment = start.of_segment - start.step;
  float feature_scale[Tile::kColTiles][Math::kColumns];
  load_feature_scales<Math, Tile>(feature_scale, p, segment, l);
  Copies copies(p);
  pipeline<Tile::kStages>(
      p.steps, [&](int stage) { copies.copy_next(Stage(stage)); },
      [&](int stage) {
        multiply_stage<Math, kInner, Tile>(acc, Stage(stage), feature_scale, l);
        // forward has a single segment
        if (kInner == Inner::depth || --left_in_segment > 0) return;
        if (++segment == p.segments) return;
        left_in_segment = start.of_segment;
        load_feature_scales<Math, Tile>(feature_scale, p, segment, l);
      });
}

template <class Math, class Staged, Inner kInner, class Tile>
RLRR_DEVICE void accumulate(typename Tile::Accumulator& acc, const Product& p) {
  using Stage = ProductStage<Math, Staged, kInner, Tile>;
  if (WholeCopies<kInner, Stage, Tile>::suit(p)) {
    accumulate_steps<Math, kInner, Tile, Stage, WholeCopies<kInner, Stage, Tile>>(acc, p);
  } else {
    accumulate_steps<Math, kInner, Tile, Stage, EdgeCopies<kInner, Stage, Tile>>(acc, p);
  }
}

}  // namespace rlrr
