// Health checking, as gRPC's own tools expect it: grpc.health.v1.Health of gRPC's document
// doc/health-checking.md. (gRPC brings one, whose threads wait for the sockets together with ours:
// an echo takes 1.4 of the time then.)
#pragma once

#include <cstdint>
#include <mutex>
#include <unordered_set>

#include <google/protobuf/wrappers.pb.h>
#include <grpcpp/grpcpp.h>

#include <ipc_bridge/bridge.grpc.pb.h>
#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/transports/grpc_calls.hpp>
#include <ipc_bridge/transports/grpc_loop.hpp>

namespace ipc_bridge::grpc_rpc {

class Watch;

// What generated code would be. HealthCheckRequest is on the wire what protobuf's StringValue is,
// and HealthCheckResponse an Int32Value: the messages of a health.proto of ours would meet those of
// another one in the same program, which protobuf ends for that.
class HealthService : public grpc::Service {
  public:
    using Request = google::protobuf::StringValue;  // the name of a service, or ""
    using Response = google::protobuf::Int32Value;  // a ServingStatus
    enum ServingStatus : std::int32_t { SERVING = 1, NOT_SERVING = 2, SERVICE_UNKNOWN = 3 };

    HealthService() {
        using Kind = grpc::internal::RpcMethod;
        using Method = grpc::internal::RpcServiceMethod;
        AddMethod(new Method("/grpc.health.v1.Health/Check", Kind::NORMAL_RPC, nullptr));
        AddMethod(new Method("/grpc.health.v1.Health/Watch", Kind::SERVER_STREAMING, nullptr));
        MarkMethodAsync(check);
        MarkMethodAsync(watch);
    }

    void RequestCheck(
        grpc::ServerContext* context,
        Request* request,
        grpc::ServerAsyncResponseWriter<Response>* responder,
        grpc::CompletionQueue* call_queue,
        grpc::ServerCompletionQueue* queue,
        void* tag
    ) {
        RequestAsyncUnary(check, context, request, responder, call_queue, queue, tag);
    }

    void RequestWatch(
        grpc::ServerContext* context,
        Request* request,
        grpc::ServerAsyncWriter<Response>* writer,
        grpc::CompletionQueue* call_queue,
        grpc::ServerCompletionQueue* queue,
        void* tag
    ) {
        RequestAsyncServerStreaming(watch, context, request, writer, call_queue, queue, tag);
    }

    // The mutex is held from here on.
    std::mutex mutex;
    std::unordered_set<Watch*> watches;
    bool leaving = false;

    ServingStatus status_of(const std::string& name) const {
        if (!name.empty() && name != Bridge::service_full_name()) {
            return SERVICE_UNKNOWN;
        }
        return leaving ? NOT_SERVING : SERVING;
    }

  private:
    static constexpr int check = 0;
    static constexpr int watch = 1;
};

struct CheckMethod {
    using Request = HealthService::Request;
    using Responder = grpc::ServerAsyncResponseWriter<HealthService::Response>;
    static constexpr auto await = &HealthService::RequestCheck;
};
struct WatchMethod {
    using Request = HealthService::Request;
    using Responder = grpc::ServerAsyncWriter<HealthService::Response>;
    static constexpr auto await = &HealthService::RequestWatch;
};

// One question.
class Check : public Exchange<CheckMethod, HealthService> {
  public:
    using Exchange::Exchange;

  private:
    void await_next() override { await<Check>(); }

    void begin() override {
        HealthService::Response response;
        {
            const std::lock_guard lock(service.mutex);
            response.set_value(service.status_of(request.value()));
        }
        if (response.value() == HealthService::SERVICE_UNKNOWN) {
            responder.FinishWithError(
                {grpc::StatusCode::NOT_FOUND, "unknown service"}, finished.tag()
            );
        } else {
            responder.Finish(response, grpc::Status::OK, finished.tag());
        }
    }
};

// The status now, and whenever it changes.
class Watch : public Exchange<WatchMethod, HealthService> {
  public:
    using Exchange::Exchange;

    // Write what has changed, or end, with the service's mutex held.
    void step() {
        if (writing_ || ended_) {
            return;
        }
        const HealthService::ServingStatus status = service.status_of(request.value());
        if (is_gone_) {
            end(grpc::Status::CANCELLED);
        } else if (status != told_) {
            told_ = status;
            HealthService::Response response;
            response.set_value(status);
            writing_ = true;
            responder.Write(response, written_.tag());
        } else if (service.leaving) {
            end(grpc::Status::OK);  // the server waits for its calls
        }
    }

  private:
    void await_next() override { await<Watch>(); }

    void begin() override {
        const std::lock_guard lock(service.mutex);
        if (service.watches.size() >= shared.options.clients_max) {
            end(shared.full());
        } else {
            service.watches.insert(this);
            step();
        }
    }

    void cancelled() override {
        const std::lock_guard lock(service.mutex);
        is_gone_ = true;
        if (service.watches.contains(this)) {
            step();
        }
    }

    void written(bool ok) {
        const std::lock_guard lock(service.mutex);
        writing_ = false;
        is_gone_ = is_gone_ || !ok;
        step();
    }

    void end(const grpc::Status& status) {
        ended_ = true;
        service.watches.erase(this);
        responder.Finish(status, finished.tag());
    }

    EventOf<Watch> written_{*this, &Watch::written};
    std::int32_t told_ = 0;
    bool writing_ = false;
    bool is_gone_ = false;
    bool ended_ = false;
};

// Tell who asks, and all that watch, that the end has begun.
inline void leave(HealthService& service) {
    const std::lock_guard lock(service.mutex);
    service.leaving = true;
    for (Watch* watch : std::unordered_set(service.watches)) {
        watch->step();
    }
}

}  // namespace ipc_bridge::grpc_rpc
