// One OpenMP pool, torch's own: its wheel and this extension share libgomp. The number of threads comes with each call.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace sk {

struct Team {
  int thread, threads;

  void barrier() const;  // every member calls it equally often
  std::int64_t begin(std::int64_t n) const { return n * thread / threads; }
  std::int64_t end(std::int64_t n) const { return n * (thread + 1) / threads; }
};

// Runs body on a team of at most `threads`; a forked child runs alone, because libgomp's threads do not survive a fork.
void run_team(int threads, const std::function<void(const Team&)>& body);

// A float buffer of this calling thread, 64-byte aligned, kept between calls. Throws std::bad_alloc.
float* scratch(std::size_t floats);

}  // namespace sk
