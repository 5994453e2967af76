// The ring in a loop of one's own: `arm`, then poll or epoll on `fileno`, on both sides; and the
// other stream whose descriptor needs that, ZeroMQ's. Its Python twin is tests/test_waiting.py.
//
// Each loop sleeps on the descriptor and on nothing else, so that a bell that is missing fails it.
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/transports/shm_ring.hpp>
#include <ipc_bridge/transports/zeromq.hpp>

namespace {

using namespace ipc_bridge;

constexpr int rounds = 300;                                    // of echo, each asleep at either end
constexpr std::size_t large_bytes = 4 * ring::capacity_bytes;  // its writer waits for room
constexpr int sleep_ms = 20'000;  // a bell that is missing costs so much, and fails
constexpr int turns_max = 100;    // of a loop that wakes for nothing

// On a descriptor, until it is readable; false: it never came.
using Sleep = std::function<bool(int fd)>;

bool by_select(int fd) {
    fd_set set;
    FD_ZERO(&set);
    FD_SET(fd, &set);
    timeval time{sleep_ms / 1000, 0};
    return ::select(fd + 1, &set, nullptr, nullptr, &time) == 1;
}

bool by_poll(int fd) {
    pollfd ready{fd, POLLIN, 0};
    return ::poll(&ready, 1, sleep_ms) == 1;
}

bool by_epoll(int fd) {
    const Fd epoll(::epoll_create1(EPOLL_CLOEXEC));
    epoll_event event{};
    event.events = EPOLLIN;
    return ::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, fd, &event) == 0 &&
           ::epoll_wait(epoll.get(), &event, 1, sleep_ms) == 1;
}

const std::array<Sleep, 3> sleeps = {by_select, by_poll, by_epoll};

// A client's and a server's stream, joined by a ring, in a directory that is empty in the end.
struct Joined {
    Joined() {
        char name[] = "/tmp/ipcb-waiting-XXXXXX";
        REQUIRE(::mkdtemp(name) != nullptr);
        path = name;
        Shm transport(path + "/s", Wait::BLOCK);
        const auto listener = transport.listen();
        std::thread accepting([&] { server = listener->accept(); });
        client = transport.connect(deadline_after(5.0));
        accepting.join();
        listener->close();
    }
    ~Joined() { CHECK(::rmdir(path.c_str()) == 0); }
    Joined(const Joined&) = delete;
    Joined& operator=(const Joined&) = delete;
    std::string path;
    std::unique_ptr<Stream> client;
    std::unique_ptr<Stream> server;
};

void require(bool holds, const char* what) {  // doctest's own is not for threads
    if (!holds) {
        throw std::runtime_error(what);
    }
}

// What comes next, asleep on the descriptor until then.
std::ptrdiff_t read(Stream& stream, std::span<std::byte> buffer, const Sleep& sleep) {
    while (true) {
        if (const std::ptrdiff_t count = stream.try_read(buffer); count != would_block) {
            return count;
        }
        if (!stream.arm()) {
            require(sleep(stream.fileno()), "no bell rang");
        }
    }
}

// Write it, asleep while there is no room: armed, and then looked at once more.
void write_all(Stream& stream, std::span<const std::byte> rest, const Sleep& sleep) {
    bool is_armed = false;
    while (!rest.empty()) {
        const std::ptrdiff_t count = stream.try_write({&rest, 1});
        require(count != end_of_stream, "the peer has gone");
        rest = rest.subspan(static_cast<std::size_t>(count));
        if (count == would_block && is_armed) {
            require(sleep(stream.fileno()), "no bell rang for room");
        }
        is_armed = count == would_block && !is_armed;
        require(!is_armed || !stream.arm(), "there is something to read");
    }
}

std::vector<std::byte> large() {
    std::vector<std::byte> bytes(large_bytes);
    for (std::size_t i = 0; i < bytes.size(); ++i) {
        bytes[i] = static_cast<std::byte>(i * i >> 8U);
    }
    return bytes;
}

