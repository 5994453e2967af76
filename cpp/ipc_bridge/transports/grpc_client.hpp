// A client's end of gRPC: a channel of its own and the calls on it; the traps stand in grpc_rpc.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include <grpcpp/grpcpp.h>

#include <ipc_bridge/bridge.grpc.pb.h>
#include <ipc_bridge/client.hpp>
#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/session.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/grpc_options.hpp>

namespace ipc_bridge::grpc_rpc {

// Between attempts to reach a server; gRPC allows no less than 100.
inline constexpr int connect_retry_ms_min = 100;
inline constexpr int connect_retry_ms_max = 500;
// Buffers that a client keeps from call to call; larger ones are given back.
inline constexpr std::size_t keep_bytes_max = 1U << 20;

// How often this process is a fork of another. The threads of gRPC stay behind in a fork, with the
// locks that they hold: what the parent had, the child leaves alone, and keeps, for its end would
// wait for them.
inline std::atomic<int> forks = 0;
inline const int watching_forks = ::pthread_atfork(nullptr, nullptr, [] { ++forks; });

class RpcClient : public Caller {
  public:
    RpcClient(
        const std::string& target,
        const std::shared_ptr<grpc::ChannelCredentials>& credentials,
        grpc::ChannelArguments arguments,
        std::string url,
        const ConnectOptions& options
    )
        : url_(std::move(url)), payload_bytes_max_(options.payload_bytes_max) {
        ServerSession(options.window_bytes, options.payload_bytes_max);  // a bad option shows now
        arguments.SetInt(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1);
        arguments.SetMaxReceiveMessageSize(message_bytes(options.payload_bytes_max));
        // The window of a stream.
        arguments.SetInt(
            GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, static_cast<int>(options.window_bytes)
        );
        // That of the connection is 64 KiB in gRPC 1.51 unless it measures the link, and twice as
        // fast then from items of 4 KiB on. Who asks for less than the default gets what he asks
        // for. (Python's is a later gRPC, where the connection's is as wide as the stream's.)
        arguments.SetInt(
            GRPC_ARG_HTTP2_BDP_PROBE, options.window_bytes >= window_bytes_default ? 1 : 0
        );
        // A connection of its own: gRPC's channels to one address share theirs otherwise.
        arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
        arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
        // A call is made once or not at all; and both cost time on every call.
        arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
        arguments.SetInt(GRPC_ARG_ENABLE_CHANNELZ, 0);
        arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, connect_retry_ms_min);
        arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, connect_retry_ms_max);
        channel_ = grpc::CreateCustomChannel(target, credentials, arguments);
        stub_ = Bridge::NewStub(channel_);
    }

    // Learn what the server takes, waiting for it to start. Throws Error: UNAVAILABLE.
    void meet(std::int64_t deadline_ns, const std::string& missing) {
        grpc::ClientContext context;
        set_deadline(context, deadline_ns);
        context.set_wait_for_ready(true);
        HelloReply reply;
        const grpc::Status status = stub_->Hello(&context, {}, &reply);
        if (status.ok()) {
            peer_payload_bytes_max_ = reply.max_payload();
        } else if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) {
            throw Error(Status::UNAVAILABLE, missing, url_);
        } else if (status.error_code() != grpc::StatusCode::UNIMPLEMENTED) {
            throw error_of(status);
        }  // else a server that was made from an older bridge.proto
    }

    // As Client::call; but the connection lives also after UNAVAILABLE, as gRPC connects again, and
    // after a deadline met while the request was still being sent.
    Bytes call(std::uint16_t method, Bytes payload, std::optional<double> timeout) override {
        const std::int64_t deadline_ns = prepare(method, payload, timeout);
        if (method == echo_method) {
            return bytes_of(answer(&Bridge::Stub::Echo, echo_, payload, deadline_ns));
        }
        by_number_.request.set_method(method);
        return bytes_of(answer(&Bridge::Stub::Call, by_number_, payload, deadline_ns));
    }

    Items call_stream(std::uint16_t method, Bytes payload, std::optional<double> timeout) override {
        auto source = std::make_unique<Source>(*this);
        OpenStream& open = *source->open;
        introduce(open.context, prepare(method, payload, timeout));
        StreamRequest asked;
        if (method == stream_method &&
            asked.ParseFromArray(payload.data(), static_cast<int>(payload.size()))) {
            open.reader = stub_->Stream(&open.context, asked);
        } else {
            CallRequest request;
            request.set_method(method);
            request.set_payload(payload.data(), payload.size());
            open.reader = stub_->CallStream(&open.context, request);
        }
        busy_ = true;
        return Items(std::move(source));
    }

    void close() override {
        if (forks != forks_) {
            static_cast<void>(stub_.release());
            static_cast<void>(new std::shared_ptr<grpc::Channel>(std::move(channel_)));
        }
        stub_.reset();
        channel_.reset();
    }
    ~RpcClient() override { close(); }

  private:
    struct OpenStream {
        grpc::ClientContext context;
        std::unique_ptr<grpc::ClientReader<StreamItem>> reader;
    };

    class Source : public ItemSource {
      public:
        explicit Source(RpcClient& client) : client_(client) {}

        std::unique_ptr<OpenStream> open = std::make_unique<OpenStream>();

        std::span<const Bytes> next() override {
            if (!open) {
                return {};
            }
            client_.check_fork();
            if (open->reader->Read(&item_)) {
                view_ = bytes_of(item_.payload());
                return {&view_, 1};
            }
            const grpc::Status status = finish();
            if (!status.ok()) {
                throw client_.error_of(status);
            }
            return {};
        }

        void close() noexcept override {
            if (open && forks != client_.forks_) {
                static_cast<void>(open.release());
            } else if (open) {
                open->context.TryCancel();
                finish();
            }
        }

      private:
        grpc::Status finish() {
            client_.busy_ = false;
            grpc::Status status = open->reader->Finish();
            open.reset();
            return status;
        }

        RpcClient& client_;
        StreamItem item_;
        Bytes view_;  // of its payload
    };

    // A request and its reply, kept for their buffers.
    template <class Request, class Reply>
    struct Exchange {
        Request request;
        Reply reply;
    };
    template <class Request, class Reply>
    using Method = grpc::Status (Bridge::Stub::*)(grpc::ClientContext*, const Request&, Reply*);

    // The reply of a unary call.
    template <class Request, class Reply>
    const std::string& answer(
        Method<Request, Reply> method,
        Exchange<Request, Reply>& exchange,
        Bytes payload,
        std::int64_t deadline_ns
    ) {
        exchange.request.set_payload(payload.data(), payload.size());
        grpc::ClientContext context;
        introduce(context, deadline_ns);
        const grpc::Status status =
            (stub_.get()->*method)(&context, exchange.request, &exchange.reply);
        if (payload.size() > keep_bytes_max) {
            std::string().swap(*exchange.request.mutable_payload());
        }
        if (!status.ok()) {
            throw error_of(status);
        }
        return exchange.reply.payload();
    }

    // What is checked before any call; its deadline. Throws as Caller::call.
    std::int64_t prepare(std::uint16_t method, Bytes payload, std::optional<double> timeout) {
        const std::int64_t deadline_ns = deadline_after(timeout);
        if (deadline_ns != never && deadline_ns <= now_ns()) {
            throw CallError(Status::DEADLINE_EXCEEDED, "the deadline has passed", url_);
        }
        check_fork();
        if (busy_) {
            throw UsageError(
                Status::FAILED_PRECONDITION, "a call is under way on this connection", url_
            );
        }
        if (!stub_) {
            throw CallError(Status::UNAVAILABLE, "the connection is closed", url_);
        }
        frame::check_method(method, url_);
        if (payload.size() > peer_payload_bytes_max_) {
            throw UsageError(
                Status::RESOURCE_EXHAUSTED,
                too_large(payload.size(), "server", peer_payload_bytes_max_),
                url_
            );
        }
        return deadline_ns;
    }

    void check_fork() const {
        if (forks != forks_) {
            throw UsageError(
                Status::FAILED_PRECONDITION,
                "the connection is the parent's, from before the fork: connect anew",
                url_
            );
        }
    }

    // What goes with every call.
    void introduce(grpc::ClientContext& context, std::int64_t deadline_ns) const {
        set_deadline(context, deadline_ns);
        if (payload_bytes_max_ != frame::payload_bytes_max) {
            context.AddMetadata(max_payload_key, std::to_string(payload_bytes_max_));
        }
    }

    static void set_deadline(grpc::ClientContext& context, std::int64_t deadline_ns) {
        if (deadline_ns != never) {
            context.set_deadline(gpr_timespec{
                deadline_ns / 1'000'000'000,
                static_cast<std::int32_t>(deadline_ns % 1'000'000'000),
                GPR_CLOCK_MONOTONIC});
        }
    }

    // What gRPC itself found out is said in our words; what the server said, in its own.
    CallError error_of(const grpc::Status& status) const {
        if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) {
            return {Status::DEADLINE_EXCEEDED, "no answer before the deadline", url_};
        }
        return {static_cast<Status>(status.error_code()), status.error_message(), url_};
    }

    std::string url_;
    std::uint32_t payload_bytes_max_;
    std::uint32_t peer_payload_bytes_max_ = frame::payload_bytes_max;
    std::shared_ptr<grpc::Channel> channel_;
    std::unique_ptr<Bridge::Stub> stub_;
    Exchange<EchoRequest, EchoReply> echo_;
    Exchange<CallRequest, CallReply> by_number_;
    bool busy_ = false;  // a stream is open
    int forks_ = forks;  // when it was made
};

}  // namespace ipc_bridge::grpc_rpc
