// One OpenMP pool, torch's own: its wheel and this extension share libgomp. The number of threads comes with each call.
#pragma once
#include <atomic>
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

// Brings near what the other members wrote in the call before: of `count` stretches of `floats`, `stride` apart, all but this
// member's share. Met one by one, lines of another core's cache cost two cores 2 % of VGG-16 at
// batch 1.
void fetch_from_others(const Team& team, const float* first, std::int64_t count, std::int64_t floats,
                       std::int64_t stride);

// Tasks 0 to count, dealt out as members get free. Each member begins with the task of its own number, so that it finds in
// its caches what it left there in the call before: in which order members arrive says nothing.
class Tasks {
 public:
  template <class Fn>
  void each(const Team& team, int count, const Fn& fn) {
    for (int task = team.thread; task < count; task = team.threads + taken_.fetch_add(1)) fn(task);
  }
  void reset() { taken_.store(0); }

 private:
  std::atomic<int> taken_{0};
};

// Runs body on a team of at most `threads`; a forked child runs alone, because libgomp's threads do not survive a fork.
void run_team(int threads, const std::function<void(const Team&)>& body);

// A float buffer of this calling thread, 64-byte aligned, kept between calls. Throws std::bad_alloc.
float* scratch(std::size_t floats);

}  // namespace sk
