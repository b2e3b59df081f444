// The loading warp of attend_kernel.cuh: turns runs of tiles into units in a ring of stages in shared memory, and how the computing warps
// wait for them.
//
// A unit is a whole record, read once (bulk copies on sm_90 and later), or 16 tokens of a staging slot. Its K and its V pass through rings
// of their own, each part with its metadata: a stage of K is free again while the warp is still busy with V.
#pragma once

#include "attend_walk.cuh"
#include "numbers.cuh"
#include "primitives.cuh"

namespace kvarn::cuda {

constexpr int kTile = 128;        // tokens of a tile this kernel is made for
constexpr int kStagingUnit = 16;  // tokens of one staging load
constexpr int kMaxStages = 32;
constexpr int kMaxBlockRows = 128;
constexpr int kMaxWarps = 16;
constexpr int kMaxRuns = 4;            // described at a time: being finished, computed, loaded, and prepared
constexpr int kFullArrivals = 1 + 32;  // of a full stage: its description, and the lanes that load

enum UnitKind : int { kRecordUnit, kStagingUnitKind, kInvalidUnit };

struct Unit {
  int number;  // counted over the block's life
  int kind;
  int first_token;  // position of the first token
};

// A place in a ring of stages. A barrier knows phases by their parity.
struct RingPlace {
  int stage, parity;
  __device__ __forceinline__ void advance(int by, int num_stages) {
    stage += by;
    while (stage >= num_stages) {
      stage -= num_stages;
      parity ^= 1;
    }
  }
};

// Where a computing warp stands, and its places in shared memory. Kept there: the products need the registers.
struct __align__(16) Cursor {
  int unit;      // counted over the block's life: the next one of this warp
  int unit_end;  // of the run
  RingPlace k, v;
  int q, info;    // of the run: bytes from the beginning of shared memory
  int run;        // counted over the block's life
  int real;       // 0: the run before the first, or the one after the last
  int step_due;   // of the run, see attend_kernel.cuh
  int has_rows;   // of the run
  int first_row;  // of this warp in a block of rows
};

struct RowInfo {
  float scale;  // of products with the prepared row of q, to base-2 logits
  float slope;  // ALiBi, base 2
  int position;
  int unused;
};

// Shared memory: this, q, the merge buffer, the stages of K, the stages of V.
struct SharedHead {
  uint64_t k_full[kMaxStages], k_empty[kMaxStages], v_full[kMaxStages], v_empty[kMaxStages];
  uint64_t run_full[kMaxRuns], run_empty[kMaxRuns];  // described; finished
  uint64_t q_full[2];                                // a run's rows are prepared, in one of the buffers for q
  uint64_t merge_full, merge_empty;                  // a run's results are in the merge buffer; they are read
  Unit units[kMaxStages];                            // of the stages of K
  int v_numbers[kMaxStages];                         // of the units of the stages of V
  Run runs[kMaxRuns];
  Cursor cursors[kMaxWarps];
  RowInfo rows[kMaxBlockRows];
};

__device__ __forceinline__ uint32_t parity_of_run(int run) { return run / kMaxRuns & 1; }

// Read anew at every use, so that neither it nor what follows from it takes registers over the products.
__device__ __forceinline__ int this_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
__device__ __forceinline__ int this_warp() { return this_thread() / 32; }

// Block, ~slot, or kNoEntry.
constexpr int kNoEntry = INT32_MAX;  // blocks and slots are counted in int32, so no entry has this value
__device__ __forceinline__ int table_entry(const AttendArgs& a, const Run& run, int tile) {
  if (tile >= a.max_tiles) return kNoEntry;
  const int e = a.block_table[run.sequence * a.block_table_stride + tile];
  return (e >= 0 ? e < a.num_blocks : ~e < a.num_slots) ? e : kNoEntry;
}

// The units of staging that the run's rows see of a tile.
__device__ __forceinline__ void staging_span(const Run& run, int tile, int& first, int& last) {
  first = max(run.first_visible - tile * kTile, 0) / kStagingUnit;
  last = min(run.last_visible - tile * kTile, kTile - 1) / kStagingUnit;
}

// The rows of a unit of staging.
struct StagingRows {
  const uint8_t *k, *v;
};
template <int D, int VALUE_BYTES>
__device__ __forceinline__ StagingRows staging_rows(const AttendArgs& a, const Run& run, int slot, int unit) {
  constexpr int64_t kHeadBytes = int64_t{kTile} * D * VALUE_BYTES, kUnitBytes = int64_t{kStagingUnit} * D * VALUE_BYTES;
  const uint8_t* const k = a.staging + (int64_t{slot} * 2 * a.num_kv_heads + run.kv_head) * kHeadBytes + unit * kUnitBytes;
  return {k, k + a.num_kv_heads * kHeadBytes};
}
// Copies 16 rows into a stage, 16 bytes further apart than in memory.
template <int D, int VALUE_BYTES>
__device__ __forceinline__ void copy_rows(uint32_t to, const uint8_t* from, int lane) {
  constexpr int kRowCopies = D * VALUE_BYTES / 16;
  static_assert(32 % kRowCopies == 0 || kRowCopies % 32 == 0);
  to += lane * 16 + lane / kRowCopies * 16;
  from += lane * 16;
#pragma unroll
  for (int i = 0; i < kStagingUnit * kRowCopies; i += 32) copy16(to + i * 16 + i / kRowCopies * 16, from + i * 16);
}

// The two parts of a record that are loaded, K and V: codes, and the metadata that belongs to them.
struct RecordParts {
  uint32_t k_bytes, v_bytes, k_metadata, v_metadata;
  template <int D>
  static __device__ __forceinline__ RecordParts of(const AttendArgs& a) {
    return {static_cast<uint32_t>(a.v_offset), static_cast<uint32_t>(a.metadata_offset - a.v_offset), 2 * (2 * D + kTile),
            2 * (D + 2 * kTile)};
  }
};
__device__ __forceinline__ const uint8_t* record_of(const AttendArgs& a, const Run& run, int block) {
  return a.records + (int64_t{block} * a.num_kv_heads + run.kv_head) * a.record_bytes;
}

template <int D>
class Loader {
 public:
  __device__ __forceinline__ Loader(const AttendArgs& a, SharedHead* head, uint32_t shared, int lane)
      : a_(a), head_(head), k_stages_(shared + a.k_stages), v_stages_(shared + a.v_stages), lane_(lane) {}

