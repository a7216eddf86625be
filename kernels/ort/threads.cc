#include "threads.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace compressor {
namespace {

struct Job {
  void (*task)(void*, size_t);
  void* argument;
  size_t count;
  std::atomic<size_t> next{0};

  void work() {
    for (size_t i; (i = next.fetch_add(1)) < count;) task(argument, i);
  }
};

// One job at a time; a second caller works alone meanwhile.
class Pool {
 public:
  bool run(Job& job, int helpers) {
    std::unique_lock<std::mutex> turn(busy_, std::try_to_lock);
    if (!turn) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; started_ < helpers; ++started_) std::thread(&Pool::serve, this).detach();
      job_ = &job;
      wanted_ = helpers;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    wanted_ = 0;
    done_.wait(lock, [&] { return working_ == 0; });
    return true;
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return wanted_ > 0; });
      --wanted_;
      ++working_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int started_ = 0, wanted_ = 0, working_ = 0;
};

// Never destroyed: its threads may outlive static destructors. A forked child gets one of its own.
Pool& pool() {
  static std::mutex mutex;
  static Pool* pool = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (owner != getpid()) {
    pool = new Pool;
    owner = getpid();
  }
  return *pool;
}

}  // namespace

void OwnThreads::run(size_t count, void (*task)(void*, size_t), void* argument) const {
  Job job{task, argument, count};
  int helpers = int(std::min<size_t>(limit, count)) - 1;
  if (helpers < 1 || !pool().run(job, helpers)) job.work();
}

}  // namespace compressor
