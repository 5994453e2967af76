// The server: one thread a connection, each the same loop. (Where one socket brings all clients,
// and no handler blocks, one thread for all: see `serve_all`.)
//
// Copy with it: errors, frame, session, system, handlers, connection.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include <ipc_bridge/connection.hpp>
#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/handlers.hpp>
#include <ipc_bridge/session.hpp>
#include <ipc_bridge/system.hpp>

namespace ipc_bridge {

// Of clients with input, in a shared loop, before those whose time has come.
inline constexpr int turns_max = 16;
// Default; each costs a thread and 256 KiB of buffer.
inline constexpr std::size_t clients_max_default = 256;
// Connections that have not said HELLO; beyond, the oldest is dropped.
inline constexpr std::size_t strangers_max = 256;
// Default; for running calls when the server is told to stop.
inline constexpr double grace_s_default = 1.0;
// Then, for handlers to notice that they are cut.
inline constexpr double cut_s = 0.5;

// `payload_bytes_max` is the largest request taken, `window_bytes` what is stated for streams
// towards this side (there are none yet).
struct ServeOptions {
    std::uint32_t window_bytes = window_bytes_default;
    std::uint32_t payload_bytes_max = frame::payload_bytes_max;
    std::size_t clients_max = clients_max_default;
    double grace_s = grace_s_default;
};

// What answers calls: `Server`, or another with the same face; `run` it.
class Callee {
  public:
    virtual ~Callee() = default;

    std::string url;  // what a client connects to, the port filled in

    // Serve until `stop`, or until no further client can come; then let running calls end within
    // the grace, and cut what is left.
    virtual void run() = 0;

    // From any thread, or a signal handler: make `run` return.
    virtual void stop() = 0;

    // Stop listening, and remove the address. From any thread: a `run` under way is told to `stop`,
    // and does it. Idempotent.
    virtual void close() = 0;
};

// Listens on a transport and serves a service.
class Server : public Callee {
  public:
    // Listen; clients may come from now on. Throws Error as Transport::listen does.
    Server(Transport& transport, Service service, const ServeOptions& options = {})
        : shared_(std::make_shared<Shared>(std::move(service), options)) {
        ServerSession(options.window_bytes, options.payload_bytes_max);  // a bad option shows now
        transport.payload_bytes_max = options.payload_bytes_max;
        listener_ = transport.listen();
        if (!shared_->service.blocks) {  // else a thread for each client all the same
            hub_ = dynamic_cast<Hub*>(listener_.get());
        }
        url = listener_->url;
    }
    ~Server() override { close(); }
    Server(const Server&) = delete;
    Server& operator=(const Server&) = delete;

    void run() override {
        {
            const std::lock_guard lock(shared_->mutex);
            if (closed_) {
                return;
            }
            running_ = true;
        }
        try {
            if (hub_) {
                while (!stopping_ && serve_all(never)) {
                }
            } else {
                while (auto stream = listener_->accept()) {
                    welcome(std::move(stream));
                }
            }
        } catch (...) {
            drain();
            throw;
        }
        drain();
    }

    void stop() override {
        stopping_ = true;
        listener_->interrupt();
    }

    void close() override {
        const std::lock_guard lock(shared_->mutex);
        closed_ = true;
        if (running_) {
            stop();
        } else {
            listener_->close();
        }
    }

  private:
    // What the threads of connections hold on to; they may outlive the server, if a handler does.
    struct Shared {
        Shared(Service service_, const ServeOptions& options_)
            : service(std::move(service_)), options(options_) {}

        Service service;
        ServeOptions options;
        std::mutex mutex;
        std::condition_variable changed;
        std::list<std::shared_ptr<Connection>> strangers;  // have not said hello; oldest first
        std::list<std::shared_ptr<Connection>> clients;

        void on_hello(Connection& connection) {
            const std::lock_guard lock(mutex);
            if (clients.size() >= options.clients_max) {
                throw Error(
                    Status::RESOURCE_EXHAUSTED,
                    "the server has " + std::to_string(options.clients_max) +
                        " clients and takes no more"
                );
            }
            clients.splice(clients.end(), strangers, find_stranger(connection));
            changed.notify_all();
        }

        std::list<std::shared_ptr<Connection>>::iterator find_stranger(const Connection& connection
        ) {
            return std::find_if(strangers.begin(), strangers.end(), [&](const auto& one) {
                return one.get() == &connection;
            });
        }

        void forget(const std::shared_ptr<Connection>& connection) {
            const std::lock_guard lock(mutex);
            connection->stream->close();  // under the lock: nobody interrupts it after that
            strangers.remove(connection);
            clients.remove(connection);
            changed.notify_all();
        }

        template <class Body>
        void each(Body body) {
            for (auto* list : {&strangers, &clients}) {
                for (const auto& connection : *list) {
                    body(connection);
                }
            }
        }

        bool is_empty() const { return strangers.empty() && clients.empty(); }
    };

