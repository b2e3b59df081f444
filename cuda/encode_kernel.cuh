// The kernel around RegisterEncoder: a block an operand of a tile.
#pragma once

#include "encode_place.cuh"
#include "encode_round.cuh"

namespace kvarn::cuda {

// kBlocks: that share a multiprocessor.
template <class Shape, int kBlocks, bool kFeedback>
__global__ void __launch_bounds__(Shape::kThreads, kBlocks) encode_registers_kernel(const __grid_constant__ EncodeArgs a) {
  extern __shared__ __align__(16) uint8_t shared[];
  auto& s = *reinterpret_cast<typename Shape::template Shared<kFeedback>*>(shared);
  const EncodePlace place = encode_place(a);
  if (place.record == nullptr) return;
  if (blockIdx.y == 0) {
    RegisterEncoder<true, kFeedback, Shape>(a, s, place.record).encode(place.tile, a.unbiased_k != 0);
  } else {
    RegisterEncoder<false, kFeedback, Shape>(a, s, place.record).encode(place.tile, a.unbiased_v != 0);
  }
}

template <int NX, int NY, int UY, int kBlocks, bool kFeedback>
EncodeKernel encode_in_registers() {
  using Shape = TileShape<NX, NY, UY>;
  return {reinterpret_cast<const void*>(&encode_registers_kernel<Shape, kBlocks, kFeedback>),
          static_cast<int>(sizeof(typename Shape::template Shared<kFeedback>)), Shape::kThreads};
}

}  // namespace kvarn::cuda
