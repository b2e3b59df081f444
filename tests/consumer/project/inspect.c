/* What a format costs, and which backends this machine has: kvarn from C.
 *
 *   inspect [format [head_dim]]
 */
#include <kvarn/kvarn.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char** argv) {
  const char* name = argc > 1 ? argv[1] : "k4v2_g128";
  const int head_dim = argc > 2 ? atoi(argv[2]) : 128;
  kvarn_format format;
  kvarn_record_layout layout;
  if (kvarn_format_parse(name, &format) != KVARN_OK || kvarn_record_layout_of(format, head_dim, &layout) != KVARN_OK) {
    fprintf(stderr, "%s\n", kvarn_last_error());
    return 1;
  }
  printf("kvarn %s\n", kvarn_version());
  const double values = 2.0 * format.tile_tokens * head_dim;
  printf("%s, head_dim %d: %lld bytes for %d tokens of one KV head, %.3f bits per value, %.2f times smaller than 16 bits\n", name, head_dim,
         (long long)layout.record_bytes, format.tile_tokens, 8 * (double)layout.record_bytes / values,
         2 * values / (double)layout.record_bytes);

  for (int32_t i = 0; i < kvarn_backend_count(); ++i) {
    kvarn_backend_info info = {0};
    KVARN_INIT(info);
    if (kvarn_backend_get(i, &info) != KVARN_OK) {
      fprintf(stderr, "%s\n", kvarn_last_error());
      return 1;
    }
    printf("%s: %s (%s)\n", info.name, info.available ? "available" : "not available", info.detail);
  }

  kvarn_plan_params params = {0};
  KVARN_INIT(params);
  params.config.format = format;
  params.config.head_dim = head_dim;
  params.config.num_kv_heads = 1;
  params.config.dtype = KVARN_F32;
  kvarn_plan* plan = NULL;
  if (kvarn_plan_create(&params, &plan) != KVARN_OK) {
    fprintf(stderr, "%s\n", kvarn_last_error());
    return 1;
  }
  printf("plan: %s\n", kvarn_plan_describe(plan));
  kvarn_plan_destroy(plan);
  return 0;
}
