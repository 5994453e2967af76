// The source of grpc_rpc.hpp.
//
// Which API, and why (gRPC 1.51): a client's thread that waits for its answer polls the socket
// itself in the synchronous API; the callback API leaves that to threads of its own, which have to
// wake it. For a server it is the other way round: in the callback API the thread that read a
// request can answer it, and the next write of a stream needs no thread to be woken. Its threads
// are few and must not be blocked, so that of all handlers only one at a time runs there; the
// others have a thread.
#include <netdb.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <unordered_set>
#include <utility>
#include <variant>

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <ipc_bridge/bridge.grpc.pb.h>
#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/session.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/grpc_rpc.hpp>

namespace ipc_bridge {
namespace {

// service.hpp's. (It names its client's face Bridge, as the generated code does the service.)
constexpr std::uint16_t echo_method = 1;
constexpr std::uint16_t stream_method = 2;

// The metadata that tells a client's max_payload (bridge.proto).
const std::string max_payload_key = "ipc-bridge-max-payload";
// Tags and sizes around a payload: more than any message here has.
constexpr std::int64_t message_extra_bytes = 64;
// Between attempts to reach a server; gRPC allows no less than 100.
constexpr int connect_retry_ms_min = 100;
constexpr int connect_retry_ms_max = 500;
// Silence of a host for twice as long: it has gone. (A process that goes is seen at once.)
constexpr int keepalive_ms = 5000;
// HTTP/2's default; a Unix socket's buffer has three times as much.
constexpr int request_window_bytes = 65535;
// A stranger that says no HTTP/2 for so long is none of ours.
constexpr int handshake_timeout_ms = 5000;
// Items made before gRPC takes them: enough that it never waits for a fast producer.
constexpr std::size_t queue_bytes_max = 64U << 10;
// What an item costs there beside its payload.
constexpr std::size_t item_extra_bytes = 64;
// Buffers that a client keeps from call to call; larger ones are given back.
constexpr std::size_t keep_bytes_max = 1U << 20;

// The largest message for a payload; gRPC takes an int, and protobuf makes none that is larger.
int message_bytes(std::uint32_t payload_bytes) {
    constexpr std::int64_t limit = std::numeric_limits<int>::max();
    return static_cast<int>(std::min(payload_bytes + message_extra_bytes, limit));
}

std::chrono::steady_clock::time_point time_point_of(std::int64_t ns) {
    return std::chrono::steady_clock::time_point(std::chrono::nanoseconds(ns));
}

// At most message_bytes_max, never cut inside a character (RFC 3629: bytes 10xxxxxx continue one).
std::string clipped(std::string text) {
    if (text.size() > message_bytes_max) {
        std::size_t end = message_bytes_max;
        while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U) {
            --end;
        }
        text.resize(end);
    }
    return text;
}

grpc::Status status_of(Status status, std::string text) {
    return {static_cast<grpc::StatusCode>(status), clipped(std::move(text))};
}

std::string too_large(std::size_t size, const char* who, std::uint32_t size_max) {
    return "payload of " + std::to_string(size) + " bytes, the " + who + " takes " +
           std::to_string(size_max);
}

// gRPC writes what it meets to stderr; what matters here reaches the caller as an Error. Whoever
// wants its log sets GRPC_VERBOSITY.
void quieten() {
    ::setenv("GRPC_VERBOSITY", "NONE", 0);
}

// --- the client ---

// How often this process is a fork of another. The threads of gRPC stay behind in a fork.
std::atomic<int> forks = 0;
const int watching_forks = ::pthread_atfork(nullptr, nullptr, [] { ++forks; });

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
        // The window of a stream: fixed, else it grows with the link's speed.
        arguments.SetInt(
            GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, static_cast<int>(options.window_bytes)
        );
        arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
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
        const std::int64_t deadline_ns = prepare(payload, timeout);
        if (method == echo_method) {
            return bytes_of(answer(&Bridge::Stub::Echo, echo_, payload, deadline_ns));
        }
        by_number_.request.set_method(method);
        return bytes_of(answer(&Bridge::Stub::Call, by_number_, payload, deadline_ns));
    }

    Items call_stream(std::uint16_t method, Bytes payload, std::optional<double> timeout) override {
        auto source = std::make_unique<Source>(*this);
        introduce(source->context, prepare(payload, timeout));
        StreamRequest asked;
        if (method == stream_method &&
            asked.ParseFromArray(payload.data(), static_cast<int>(payload.size()))) {
            source->reader = stub_->Stream(&source->context, asked);
        } else {
            CallRequest request;
            request.set_method(method);
            request.set_payload(payload.data(), payload.size());
            source->reader = stub_->CallStream(&source->context, request);
        }
        busy_ = true;
        return Items(std::move(source));
    }

    void close() override {
        if (forks != forks_) {  // what is left of it cannot be ended here
            static_cast<void>(stub_.release());
            static_cast<void>(new std::shared_ptr<grpc::Channel>(std::move(channel_)));
        }
        stub_.reset();
        channel_.reset();
    }
    ~RpcClient() override { close(); }

  private:
    class Source : public ItemSource {
      public:
        explicit Source(RpcClient& client) : client_(client) {}

        grpc::ClientContext context;
        std::unique_ptr<grpc::ClientReader<StreamItem>> reader;

        std::span<const Bytes> next() override {
            if (!open_) {
                return {};
            }
            if (reader->Read(&item_)) {
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
            if (open_) {
                context.TryCancel();
                finish();
            }
        }

      private:
        grpc::Status finish() {
            open_ = false;
            client_.busy_ = false;
            return reader->Finish();
        }

        RpcClient& client_;
        StreamItem item_;
        Bytes view_;  // of its payload
        bool open_ = true;
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
    std::int64_t prepare(Bytes payload, std::optional<double> timeout) {
        const std::int64_t deadline_ns = deadline_after(timeout);
        if (deadline_ns != never && deadline_ns <= now_ns()) {
            throw CallError(Status::DEADLINE_EXCEEDED, "the deadline has passed", url_);
        }
        if (busy_) {
            throw UsageError(
                Status::FAILED_PRECONDITION, "a call is under way on this connection", url_
            );
        }
        if (forks != forks_) {
            throw UsageError(
                Status::FAILED_PRECONDITION, "a connection does not survive a fork", url_
            );
        }
        if (!stub_) {
            throw CallError(Status::UNAVAILABLE, "the connection is closed", url_);
        }
        if (payload.size() > peer_payload_bytes_max_) {
            throw UsageError(
                Status::RESOURCE_EXHAUSTED,
                too_large(payload.size(), "server", peer_payload_bytes_max_),
                url_
            );
        }
        return deadline_ns;
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

// --- the server ---

// A call that runs; ended early from any thread by `cancel`.
class RpcCall : public Call {
  public:
    explicit RpcCall(const grpc::CallbackServerContext& context)
        : Call(deadline_of(context)), context_(context) {}

    std::mutex mutex;
    std::condition_variable changed;

    bool is_cancelled() override { return reason() != Status::OK; }

    void sleep(double seconds) override { sleep_until(deadline_after(seconds)); }

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
        return status_of(Status::INTERNAL, error.what());
    } catch (...) {
        return status_of(Status::INTERNAL, "a handler failed");
    }
    const Status why = call.reason();
    return why == Status::OK ? grpc::Status::OK : status_of(why, reason_text(why));
}

// A unary call.
class Unary : public grpc::ServerUnaryReactor {
  public:
    Unary(
        Shared& shared,
        const grpc::CallbackServerContext& context,
        std::uint32_t method,
        Bytes request,
        std::string* reply
    )
        : shared_(shared), call_(context), method_(method), request_(request), reply_(reply) {
        if (!shared_.enter(call_)) {
            Finish(shared_.full());
        } else if (shared_.take_inline()) {
            const grpc::Status status = run();
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
            std::thread([this] { end(run()); }).detach();
        } catch (const std::system_error&) {
            end(status_of(Status::RESOURCE_EXHAUSTED, "the server has no further thread"));
        }
    }

    grpc::Status run() {
        return guarded(call_, [this] {
            shared_.check_request(request_.size());
            const auto number = static_cast<std::uint16_t>(std::min(method_, 0xFFFFU));
            const Payload payload = shared_.service.find_unary(number)(call_, request_);
            const Bytes bytes = payload.bytes();
            Shared::check_size(call_, bytes.size());
            reply_->assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
        });
    }

    // The last that is done here: OnDone may come at once.
    void end(const grpc::Status& status) {
        shared_.leave(call_);
        Finish(status);
    }

    Shared& shared_;
    RpcCall call_;
    std::uint32_t method_;
    Bytes request_;
    std::string* reply_;
};

// A streaming call: a thread makes the items, gRPC's threads write them.
class Streaming : public grpc::ServerWriteReactor<StreamItem> {
  public:
    Streaming(
        Shared& shared,
        const grpc::CallbackServerContext& context,
        std::uint32_t method,
        std::string request
    )
        : shared_(shared), call_(context), method_(method), request_(std::move(request)) {
        if (!shared_.enter(call_)) {
            Finish(shared_.full());
            return;
        }
        try {
            std::thread([this] { run(); }).detach();
        } catch (const std::system_error&) {
            end(status_of(Status::RESOURCE_EXHAUSTED, "the server has no further thread"));
        }
    }

    void OnWriteDone(bool ok) override {
        bool is_over = false;
        {
            const std::lock_guard lock(call_.mutex);
            queued_bytes_ -= cost(queue_.front());
            queue_.pop_front();
            if (!ok) {  // the call is over: OnCancel comes, too
                queue_.clear();
                queued_bytes_ = 0;
            }
            writing_ = !queue_.empty();
            if (writing_) {
                StartWrite(&queue_.front());
            }
            is_over = !writing_ && ended_;
            call_.changed.notify_all();
        }
        if (is_over) {
            Finish(status_);
        }
    }

    void OnCancel() override { call_.cancel(Status::CANCELLED); }

    void OnDone() override { delete this; }

  private:
    static std::size_t cost(const StreamItem& item) {
        return item.payload().size() + item_extra_bytes;
    }

    void run() {
        end(guarded(call_, [this] {
            shared_.check_request(request_.size());
            const auto number = static_cast<std::uint16_t>(std::min(method_, 0xFFFFU));
            const Producer producer =
                shared_.service.find_streaming(number)(call_, bytes_of(request_));
            while (call_.reason() == Status::OK) {
                const std::optional<Item> item = producer();
                if (!item) {
                    break;
                }
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
        Shared::check_size(call_, bytes.size());
        std::unique_lock lock(call_.mutex);
        call_.wait(lock, call_.deadline_ns, [this] { return queued_bytes_ < queue_bytes_max; });
        if (call_.reason() != Status::OK) {
            return;
        }
        StreamItem& item = queue_.emplace_back();
        item.set_payload(bytes.data(), bytes.size());
        queued_bytes_ += cost(item);
        if (!std::exchange(writing_, true)) {
            StartWrite(&item);
        }
    }

    // The last that is done here: OnDone may come at once.
    void end(const grpc::Status& status) {
        shared_.leave(call_);
        bool is_over = false;
        {
            const std::lock_guard lock(call_.mutex);
            ended_ = true;
            status_ = status;
            is_over = !writing_;
        }
        if (is_over) {
            Finish(status);
        }
    }

    Shared& shared_;
    RpcCall call_;
    std::uint32_t method_;
    std::string request_;
    std::deque<StreamItem> queue_;  // the first is being written
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
        const Bytes payload = bytes_of(request->payload());
        return new Unary(shared_, *context, echo_method, payload, reply->mutable_payload());
    }

    grpc::ServerWriteReactor<StreamItem>* Stream(
        grpc::CallbackServerContext* context, const StreamRequest* request
    ) override {
        return new Streaming(shared_, *context, stream_method, request->SerializeAsString());
    }

    grpc::ServerUnaryReactor* Call(
        grpc::CallbackServerContext* context, const CallRequest* request, CallReply* reply
    ) override {
        const Bytes payload = bytes_of(request->payload());
        return new Unary(shared_, *context, request->method(), payload, reply->mutable_payload());
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
    Shared& shared_;
};

// What gRPC's threads hold on to; it may outlive the server, if a handler does.
struct Rooms {
    Rooms(Service service, const ServeOptions& options)
        : shared(std::move(service), options), bridge(shared) {}

    Shared shared;
    BridgeService bridge;
    std::unique_ptr<grpc::Server> server;
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
        // Health checking and reflection, as gRPC's own tools expect them.
        grpc::EnableDefaultHealthCheckService(true);
        grpc::reflection::InitProtoReflectionServerBuilderPlugin();
        grpc::ServerBuilder builder;
        int port = 0;
        builder.AddListeningPort(address, credentials, &port);
        builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
        builder.AddChannelArgument(GRPC_ARG_ENABLE_CHANNELZ, 0);
        builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, handshake_timeout_ms);
        // gRPC does not give up a call while a part of it is stuck in a socket that nobody reads;
        // so a client may send no more than a socket's buffer takes.
        builder.AddChannelArgument(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, request_window_bytes);
        builder.AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, 0);
        // Clients may ask whether we live as often as we do them, also between calls.
        builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, keepalive_ms);
        builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, keepalive_ms);
        builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
        builder.AddChannelArgument(
            GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, keepalive_ms / 2
        );
        builder.SetMaxSendMessageSize(-1);
        builder.SetMaxReceiveMessageSize(message_bytes(options.payload_bytes_max));
        builder.RegisterService(&rooms_->bridge);
        rooms_->server = builder.BuildAndStart();
        if (!rooms_->server && has_keys) {
            throw Error(Status::INVALID_ARGUMENT, "gRPC cannot listen with these keys", address);
        }
        if (!rooms_->server) {
            throw Error(Status::ALREADY_EXISTS, "gRPC cannot listen there", address);
        }
        rooms_->server->GetHealthCheckService()->SetServingStatus(
            Bridge::service_full_name(), true
        );
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
        rooms_->server->GetHealthCheckService()->Shutdown();
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

// --- addresses ---

// RFC 3986 2.1, for a target of gRPC.
std::string quoted(const std::string& path) {
    constexpr char digits[] = "0123456789ABCDEF";
    std::string out;
    for (const char c : path) {
        const auto byte = static_cast<unsigned char>(c);
        if (std::isalnum(byte) != 0 || std::strchr("/-._~", c) != nullptr) {
            out += c;
        } else {
            out += {'%', digits[byte >> 4U], digits[byte & 15U]};
        }
    }
    return out;
}

// A file of keys, whole. Throws Error.
std::string read_key(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (!file) {
        throw SystemError("open", errno != 0 ? errno : ENOENT, path);
    }
    return text;
}

std::string read_if(const std::string& path) {
    return path.empty() ? std::string() : read_key(path);
}

}  // namespace

GrpcUnix::GrpcUnix(const std::string& path) : address_(path, "grpc+unix://" + path, SOCK_STREAM) {
    url = address_.url;
}

std::unique_ptr<Caller> GrpcUnix::connect(const ConnectOptions& options) {
    quieten();
    const std::int64_t deadline_ns = deadline_after(options.timeout);
    // Once by ourselves: gRPC asks nobody whose socket it is, and is slow to try again.
    address_.connect(deadline_ns).close();
    auto client = std::make_unique<RpcClient>(
        "unix:" + quoted(address_.path),
        grpc::InsecureChannelCredentials(),
        grpc::ChannelArguments(),
        url,
        options
    );
    client->meet(deadline_ns, "no server");
    return client;
}

std::unique_ptr<Callee> GrpcUnix::serve(Service service, const ServeOptions& options) {
    quieten();
    auto lock = std::make_shared<Lock>(address_.path + ".lock");
    address_.reclaim();
    // The file is born with its mode. (umask(2) is the process's: others that make files now get
    // narrower ones.)
    const mode_t before = ::umask(0177);
    std::unique_ptr<RpcServer> server;
    try {
        server = std::make_unique<RpcServer>(
            "unix:" + quoted(address_.path),
            grpc::InsecureServerCredentials(),
            false,
            [url = url](int) { return url; },
            [path = address_.path, lock] {
                ::unlink(path.c_str());
                lock->close();
            },
            std::move(service),
            options
        );
    } catch (...) {
        ::umask(before);
        throw;
    }
    ::umask(before);
    return server;
}

namespace {

struct Place {
    std::string host;  // in numbers
    int family;
    bool is_loopback;
    sockaddr_storage address;
    socklen_t size;
};

Place resolve(const std::string& host, int port, const std::string& url) {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* found = nullptr;
    if (::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) {
        throw Error(Status::NOT_FOUND, "unknown host", url);
    }
    Place place{};
    place.family = found->ai_family;
    place.size = found->ai_addrlen;
    std::memcpy(&place.address, found->ai_addr, found->ai_addrlen);
    ::freeaddrinfo(found);
    char name[NI_MAXHOST];
    ::getnameinfo(
        reinterpret_cast<const sockaddr*>(&place.address),
        place.size,
        name,
        sizeof(name),
        nullptr,
        0,
        NI_NUMERICHOST
    );
    place.host = name;
    if (place.family == AF_INET6) {
        const auto* v6 = reinterpret_cast<const sockaddr_in6*>(&place.address);
        place.is_loopback = IN6_IS_ADDR_LOOPBACK(&v6->sin6_addr);
    } else {
        const auto* v4 = reinterpret_cast<const sockaddr_in*>(&place.address);
        place.is_loopback = (ntohl(v4->sin_addr.s_addr) >> 24U) == 127;
    }
    return place;
}

std::string authority(const std::string& host, int port) {
    const bool is_v6 = host.find(':') != std::string::npos;
    return (is_v6 ? "[" + host + "]" : host) + ":" + std::to_string(port);
}

// gRPC does not say why it cannot listen: bind the address once before it does. Throws Error.
void check_free(const Place& place, const std::string& url) {
    const Fd fd(checked(::socket(place.family, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket", url));
    const int on = 1;
    checked(::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)), "setsockopt", url);
    checked(
        ::bind(fd.get(), reinterpret_cast<const sockaddr*>(&place.address), place.size), "bind", url
    );
    checked(::listen(fd.get(), 1), "bind", url);
}

}  // namespace

GrpcTcp::GrpcTcp(std::string host, int port, Keys keys, bool allow_remote)
    : host_(std::move(host)), port_(port), keys_(std::move(keys)), allow_remote_(allow_remote) {
    url = "grpc+tcp://" + authority(host_, port_);
    if (keys_.cert.empty() != keys_.key.empty()) {
        throw Error(Status::INVALID_ARGUMENT, "cert and key go together", url);
    }
}

std::unique_ptr<Caller> GrpcTcp::connect(const ConnectOptions& options) {
    quieten();
    const std::int64_t deadline_ns = deadline_after(options.timeout);
    const Place place = resolve(host_, port_, url);
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, keepalive_ms);
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, keepalive_ms);
    std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
    const bool is_secure = !keys_.ca.empty() || !keys_.cert.empty();
    if (is_secure) {
        credentials =
            grpc::SslCredentials({read_if(keys_.ca), read_if(keys_.key), read_if(keys_.cert)});
        arguments.SetSslTargetNameOverride(keys_.name.empty() ? host_ : keys_.name);
    }
    auto client = std::make_unique<RpcClient>(
        authority(place.host, port_), credentials, arguments, url, options
    );
    client->meet(deadline_ns, is_secure ? "no server, or none that shares our keys" : "no server");
    return client;
}

std::unique_ptr<Callee> GrpcTcp::serve(Service service, const ServeOptions& options) {
    quieten();
    const Place place = resolve(host_, port_, url);
    const bool knows_clients = !keys_.ca.empty() && !keys_.cert.empty();
    if (!place.is_loopback && !knows_clients && !allow_remote_) {
        throw Error(
            Status::PERMISSION_DENIED,
            "not a loopback address: ?ca=F&cert=F&key=F serves hosts with keys, "
            "?allow_remote=1 any",
            url
        );
    }
    if (!keys_.ca.empty() && keys_.cert.empty()) {
        throw Error(Status::INVALID_ARGUMENT, "a server with ca needs cert and key", url);
    }
    std::shared_ptr<grpc::ServerCredentials> credentials = grpc::InsecureServerCredentials();
    if (!keys_.cert.empty()) {
        grpc::SslServerCredentialsOptions secure(
            keys_.ca.empty() ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                             : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
        );
        secure.pem_root_certs = read_if(keys_.ca);
        secure.pem_key_cert_pairs = {{read_key(keys_.key), read_key(keys_.cert)}};
        credentials = grpc::SslServerCredentials(secure);
    }
    check_free(place, url);
    return std::make_unique<RpcServer>(
        authority(place.host, port_),
        credentials,
        !keys_.cert.empty(),
        [host = host_](int port) { return "grpc+tcp://" + authority(host, port); },
        [] {},
        std::move(service),
        options
    );
}

}  // namespace ipc_bridge
