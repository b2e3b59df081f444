/* kvarn: KV-cache quantization with variance normalisation (KVarN, arXiv 2606.03458). The C ABI.
 *
 * Rules that hold everywhere
 *  - Memory is borrowed: the caller owns every pointer in a params struct. Nothing is kept after a call returns.
 *  - Device pointers belong to the backend's device (host memory for "cpu"); `stream` is the backend's stream handle (NULL for "cpu").
 *  - Every params struct starts with `struct_size`; set it with KVARN_INIT(params) so that older callers keep working.
 *  - Every function that can fail returns a kvarn_status. On failure nothing was written, and kvarn_last_error() (thread-local) says
 *    "[kvarn.<operation>] <argument>: expected <what>, got <what>".
 *  - What a call writes lies apart from what it reads and from its other outputs (hadamard may work in place). Index arrays that say where
 *    to write name each place once: this is checked in host memory; on a GPU it is not defined what a repeated place holds afterwards.
 *  - A plan may be used by one thread at a time; different plans are independent.
 *  - Operations on a plan do not allocate, synchronise, read the environment or log.
 */
#ifndef KVARN_KVARN_H
#define KVARN_KVARN_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define KVARN_API __declspec(dllexport)
#else
#define KVARN_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- status ------------------------------------------------------------------------------------------------------------------ */

typedef enum kvarn_status {
  KVARN_OK = 0,
  KVARN_INVALID_ARGUMENT = 1, /* a value outside its documented range, a null pointer, an index outside its table */
  KVARN_UNSUPPORTED = 2,      /* well-formed, but this backend or build cannot do it */
  KVARN_OUT_OF_MEMORY = 3,
  KVARN_OUT_OF_BLOCKS = 4, /* the pool has too few free blocks or slots; every sequence is as it was */
  KVARN_STALE_HANDLE = 5,  /* a sequence handle that was freed, or belongs to another pool */
  KVARN_UNAVAILABLE = 6,   /* the backend exists but cannot run here; the message says why */
  KVARN_LAUNCH_FAILED = 7, /* the device runtime reported an error */
  KVARN_CORRUPT = 8,       /* stored data fails its checks */
  KVARN_INTERNAL = 9
} kvarn_status;

KVARN_API const char* kvarn_status_name(kvarn_status status);
/* Message of this thread's last failure; "" when there was none. Valid until the thread's next failing call. */
KVARN_API const char* kvarn_last_error(void);
/* "major.minor.patch" */
KVARN_API const char* kvarn_version(void);

#define KVARN_INIT(params) ((params).struct_size = sizeof(params))

/* ---- format ------------------------------------------------------------------------------------------------------------------ */

typedef enum kvarn_dtype { KVARN_F32 = 0, KVARN_F16 = 1, KVARN_BF16 = 2 } kvarn_dtype;

/* A record format. Its name is "k<k_bits>v<v_bits>_g<tile_tokens>", with "_m8" appended for 8-bit metadata: "k4v2_g128". */
typedef struct kvarn_format {
  int32_t k_bits;        /* 2, 3, 4, 5, 6 or 8 */
  int32_t v_bits;        /* 2, 3, 4, 5, 6 or 8 */
  int32_t tile_tokens;   /* 32, 64, 128 or 256 */
  int32_t metadata_bits; /* 16 or 8 */
} kvarn_format;

KVARN_API kvarn_status kvarn_format_parse(const char* name, kvarn_format* format);
/* Writes the name and its terminating zero; 32 bytes always suffice. */
KVARN_API kvarn_status kvarn_format_name(kvarn_format format, char* name, size_t capacity);

/* Offsets of one record in bytes, as docs/FORMAT.md defines them. A plane of 0 bytes does not exist. */
typedef struct kvarn_record_layout {
  int64_t record_bytes;
  int64_t k_low_offset, k_low_bytes, k_high_offset, k_high_bytes;
  int64_t v_low_offset, v_low_bytes, v_high_offset, v_high_bytes;
  /* k_scale, k_zero, k_token_scale, v_channel_scale, v_scale, v_zero */
  int64_t metadata_offset[6];
  int64_t metadata_count[6];
  int64_t metadata_range_offset; /* 8-bit metadata: fp16 [6][2] = low, step */
} kvarn_record_layout;

