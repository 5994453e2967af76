// The calls that a server of gRPC runs: a handler, and what its client is told of it.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>

#include <grpcpp/grpcpp.h>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/handlers.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/grpc_loop.hpp>
#include <ipc_bridge/transports/grpc_options.hpp>

namespace ipc_bridge::grpc_rpc {

inline std::chrono::steady_clock::time_point time_point_of(std::int64_t ns) {
    return std::chrono::steady_clock::time_point(std::chrono::nanoseconds(ns));
}

// At most message_bytes_max, never cut inside a character (RFC 3629: bytes 10xxxxxx continue one).
inline std::string clipped(std::string text) {
    if (text.size() > message_bytes_max) {
        std::size_t end = message_bytes_max;
        while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U) {
            --end;
        }
        text.resize(end);
    }
    return text;
}

inline grpc::Status status_of(Status status, std::string text) {
    return {static_cast<grpc::StatusCode>(status), clipped(std::move(text))};
}

// A call that runs; ended early from any thread by `cancel`.
class RpcCall : public Call {
  public:
    explicit RpcCall(const grpc::ServerContext& context)
        : Call(deadline_of(context)), context_(context) {}

    std::mutex mutex;
    std::condition_variable changed;
    // The loop whose only thread its handler holds up: it has to look there itself. Else null.
    Loop* held_up = nullptr;
    std::function<void()> before_handing_over;

    bool is_cancelled() override {
        if (held_up != nullptr) {
            held_up->look();
        }
        return reason() != Status::OK;
    }

    void sleep(double seconds) override {
        if (held_up != nullptr) {
            if (before_handing_over) {
                before_handing_over();
            }
            held_up->hand_over();
            held_up = nullptr;
        }
        sleep_until(deadline_after(seconds));
    }

    void sleep_until(std::int64_t until_ns) {
        std::unique_lock lock(mutex);
        wait(lock, std::min(until_ns, deadline_ns), [] { return false; });
    }

    std::uint32_t peer_payload_bytes_max() const override {
        const auto& metadata = context_.client_metadata();
        const auto found = metadata.find(max_payload_key);
        if (found == metadata.end()) {
            return frame::payload_bytes_max;
        }
        const std::string text(found->second.data(), found->second.size());
        return static_cast<std::uint32_t>(
            std::min<unsigned long>(std::strtoul(text.c_str(), nullptr, 10), frame::u32_max)
        );
    }

    // Why the call must end before its handler is done; OK: it need not.
    Status reason() const {
        const Status why = why_;
        if (why == Status::OK && deadline_ns != never && now_ns() >= deadline_ns) {
            return Status::DEADLINE_EXCEEDED;
        }
        return why;
    }

    // The first reason counts.
    void cancel(Status why) {
        const std::lock_guard lock(mutex);
        Status none = Status::OK;
        why_.compare_exchange_strong(none, why);
        changed.notify_all();
    }

    // Wait, with the mutex held, until it is so, a time, or the end of the call.
    template <class Condition>
    void wait(std::unique_lock<std::mutex>& lock, std::int64_t until_ns, Condition is_so) {
        const auto done = [&] { return why_ != Status::OK || is_so(); };
        if (until_ns == never) {
            changed.wait(lock, done);
        } else {
            changed.wait_until(lock, time_point_of(until_ns), done);
        }
    }

  private:
    static std::int64_t deadline_of(const grpc::ServerContext& context) {
        const gpr_timespec deadline = context.raw_deadline();
        const gpr_timespec left = gpr_time_sub(deadline, gpr_now(deadline.clock_type));
        if (left.tv_sec > static_cast<std::int64_t>(timeout_s_max)) {
            return never;
        }
        return now_ns() + left.tv_sec * 1'000'000'000 + left.tv_nsec;
    }

    const grpc::ServerContext& context_;
    std::atomic<Status> why_ = Status::OK;
};

// What all calls of a server share.
struct Shared {
    Shared(Service service_, const ServeOptions& options_)
        : service(std::move(service_)), options(options_) {}

    Service service;
    ServeOptions options;
    std::mutex mutex;
    std::condition_variable changed;
    std::unordered_set<RpcCall*> calls;
    bool inline_taken = false;  // a handler that may block runs in a thread of the loop

    // A call begins. False: there are too many.
    bool enter(RpcCall& call) {
        const std::lock_guard lock(mutex);
        return calls.size() < options.clients_max && calls.insert(&call).second;
    }

