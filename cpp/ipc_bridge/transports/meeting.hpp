// How peers meet that will move their bytes elsewhere: shared memory and System V objects.
//
// A client knocks at a Unix socket and sends one record; only then does the server make what they
// will share, and one record answers, with its names or its descriptors. Who says nothing costs a
// descriptor, and that for 5 s: no memory, no queue, no thread.
//
// The socket stays, as the life-line: it carries no data, and its end-of-file is the peer's end,
// however that came (the kernel closes it). A process id would not do: it is reused, and means
// nothing in another PID namespace.
//
// A record is one packet of a SOCK_SEQPACKET socket, so it comes whole or not at all:
//
//     0 "IPCM" | 4 u16 version | 6 u16 status | 8 scheme, 16 bytes, padded with zeros | 24 body
//
// with up to fds_max descriptors beside it (SCM_RIGHTS, unix(7)). A status that is not OK refuses,
// and the body is its message.
//
// Copy with it: errors, system, unix_address.
#pragma once

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/unix_address.hpp>

namespace ipc_bridge {
namespace meeting {

inline constexpr std::string_view magic = "IPCM";
inline constexpr std::uint16_t version = 1;
inline constexpr std::size_t scheme_bytes = 16;
inline constexpr std::size_t header_bytes = 8 + scheme_bytes;
// Names and sizes; a refusal's message has as much (errors).
inline constexpr std::size_t body_bytes_max = 1024;
// More in one packet are closed by the kernel, and the packet refused.
inline constexpr std::size_t fds_max = 4;
// Who have not sent their record; beyond, the oldest is dropped.
inline constexpr std::size_t strangers_max = 256;
// Who has sent none for so long is dropped.
inline constexpr double stranger_s = 5.0;

// What one peer tells the other. Its descriptors are the receiver's: take them out of `fds`
// (`take_fd`), or they are closed.
struct Record {
    std::string body;
    std::vector<Fd> fds;

    // The next descriptor, yours now. Throws Error: INTERNAL if there is none.
    Fd take_fd(const std::string& where) {
        if (fds.empty()) {
            throw Error(Status::INTERNAL, "the peer has sent no descriptor", where);
        }
        Fd fd = std::move(fds.front());
        fds.erase(fds.begin());
        return fd;
    }
};

// Has the peer gone? What it wrote before that, wherever it wrote, is there by now.
inline bool is_over(int life_line) {
    pollfd end{life_line, POLLRDHUP, 0};
    return retrying([&] { return ::poll(&end, 1, 0); }) > 0;
}

// Send one, at once: the first packet on a socket always has room. False: the peer has gone.
inline bool send_record(
    int fd, std::string_view scheme, const Record& record, Status status = Status::OK
) {
    std::string packet(header_bytes, '\0');
    const auto code = static_cast<std::uint16_t>(status);
    packet.replace(0, magic.size(), magic);
    std::memcpy(&packet[4], &version, 2);
    std::memcpy(&packet[6], &code, 2);
    packet.replace(8, scheme.size(), scheme);
    packet += record.body;
    iovec part{packet.data(), packet.size()};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(fds_max * sizeof(int))] = {};
    if (const std::size_t count = std::min(record.fds.size(), fds_max)) {
        message.msg_control = control;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        cmsghdr* head = CMSG_FIRSTHDR(&message);
        head->cmsg_level = SOL_SOCKET;
        head->cmsg_type = SCM_RIGHTS;
        head->cmsg_len = CMSG_LEN(count * sizeof(int));
        std::array<int, fds_max> fds{};
        for (std::size_t i = 0; i < count; ++i) {
            fds[i] = record.fds[i].get();
        }
        std::memcpy(CMSG_DATA(head), fds.data(), count * sizeof(int));
    }
    return retrying([&] { return ::sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL); }) > 0;
}

