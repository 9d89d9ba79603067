#include <cuda_runtime.h>

// Threads of a block run in falling order from now on, or in rising order again.
extern "C" __attribute__((visibility("default"))) void emulate_backwards(bool on) { emulate::backwards = on; }

// Copies and products of sm_90 happen as late as they may from now on, or at once again.
extern "C" __attribute__((visibility("default"))) void emulate_late(bool on) { emulate::late = on; }

// A warp runs as long as it can before the next one from now on, or all in turn again.
extern "C" __attribute__((visibility("default"))) void emulate_greedy(bool on) { emulate::greedy = on; }

// The call of the runtime or driver of this name fails from now on; none does where the name is empty.
extern "C" __attribute__((visibility("default"))) void emulate_failing(const char* call) {
  emulate::failing = call;
}

// Only the last block of every grid runs from now on, or all of them again.
extern "C" __attribute__((visibility("default"))) void emulate_last_block(bool on) {
  emulate::last_block = on;
}