    void leave(RpcCall& call) {
        const std::lock_guard lock(mutex);
        if (calls.erase(&call) != 0) {
            changed.notify_all();
        }
    }

    // May a handler that may block run in a thread of the loop? There are two: one may.
    bool take_inline() {
        const std::lock_guard lock(mutex);
        return !std::exchange(inline_taken, true);
    }

    void give_inline() {
        const std::lock_guard lock(mutex);
        inline_taken = false;
    }

    grpc::Status full() const {
        return status_of(
            Status::RESOURCE_EXHAUSTED,
            "the server has " + std::to_string(options.clients_max) +
                " calls under way and takes no more"
        );
    }

    // A payload to the client. Throws Error: RESOURCE_EXHAUSTED.
    static void check_size(const RpcCall& call, std::size_t size) {
        const std::uint32_t size_max = call.peer_payload_bytes_max();
        if (size > size_max) {
            throw Error(Status::RESOURCE_EXHAUSTED, too_large(size, "client", size_max));
        }
    }

    // A request. Throws Error: RESOURCE_EXHAUSTED. (gRPC's own limit is a little above.)
    void check_request(std::size_t size) const {
        if (size > options.payload_bytes_max) {
            throw Error(
                Status::RESOURCE_EXHAUSTED, too_large(size, "server", options.payload_bytes_max)
            );
        }
    }
};

// Run a handler; how the call ends.
template <class Body>
grpc::Status guarded(const RpcCall& call, Body body) {
    try {
        body();
    } catch (const Error& error) {
        return status_of(error.status, error.message);
    } catch (const std::exception& error) {
        tell_handler_failure(error.what());
        return status_of(Status::INTERNAL, error.what());
    } catch (...) {
        tell_handler_failure("a handler failed");
        return status_of(Status::INTERNAL, "a handler failed");
    }
    const Status why = call.reason();
    return why == Status::OK ? grpc::Status::OK : status_of(why, reason_text(why));
}

// What gRPC tells of a call, from its being awaited on; after the last word it deletes itself.
//
// `Method` says what is asked and answered, and how `Service` awaits it. The asynchronous API has
// an object like this for the call that comes next, and one for each that runs.
template <class Method, class Service>
class Exchange {
  public:
    Exchange(Shared& shared_, Service& service_, Loop& loop_)
        : shared(shared_), service(service_), loop(loop_) {}
    Exchange(const Exchange&) = delete;
    Exchange& operator=(const Exchange&) = delete;

    void start() {
        context.AsyncNotifyWhenDone(over_.tag());
        auto* const queue = loop.queue();
        (service.*Method::await)(&context, &request, &responder, queue, queue, arrived_.tag());
    }

  protected:
    virtual ~Exchange() = default;

    // Await the next call with another of these.
    virtual void await_next() = 0;
    // The call is there; answer it, at last by `responder.Finish` with the event `finished`.
    virtual void begin() = 0;
    // The client has gone, or cancelled, after `begin` or at the same time.
    virtual void cancelled() {}

    template <class Self>
    void await() {
        (new Self(shared, service, loop))->start();
    }

    Shared& shared;
    Service& service;
    Loop& loop;
    Loop::Use use{loop};  // gone after all below
    grpc::ServerContext context;
    typename Method::Request request;
    typename Method::Responder responder{&context};
    std::optional<RpcCall> call;
    EventOf<Exchange> finished{*this, &Exchange::forget};

  private:
    void arrived(bool ok) {
        if (!ok) {  // no call comes any more, nor a word of its end
            delete this;
            return;
        }
        await_next();
        {
            const std::lock_guard lock(mutex_);
            call.emplace(context);
            if (is_cancelled_) {
                call->cancel(Status::CANCELLED);
            }
        }
        begin();
    }

    // With two threads the end may be seen to before the beginning.
    void over(bool /*ok*/) {
        if (context.IsCancelled()) {
            {
                const std::lock_guard lock(mutex_);
                is_cancelled_ = true;
                if (call) {
                    call->cancel(Status::CANCELLED);
                }
            }
            cancelled();
        }
        forget(true);
    }

    // Of `finished` and `over_` the second is the last word.
    void forget(bool /*ok*/) {
        if (--words_left_ == 0) {
            delete this;
        }
    }

    EventOf<Exchange> arrived_{*this, &Exchange::arrived};
    EventOf<Exchange> over_{*this, &Exchange::over, true};
    std::atomic<int> words_left_ = 2;
    std::mutex mutex_;
    bool is_cancelled_ = false;
};

}  // namespace ipc_bridge::grpc_rpc
