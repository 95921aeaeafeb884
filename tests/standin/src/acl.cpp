// libascendcl.so over host memory: devices, contexts, streams and events, as far as TransferEngine asks for them.
//
// A stream is a thread with a queue; an event is a marker in that queue. What is copied here from the real
// runtime is what the engine can observe: a thread without a device has no context, work is asynchronous, errors
// show at synchronisation, and destroying a stream waits for its work.

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#include "stream.hpp"

namespace {

// The engine only tells zero from the rest; the numbers are the runtime's own where they are known.
constexpr int kOk = 0;
constexpr int kInvalidParameter = 107000;
constexpr int kNoContext = 107002;
constexpr int kWaitTimeout = 107019;

// One event on one stream. `generation` tells a second recording of an event from the first.
struct Event {
    std::mutex mutex;
    std::condition_variable changed;
    uint64_t recorded = 0;
    uint64_t reached = 0;
    int error = kOk;
};
using SharedEvent = std::shared_ptr<Event>;

class ThreadStream final : public standin::Stream {
 public:
    ThreadStream() : thread_([this] { Run(); }) {}

    ~ThreadStream() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            closing_ = true;
        }
        changed_.notify_all();
        thread_.join();
    }

    void Enqueue(std::function<int()> work) override {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            queue_.push_back(std::move(work));
        }
        changed_.notify_all();
    }

    // Waits until the queue is empty and hands out the first error since the last call.
    int Drain() {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return queue_.empty() && !running_; });
        const int error = error_;
        error_ = kOk;
        return error;
    }

    int error() {
        std::lock_guard<std::mutex> lock(mutex_);
        return error_;
    }

 private:
    void Run() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            changed_.wait(lock, [this] { return closing_ || !queue_.empty(); });
            if (queue_.empty()) {
                return;  // closing, and everything before it has run
            }
            auto work = std::move(queue_.front());
            queue_.pop_front();
            running_ = true;
            lock.unlock();
            const int result = work();
            work = nullptr;
            lock.lock();
            running_ = false;
            if (result != kOk && error_ == kOk) {
                error_ = result;
            }
            changed_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::function<int()>> queue_;
    bool running_ = false;
    bool closing_ = false;
    int error_ = kOk;
    std::thread thread_;  // last: it uses everything above
};

thread_local int32_t current_device = -1;
int context_anchor;  // the address of something: contexts are only compared with null

// RFORK_STANDIN_WAIT_SCALE: a wait of the engine's, times this. Its 10 s would otherwise be every test's 10 s.
double WaitScale() {
    const char* text = std::getenv("RFORK_STANDIN_WAIT_SCALE");
    const double scale = text == nullptr ? 1.0 : std::atof(text);
    return scale > 0 ? scale : 1.0;
}

int Await(const SharedEvent& event, int64_t timeout_ms) {
    std::unique_lock<std::mutex> lock(event->mutex);
    const auto reached = [&event] { return event->reached >= event->recorded; };
    if (timeout_ms < 0) {
        event->changed.wait(lock, reached);
    } else {
        const auto limit = std::chrono::duration<double, std::milli>(static_cast<double>(timeout_ms) * WaitScale());
        if (!event->changed.wait_for(lock, limit, reached)) {
            return kWaitTimeout;
        }
    }
    return event->error;
}

}  // namespace

#define STANDIN_API extern "C" __attribute__((visibility("default")))

STANDIN_API int aclrtSetDevice(int32_t device) {
    if (device < 0) {
        return kInvalidParameter;
    }
    current_device = device;
    return kOk;
}

STANDIN_API int aclrtGetCurrentContext(void** context) {
    if (context == nullptr) {
        return kInvalidParameter;
    }
    if (current_device < 0) {
        *context = nullptr;
        return kNoContext;
    }
    *context = &context_anchor;
    return kOk;
}

STANDIN_API int aclrtCreateStream(void** stream) {
    if (stream == nullptr) {
        return kInvalidParameter;
    }
    if (current_device < 0) {
        return kNoContext;
    }
    // The handle is the interface's address, which is what the P2P library casts it back to.
    *stream = static_cast<standin::Stream*>(new ThreadStream());
    return kOk;
}

STANDIN_API int aclrtDestroyStream(void* stream) {
    if (stream == nullptr) {
        return kInvalidParameter;
    }
    delete static_cast<ThreadStream*>(static_cast<standin::Stream*>(stream));
    return kOk;
}

STANDIN_API int aclrtSynchronizeStream(void* stream) {
    if (stream == nullptr) {
        return kInvalidParameter;
    }
    return static_cast<ThreadStream*>(static_cast<standin::Stream*>(stream))->Drain();
}

STANDIN_API int aclrtCreateEvent(void** event) {
    if (event == nullptr) {
        return kInvalidParameter;
    }
    *event = new SharedEvent(std::make_shared<Event>());
    return kOk;
}

STANDIN_API int aclrtDestroyEvent(void* event) {
    if (event == nullptr) {
        return kInvalidParameter;
    }
    delete static_cast<SharedEvent*>(event);
    return kOk;
}

STANDIN_API int aclrtRecordEvent(void* event, void* stream) {
    if (event == nullptr || stream == nullptr) {
        return kInvalidParameter;
    }
    // Shared: an event may be destroyed while its marker still waits in the queue.
    const SharedEvent shared = *static_cast<SharedEvent*>(event);
    auto* const queue = static_cast<ThreadStream*>(static_cast<standin::Stream*>(stream));
    uint64_t generation = 0;
    {
        std::lock_guard<std::mutex> lock(shared->mutex);
        generation = ++shared->recorded;
    }
    queue->Enqueue([shared, queue, generation] {
        {
            std::lock_guard<std::mutex> lock(shared->mutex);
            shared->reached = generation;
            shared->error = queue->error();
        }
        shared->changed.notify_all();
        return kOk;
    });
    return kOk;
}

STANDIN_API int aclrtSynchronizeEvent(void* event) {
    return event == nullptr ? kInvalidParameter : Await(*static_cast<SharedEvent*>(event), -1);
}

STANDIN_API int aclrtSynchronizeEventWithTimeout(void* event, int32_t timeout_ms) {
    return event == nullptr ? kInvalidParameter : Await(*static_cast<SharedEvent*>(event), timeout_ms);
}