KVARN_API kvarn_status kvarn_record_layout_of(kvarn_format format, int32_t head_dim, kvarn_record_layout* layout);

/* What one cache holds. The same for every layer and operation of that cache. */
typedef struct kvarn_config {
  kvarn_format format;
  int32_t head_dim;     /* 64, 80, 96, 112, 128, 160, 192, 256, 512 */
  int32_t num_kv_heads; /* 1 .. 1024 */
  int32_t dtype;        /* kvarn_dtype of staging, K, V, q and out */
} kvarn_config;

/* Conversion from and to the record layout of the method's authors: K codes [D][G*k_bits/8], V codes [G][D*v_bits/8], little-endian inside
 * a byte (value i of a row at bit i*bits), for widths 2, 4 and 8 and 16-bit metadata, followed by fp16 k_scale, k_zero, k_token_scale,
 * v_channel_scale, v_scale, v_zero. Lossless both ways. Host memory. */
KVARN_API kvarn_status kvarn_import_published(kvarn_format format, int32_t head_dim, const uint8_t* published, int64_t published_bytes,
                                              uint8_t* record, int64_t record_bytes);
KVARN_API kvarn_status kvarn_export_published(kvarn_format format, int32_t head_dim, const uint8_t* record, int64_t record_bytes,
                                              uint8_t* published, int64_t published_bytes);
KVARN_API int64_t kvarn_published_bytes(kvarn_format format, int32_t head_dim); /* -1 when the layout does not exist for this format */

/* ---- backends ---------------------------------------------------------------------------------------------------------------- */

typedef struct kvarn_backend_info {
  size_t struct_size;
  const char* name;   /* "cpu", "cuda", "hip" */
  int32_t available;  /* 1 or 0 */
  const char* detail; /* available: instruction set or device; otherwise the exact reason why not */
  int32_t num_devices;
  int32_t num_threads; /* cpu: threads a plan uses by default */
} kvarn_backend_info;

KVARN_API int32_t kvarn_backend_count(void);
KVARN_API kvarn_status kvarn_backend_get(int32_t index, kvarn_backend_info* info);
/* Names of the CPU instruction sets this build has and this machine runs, comma separated, best first: "avx512_vnni,avx2,generic". */
KVARN_API const char* kvarn_cpu_isas(void);

/* ---- plan -------------------------------------------------------------------------------------------------------------------- */

/* Runs body(context, i) for every i in [0, count), in any order and on any threads, and returns when all are done. */
typedef void (*kvarn_parallel_body)(void* context, int64_t i);
typedef void (*kvarn_parallel_for)(void* user, int64_t count, kvarn_parallel_body body, void* context);

typedef struct kvarn_plan_params {
  size_t struct_size;
  const char* backend; /* NULL: "cpu" */
  int32_t device;      /* GPU index */
  kvarn_config config;
  int32_t num_q_heads;  /* 0: the plan does not attend; else a multiple of num_kv_heads */
  int32_t max_num_seqs; /* attend: most sequences per call */
  int64_t max_q_tokens; /* attend: most query tokens per call, all sequences together */
  int32_t max_tiles;    /* attend: most tiles of one sequence = columns of the block table */
  /* attend: each sequence's result depends on that sequence alone, bit for bit, not on the rest of the batch */
  int32_t batch_invariant;
  /* cpu only */
  const char* cpu_isa;             /* NULL: KVARN_CPU_ISA from the environment, else the best this machine runs */
  int32_t num_threads;             /* 0: affinity and cgroup limits decide (KVARN_NUM_THREADS overrides) */
  kvarn_parallel_for parallel_for; /* NULL: kvarn's own pool */
  void* parallel_user;
} kvarn_plan_params;

typedef struct kvarn_plan kvarn_plan;

/* Does everything lazy: loads the backend, picks kernels, builds schedules. */
KVARN_API kvarn_status kvarn_plan_create(const kvarn_plan_params* params, kvarn_plan** plan);
KVARN_API void kvarn_plan_destroy(kvarn_plan* plan);
/* Bytes of device workspace that kvarn_attend needs, 256-byte aligned; the contents need not survive between calls. */
KVARN_API int64_t kvarn_plan_workspace_bytes(const kvarn_plan* plan);
/* "cpu/avx2, 2 threads" */
KVARN_API const char* kvarn_plan_describe(const kvarn_plan* plan);

