// A path where one server listens on a Unix socket, under a lock: `unix` and `meeting` stand on it.
//
// The lock beside the path (`path.lock`) tells a second server at once that it is one, and makes it
// safe to remove what a dead one left: a socket file says nothing about who made it, or whether it
// still listens.
#pragma once

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <utility>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>

namespace ipc_bridge {
namespace unix_address {

// Clients that may knock at once before connect(2) has to try again.
inline constexpr int backlog = 1024;
// sockaddr_un.sun_path less its NUL, unix(7)
inline constexpr std::size_t path_bytes_max = 107;
// EAGAIN: the backlog is full, connect(2).
inline constexpr std::initializer_list<int> later = {ENOENT, ECONNREFUSED, EAGAIN};

}  // namespace unix_address

// A listening socket, and the lock; `close` removes both files. Whoever accepts may take `fd`.
class UnixDoor {
  public:
    UnixDoor(Fd fd_, Lock lock_, std::string path)
        : fd(std::move(fd_)), lock(std::move(lock_)), path_(std::move(path)) {
        struct stat mine {};
        checked(::stat(path_.c_str(), &mine), "stat", path_);
        inode_ = mine.st_ino;
    }
    UnixDoor(UnixDoor&&) = default;
    UnixDoor& operator=(UnixDoor&&) = delete;
    ~UnixDoor() { close(); }

    Fd fd;
    Lock lock;

    // Remove the address. Idempotent.
    void close() {
        if (lock.fileno() < 0) {
            return;
        }
        struct stat there {};
        if (::stat(path_.c_str(), &there) == 0 && there.st_ino == inode_) {
            ::unlink(path_.c_str());
        }
        lock.close();
    }

  private:
    std::string path_;
    ino_t inode_ = 0;
};

// A path for sockets of one kind: SOCK_STREAM, or SOCK_SEQPACKET, which keeps records whole.
class UnixAddress {
  public:
    // Throws Error: INVALID_ARGUMENT for a path that is empty or too long.
    UnixAddress(std::string path_, std::string url_, int kind)
        : path(std::move(path_)), url(std::move(url_)), kind_(kind) {
        if (path.empty() || path.size() > unix_address::path_bytes_max) {
            throw Error(
                Status::INVALID_ARGUMENT,
                "a socket's path takes 1 to " + std::to_string(unix_address::path_bytes_max) +
                    " bytes",
                path
            );
        }
    }

    const std::string path;
    const std::string url;

    // Reach the server, which runs as us or root. Throws as Transport::connect.
    Fd connect(std::int64_t deadline_ns) const {
        return persist([this] { return attempt(); }, unix_address::later, url, deadline_ns);
    }

    // Try once: a socket in non-blocking mode; or none, with errno: one of `later` if the server is
    // not there yet. Throws Error: PERMISSION_DENIED.
    Fd attempt() const {
        Fd fd = make_socket();
        const sockaddr_un address = make_address();
        if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) < 0) {
            const int number = errno;  // which closing may change
            fd.close();
            errno = number;
            return fd;
        }
        check_peer(fd.get(), url);
        return fd;
    }

    // Become its server. Throws as Transport::listen.
    UnixDoor listen() const {
        Lock lock(path + ".lock");
        Fd fd = make_socket();
        reclaim();
        const sockaddr_un address = make_address();
        checked(::fchmod(fd.get(), 0600), "bind", path);  // the file is born with this mode
        checked(
            ::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)),
            "bind",
            path
        );
        checked(::listen(fd.get(), unix_address::backlog), "listen", path);
        return {std::move(fd), std::move(lock), path};
    }

    // Remove a dead server's socket; only under the lock, and only if it is ours.
    void reclaim() const {
        struct stat info {};
        if (::lstat(path.c_str(), &info) < 0) {
            return;
        }
        if (!S_ISSOCK(info.st_mode) || info.st_uid != ::geteuid()) {
            throw Error(
                Status::ALREADY_EXISTS, "something that is not our socket is in the way", path
            );
        }
        const Fd probe = make_socket();
        const sockaddr_un address = make_address();
        if (::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) ==
                0 ||
            errno != ECONNREFUSED) {
            throw Error(Status::ALREADY_EXISTS, "another program listens on this socket", path);
        }
        ::unlink(path.c_str());
    }

  private:
    Fd make_socket() const {
        constexpr int flags = SOCK_CLOEXEC | SOCK_NONBLOCK;
        return Fd(checked(::socket(AF_UNIX, kind_ | flags, 0), "socket", url));
    }

    sockaddr_un make_address() const {
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        std::memcpy(address.sun_path, path.data(), path.size());
        return address;
    }

    int kind_;
};

}  // namespace ipc_bridge
