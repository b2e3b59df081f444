# Settings shared by every target of the project.

# kvarn_compile_settings(<target>): language level, warnings, visibility, sanitizers. Contraction stays off because records are byte-equal on every
# machine; where a fused multiply-add is meant, the source says fma.
function(kvarn_compile_settings target)
  target_compile_features(${target} PRIVATE cxx_std_20)
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -ffp-contract=off>)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
      # Warns about the standard library's own text + std::string (GCC PR 105651).
      target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>)
    endif()
    if(KVARN_WERROR)
      target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
    endif()
  endif()
  if(KVARN_SANITIZE)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${KVARN_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all>)
    target_link_options(${target} PRIVATE -fsanitize=${KVARN_SANITIZE})
  endif()
endfunction()

# kvarn_add_isa_sources(FLAGS <flags...> SOURCES <files...>): adds sources of the calling folder to the library, compiled for one instruction set.
function(kvarn_add_isa_sources)
  cmake_parse_arguments(ARG "" "" "FLAGS;SOURCES" ${ARGN})
  list(TRANSFORM ARG_SOURCES PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/)
  target_sources(kvarn_objects PRIVATE ${ARG_SOURCES})
  set_source_files_properties(${ARG_SOURCES} TARGET_DIRECTORY kvarn_objects PROPERTIES COMPILE_OPTIONS "${ARG_FLAGS}")
endfunction()

# kvarn_export_only(<shared library> <version script>): hides every symbol that the script does not name.
function(kvarn_export_only target script)
  if(UNIX AND NOT APPLE)
    target_link_options(${target} PRIVATE -Wl,--version-script=${script})
    set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS ${script})
    if(NOT KVARN_SANITIZE)
      target_link_options(${target} PRIVATE -Wl,-z,defs)
    endif()
  endif()
endfunction()
