// The calls that a server of gRPC runs: a handler, and what its client is told of it.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <exception>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <unordered_set>
#include <utility>
#include <variant>

#include <grpcpp/grpcpp.h>

#include <ipc_bridge/bridge.grpc.pb.h>
#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/handlers.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/grpc_options.hpp>

namespace ipc_bridge::grpc_rpc {

// Items made before gRPC takes them: enough that it never waits for a fast producer. One that had
// to wait goes on at half of it: to be woken for each item costs more than the item.
inline constexpr std::size_t queue_bytes_max = 128U << 10;
// For so long gRPC's own threads make items before they write them.
inline constexpr std::int64_t make_ns_max = 50'000;
// What an item costs there beside its payload.
inline constexpr std::size_t item_extra_bytes = 64;
// So often a handler that sleeps in gRPC's thread asks whether its client is still there.
inline constexpr std::int64_t client_look_ns = 50'000'000;

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
    explicit RpcCall(const grpc::CallbackServerContext& context)
        : Call(deadline_of(context)), context_(context) {}

    std::mutex mutex;
    std::condition_variable changed;
    // Its handler runs in gRPC's thread, which tells a reactor of the client's end only after that:
    // who wants to know meanwhile asks.
    bool is_inline = false;

    bool is_cancelled() override { return reason() != Status::OK || context_.IsCancelled(); }

