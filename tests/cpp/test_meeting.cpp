// How peers meet: records, descriptors, strangers. Its Python twin is tests/test_meeting.py.
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include <ipc_bridge/transports/meeting.hpp>

namespace {

using namespace ipc_bridge;
using meeting::Record;

// A directory of its own, empty in the end.
struct Place {
    Place() {
        char name[] = "/tmp/ipcb-meeting-XXXXXX";
        REQUIRE(::mkdtemp(name) != nullptr);
        path = name;
    }
    ~Place() { CHECK(::rmdir(path.c_str()) == 0); }
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;
    std::string path;
};

// No more than the life-line.
class Idle : public Stream {
  public:
    explicit Idle(Fd life_line) : Stream(Wait::BLOCK), life_line_(std::move(life_line)) {}
    std::ptrdiff_t try_read(std::span<std::byte> /*buffer*/) override { return would_block; }
    std::ptrdiff_t try_write(std::span<const std::span<const std::byte>> /*buffers*/) override {
        return would_block;
    }
    bool wait(bool /*readable*/, bool /*writable*/, std::int64_t deadline_ns) override {
        pollfd ready{life_line_.get(), POLLIN, 0};
        return sleep_until_ready({&ready, 1}, deadline_ns);
    }
    int fileno() const override { return life_line_.get(); }
    void interrupt() override {}
    void close() override { life_line_.close(); }

  private:
    Fd life_line_;
};

std::string text_of(const Fd& fd) {
    char text[64] = {};
    const auto count = ::pread(fd.get(), text, sizeof(text), 0);
    return {text, count > 0 ? static_cast<std::size_t>(count) : 0};
}

Fd memory_with(const std::string& text) {
    Fd fd(::memfd_create("test", MFD_CLOEXEC));
    REQUIRE(::write(fd.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size()));
    return fd;
}

int open_fds() {
    int count = 0;
    for (int fd = 0; fd < 256; ++fd) {
        count += ::fcntl(fd, F_GETFD) >= 0 ? 1 : 0;
    }
    return count;
}

// A server that answers every client as `welcome` does, for the time of a body.
template <class Body>
void with_server(const Meeting& place, meeting::Welcome welcome, Body body) {
    MeetingListener listener(place, std::make_shared<UnixDoor>(place.open()), std::move(welcome));
    std::vector<std::unique_ptr<Stream>> streams;
    std::thread server([&] {
        while (auto stream = listener.accept()) {
            streams.push_back(std::move(stream));
        }
    });
    try {
        body();
    } catch (...) {
        listener.interrupt();
        server.join();
        throw;
    }
    listener.interrupt();
    server.join();
}

}  // namespace

TEST_CASE("bodies and descriptors go both ways") {
    const int before = open_fds();
    {
        const Place place;
        const Meeting here("test", place.path + "/m");
        const auto welcome = [](Fd& life_line, Record& hello) {
            const Fd given = hello.take_fd("here");
            Record answer{hello.body + "+" + text_of(given), {}};
            answer.fds.push_back(memory_with("from the server"));
            answer.fds.push_back(memory_with("and another"));
            return std::pair<std::unique_ptr<Stream>, Record>(
                std::make_unique<Idle>(std::move(life_line)), std::move(answer)
            );
        };
        with_server(here, welcome, [&] {
            Record hello{"body", {}};
            hello.fds.push_back(memory_with("from the client"));
            auto [life_line, answer] = here.connect(deadline_after(2.0), hello);
            CHECK(answer.body == "body+from the client");
            REQUIRE(answer.fds.size() == 2);
            CHECK(text_of(answer.take_fd("here")) == "from the server");
            CHECK(text_of(answer.fds[0]) == "and another");
            CHECK(::fcntl(answer.fds[0].get(), F_GETFD) == FD_CLOEXEC);
            CHECK_FALSE(meeting::is_over(life_line.get()));
        });
    }
    CHECK(open_fds() == before);
}

TEST_CASE("a refusal says why; another scheme is told so") {
    const Place place;
    const Meeting here("test", place.path + "/m");
    const Meeting other("other", place.path + "/m");
    const auto refuse = [](Fd&, Record&) -> std::pair<std::unique_ptr<Stream>, Record> {
        throw Error(Status::RESOURCE_EXHAUSTED, "no more to share");
    };
    with_server(here, refuse, [&] {
        try {
            here.connect(deadline_after(2.0));
            FAIL("it was not refused");
        } catch (const Error& error) {
            CHECK(error.status == Status::RESOURCE_EXHAUSTED);
            CHECK(error.message == "no more to share");
        }
        CHECK_THROWS_AS(other.connect(deadline_after(2.0)), Error);
        CHECK_THROWS_AS(here.open(), Error);  // the lock is held
    });
}

TEST_CASE("records that break the rules are refused, and their descriptors closed") {
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) == 0);
    const Fd here(ends[0]);
    const Fd there(ends[1]);
    const int before = open_fds();
    std::string right(meeting::header_bytes, '\0');
    right.replace(0, 4, "IPCM");
    right[4] = 1;
    right.replace(8, 4, "test");
    const auto status_of = [&](const std::string& packet) {
        REQUIRE(::send(there.get(), packet.data(), packet.size(), 0) > 0);
        try {
            meeting::receive_record(here.get(), "test", "here");
            return Status::OK;
        } catch (const Error& error) {
            return error.status;
        }
    };
    const auto with = [&](std::size_t at, char byte) {
        std::string packet = right;
        packet[at] = byte;
        return packet;
    };
    CHECK(status_of(right) == Status::OK);
    CHECK(status_of("x") == Status::INTERNAL);
    CHECK(status_of(with(0, 'X')) == Status::INTERNAL);
    CHECK(status_of(with(4, 2)) == Status::FAILED_PRECONDITION);
    CHECK(status_of(with(12, 's')) == Status::INVALID_ARGUMENT);
    CHECK(status_of(with(6, 8)) == Status::RESOURCE_EXHAUSTED);
    CHECK(status_of(with(6, 99)) == Status::UNKNOWN);
    CHECK(status_of(right + std::string(1024, 'x')) == Status::OK);
    CHECK(status_of(right + std::string(1025, 'x')) == Status::INTERNAL);
    Record refusing{"no", {}};
    refusing.fds.push_back(memory_with("x"));
    REQUIRE(meeting::send_record(there.get(), "test", refusing, Status::ABORTED));
    CHECK_THROWS_AS(meeting::receive_record(here.get(), "test", "here"), Error);
    refusing.fds.clear();
    CHECK(open_fds() == before);
}

TEST_CASE("without a server, and with one that goes, a client gives up at its deadline") {
    const Place place;
    const Meeting here("test", place.path + "/m");
    CHECK_THROWS_AS(here.connect(deadline_after(0.05)), Error);
    UnixDoor silent = here.open();
    const std::int64_t by_ns = deadline_after(0.2);
    CHECK_THROWS_AS(here.connect(by_ns), Error);
    CHECK(now_ns() >= by_ns);
}
