// The server and the client as objects. Its Python twin is tests/test_server.py.
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <future>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include <doctest/doctest.h>

#include <ipc_bridge/endpoint.hpp>

namespace {

using namespace ipc_bridge;

constexpr double answer_s = 10;

// A directory of its own, empty in the end.
struct Place {
    Place() {
        char name[] = "/tmp/ipcb-server-XXXXXX";
        REQUIRE(::mkdtemp(name) != nullptr);
        path = name;
    }
    ~Place() { CHECK(::rmdir(path.c_str()) == 0); }
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;
    std::string path;
};

// A thread of this process (proc(5)).
bool sleeps(pid_t thread) {
    std::ifstream file("/proc/self/task/" + std::to_string(thread) + "/stat");
    std::string text;
    std::getline(file, text);
    return text.find(") S ") != std::string::npos;
}

}  // namespace

TEST_CASE("close ends a run in another thread") {
    const Place place;
    for (const std::string& url :
         {"unix://" + place.path + "/s",
          "pipe://" + place.path + "/p",
          std::string("tcp://127.0.0.1:0")}) {
        const auto server = serve(url);
        std::thread thread([&] { server->run(); });
        {
            Bridge bridge = connect(server->url);
            bridge.echo(bytes_of("it runs"), answer_s);
        }
        server->close();
        thread.join();
        server->close();
        server->run();  // at once
    }
}

TEST_CASE("a handler's failure that is no Error is told, to this side as well") {
    const Place place;
    static std::string told;
    on_handler_failure = [](const std::string& what) { told += what + "\n"; };
    for (const std::string& url :
         {"unix://" + place.path + "/s", "grpc+unix://" + place.path + "/g"}) {
        CAPTURE(url);
        told.clear();
        Service service;
        service.unary(10, [](Call&, Bytes) -> Payload { throw std::runtime_error("a defect"); });
        service.unary(11, [](Call&, Bytes) -> Payload { throw Error(Status::ABORTED, "no"); });
        const auto server = listen(url, std::move(service));
        std::thread thread([&] { server->run(); });
        {
            const auto caller = dial(server->url);
            CHECK_THROWS_AS(caller->call(11, {}, answer_s), CallError);
            CHECK_THROWS_WITH_AS(
                caller->call(10, {}, answer_s),
                ("INTERNAL: a defect, " + server->url).c_str(),
                CallError
            );
        }
        server->close();
        thread.join();
        CHECK(told == "a defect\n");
    }
    on_handler_failure = print_handler_failure;
}

TEST_CASE("a closed server does not run") {
    const Place place;
    const auto server = serve("unix://" + place.path + "/s");
    server->close();
    server->run();
}

TEST_CASE("a connection closed in mid-stream says so") {
    const Place place;
    const auto server = serve("unix://" + place.path + "/s");
    std::thread thread([&] { server->run(); });
    {
        ConnectOptions options;
        options.window_bytes = 1;
        Bridge bridge = connect(server->url, options);
        Items items = bridge.stream(5, 100'000, 0, false, answer_s);
        REQUIRE(items.next());
        bridge.close();
        CHECK_THROWS_WITH_AS(
            items.next(),
            ("UNAVAILABLE: the connection is closed, " + server->url).c_str(),
            CallError
        );
    }
    server->stop();
    thread.join();
}

TEST_CASE("an interrupt ends a read") {
    const Place place;
    for (const std::string scheme : {"unix", "pipe", "tcp"}) {
        for (const std::string wait : {"block", "spin", "adaptive"}) {
            for (const std::int64_t deadline_ns : {never, deadline_after(4 * answer_s)}) {
                CAPTURE(scheme);
                CAPTURE(wait);
                const std::string address =
                    scheme == "tcp" ? "127.0.0.1:0" : place.path + "/" + scheme;
                const auto listener =
                    make_transport(scheme + "://" + address + "?wait=" + wait)->listen();
                std::byte buffer[8];
                std::unique_ptr<Stream> server;
                std::promise<void> arrival;
                std::atomic<pid_t> reader = 0;
                std::ptrdiff_t count = 0;
                std::thread thread([&] {
                    server = listener->accept();
                    const Bytes hello = bytes_of("come in");
                    server->try_write({&hello, 1});
                    reader = ::gettid();
                    arrival.set_value();
                    count = server->read(buffer, deadline_ns);
                });
                const auto client = make_transport(listener->url)->connect(never);
                arrival.get_future().wait();
                while (wait != "spin" && !sleeps(reader)) {
                    std::this_thread::yield();
                }
                server->interrupt();
                thread.join();
                CHECK(count == end_of_stream);
                CHECK(server->try_read(buffer) == end_of_stream);
                CHECK(server->read(buffer, never) == end_of_stream);
            }
        }
    }
}

TEST_CASE("what a timeout may be") {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    const std::int64_t before = now_ns();
    for (const double past : {-1.0, -1e300, -infinity}) {
        const std::int64_t deadline_ns = deadline_after(past);
        CHECK(deadline_ns >= before);
        CHECK(deadline_ns <= now_ns());
    }
    CHECK(deadline_after(infinity) == never);
    CHECK_THROWS_AS(deadline_after(std::nan("")), UsageError);
}
