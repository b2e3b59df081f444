#include "cpu/plan.h"

namespace kvarn::cpu {

void AttendPlanDeleter::operator()(AttendPlan*) const {}
kvarn_status create_attend_plan(const kvarn_plan_params&, Plan&, int64_t*) {
  return fail(KVARN_UNSUPPORTED, "[kvarn.plan_create] num_q_heads: expected 0, this build does not attend");
}
kvarn_status attend(Plan&, const kvarn_attend_params&) { return KVARN_INTERNAL; }

}  // namespace kvarn::cpu