/* ---- hadamard: rotate rows ---------------------------------------------------------------------------------------------------- */

typedef struct kvarn_hadamard_params {
  size_t struct_size;
  const void* x; /* [rows, head_dim] contiguous, `dtype` */
  void* out;     /* same shape and dtype; may equal x */
  int64_t rows;
  int32_t dtype;   /* kvarn_dtype; need not be the plan's */
  int32_t inverse; /* 0: x H, 1: x H^T */
} kvarn_hadamard_params;

KVARN_API kvarn_status kvarn_hadamard(kvarn_plan* plan, const kvarn_hadamard_params* params, void* stream);

/* ---- append: rotate new K, V and write them into staging slots ------------------------------------------------------------------ */

typedef struct kvarn_append_params {
  size_t struct_size;
  const void* k; /* [num_tokens, num_kv_heads, head_dim], channels contiguous, plan dtype; K after RoPE */
  const void* v;
  int64_t k_token_stride, k_head_stride; /* in values */
  int64_t v_token_stride, v_head_stride;
  /* [num_tokens]: slot * tile_tokens + position in the tile, all different; negative: the token is skipped */
  const int64_t* slot_mapping;
  int64_t num_tokens;
  void* staging; /* [num_slots, 2, num_kv_heads, tile_tokens, head_dim], plan dtype */
  int64_t num_slots;
  int32_t rotated; /* 1: k and v are rotated already (the model absorbed H into its weights) */
} kvarn_append_params;

KVARN_API kvarn_status kvarn_append(kvarn_plan* plan, const kvarn_append_params* params, void* stream);

/* ---- encode: staging slots -> records ------------------------------------------------------------------------------------------ */

typedef enum kvarn_normalisation {
  KVARN_SCALE_INVARIANT = 0, /* the tile is first divided by its own size: codes do not depend on the input's scale */
  KVARN_PUBLISHED = 1        /* the paper's clamps, exactly */
} kvarn_normalisation;

typedef enum kvarn_rounding {
  KVARN_ROUNDING_AUTO = 0, /* unbiased for widths 2 and 3, minmax for the others */
  KVARN_MINMAX = 1,
  KVARN_UNBIASED = 2
} kvarn_rounding;

typedef struct kvarn_encode_params {
  size_t struct_size;
  const void* staging; /* [num_slots, 2, num_kv_heads, tile_tokens, head_dim] per layer */
  int64_t num_slots;
  uint8_t* records; /* [num_blocks, num_kv_heads, record_bytes] per layer */
  int64_t num_blocks;
  int32_t num_layers;                 /* >= 1; the same pairs are encoded in every layer */
  int64_t staging_layer_stride_bytes; /* unused when num_layers == 1 */
  int64_t records_layer_stride_bytes;
  const int32_t* slots;  /* [num_tiles] source slots */
  const int32_t* blocks; /* [num_tiles] destination blocks, all different */
  int64_t num_tiles;
  int32_t normalisation; /* kvarn_normalisation */
  int32_t rounding;      /* kvarn_rounding */
  /* [num_layers, num_kv_heads, head_dim, head_dim] contiguous: factors F of error feedback (docs/FORMAT.md, section 7, step 3b), finite;
   * NULL: no feedback. The diagonal holds the channel that each step takes, 0 ... head_dim - 1 once each; an operand whose factor has
   * another diagonal is written as one that holds NaN is. What lies below does not matter. A backend without feedback answers
   * KVARN_UNSUPPORTED. */
  const float* k_feedback;
  const float* v_feedback;
} kvarn_encode_params;

KVARN_API kvarn_status kvarn_encode(kvarn_plan* plan, const kvarn_encode_params* params, void* stream);

/* ---- decode: records -> K, V ------------------------------------------------------------------------------------------------------ */

