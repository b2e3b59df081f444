// Params structs across versions of the library, and the exception barrier of the C entry points.
//
// A caller was compiled against some version of kvarn.h and says so through struct_size. Structs only ever grow at their end, and a new
// field starts past the padded size of the version before, where zero means "as before". So a shorter struct is filled up with zeros, and a
// longer one is accepted as long as what this library does not know is zero.
#pragma once

#include <cstring>
#include <exception>
#include <new>
#include <type_traits>

#include "core/backend.h"
#include "core/status.h"

namespace kvarn {

// The least struct_size of T: its size in the first release.
template <class T>
inline constexpr size_t kFirstSize = sizeof(T);

template <class T>
kvarn_status adopt_struct(const char* operation, const T* given, T& own, size_t first_size = kFirstSize<T>) {
  static_assert(std::is_trivially_copyable_v<T> && std::is_standard_layout_v<T>);
  if (given == nullptr) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] params: expected a pointer, got NULL", operation);
  const size_t size = given->struct_size;
  if (size < first_size || size > first_size + 4096) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] params.struct_size: expected %zu (KVARN_INIT), got %zu", operation, sizeof(T), size);
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (size_t i = sizeof(T); i < size; ++i) {
    if (bytes[i] != 0) {
      return fail(KVARN_UNSUPPORTED,
                  "[kvarn.%s] params: expected zeros past byte %zu, the end of what this version knows, got %d at byte %zu", operation,
                  sizeof(T), bytes[i], i);
    }
  }
  own = T{};
  std::memcpy(&own, given, size < sizeof(T) ? size : sizeof(T));
  own.struct_size = sizeof(T);
  return KVARN_OK;
}

template <class T>
kvarn_status check_out_struct(const char* operation, const char* argument, const T* given, size_t first_size = kFirstSize<T>) {
  if (given == nullptr) return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s: expected a pointer, got NULL", operation, argument);
  if (given->struct_size < first_size || given->struct_size > first_size + 4096) {
    return fail(KVARN_INVALID_ARGUMENT, "[kvarn.%s] %s.struct_size: expected %zu (KVARN_INIT), got %zu", operation, argument, sizeof(T),
                given->struct_size);
  }
  return KVARN_OK;
}

// Writes what the caller has room for; what only the caller knows becomes zero.
template <class T>
void give_struct(const T& full, T* given) {
  static_assert(std::is_trivially_copyable_v<T>);
  const size_t size = given->struct_size;
  std::memcpy(static_cast<void*>(given), &full, size < sizeof(T) ? size : sizeof(T));
  if (size > sizeof(T)) std::memset(reinterpret_cast<unsigned char*>(given) + sizeof(T), 0, size - sizeof(T));
  given->struct_size = size;
}

// Runs body and turns an exception into a status: none may cross the C boundary.
template <class Body>
kvarn_status guarded(const char* operation, Body&& body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return fail(KVARN_OUT_OF_MEMORY, "[kvarn.%s] host memory: expected to allocate, got out of memory", operation);
  } catch (const std::exception& error) {
    return fail(KVARN_INTERNAL, "[kvarn.%s] %s", operation, error.what());
  } catch (...) {
    return fail(KVARN_INTERNAL, "[kvarn.%s] unknown exception", operation);
  }
}

}  // namespace kvarn
