// The methods of bridge.proto, as a server of gRPC answers them: by the asynchronous API, whose
// events come from the completion queue (`grpc_loop`).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <variant>

#include <grpcpp/grpcpp.h>

#include <ipc_bridge/bridge.grpc.pb.h>
#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/handlers.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/grpc_calls.hpp>
#include <ipc_bridge/transports/grpc_loop.hpp>
#include <ipc_bridge/transports/grpc_options.hpp>

namespace ipc_bridge::grpc_rpc {

// Items made before gRPC takes them: enough that it never waits for a fast producer. One that had
// to wait goes on at half of it: to be woken for each item costs more than the item.
inline constexpr std::size_t queue_bytes_max = 128U << 10;
// For so long the loop makes items before it writes them.
inline constexpr std::int64_t make_ns_max = 50'000;
// What an item costs there beside its payload.
inline constexpr std::size_t item_extra_bytes = 64;

// Each method: how it is asked for, and what with.
struct EchoMethod {
    using Request = EchoRequest;
    using Reply = EchoReply;
    using Responder = grpc::ServerAsyncResponseWriter<Reply>;
    static constexpr auto await = &Bridge::AsyncService::RequestEcho;
    static std::uint32_t number(const Request& /*request*/) { return echo_method; }
    static std::string payload(Request& request) { return std::move(*request.mutable_payload()); }
};
struct CallMethod {
    using Request = CallRequest;
    using Reply = CallReply;
    using Responder = grpc::ServerAsyncResponseWriter<Reply>;
    static constexpr auto await = &Bridge::AsyncService::RequestCall;
    static std::uint32_t number(const Request& request) { return request.method(); }
    static std::string payload(Request& request) { return std::move(*request.mutable_payload()); }
};
struct StreamMethod {
    using Request = StreamRequest;
    using Responder = grpc::ServerAsyncWriter<StreamItem>;
    static constexpr auto await = &Bridge::AsyncService::RequestStream;
    static std::uint32_t number(const Request& /*request*/) { return stream_method; }
    static std::string payload(const Request& request) { return request.SerializeAsString(); }
};
struct CallStreamMethod {
    using Request = CallRequest;
    using Responder = grpc::ServerAsyncWriter<StreamItem>;
    static constexpr auto await = &Bridge::AsyncService::RequestCallStream;
    static std::uint32_t number(const Request& request) { return request.method(); }
    static std::string payload(Request& request) { return std::move(*request.mutable_payload()); }
};
struct HelloMethod {
    using Request = HelloRequest;
    using Reply = HelloReply;
    using Responder = grpc::ServerAsyncResponseWriter<Reply>;
    static constexpr auto await = &Bridge::AsyncService::RequestHello;
};

// What a client asks first.
class Greeting : public Exchange<HelloMethod, Bridge::AsyncService> {
  public:
    using Exchange::Exchange;

  private:
    void await_next() override { await<Greeting>(); }

    void begin() override {
        HelloReply reply;
        reply.set_max_payload(shared.options.payload_bytes_max);
        responder.Finish(reply, grpc::Status::OK, finished.tag());
    }
};

// A unary call of bridge.proto.
template <class Method>
class Unary : public Exchange<Method, Bridge::AsyncService> {
    using Base = Exchange<Method, Bridge::AsyncService>;
    using Base::call, Base::finished, Base::loop, Base::request, Base::responder, Base::shared;

  public:
    using Base::Base;

  private:
    void await_next() override { this->template await<Unary>(); }

    void begin() override {
        method_ = Method::number(request);
        request_ = Method::payload(request);
        if (!shared.enter(*call)) {
            finish(shared.full());
        } else if (!shared.service.blocks) {
            call->held_up = &loop;
            end(answer());
        } else if (shared.take_inline()) {
            const grpc::Status status = answer();
            shared.give_inline();
            end(status);
        } else {
            start_thread();
        }
    }

    void start_thread() {
        try {
            std::thread([this] { end(answer()); }).detach();
        } catch (const std::system_error&) {
            end(status_of(Status::RESOURCE_EXHAUSTED, no_thread));
        }
    }

    grpc::Status answer() {
        return guarded(*call, [&] {
            shared.check_request(request_.size());
            const auto& handler = shared.service.find_unary(method_);
            const Payload payload = handler(*call, bytes_of(request_));
            const Bytes bytes = payload.bytes();
            Shared::check_size(*call, bytes.size());
            reply_.set_payload(bytes.data(), bytes.size());
        });
    }

    // The last that is done here: all may be gone at once.
    void end(const grpc::Status& status) {
        shared.leave(*call);
        finish(status);
    }

    void finish(const grpc::Status& status) { responder.Finish(reply_, status, finished.tag()); }

    std::uint32_t method_ = 0;
    std::string request_;
    typename Method::Reply reply_;
};

// A streaming call. Its items wait in a queue, from which they are written, one at a time. The loop
// makes them, too, once the queue is empty, if no handler blocks; else, or from a pause or a sleep
// on, a thread of the call's own does.
template <class Method>
class Streaming : public Exchange<Method, Bridge::AsyncService> {
    using Base = Exchange<Method, Bridge::AsyncService>;
    using Base::call, Base::finished, Base::loop, Base::request, Base::responder, Base::shared;