// Take the record that is there, at once; none if the peer has gone instead.
//
// Throws Error: what the record says if it refuses, INTERNAL for one that breaks the rules,
// INVALID_ARGUMENT for another scheme's, FAILED_PRECONDITION for another version's,
// RESOURCE_EXHAUSTED if there is no room here for its descriptors.
inline std::optional<Record> receive_record(
    int fd, std::string_view scheme, const std::string& where
) {
    std::string packet(header_bytes + body_bytes_max, '\0');
    iovec part{packet.data(), packet.size()};
    alignas(cmsghdr) char control[CMSG_SPACE(fds_max * sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    const auto count =
        retrying([&] { return ::recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC); });
    if (count <= 0) {  // ECONNRESET: it went without reading what we sent
        return std::nullopt;
    }
    packet.resize(static_cast<std::size_t>(count));
    Record record;
    for (cmsghdr* head = CMSG_FIRSTHDR(&message); head; head = CMSG_NXTHDR(&message, head)) {
        if (head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS) {
            for (std::size_t at = 0; CMSG_LEN(at + sizeof(int)) <= head->cmsg_len;
                 at += sizeof(int)) {
                int one = -1;
                std::memcpy(&one, CMSG_DATA(head) + at, sizeof(int));
                record.fds.emplace_back(one);
            }
        }
    }
    if ((message.msg_flags & MSG_CTRUNC) != 0) {
        throw Error(Status::RESOURCE_EXHAUSTED, "no room for the peer's descriptors", where);
    }
    if (packet.size() < header_bytes || (message.msg_flags & MSG_TRUNC) != 0 ||
        !packet.starts_with(magic)) {
        throw Error(Status::INTERNAL, "protocol error: not a meeting's record", where);
    }
    std::uint16_t spoken = 0;
    std::uint16_t code = 0;
    std::memcpy(&spoken, &packet[4], 2);
    std::memcpy(&code, &packet[6], 2);
    if (spoken != version) {
        throw Error(
            Status::FAILED_PRECONDITION,
            "the peer meets by version " + std::to_string(spoken) + ", not " +
                std::to_string(version),
            where
        );
    }
    if (std::string name(scheme);
        packet.substr(8, scheme_bytes) != (name.resize(scheme_bytes), name)) {
        throw Error(Status::INVALID_ARGUMENT, "the peer uses another scheme here", where);
    }
    record.body = packet.substr(header_bytes);
    if (code != 0) {
        const bool is_known = code <= static_cast<std::uint16_t>(Status::UNAUTHENTICATED);
        throw Error(is_known ? Status{code} : Status::UNKNOWN, record.body, where);
    }
    return record;
}

// Makes what a client shares with its server, from the client's record: the stream, which has moved
// the life-line to itself, and the answer, whose descriptors are closed once they are sent. Throws
// Error to refuse the client, who is told so if the life-line is still there.
using Welcome = std::function<std::pair<std::unique_ptr<Stream>, Record>(Fd& life_line, Record&)>;

}  // namespace meeting

// The address at which the peers of one scheme meet: a socket at `path`, mode 0600, and `path.lock`
// while a server lives.
class Meeting {
  public:
    // Throws Error: INVALID_ARGUMENT for a path that is empty or too long.
    Meeting(std::string scheme_, const std::string& path)
        : scheme(std::move(scheme_)),
          url(scheme + "://" + path),
          address_(path, url, SOCK_SEQPACKET) {}

    const std::string scheme;
    const std::string url;

    // Knock, and wait for the answer: the life-line, in non-blocking mode, and the answer.
    //
    // The descriptors of `hello` are sent and stay the caller's. Throws as Transport::connect, and
    // what the server says if it refuses (RESOURCE_EXHAUSTED: it has no more to share).
    std::pair<Fd, meeting::Record> connect(
        std::int64_t deadline_ns, const meeting::Record& hello = {}
    ) const {
        meeting::Record answer;
        const auto attempt = [&]() -> Fd {
            Fd fd = address_.attempt();
            if (!fd) {
                return fd;
            }
            if (meeting::send_record(fd.get(), scheme, hello)) {
                pollfd ready{fd.get(), POLLIN, 0};
                if (!sleep_until_ready({&ready, 1}, deadline_ns)) {
                    throw Error(Status::UNAVAILABLE, "no server", url);
                }
                if (auto record = meeting::receive_record(fd.get(), scheme, url)) {
                    answer = std::move(*record);
                    return fd;
                }
            }
            // The server went as we knocked: its successor may be on the way.
            fd.close();
            errno = ECONNREFUSED;
            return fd;
        };
        Fd life_line = persist(attempt, unix_address::later, url, deadline_ns);
        return {std::move(life_line), std::move(answer)};
    }