  // Describes every run of the block, one after the last that is none, and loads them, one behind: the computing warps prepare a run while
  // they work on another.
  __device__ __forceinline__ void load_all(Walk& walk, int block) {
    int loaded = 0, units = 0;
    int entries = kNoEntry, last_entries;  // this lane's of the first 32 tiles of the run described last, and of the one before
    bool more = true;
    for (int number = 0; more; ++number) {
      barrier_wait(shared_address(&head_->run_empty[number % kMaxRuns]), parity_of_run(number) ^ 1);
      __syncwarp();
      Run& run = head_->runs[number % kMaxRuns];
      more = walk.unit < walk.end;
      last_entries = entries;
      if (more) {
        next_run(a_, walk, block, lane_, &run);
        // The computing warps must know where the run ends.
        int count = 0;
        for (int tile = run.tile_begin + lane_; tile < run.tile_end; tile += 32) {
          const int e = table_entry(a_, run, tile);
          if (tile < run.tile_begin + 32) entries = e;
          count += units_of(run, tile, e);
        }
        units += __reduce_add_sync(kFullWarp, count);
        if (lane_ == 0) run.unit_end = units;
      } else if (lane_ == 0) {
        run.end = 1;
      }
      barrier_arrive(shared_address(&head_->run_full[number % kMaxRuns]));
      // The first run need not wait for the second's description while no computing warp has to give up a stage for it.
      const int loadable = number == 0 && more && units <= min(a_.num_k_stages, a_.num_v_stages) ? 1 : number;
      for (; loaded < loadable; ++loaded) load(head_->runs[loaded % kMaxRuns], loaded < number ? last_entries : entries);
    }
  }