typedef struct kvarn_decode_params {
  size_t struct_size;
  const uint8_t* records; /* [num_blocks, num_kv_heads, record_bytes] */
  int64_t num_blocks;
  const int32_t* blocks; /* [num_tiles] */
  int64_t num_tiles;
  /* [num_tiles] destination tile indices in k and v, all different; NULL: tile i goes to index i. What no index names is
   * left alone. */
  const int32_t* destinations;
  int64_t num_destinations; /* tiles that k and v have room for */
  void* k;                  /* tile t, head h at k + t*tile_stride + h*head_stride values: [tile_tokens, head_dim]; NULL: not wanted */
  void* v;
  int64_t tile_stride, head_stride; /* in values; 0: contiguous [num_destinations, num_kv_heads, tile_tokens, head_dim] */
  int32_t dtype;                    /* of k and v */
  int32_t rotated;                  /* 1: leave the values in the rotated frame, as staging holds them */
} kvarn_decode_params;

KVARN_API kvarn_status kvarn_decode(kvarn_plan* plan, const kvarn_decode_params* params, void* stream);

/* ---- attend: softmax attention of q against records and staging --------------------------------------------------------------------- */

typedef struct kvarn_attend_params {
  size_t struct_size;
  const void* q;                         /* [num_q_tokens, num_q_heads, head_dim], channels contiguous, plan dtype, the model's frame */
  void* out;                             /* same shape and dtype */
  int64_t q_token_stride, q_head_stride; /* in values */
  int64_t out_token_stride, out_head_stride;
  float* lse;               /* [num_q_tokens, num_q_heads] natural-log sum of exponentials of the scaled scores (sinks included), or NULL */
  const int32_t* cu_q_lens; /* [num_seqs + 1]: sequence s owns query tokens [cu_q_lens[s], cu_q_lens[s+1]); starts at 0, never falls */
  const int32_t* seq_lens;  /* [num_seqs]: tokens of K and V, this step's included; query i of q_len sits at position seq_len - q_len + i */
  const int32_t* block_table; /* [num_seqs, block_table_stride]: >= 0 a block, < 0 staging slot ~entry */
  int64_t block_table_stride; /* entries between rows: at least the longest sequence's tiles, at most max_tiles unless num_seqs == 1 */
  int32_t num_seqs;
  int64_t num_q_tokens;
  const uint8_t* records; /* [num_blocks, num_kv_heads, record_bytes] */
  int64_t num_blocks;
  const void* staging; /* [num_slots, 2, num_kv_heads, tile_tokens, head_dim] */
  int64_t num_slots;
  float softmax_scale;   /* usually 1/sqrt(head_dim) */
  int32_t causal;        /* 1: a query sees positions <= its own; 0: all seq_len positions */
  int32_t window;        /* > 0: a query sees only the last `window` positions up to and including its own, causal or not; 0: no window */
  float logits_soft_cap; /* > 0: scores become cap * tanh(score / cap); 0: none */
  const float* alibi_slopes; /* [num_q_heads]: adds slope * (key position - query position), after the soft cap; or NULL */
  const float* sinks;        /* [num_q_heads]: a logit that joins the softmax and has no value; or NULL */
  int32_t q_rotated;         /* 1: q is rotated already */
  int32_t out_rotated;       /* 1: leave the output in V's rotated frame */
  void* workspace;           /* kvarn_plan_workspace_bytes(plan), 256-byte aligned */
  int64_t workspace_bytes;
} kvarn_attend_params;

/* out, lse and workspace lie apart from one another and from q, records and staging.
 * A query that sees no position and no sink gives zeros and lse = -inf; so does one before position 0 (seq_len < q_len). */
KVARN_API kvarn_status kvarn_attend(kvarn_plan* plan, const kvarn_attend_params* params, void* stream);

/* ---- paged cache: who owns which block -------------------------------------------------------------------------------------------- */
/*
 * A pool hands out block and slot numbers; it touches no K or V. Calls that change a sequence fill a kvarn_work: what the caller must
 * now run on every layer's memory, in this order: copies, decodes, (append through the slot mapping), encodes. Slots released by a call may
 * be handed out again by the next call, so run the work before it (or in the same stream order). A pool is thread-compatible: one thread at
 * a time.
 */

typedef struct kvarn_pool kvarn_pool;
typedef uint64_t kvarn_sequence; /* index and generation; 0 is never a valid handle */