// So many rounds, then a large message, an answer, and the end.
void play(Stream& stream, const Sleep& sleep) {
    std::vector<std::byte> buffer(large_bytes);
    for (int number = 0; number < rounds; ++number) {
        const std::string ball = "ball " + std::to_string(number);
        write_all(stream, bytes_of(ball), sleep);
        const auto count = static_cast<std::size_t>(read(stream, buffer, sleep));
        require(text_of(std::span(buffer).first(count)) == ball, "another ball");
    }
    write_all(stream, large(), sleep);
    const auto count = static_cast<std::size_t>(read(stream, buffer, sleep));
    require(text_of(std::span(buffer).first(count)) == "all of it", "another answer");
    require(read(stream, buffer, sleep) == end_of_stream, "no end");
}

void answer(Stream& stream, const Sleep& sleep) {
    std::vector<std::byte> buffer(large_bytes);
    for (int number = 0; number < rounds; ++number) {
        const auto count = static_cast<std::size_t>(read(stream, buffer, sleep));
        write_all(stream, std::span(buffer).first(count), sleep);
    }
    for (std::size_t got = 0; got < large_bytes;) {
        const std::ptrdiff_t count = read(stream, std::span(buffer).subspan(got), sleep);
        require(count > 0, "the end came early");
        got += static_cast<std::size_t>(count);
    }
    require(buffer == large(), "other bytes");
    write_all(stream, bytes_of("all of it"), sleep);
    stream.close();
}

}  // namespace

TEST_CASE("a loop sleeps on the descriptor of a ring, on both sides") {
    for (const Sleep& sleep : sleeps) {
        for (const bool from_client : {true, false}) {
            const Joined joined;
            Stream& one = from_client ? *joined.client : *joined.server;
            Stream& other = from_client ? *joined.server : *joined.client;
            std::string failure;
            std::thread thread([&] {
                try {
                    answer(other, sleep);
                } catch (const std::exception& error) {
                    failure = error.what();
                    other.close();
                }
            });
            try {
                play(one, sleep);
            } catch (const std::exception& error) {
                CHECK_MESSAGE(false, error.what());
                one.close();
            }
            thread.join();
            CHECK(failure.empty());
        }
    }
}

TEST_CASE("what was written before the end is read before it, by who slept on the descriptor") {
    for (const Sleep& sleep : sleeps) {
        const Joined joined;
        const Bytes words = bytes_of("last words");
        REQUIRE(joined.server->try_write({&words, 1}) == 10);
        joined.server->close();
        std::array<std::byte, 64> buffer{};
        REQUIRE(read(*joined.client, buffer, sleep) == 10);
        CHECK(text_of(std::span(buffer).first(10)) == "last words");
        CHECK(read(*joined.client, buffer, sleep) == end_of_stream);
        CHECK(joined.client->arm());  // there is nothing to sleep for
        CHECK(joined.client->try_write({&words, 1}) == end_of_stream);
    }
}

TEST_CASE("the end of a ZeroMQ server is seen by who slept on the descriptor") {
    for (const Sleep& sleep : sleeps) {
        const auto listener = ZmqTcp("127.0.0.1", 0).listen();
        const int port = std::stoi(listener->url.substr(listener->url.rfind(':') + 1));
        const auto client = ZmqTcp("127.0.0.1", port).connect(deadline_after(5.0));
        std::array<std::byte, 64> buffer{};
        CHECK(client->try_read(buffer) == would_block);
        CHECK_FALSE(client->arm());
        listener->close();
        std::ptrdiff_t count = would_block;
        for (int turn = 0; turn < turns_max && count == would_block; ++turn) {
            REQUIRE((client->arm() || sleep(client->fileno())));
            count = client->try_read(buffer);
        }
        CHECK(count == end_of_stream);
    }
}

TEST_CASE("a descriptor is quiet unless it was armed") {
    const Joined joined;
    const auto is_readable = [&] {
        pollfd ready{joined.server->fileno(), POLLIN, 0};
        return ::poll(&ready, 1, 0) == 1;
    };
    const Bytes word = bytes_of("word");
    std::array<std::byte, 64> buffer{};
    REQUIRE(joined.client->try_write({&word, 1}) == 4);
    CHECK_FALSE(is_readable());
    CHECK(joined.server->arm());  // it is here already: do not sleep
    REQUIRE(joined.server->try_read(buffer) == 4);
    CHECK_FALSE(joined.server->arm());
    REQUIRE(joined.client->try_write({&word, 1}) == 4);
    CHECK(is_readable());
    CHECK(joined.server->wait(true, false, never));
}