    void sleep(double seconds) override {
        const std::int64_t until_ns = std::min(deadline_after(seconds), deadline_ns);
        while (is_inline && now_ns() + client_look_ns < until_ns) {
            sleep_until(now_ns() + client_look_ns);
            if (is_cancelled()) {
                return;
            }
        }
        sleep_until(until_ns);
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
    static std::int64_t deadline_of(const grpc::CallbackServerContext& context) {
        const gpr_timespec deadline = context.raw_deadline();
        const gpr_timespec left = gpr_time_sub(deadline, gpr_now(deadline.clock_type));
        if (left.tv_sec > static_cast<std::int64_t>(timeout_s_max)) {
            return never;
        }
        return now_ns() + left.tv_sec * 1'000'000'000 + left.tv_nsec;
    }

    const grpc::CallbackServerContext& context_;
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
    bool inline_taken = false;  // a handler runs on a thread of gRPC

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

    // May a handler that may block run on a thread of gRPC? They are few: one may.
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

// A unary call: what is asked, and where the answer goes.
struct Question {
    std::uint32_t method;
    Bytes request;
    std::string* reply;
};

inline grpc::Status answer(const Shared& shared, RpcCall& call, const Question& question) {
    return guarded(call, [&] {
        shared.check_request(question.request.size());
        const auto& handler = shared.service.find_unary(question.method);
        const Payload payload = handler(call, question.request);
        const Bytes bytes = payload.bytes();
        Shared::check_size(call, bytes.size());
        question.reply->assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    });
}

// A unary call whose handler may block.
class Unary : public grpc::ServerUnaryReactor {
  public:
    Unary(Shared& shared, const grpc::CallbackServerContext& context, const Question& question)
        : shared_(shared), call_(context), question_(question) {
        if (!shared_.enter(call_)) {
            Finish(shared_.full());
        } else if (shared_.take_inline()) {
            call_.is_inline = true;
            const grpc::Status status = answer(shared_, call_, question_);
            shared_.give_inline();
            end(status);
        } else {
            start_thread();
        }
    }

    void OnCancel() override { call_.cancel(Status::CANCELLED); }

    void OnDone() override { delete this; }

  private:
    void start_thread() {
        try {
            std::thread([this] { end(answer(shared_, call_, question_)); }).detach();
        } catch (const std::system_error&) {
            end(status_of(Status::RESOURCE_EXHAUSTED, "the server has no further thread"));
        }
    }

    // The last that is done here: OnDone may come at once.
    void end(const grpc::Status& status) {
        shared_.leave(call_);
        Finish(status);
    }

    Shared& shared_;
    RpcCall call_;
    Question question_;
};

// A unary call whose handler does not block, answered at once. (Not by a reactor of ours: gRPC
// tells that of its end from another thread, and to wake one costs a fifth of a call.)
inline grpc::ServerUnaryReactor* answer_now(
    Shared& shared, grpc::CallbackServerContext& context, const Question& question
) {
    RpcCall call(context);
    call.is_inline = true;
    grpc::ServerUnaryReactor* reactor = context.DefaultReactor();
    if (shared.enter(call)) {
        const grpc::Status status = answer(shared, call, question);
        shared.leave(call);
        reactor->Finish(status);
    } else {
        reactor->Finish(shared.full());
    }
    return reactor;
}

// A streaming call. Its items wait in a queue, from which gRPC's threads write them, one at a time.
// They make them, too, once the queue is empty, if no handler blocks; else, or from a pause on, a
// thread of the call's own does.
class Streaming : public grpc::ServerWriteReactor<StreamItem> {
  public:
    Streaming(
        Shared& shared,
        const grpc::CallbackServerContext& context,
        std::uint32_t method,
        std::string request
    )
        : shared_(shared),
          call_(context),
          method_(method),
          request_(std::move(request)),
          has_thread_(shared.service.blocks) {
        if (!shared_.enter(call_)) {
            Finish(shared_.full());
        } else if (has_thread_) {
            start_thread();
        } else {
            call_.is_inline = true;
            make_and_write();
        }
    }

    void OnWriteDone(bool ok) override {
        if (!ok) {  // OnCancel comes, too, but the handler would go on until then
            call_.cancel(Status::CANCELLED);
        }
        bool is_over = false;
        {
            const std::lock_guard lock(call_.mutex);
            const bool was_full = !has_room(queue_bytes_max / 2);
            queued_bytes_ -= cost(queue_.front());
            spare_ = std::move(queue_.front());
            queue_.pop_front();
            if (!ok) {
                queue_.clear();
                queued_bytes_ = 0;
            }
            writing_ = false;
            if (was_full && has_room(queue_bytes_max / 2)) {
                call_.changed.notify_all();
            }
            if (write() || (has_thread_ && !ended_)) {
                return;
            }
            is_over = ended_;
        }
        if (is_over) {
            Finish(status_);
        } else {
            make_and_write();
        }
    }

    void OnCancel() override { call_.cancel(Status::CANCELLED); }

    void OnDone() override { delete this; }

  private:
    static std::size_t cost(const StreamItem& item) {
        return item.payload().size() + item_extra_bytes;
    }

    bool has_room(std::size_t bytes_max) const { return queued_bytes_ < bytes_max; }

    // Write the first of the queue, with the mutex held; false: there is none.
    bool write() {
        if (!writing_ && !queue_.empty()) {
            writing_ = true;
            grpc::WriteOptions options;
            if (queue_.size() > 1) {  // gRPC may keep it for the next: many leave at once
                options.set_buffer_hint();
            }
            StartWrite(&queue_.front(), options);
        }
        return writing_;
    }

    // The next of the handler; nothing at its end, also if that comes from outside.
    std::optional<Item> make() {
        if (!producer_) {
            shared_.check_request(request_.size());
            producer_ = shared_.service.find_streaming(method_)(call_, bytes_of(request_));
        }
        return call_.reason() == Status::OK ? producer_() : std::nullopt;
    }

    void queue(Bytes bytes) {
        Shared::check_size(call_, bytes.size());
        StreamItem& item = queue_.emplace_back(std::move(spare_));
        item.set_payload(bytes.data(), bytes.size());
        queued_bytes_ += cost(item);
    }

    // --- in gRPC's threads, while nothing is being written ---

    void make_and_write() {
        std::optional<Pause> pause;
        bool is_over = false;
        const grpc::Status status = guarded(call_, [&] {
            const std::int64_t until_ns = now_ns() + make_ns_max;
            do {
                const std::optional<Item> item = make();
                is_over = !item;
                if (is_over) {
                    return;
                }
                if (const auto* found = std::get_if<Pause>(&*item)) {
                    pause = *found;
                    return;
                }
                queue(std::get<Payload>(*item).bytes());
            } while (has_room(queue_bytes_max) && now_ns() < until_ns);
        });
        if (is_over || !status.ok()) {
            end(status);
            return;
        }
        {
            const std::lock_guard lock(call_.mutex);
            has_thread_ = pause.has_value();
            write();
        }
        if (pause) {
            start_thread(pause->until_ns);
        }
    }

    // --- in a thread of its own ---

    void start_thread(std::int64_t begin_ns = 0) {
        try {
            std::thread([this, begin_ns] { run(begin_ns); }).detach();
        } catch (const std::system_error&) {
            end(status_of(Status::RESOURCE_EXHAUSTED, "the server has no further thread"));
        }
    }

    void run(std::int64_t begin_ns) {
        end(guarded(call_, [&] {
            call_.sleep_until(begin_ns);
            while (const std::optional<Item> item = make()) {
                if (const auto* pause = std::get_if<Pause>(&*item)) {
                    call_.sleep_until(pause->until_ns);
                } else {
                    put(std::get<Payload>(*item).bytes());
                }
            }
        }));
    }

    // Queue an item, once there is room.
    void put(Bytes bytes) {
        std::unique_lock lock(call_.mutex);
        if (!has_room(queue_bytes_max)) {
            call_.wait(lock, call_.deadline_ns, [this] { return has_room(queue_bytes_max / 2); });
        }
        if (call_.reason() == Status::OK) {
            queue(bytes);
            write();
        }
    }

    // --- both ---

    // The last that is done there: OnDone may come at once.
    void end(const grpc::Status& status) {
        shared_.leave(call_);
        bool is_over = false;
        {
            const std::lock_guard lock(call_.mutex);
            ended_ = true;
            status_ = status;
            is_over = !write();
        }
        if (is_over) {
            Finish(status);
        }
    }

    Shared& shared_;
    RpcCall call_;
    std::uint32_t method_;
    std::string request_;
    Producer producer_;
    bool has_thread_;
    std::deque<StreamItem> queue_;  // the first is being written
    StreamItem spare_;              // the last that was: a large buffer costs more than its bytes
    std::size_t queued_bytes_ = 0;
    bool writing_ = false;
    bool ended_ = false;  // the handler is done; Finish with status_ after the queue
    grpc::Status status_;
};

class BridgeService : public Bridge::CallbackService {
  public:
    explicit BridgeService(Shared& shared) : shared_(shared) {}

    grpc::ServerUnaryReactor* Echo(
        grpc::CallbackServerContext* context, const EchoRequest* request, EchoReply* reply
    ) override {
        return unary(*context, echo_method, request->payload(), reply->mutable_payload());
    }

    grpc::ServerWriteReactor<StreamItem>* Stream(
        grpc::CallbackServerContext* context, const StreamRequest* request
    ) override {
        return new Streaming(shared_, *context, stream_method, request->SerializeAsString());
    }

    grpc::ServerUnaryReactor* Call(
        grpc::CallbackServerContext* context, const CallRequest* request, CallReply* reply
    ) override {
        return unary(*context, request->method(), request->payload(), reply->mutable_payload());
    }

    grpc::ServerWriteReactor<StreamItem>* CallStream(
        grpc::CallbackServerContext* context, const CallRequest* request
    ) override {
        return new Streaming(shared_, *context, request->method(), request->payload());
    }

    grpc::ServerUnaryReactor* Hello(
        grpc::CallbackServerContext* context, const HelloRequest* /*request*/, HelloReply* reply
    ) override {
        reply->set_max_payload(shared_.options.payload_bytes_max);
        grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
        reactor->Finish(grpc::Status::OK);
        return reactor;
    }

  private:
    grpc::ServerUnaryReactor* unary(
        grpc::CallbackServerContext& context,
        std::uint32_t method,
        const std::string& request,
        std::string* reply
    ) {
        const Question question{method, bytes_of(request), reply};
        if (!shared_.service.blocks) {
            return answer_now(shared_, context, question);
        }
        return new Unary(shared_, context, question);
    }

    Shared& shared_;
};

}  // namespace ipc_bridge::grpc_rpc
