// Formats at the C boundary: names, checks, layouts.
#pragma once

#include <string>

#include "core/backend.h"

namespace kvarn {

inline Format to_format(const kvarn_format& f) { return Format{f.k_bits, f.v_bits, f.tile_tokens, f.metadata_bits}; }

// Refuse what docs/FORMAT.md does not define; `operation` is the name between the brackets of the message.
kvarn_status check_format(const char* operation, const kvarn_format& format);
kvarn_status check_head_dim(const char* operation, int64_t head_dim);

std::string format_name(const kvarn_format& format);

}  // namespace kvarn
