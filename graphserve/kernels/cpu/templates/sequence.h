// A list of kernel calls as one call: what a decode step is once its buffers are fixed.
#include <stdint.h>
struct Launch {
  void (*function)(void* const* p, const int64_t* s);
  void* const* p;
};
extern "C" __attribute__((visibility("default"))) void gs_run(const Launch* launches, int64_t n, const int64_t* s) {
  for (int64_t i = 0; i < n; ++i) launches[i].function(launches[i].p, s);
}