    // Become the server of this address. Throws as Transport::listen.
    UnixDoor open() const { return address_.listen(); }

  private:
    UnixAddress address_;
};

// Takes clients' records, however slowly they come, and answers them.
class MeetingListener : public Listener {
  public:
    // `cleanup` closes the door, in the end, and whatever must be done under its lock.
    MeetingListener(
        const Meeting& meeting,
        std::shared_ptr<UnixDoor> door,
        meeting::Welcome welcome,
        std::function<void()> cleanup = nullptr
    )
        : scheme_(meeting.scheme),
          welcome_(std::move(welcome)),
          fd_(std::move(door->fd)),
          cleanup_(std::move(cleanup)) {
        url = meeting.url;
        if (!cleanup_) {
            cleanup_ = [door] { door->close(); };
        }
    }
    ~MeetingListener() override { MeetingListener::close(); }

    std::unique_ptr<Stream> accept() override {
        while (true) {
            std::vector<pollfd> fds = {{wakeup_.fileno(), POLLIN, 0}, {fd_.get(), POLLIN, 0}};
            for (const Stranger& stranger : strangers_) {
                fds.push_back({stranger.fd.get(), POLLIN, 0});
            }
            sleep_until_ready(fds, strangers_.empty() ? never : strangers_.front().until_ns);
            if (stopped_) {
                return nullptr;
            }
            for (auto at = fds.size(); at-- > 2;) {  // from the end: those before keep their places
                if (fds[at].revents != 0) {
                    const auto one = strangers_.begin() + static_cast<std::ptrdiff_t>(at - 2);
                    Fd fd = std::move(one->fd);
                    strangers_.erase(one);
                    if (auto stream = answer(std::move(fd))) {
                        return stream;
                    }
                }
            }
            if (fds[1].revents != 0) {
                admit(fds[0]);
            }
            while (!strangers_.empty() && strangers_.front().until_ns <= now_ns()) {
                strangers_.pop_front();
            }
        }
    }

    void interrupt() override {
        stopped_ = true;
        wakeup_.set();
    }

    void close() override {
        strangers_.clear();
        fd_.close();
        if (auto cleanup = std::exchange(cleanup_, nullptr)) {
            cleanup();
        }
    }

  private:
    struct Stranger {
        Fd fd;
        std::int64_t until_ns;
    };

    // Let a client in, as a stranger.
    void admit(pollfd wakeup) {
        Fd fd(::accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
        if (!fd) {
            if (is_exhausted(errno)) {  // still readable: without a pause this would spin
                sleep_until_ready({&wakeup, 1}, now_ns() + retry_ns);
            }
            return;  // anything else concerns a client that has left already: accept(2)
        }
        try {
            check_peer(fd.get(), url);
        } catch (const Error& error) {
            refuse(fd, error);
            return;
        }
        if (strangers_.size() >= meeting::strangers_max) {
            strangers_.pop_front();
        }
        strangers_.push_back({std::move(fd), deadline_after(meeting::stranger_s)});
    }

    // Take a stranger's record, and make what it asks for; null if it has to go.
    std::unique_ptr<Stream> answer(Fd fd) {
        const int life_line = fd.get();
        try {
            if (auto hello = meeting::receive_record(life_line, scheme_, url)) {
                auto [stream, record] = welcome_(fd, *hello);
                if (meeting::send_record(life_line, scheme_, record)) {
                    return std::move(stream);
                }
                stream->close();  // it left before the answer
            }
        } catch (const Error& error) {
            refuse(fd, error);
        }
        return nullptr;
    }

    void refuse(const Fd& fd, const Error& error) const {
        if (fd) {
            meeting::Record message;
            message.body = error.message.substr(0, meeting::body_bytes_max);
            meeting::send_record(fd.get(), scheme_, message, error.status);
        }
    }

    std::string scheme_;
    meeting::Welcome welcome_;
    Fd fd_;
    std::function<void()> cleanup_;
    std::deque<Stranger> strangers_;  // the oldest first
    Wakeup wakeup_;
    std::atomic<bool> stopped_ = false;
};

}  // namespace ipc_bridge