 private:
  // `mine`: this lane's entry of the run's first 32 tiles.
  __device__ __forceinline__ void load(const Run& run, int mine) {
    const int tile_begin = run.tile_begin, tile_end = run.tile_end;
    for (int base = tile_begin; base < tile_end; base += 32) {
      if (base > tile_begin) mine = base + lane_ < tile_end ? table_entry(a_, run, base + lane_) : kNoEntry;
      const int count = min(32, tile_end - base);
      const unsigned records = __ballot_sync(kFullWarp, mine >= 0 && mine != kNoEntry);
      for (int i = 0; i < count;) {
        // Records in a row, as many as are loaded together.
        const int together = min(min(__clz(static_cast<int>(__brev(~(records >> i)))), together_), count - i);
        if (together > 0) {
          load_records(run, base + i, __shfl_sync(kFullWarp, mine, (i + lane_) % 32), together);
          i += together;
        } else {
          load_staging(run, base + i, __shfl_sync(kFullWarp, mine, i));
          ++i;
        }
      }
    }
  }

  static constexpr int kMostTogether = 4;

  __device__ __forceinline__ int units_of(const Run& run, int tile, int e) const {
    if (e >= 0) return 1;
    int first, last;
    staging_span(run, tile, first, last);
    return last - first + 1;
  }
  // `count` records from tile `tile` on, the entry of the first in lane 0, of the next in lane 1.
  __device__ __forceinline__ void load_records(const Run& run, int tile, int e, int count) {
    const auto [k_bytes, v_bytes, k_metadata, v_metadata] = RecordParts::of<D>(a_);
#if __CUDA_ARCH__ >= 900
    // A lane loads a record: what is done once a record is waiting, mostly, and lanes wait together.
    if (lane_ < count) {
      RingPlace k = k_, v = v_;
      k.advance(lane_, a_.num_k_stages);
      v.advance(lane_, a_.num_v_stages);
      const uint8_t* const record = record_of(a_, run, e);
      const uint32_t k_full = shared_address(&head_->k_full[k.stage]), v_full = shared_address(&head_->v_full[v.stage]);
      const uint32_t k_to = k_stages_ + k.stage * a_.k_stage_bytes, v_to = v_stages_ + v.stage * a_.v_stage_bytes;
      barrier_wait(shared_address(&head_->k_empty[k.stage]), k.parity ^ 1);
      head_->units[k.stage] = Unit{opened_ + lane_, kRecordUnit, (tile + lane_) * kTile};
      barrier_expect(k_full, k_bytes + k_metadata);
      barrier_arrive(k_full, kFullArrivals);
      copy_bulk(k_to, record, k_bytes, k_full);
      copy_bulk(k_to + k_bytes, record + a_.metadata_offset, k_metadata, k_full);
      barrier_wait(shared_address(&head_->v_empty[v.stage]), v.parity ^ 1);
      head_->v_numbers[v.stage] = opened_ + lane_;
      barrier_expect(v_full, v_bytes + v_metadata);
      barrier_arrive(v_full, kFullArrivals);
      copy_bulk(v_to, record + a_.v_offset, v_bytes, v_full);
      copy_bulk(v_to + v_bytes, record + a_.metadata_offset + k_metadata, v_metadata, v_full);
    }
    __syncwarp();
    k_.advance(count, a_.num_k_stages);
    v_.advance(count, a_.num_v_stages);
    opened_ += count;
#else
    const auto copy = [&](uint32_t to, const uint8_t* from, uint32_t bytes) {
      for (uint32_t at = lane_ * 16; at < bytes; at += 512) copy16(to + at, from + at);
    };
    for (int i = 0; i < count; ++i) {
      const uint8_t* const record = record_of(a_, run, __shfl_sync(kFullWarp, e, i));
      const uint32_t k_to = open_k(kRecordUnit, (tile + i) * kTile);
      copy(k_to, record, k_bytes);
      copy(k_to + k_bytes, record + a_.metadata_offset, k_metadata);
      close_k();
      const uint32_t v_to = open_v();
      copy(v_to, record + a_.v_offset, v_bytes);
      copy(v_to + v_bytes, record + a_.metadata_offset + k_metadata, v_metadata);
      close_v();
    }
#endif
  }