  public:
    using Base::Base;

  private:
    void await_next() override { this->template await<Streaming>(); }

    void begin() override {
        method_ = Method::number(request);
        request_ = Method::payload(request);
        has_thread_ = shared.service.blocks;
        if (!shared.enter(*call)) {
            finish(shared.full());
        } else if (has_thread_) {
            start_thread();
        } else {
            call->before_handing_over = [this] {
                const std::lock_guard lock(call->mutex);
                has_thread_ = true;  // this one, from now on
                write();
            };
            make_and_write();
        }
    }

    void written(bool ok) {
        if (!ok) {  // the end comes, too, but the handler would go on until then
            call->cancel(Status::CANCELLED);
        }
        bool is_over = false;
        {
            const std::lock_guard lock(call->mutex);
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
                call->changed.notify_all();
            }
            if (write() || (has_thread_ && !ended_)) {
                return;
            }
            is_over = ended_;
        }
        if (is_over) {
            finish(status_);
        } else {
            make_and_write();
        }
    }

    static std::size_t cost(const StreamItem& item) {
        return item.payload().size() + item_extra_bytes;
    }

    bool has_room(std::size_t bytes_max) const { return queued_bytes_ < bytes_max; }

    // Write the first of the queue, with the mutex held; false: there is none.
    bool write() {
        if (!writing_ && !queue_.empty()) {
            writing_ = true;
            grpc::WriteOptions options;
            // gRPC may keep it for the next: many leave at once. (Not the first: gRPC 1.51 says
            // nothing more of one that it keeps together with the headers.)
            if (std::exchange(begun_, true) && queue_.size() > 1) {
                options.set_buffer_hint();
            }
            responder.Write(queue_.front(), options, written_.tag());
        }
        return writing_;
    }

    // The next of the handler; nothing at its end, also if that comes from outside.
    std::optional<Item> make() {
        if (!producer_) {
            shared.check_request(request_.size());
            producer_ = shared.service.find_streaming(method_)(*call, bytes_of(request_));
        }
        return call->reason() == Status::OK ? producer_() : std::nullopt;
    }

    void queue(Bytes bytes) {
        Shared::check_size(*call, bytes.size());
        StreamItem& item = queue_.emplace_back(std::move(spare_));
        item.set_payload(bytes.data(), bytes.size());
        queued_bytes_ += cost(item);
    }

    // --- in the loop, while nothing is being written ---

    void make_and_write() {
        call->held_up = &loop;
        std::optional<Pause> pause;
        bool is_over = false;
        const grpc::Status status = guarded(*call, [&] {
            const std::int64_t until_ns = now_ns() + make_ns_max;
            do {
                std::optional<Item> item = make();
                is_over = !item || call->held_up == nullptr;
                if (is_over) {
                    follow(std::move(item));
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
            const std::lock_guard lock(call->mutex);
            has_thread_ = pause.has_value();
            write();
        }
        if (pause) {
            start_thread(pause->until_ns);
        }
    }

    // --- in a thread of its own ---

    void start_thread(std::int64_t begin_ns = 0) {
        call->held_up = nullptr;
        try {
            std::thread([this, begin_ns] { run(begin_ns); }).detach();
        } catch (const std::system_error&) {
            end(status_of(Status::RESOURCE_EXHAUSTED, no_thread));
        }
    }

    void run(std::int64_t begin_ns) {
        end(guarded(*call, [&] {
            call->sleep_until(begin_ns);
            follow(make());
        }));
    }

    // From an item on to the end.
    void follow(std::optional<Item> item) {
        for (; item; item = make()) {
            if (const auto* pause = std::get_if<Pause>(&*item)) {
                call->sleep_until(pause->until_ns);
            } else {
                put(std::get<Payload>(*item).bytes());
            }
        }
    }

    // Queue an item, once there is room.
    void put(Bytes bytes) {
        std::unique_lock lock(call->mutex);
        if (!has_room(queue_bytes_max)) {
            call->wait(lock, call->deadline_ns, [this] { return has_room(queue_bytes_max / 2); });
        }
        if (call->reason() == Status::OK) {
            queue(bytes);
            write();
        }
    }

    // --- both ---

    // The last that is done there: all may be gone at once.
    void end(const grpc::Status& status) {
        shared.leave(*call);
        bool is_over = false;
        {
            const std::lock_guard lock(call->mutex);
            ended_ = true;
            status_ = status;
            is_over = !write();
        }
        if (is_over) {
            finish(status);
        }
    }

    void finish(const grpc::Status& status) { responder.Finish(status, finished.tag()); }

    EventOf<Streaming> written_{*this, &Streaming::written};
    std::uint32_t method_ = 0;
    std::string request_;
    Producer producer_;
    bool has_thread_ = false;
    std::deque<StreamItem> queue_;  // the first is being written
    StreamItem spare_;              // the last that was: a large buffer costs more than its bytes
    std::size_t queued_bytes_ = 0;
    bool begun_ = false;  // to write
    bool writing_ = false;
    bool ended_ = false;  // the handler is done; `finish` with status_ after the queue
    grpc::Status status_;
};

}  // namespace ipc_bridge::grpc_rpc
