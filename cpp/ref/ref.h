// The oracle: scalar, obvious code that every backend is tested against. Nothing shipped includes it.
//
// Functions without a suffix carry out docs/FORMAT.md's fp32 definitions operation by operation, so their bytes are the expected ones.
// Functions with the suffix `_exact` compute the same mathematics in double, where rounding plays no part. attend is double throughout.
// Arguments are assumed valid: the oracle checks nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kvarn/format.h"
#include "kvarn/kvarn.h"

namespace kvarn::ref {

// ---- numbers ----

float f16_to_f32(uint16_t bits);
// Round to nearest even; beyond the range: infinity; NaN: 0x7e00 with the sign kept.
uint16_t f32_to_f16(float value);
float bf16_to_f32(uint16_t bits);
uint16_t f32_to_bf16(float value);

int dtype_bytes(int dtype);  // of a kvarn_dtype
// `values` consecutive values of a kvarn_dtype to and from fp32.
void load_values(const void* source, int dtype, int64_t values, float* out);
void store_values(const float* values, int dtype, int64_t count, void* out);

// ---- rotation ----

// One row of head_dim values in place: x H, or x H^T when `inverse`.
void hadamard(float* row, int head_dim, bool inverse);
// A plain product with the matrix below.
void hadamard_exact(double* row, int head_dim, bool inverse);
// Entry [row][column] of the orthonormal matrix H of order head_dim.
double hadamard_entry(int head_dim, int row, int column);

// ---- codes and metadata of a record ----

// Code `i` of row `row`; `low` and `high` are the two planes' first bytes (`high` unused when the plane does not exist).
int get_code(const uint8_t* low, const uint8_t* high, const Plane& low_plane, const Plane& high_plane, int row, int i);
// The bits must be zero before.
void set_code(uint8_t* low, uint8_t* high, const Plane& low_plane, const Plane& high_plane, int row, int i, int code);

int k_code(const uint8_t* record, const RecordLayout& layout, int token, int channel);
int v_code(const uint8_t* record, const RecordLayout& layout, int token, int channel);
void set_k_code(uint8_t* record, const RecordLayout& layout, int token, int channel, int code);
void set_v_code(uint8_t* record, const RecordLayout& layout, int token, int channel, int code);

// Value `i` of a metadata vector, fp16 or 8-bit, as docs/FORMAT.md defines it (exact in fp32).
double metadata_value(const uint8_t* record, const RecordLayout& layout, Metadata which, int i);
// Writes a whole metadata vector: rounds to fp16, or to bytes and an fp16 (low, step) pair.
void set_metadata(uint8_t* record, const RecordLayout& layout, Metadata which, const float* values);
// Writes the NaN form of a vector.
void set_metadata_nan(uint8_t* record, const RecordLayout& layout, Metadata which);

// ---- encode and decode one tile ----

struct EncodeOptions {
  int normalisation = KVARN_SCALE_INVARIANT;  // kvarn_normalisation
  int rounding = KVARN_ROUNDING_AUTO;         // kvarn_rounding
  const float* k_feedback = nullptr;          // [head_dim][head_dim], read on and above the diagonal; null: no feedback
  const float* v_feedback = nullptr;
};

// k, v [tile_tokens][head_dim], rotated. Every byte of the record is written.
void encode_tile(const float* k, const float* v, const Format& format, int head_dim, const EncodeOptions& options, uint8_t* record);
void encode_tile_exact(const double* k, const double* v, const Format& format, int head_dim, const EncodeOptions& options, uint8_t* record);

// What encode computes for one operand before anything is stored; the two template instances behind encode_tile and encode_tile_exact.
template <class Real>
struct EncodedOperand {
  bool finite = true;                     // false: the operand cannot be encoded; codes are 0 and the metadata is NaN
  std::vector<uint8_t> codes;             // [rows][columns]
  std::vector<Real> row_scale, row_zero;  // [rows]; before the balance of exponents
  std::vector<Real> column_scale;         // [columns]
  Real size = 1;                          // t
  Real first_imbalance = 0, last_imbalance = 0, best_imbalance = 0;
};
enum class BestSoFar { kKeep, kTakeLast };  // kTakeLast exists to show in a test what keeping the best iterate is for
enum class Axis { kRows, kColumns };
// Which axis the channels are (K: rows, V: columns), over which errors are fed back, and the factor of this head.
struct Feedback {
  const float* factor = nullptr;  // [channels][channels], read on and above the diagonal; null: no feedback
  Axis channels = Axis::kRows;
};
// m [rows][columns]; rows are the axis that gets scale and zero.
template <class Real>
EncodedOperand<Real> encode_operand(const Real* m, int rows, int columns, int bits, const EncodeOptions& options,
                                    BestSoFar best_so_far = BestSoFar::kKeep, const Feedback& feedback = {});
extern template EncodedOperand<float> encode_operand(const float*, int, int, int, const EncodeOptions&, BestSoFar, const Feedback&);
extern template EncodedOperand<double> encode_operand(const double*, int, int, int, const EncodeOptions&, BestSoFar, const Feedback&);

// k, v [tile_tokens][head_dim] in the rotated frame; either may be null.
void decode_tile(const uint8_t* record, const Format& format, int head_dim, double* k, double* v);
// The decode operation's fp32 definition, rotated back unless `rotated`.
void decode_tile(const uint8_t* record, const Format& format, int head_dim, bool rotated, float* k, float* v);

// ---- attend ----

struct AttendProblem {
  kvarn_config config;
  int num_q_heads;
  kvarn_attend_params params;  // host memory; out, lse and the workspace are not used
};
// out [num_q_tokens][num_q_heads][head_dim], lse [num_q_tokens][num_q_heads] or null; dense, whatever the strides in params.
void attend(const AttendProblem& problem, double* out, double* lse);

// ---- test data and hashes ----

// splitmix64, so that any language reproduces the inputs of docs/FORMAT.md, "Golden records".
class Generator {
 public:
  explicit Generator(uint64_t seed) : state_(seed) {}
  uint64_t next();
  // The sum of four 8-bit integers of one draw, minus 510, over 256: about normal, standard deviation 0.58, exact in fp16 and fp32.
  float next_value();

 private:
  uint64_t state_;
};

// CRC-32 (IEEE 802.3, reflected, as zlib computes it), and SHA-256 in lower-case hexadecimal digits.
uint32_t crc32(const void* data, size_t bytes);
std::string sha256(const void* data, size_t bytes);

}  // namespace kvarn::ref
