// A server's end of gRPC: the port, and its end; the traps stand in grpc_rpc.
#pragma once

#include <poll.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include <grpcpp/ext/health_check_service_server_builder_option.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>

#include <ipc_bridge/bridge.grpc.pb.h>
#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/server.hpp>
#include <ipc_bridge/session.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/grpc_calls.hpp>
#include <ipc_bridge/transports/grpc_health.hpp>
#include <ipc_bridge/transports/grpc_loop.hpp>
#include <ipc_bridge/transports/grpc_methods.hpp>
#include <ipc_bridge/transports/grpc_options.hpp>

namespace ipc_bridge::grpc_rpc {

// HTTP/2's default; a Unix socket's buffer has three times as much.
inline constexpr int request_window_bytes = 65535;
// A stranger that says no HTTP/2 for so long is none of ours.
inline constexpr int handshake_timeout_ms = 5000;

// What the calls hold on to; it may outlive the server, if a handler does.
struct Rooms {
    Rooms(Service service, const ServeOptions& options) : shared(std::move(service), options) {}

    // Await the first call of each method. Throws as Loop::start.
    void open() {
        loop->start(shared.service.blocks ? 2 : 1);
        await<Unary<EchoMethod>>(bridge);
        await<Unary<CallMethod>>(bridge);
        await<Streaming<StreamMethod>>(bridge);
        await<Streaming<CallStreamMethod>>(bridge);
        await<Greeting>(bridge);
        await<Check>(health);
        await<Watch>(health);
    }

    Shared shared;
    Bridge::AsyncService bridge;
    HealthService health;
    std::optional<Loop> loop;
    std::unique_ptr<grpc::Server> server;  // ends before it

  private:
    template <class Call, class Of>
    void await(Of& service) {
        (new Call(shared, service, *loop))->start();
    }
};

class RpcServer : public Callee {
  public:
    // Listen at `address`, which is free. `cleanup` removes it. Throws Error: ALREADY_EXISTS if
    // another program has just taken it; INVALID_ARGUMENT if the keys are of no use.
    RpcServer(
        const std::string& address,
        const std::shared_ptr<grpc::ServerCredentials>& credentials,
        bool has_keys,
        std::function<std::string(int)> url_of_port,
        std::function<void()> cleanup,
        Service service,
        const ServeOptions& options
    )
        : rooms_(std::make_shared<Rooms>(std::move(service), options)),
          cleanup_(std::move(cleanup)) {
        ServerSession(options.window_bytes, options.payload_bytes_max);  // a bad option shows now
        // Health checking (ours: `grpc_health`) and reflection, as gRPC's own tools expect them.
        grpc::reflection::InitProtoReflectionServerBuilderPlugin();
        grpc::ServerBuilder builder;
        builder.SetOption(std::make_unique<grpc::HealthCheckServiceServerBuilderOption>(nullptr));
        int port = 0;
        builder.AddListeningPort(address, credentials, &port);
        builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
        builder.AddChannelArgument(GRPC_ARG_ENABLE_CHANNELZ, 0);
        builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, handshake_timeout_ms);
        // gRPC does not give up a call while a part of it is stuck in a socket that nobody reads;
        // so a client may send no more than a socket's buffer takes.
        builder.AddChannelArgument(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, request_window_bytes);
        builder.AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, 0);
        // Clients may ask whether we live, also between calls, and several times at once: one that
        // is not waiting for anything writes and reads every 5 s only.
        builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, keepalive_ms);
        builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
        builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
        builder.SetMaxSendMessageSize(-1);
        builder.SetMaxReceiveMessageSize(message_bytes(options.payload_bytes_max));
        builder.RegisterService(&rooms_->bridge);
        builder.RegisterService(&rooms_->health);
        rooms_->loop.emplace(builder.AddCompletionQueue());
        rooms_->server = builder.BuildAndStart();
        if (!rooms_->server && has_keys) {
            throw Error(Status::INVALID_ARGUMENT, "gRPC cannot listen with these keys", address);
        }
        if (!rooms_->server) {
            throw Error(Status::ALREADY_EXISTS, "gRPC cannot listen there", address);
        }
        rooms_->open();
        url = url_of_port(port);
    }
    ~RpcServer() override { close(); }

    void run() override {
        {
            const std::lock_guard lock(mutex_);
            if (closed_) {
                return;
            }
            running_ = true;
        }
        pollfd stopped{wakeup_.fileno(), POLLIN, 0};
        sleep_until_ready({&stopped, 1}, never);
        drain();
    }

    void stop() override { wakeup_.set(); }

    void close() override {
        {
            const std::lock_guard lock(mutex_);
            if (running_) {
                wakeup_.set();
                return;
            }
        }
        drain();
    }

  private:
    // gRPC refuses new calls from now on. Running ones may end within the grace, then they are cut;
    // a handler that goes on regardless is left behind with all that it uses.
    void drain() {
        {
            const std::lock_guard lock(mutex_);
            if (std::exchange(closed_, true)) {
                return;
            }
        }
        Shared& shared = rooms_->shared;
        leave(rooms_->health);
        const auto ended = std::make_shared<std::atomic<bool>>(false);
        const double grace_s = shared.options.grace_s;
        const std::int64_t cut_ns = deadline_after(grace_s + cut_s);
        std::thread([rooms = rooms_, ended, cut_ns] {
            gpr_timespec by{
                cut_ns / 1'000'000'000,
                static_cast<std::int32_t>(cut_ns % 1'000'000'000),
                GPR_CLOCK_MONOTONIC};
            rooms->server->Shutdown(by);
            rooms->server->Wait();
            rooms->loop->finish();
            rooms->server.reset();
            const std::lock_guard lock(rooms->shared.mutex);
            *ended = true;
            rooms->shared.changed.notify_all();
        }).detach();
        std::unique_lock lock(shared.mutex);
        const auto has_ended = [&] { return ended->load(); };
        const auto grace = std::chrono::duration<double>(grace_s);
        if (!shared.changed.wait_for(lock, grace, has_ended)) {
            for (RpcCall* call : shared.calls) {
                call->cancel(Status::UNAVAILABLE);
            }
            shared.changed.wait_for(lock, std::chrono::duration<double>(2 * cut_s), has_ended);
        }
        cleanup_();
    }

    std::shared_ptr<Rooms> rooms_;
    std::function<void()> cleanup_;
    Wakeup wakeup_;
    std::mutex mutex_;
    bool running_ = false;  // then `run` drains
    bool closed_ = false;
};

}  // namespace ipc_bridge::grpc_rpc
