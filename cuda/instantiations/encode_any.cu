#include "encode_place.cuh"
#include "encode_tile.cuh"

namespace kvarn::cuda {
namespace {

template <bool kFeedback>
__global__ void __launch_bounds__(kEncodeThreads, 1) encode_any_kernel(const __grid_constant__ EncodeArgs a) {
  extern __shared__ __align__(16) uint8_t shared[];
  EncodeShared s;
  const int part_bytes = 16 * EncodeShared::part_stride(a.head_dim) * 4;
  s.part = reinterpret_cast<float*>(shared);
  s.part_c1 = reinterpret_cast<int*>(shared + part_bytes);
  s.part_c2 = reinterpret_cast<int*>(shared + 2 * part_bytes);
  s.x_weight = reinterpret_cast<float*>(shared + part_bytes + encode_union_bytes(a.head_dim, a.tile_tokens));
  s.x_mean = s.x_weight + a.head_dim;
  s.y_weight = s.x_mean + a.head_dim;
  s.y_mean = s.y_weight + a.tile_tokens;
  s.reduce = s.y_mean + a.tile_tokens;
  const EncodePlace place = encode_place(a);
  if (place.record == nullptr) return;
  if (blockIdx.y == 0) {
    TileEncoder<true, kFeedback>(a, s, place.tile, place.record).encode(place.tile != nullptr, a.unbiased_k != 0);
  } else {
    TileEncoder<false, kFeedback>(a, s, place.tile, place.record).encode(place.tile != nullptr, a.unbiased_v != 0);
  }
}

}  // namespace

const void* encode_any(bool feedback) {
  return feedback ? reinterpret_cast<const void*>(&encode_any_kernel<true>) : reinterpret_cast<const void*>(&encode_any_kernel<false>);
}
}  // namespace kvarn::cuda
