// Work split into numbered tasks, on onnxruntime's own pool or on ours. A task owns rows or tokens of the result, never
// a part of a sum, and how work is cut never depends on the number of threads: so neither does a bit of the result.
#pragma once

#include <cstddef>
#include <type_traits>

namespace compressor {

// Runs task(argument, i) for i in [0, count), each once, in any order, and returns when all have run.
struct Threads {
  virtual ~Threads() = default;
  virtual void run(size_t count, void (*task)(void*, size_t), void* argument) const = 0;

  template <class Function>
  void each(size_t count, Function&& function) const {
    if (count == 1) return function(size_t(0));
    auto call = [](void* f, size_t i) { (*static_cast<std::remove_reference_t<Function>*>(f))(i); };
    run(count, call, &function);
  }
};

// Threads of our own, for callers without a pool: at most `limit` at a time, the caller's included. They are started
// once, kept, and sleep between calls.
struct OwnThreads final : Threads {
  explicit OwnThreads(int limit) : limit(limit) {}
  void run(size_t count, void (*task)(void*, size_t), void* argument) const override;
  int limit;
};

}  // namespace compressor
