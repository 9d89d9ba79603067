// The GIL, given up while a kernel runs: py::call_guard<GilReleased>().
//
// Before Python 3.14 a thread that takes the GIL again while the interpreter exits is ended on the spot: pthread_exit
// unwinds its stack, and where that meets a destructor that calls PyEval_RestoreThread, as py::gil_scoped_release's
// does, std::terminate ends the process with SIGABRT. Here the thread waits for the process to end, as it does by itself
// from 3.14 on.
#pragma once
#include <Python.h>
#include <unistd.h>

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#endif

namespace sk {

class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() { take(state_); }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  static void take(PyThreadState* state) {
#if defined(__GLIBCXX__)
    try {
      PyEval_RestoreThread(state);
    } catch (const abi::__forced_unwind&) {
      for (;;) pause();
    }
#else
    PyEval_RestoreThread(state);
#endif
  }

  PyThreadState* state_;
};

// Null, or why a module with kernels does not load into this interpreter.
inline const char* refuse_interpreter() {
  if (PyInterpreterState_Get() == PyInterpreterState_Main()) return nullptr;
  return "stripe_kernels runs in the main interpreter only: torch, which it needs, has one state for the "
         "process";
}

}  // namespace sk
