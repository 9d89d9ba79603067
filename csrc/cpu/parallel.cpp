#include "cpu/parallel.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __SANITIZE_THREAD__  // the thread sanitizer cannot see libgomp's barriers; it sees these
#include <thread>
#include <vector>
#endif

namespace sk {
namespace {

std::atomic<bool> forked{false};
const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

constexpr std::int64_t kFetched = 1 << 17;  // floats: a quarter of L2

// Says how much was asked for; the bindings make MemoryError of it.
class NoMemory : public std::bad_alloc {
 public:
  explicit NoMemory(std::size_t bytes) {
    std::snprintf(text_, sizeof text_, "stripe_kernels: no memory for %zu bytes of scratch", bytes);
  }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[80];
};

struct Free {
  void operator()(float* p) const { std::free(p); }
};
thread_local std::unique_ptr<float, Free> buffer;
thread_local std::size_t capacity = 0;

}  // namespace

#ifdef __SANITIZE_THREAD__
namespace {
thread_local pthread_barrier_t* meeting = nullptr;
}

void Team::barrier() const {
  if (threads > 1) pthread_barrier_wait(meeting);
}

void run_team(int threads, const std::function<void(const Team&)>& body) {
  if (threads <= 1 || meeting || forked.load()) return body({0, 1});
  pthread_barrier_t all;
  pthread_barrier_init(&all, nullptr, threads);
  std::vector<std::thread> members;
  for (int i = 0; i < threads; ++i) members.emplace_back([&, i] { meeting = &all, body({i, threads}); });
  for (std::thread& member : members) member.join();
  pthread_barrier_destroy(&all);
}
#else
void Team::barrier() const {
  if (threads > 1) {
#pragma omp barrier
  }
}

void run_team(int threads, const std::function<void(const Team&)>& body) {
  if (threads <= 1 || at_fork != 0 || forked.load() || omp_in_parallel()) return body({0, 1});
#pragma omp parallel num_threads(threads)
  body({omp_get_thread_num(), omp_get_num_threads()});
}
#endif

void fetch_from_others(const Team& team, const float* first, std::int64_t count, std::int64_t floats,
                       std::int64_t stride) {
  if (team.threads == 1 || count * floats > kFetched) return;
  const auto fetch = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      for (std::int64_t j = 0; j < floats; j += 16) __builtin_prefetch(first + i * stride + j, 0, 2);
  };
  fetch(0, team.begin(count));
  fetch(team.end(count), count);
}

float* scratch(std::size_t floats) {
  if (floats > capacity) {
    buffer.reset();
    capacity = 0;
    const std::size_t bytes = (floats * sizeof(float) + 4095) / 4096 * 4096;
    void* p = std::aligned_alloc(64, bytes);
    if (!p) throw NoMemory(bytes);
    buffer.reset(static_cast<float*>(p));
    capacity = bytes / sizeof(float);
  }
  return buffer.get();
}

}  // namespace sk