    // A round of the loop in which one thread serves all: give a turn to those with input, and to
    // those whose time has come. False at the deadline, or once the hub is interrupted.
    bool serve_all(std::int64_t deadline_ns) {
        std::int64_t soonest_ns = never;
        for (const auto& [connection, due_ns] : due_) {
            soonest_ns = std::min(soonest_ns, due_ns);
        }
        Hub::Input input = hub_->next(std::min(soonest_ns, deadline_ns));
        int served = 0;
        while (input.stream) {
            const auto found = by_stream_.find(input.stream);
            turn(found != by_stream_.end() ? found->second : admit(std::move(input.owned)));
            ++served;
            if (soonest_ns != 0 || served == turns_max) {
                break;
            }
            input = hub_->next(0);
        }
        if (soonest_ns == never) {
            return served != 0;
        }
        const std::int64_t now = now_ns();
        std::vector<std::shared_ptr<Connection>> due;
        for (const auto& [connection, due_ns] : due_) {
            if (due_ns <= now) {
                due.push_back(connection);
            }
        }
        for (const auto& connection : due) {
            turn(connection);
        }
        return served != 0 || !due.empty();
    }

    void turn(std::shared_ptr<Connection> connection) {  // a copy: it may be the map's last
        const bool lives = connection->turn();
        const std::int64_t due_ns = lives ? connection->due_ns() : never;
        if (due_ns != never) {
            due_[connection] = due_ns;
        } else if (!due_.empty()) {
            due_.erase(connection);
        }
        if (!lives) {
            by_stream_.erase(connection->stream.get());
            shared_->forget(connection);
        }
    }

    std::shared_ptr<Connection> admit(std::unique_ptr<Stream> stream) {
        auto connection = std::make_shared<Connection>(
            std::move(stream),
            shared_->service,
            shared_->options.window_bytes,
            shared_->options.payload_bytes_max,
            [&all = *shared_](Connection& one) { all.on_hello(one); }
        );
        {
            std::unique_lock lock(shared_->mutex);
            if (shared_->strangers.size() >= strangers_max) {
                const auto oldest = shared_->strangers.front();
                cut(oldest);
                // They come faster than threads end; without this wait there is no bound. (In a
                // shared loop it goes in the next round, and nobody else would end it.)
                const auto is_gone = [&] {
                    return shared_->find_stranger(*oldest) == shared_->strangers.end();
                };
                if (!hub_) {
                    shared_->changed.wait_for(lock, std::chrono::duration<double>(cut_s), is_gone);
                }
            }
            shared_->strangers.push_back(connection);
        }
        if (hub_) {
            by_stream_[connection->stream.get()] = connection;
        }
        return connection;
    }

    void cut(const std::shared_ptr<Connection>& connection) {
        connection->cut = true;
        connection->stream->interrupt();
        if (hub_) {
            due_[connection] = 0;
        }
    }

    void welcome(std::unique_ptr<Stream> stream) {
        auto shared = shared_;
        auto connection = admit(std::move(stream));
        try {
            std::thread([shared, connection] {
                try {
                    connection->run();
                } catch (const std::exception&) {  // whatever it is, it ends this connection only
                }
                shared->forget(connection);
            }).detach();
        } catch (const std::system_error&) {  // no further thread: this client is turned away
            shared->forget(connection);
        }
    }

    void drain() {
        {
            const std::lock_guard lock(shared_->mutex);
            listener_->close();
            shared_->each([this](const std::shared_ptr<Connection>& connection) {
                connection->draining = true;
                if (connection->is_idle) {
                    connection->stream->interrupt();
                }
                if (hub_) {
                    due_[connection] = 0;
                }
            });
        }
        if (wait_until_empty(shared_->options.grace_s)) {
            return;
        }
        {
            const std::lock_guard lock(shared_->mutex);
            shared_->each([this](const auto& connection) { cut(connection); });
        }
        wait_until_empty(cut_s);
    }

    bool wait_until_empty(double timeout_s) {
        if (!hub_) {
            std::unique_lock lock(shared_->mutex);
            const auto is_empty = [this] { return shared_->is_empty(); };
            return shared_->changed.wait_for(
                lock, std::chrono::duration<double>(timeout_s), is_empty
            );
        }
        const std::int64_t deadline_ns = deadline_after(timeout_s);
        while (!shared_->is_empty() && now_ns() < deadline_ns) {
            serve_all(deadline_ns);
        }
        return shared_->is_empty();
    }

    std::shared_ptr<Shared> shared_;
    std::unique_ptr<Listener> listener_;
    bool running_ = false;  // then the listener is for `run` to close
    bool closed_ = false;
    std::atomic<bool> stopping_ = false;  // for a shared loop, which streams may keep busy
    Hub* hub_ = nullptr;                  // the listener, where one thread serves all
    std::unordered_map<Stream*, std::shared_ptr<Connection>> by_stream_;  // there
    std::unordered_map<std::shared_ptr<Connection>, std::int64_t> due_;   // and who has a time
};
}  // namespace ipc_bridge
