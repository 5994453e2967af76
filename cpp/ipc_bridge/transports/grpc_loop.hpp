// gRPC's completion queue: what has come about, and the threads that see to it.
//
// gRPC reads and writes in the threads that wait for the queue. If no handler
// blocks that is one: a second one would have to be woken for each event, to go on waiting, which
// costs a third of an echo. If handlers may block there are two: one waits while the other runs a
// handler. A handler that sleeps though it was said not to block hands the loop over.
#pragma once

#include <atomic>
#include <cstddef>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include <grpcpp/grpcpp.h>

#include <ipc_bridge/errors.hpp>

namespace ipc_bridge::grpc_rpc {

inline constexpr const char* no_thread = "the server has no further thread";

// What gRPC was asked for; it says when that has come about. (Its word is "tag".)
class Event {
  public:
    explicit Event(bool is_end_) : is_end(is_end_) {}
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;

    const bool is_end;  // of a call, which its handler may have to know before it is done

    // To give to gRPC.
    void* tag() {
        // release: pairs with `of`. gRPC's queue orders it as well, but in code that
        // ThreadSanitizer does not see.
        asked_.store(true, std::memory_order_release);
        return this;
    }
    static Event* of(void* tag) {
        auto* const event = static_cast<Event*>(tag);
        event->asked_.load(std::memory_order_acquire);
        return event;
    }

    // `ok` is gRPC's: false if it did not come about, and never will.
    virtual void happen(bool ok) = 0;

  protected:
    ~Event() = default;

  private:
    std::atomic<bool> asked_ = false;
};

// An event that its owner has a method for.
template <class Owner>
class EventOf final : public Event {
  public:
    using Method = void (Owner::*)(bool ok);

    EventOf(Owner& owner, Method method, bool is_end_ = false)
        : Event(is_end_), owner_(owner), method_(method) {}

    void happen(bool ok) override { (owner_.*method_)(ok); }

  private:
    Owner& owner_;
    Method method_;
};

// The queue and its threads.
class Loop {
  public:
    // The queue of a server that is not built yet.
    explicit Loop(std::unique_ptr<grpc::ServerCompletionQueue> queue) : queue_(std::move(queue)) {}
    Loop(const Loop&) = delete;
    Loop& operator=(const Loop&) = delete;
    ~Loop() { finish(); }

    grpc::ServerCompletionQueue* queue() { return queue_.get(); }

    // Held by whoever may still ask the queue for something.
    class Use {
      public:
        explicit Use(Loop& loop) : loop_(loop) { ++loop_.uses_; }
        Use(const Use&) = delete;
        Use& operator=(const Use&) = delete;
        ~Use() {
            if (--loop_.uses_ == 0) {
                loop_.uses_.notify_all();
            }
        }

      private:
        Loop& loop_;
    };

    // Throws Error: RESOURCE_EXHAUSTED if the system has no further thread.
    void start(int threads) {
        for (int i = 0; i < threads; ++i) {
            add_thread();
        }
    }

    // Once the server has ended: wait until nobody uses it, and end. Idempotent.
    void finish() {
        for (std::size_t count = uses_; count != 0; count = uses_) {
            uses_.wait(count);
        }
        if (std::exchange(finished_, true)) {
            return;
        }
        queue_->Shutdown();
        if (threads_.empty()) {
            run();  // the queue has to be empty
        }
        for (Thread& one : threads_) {
            one.thread.join();
        }
    }

    // For a handler that holds up the only thread: take what has come about, without waiting. Ends
    // of calls happen now, all else once the handler is done.
    void look() {
        void* tag = nullptr;
        bool ok = false;
        while (queue_->AsyncNext(&tag, &ok, gpr_time_0(GPR_CLOCK_MONOTONIC)) ==
               grpc::CompletionQueue::GOT_EVENT) {
            if (Event* event = Event::of(tag); event->is_end) {
                event->happen(ok);
            } else {
                waiting_.emplace_back(event, ok);
            }
        }
    }

    // For a handler that is about to sleep in the only thread: another goes on, this one ends after
    // the handler. Throws as `start`.
    void hand_over() {
        ++turn_;
        try {
            add_thread();
        } catch (...) {
            --turn_;
            throw;
        }
    }

  private:
    struct Thread {
        std::thread thread;
        std::atomic<bool> done = false;
    };

    // (The mutex: a new thread may be the next to add one before this is done with `thread`.)
    void add_thread() {
        const std::lock_guard lock(mutex_);
        threads_.remove_if([](Thread& one) {
            const bool done = one.done;
            if (done) {
                one.thread.join();
            }
            return done;
        });
        Thread& one = threads_.emplace_back();
        try {
            one.thread = std::thread([this, &one] {
                run();
                one.done = true;
            });
        } catch (...) {  // the system's refusal, or no memory
            threads_.pop_back();
            throw Error(Status::RESOURCE_EXHAUSTED, no_thread);
        }
    }

    void run() {
        const unsigned turn = turn_;
        std::pair<Event*, bool> next;
        while (turn_ == turn && take(next)) {
            next.first->happen(next.second);
        }
    }

    bool take(std::pair<Event*, bool>& next) {
        if (!waiting_.empty()) {
            next = waiting_.front();
            waiting_.pop_front();
            return true;
        }
        void* tag = nullptr;
        const bool is_there = queue_->Next(&tag, &next.second);
        if (is_there) {
            next.first = Event::of(tag);
        }
        return is_there;
    }

    std::unique_ptr<grpc::ServerCompletionQueue> queue_;
    std::atomic<std::size_t> uses_ = 0;
    std::mutex mutex_;
    std::list<Thread> threads_;
    std::atomic<unsigned> turn_ = 0;               // rises with each handing over
    std::deque<std::pair<Event*, bool>> waiting_;  // the only thread's; with two nobody looks
    bool finished_ = false;
};

}  // namespace ipc_bridge::grpc_rpc