typedef struct kvarn_pool_params {
  size_t struct_size;
  int32_t num_blocks;
  int32_t num_slots;
  int32_t tile_tokens;
  int32_t sink_tokens;   /* a multiple of tile_tokens: the first tokens stay in staging for good */
  int32_t recent_tokens; /* the last committed tokens that stay in staging at least; 0: only the unfinished tile */
} kvarn_pool_params;

typedef struct kvarn_pair {
  int32_t source, destination;
} kvarn_pair;

/* The arrays belong to the pool and are valid until its next call. */
typedef struct kvarn_work {
  size_t struct_size;
  const kvarn_pair* copies; /* slot -> slot, whole slots */
  int64_t num_copies;
  const kvarn_pair* decodes; /* block -> slot, rotated */
  int64_t num_decodes;
  const int64_t* slot_mapping; /* [num_tokens] for kvarn_append */
  int64_t num_tokens;
  const kvarn_pair* encodes; /* slot -> block */
  int64_t num_encodes;
} kvarn_work;

typedef struct kvarn_sequence_info {
  size_t struct_size;
  int64_t num_tokens; /* committed and not */
  int64_t num_committed;
  int32_t num_tiles;             /* entries of the block table */
  int32_t num_blocks, num_slots; /* what the table names, shared ones included */
} kvarn_sequence_info;

typedef struct kvarn_pool_info {
  size_t struct_size;
  int32_t num_blocks, free_blocks;
  int32_t num_slots, free_slots;
  int32_t num_sequences;
} kvarn_pool_info;

KVARN_API kvarn_status kvarn_pool_create(const kvarn_pool_params* params, kvarn_pool** pool);
KVARN_API void kvarn_pool_destroy(kvarn_pool* pool);
KVARN_API kvarn_status kvarn_pool_get_info(const kvarn_pool* pool, kvarn_pool_info* info);

KVARN_API kvarn_status kvarn_sequence_create(kvarn_pool* pool, kvarn_sequence* sequence);
KVARN_API kvarn_status kvarn_sequence_free(kvarn_pool* pool, kvarn_sequence sequence);
/* Room for `num_tokens` uncommitted tokens: copies (copy-on-write of a shared slot) and the slot mapping. */
KVARN_API kvarn_status kvarn_sequence_append(kvarn_pool* pool, kvarn_sequence sequence, int64_t num_tokens, kvarn_work* work);
/* The first `num_tokens` uncommitted tokens become permanent: encodes for every tile that is now complete, past the sinks and older than
 * recent_tokens. */
KVARN_API kvarn_status kvarn_sequence_commit(kvarn_pool* pool, kvarn_sequence sequence, int64_t num_tokens, kvarn_work* work);
/* Drops the last `num_tokens` uncommitted tokens. */
KVARN_API kvarn_status kvarn_sequence_rollback(kvarn_pool* pool, kvarn_sequence sequence, int64_t num_tokens);
/* Keeps the first `num_tokens` tokens, committed or not. Cutting into an encoded tile decodes it back into a slot (lossy once: those tokens
 * keep the values the record had). */
KVARN_API kvarn_status kvarn_sequence_truncate(kvarn_pool* pool, kvarn_sequence sequence, int64_t num_tokens, kvarn_work* work);
/* A second sequence with the same tokens; blocks and slots are shared until one of the two writes. */
KVARN_API kvarn_status kvarn_sequence_fork(kvarn_pool* pool, kvarn_sequence sequence, kvarn_sequence* fork);
/* A new sequence that shares the first `num_tokens` committed tokens. Whole tiles are shared; a cut inside an encoded tile is an error. */
KVARN_API kvarn_status kvarn_sequence_share_prefix(kvarn_pool* pool, kvarn_sequence sequence, int64_t num_tokens, kvarn_sequence* shared);
KVARN_API kvarn_status kvarn_sequence_get_info(const kvarn_pool* pool, kvarn_sequence sequence, kvarn_sequence_info* info);
/* Writes num_tiles entries of the block table. */
KVARN_API kvarn_status kvarn_sequence_table(const kvarn_pool* pool, kvarn_sequence sequence, int32_t* table, int64_t capacity);

#ifdef __cplusplus
}
#endif

#endif