  // A tile in staging, or one that no table has.
  __device__ __forceinline__ void load_staging(const Run& run, int tile, int e) {
    if (e == kNoEntry) {
      open_k(kInvalidUnit, tile * kTile);
      close_k();
      open_v();
      close_v();
      return;
    }
    if (a_.dtype == KVARN_F32) {
      load_rows_of<4>(run, tile, e);
    } else {
      load_rows_of<2>(run, tile, e);
    }
  }
  template <int VALUE_BYTES>
  __device__ __forceinline__ void load_rows_of(const Run& run, int tile, int e) {
    int first, last;
    staging_span(run, tile, first, last);
    for (int group = first; group <= last; ++group) {
      const StagingRows rows = staging_rows<D, VALUE_BYTES>(a_, run, ~e, group);
      copy_rows<D, VALUE_BYTES>(open_k(kStagingUnitKind, tile * kTile + group * kStagingUnit), rows.k, lane_);
      close_k();
      copy_rows<D, VALUE_BYTES>(open_v(), rows.v, lane_);
      close_v();
    }
  }

  // The next stage of K, once it is free, for a unit that is described first.
  __device__ __forceinline__ uint32_t open_k(UnitKind kind, int first_token) {
    barrier_wait(shared_address(&head_->k_empty[k_.stage]), k_.parity ^ 1);
    if (lane_ == 0) {
      head_->units[k_.stage] = Unit{opened_, kind, first_token};
      barrier_arrive(shared_address(&head_->k_full[k_.stage]));  // publishes the description, which the arrivals of copies do not
    }
    return k_stages_ + k_.stage * a_.k_stage_bytes;
  }
  __device__ __forceinline__ uint32_t open_v() {
    barrier_wait(shared_address(&head_->v_empty[v_.stage]), v_.parity ^ 1);
    if (lane_ == 0) {
      head_->v_numbers[v_.stage] = opened_;
      barrier_arrive(shared_address(&head_->v_full[v_.stage]));
    }
    return v_stages_ + v_.stage * a_.v_stage_bytes;
  }
  // Every lane arrives once its copies have landed.
  __device__ __forceinline__ void close_k() {
    barrier_arrive_copies(shared_address(&head_->k_full[k_.stage]));
    k_.advance(1, a_.num_k_stages);
  }
  __device__ __forceinline__ void close_v() {
    barrier_arrive_copies(shared_address(&head_->v_full[v_.stage]));
    v_.advance(1, a_.num_v_stages);
    ++opened_;
  }

  const AttendArgs& a_;
  SharedHead* head_;
  uint32_t k_stages_, v_stages_;
  int lane_;
  int together_ = min(kMostTogether, max(a_.num_k_stages / 2, 1));  // records that wait for their stages together
  int opened_ = 0;                                                  // units whose loading has begun
  RingPlace k_{}, v_{};
};

// A lane is done with a stage. All of them say so, which compute-sanitizer can follow, where one for all after a __syncwarp is lost on it.
__device__ __forceinline__ void release(uint64_t& empty) { barrier_arrive(shared_address(&empty)); }

// Waits until a stage holds unit `number`. A warp that is ahead of the others may ask for a phase before the one in between is over, which
// parity cannot tell: the unit's number does. Once it is there, the phase asked for is the current one or the last.
__device__ __forceinline__ void wait_for_unit(const uint64_t& barrier, int parity, const int& number_in_stage, int number) {
  const uint32_t full = shared_address(&barrier);
  for (;;) {
    barrier_wait(full, parity);
    if (*const_cast<const volatile int*>(&number_in_stage) == number) break;
    __nanosleep(40);
  }
  barrier_wait(full, parity);
  __syncwarp();
}

}  // namespace kvarn::cuda
