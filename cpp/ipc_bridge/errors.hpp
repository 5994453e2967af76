// The statuses of a call, and the errors of this library: each says who broke what.
//
// The statuses are gRPC's, by number and by name, on every transport (gRPC, `doc/statuscodes.md`).
// An error's text is `STATUS: what, where`; a program prints it behind `error: `.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace ipc_bridge {

// How a call ended.
enum class Status : std::uint16_t {
    OK = 0,
    CANCELLED = 1,
    UNKNOWN = 2,
    INVALID_ARGUMENT = 3,
    DEADLINE_EXCEEDED = 4,
    NOT_FOUND = 5,
    ALREADY_EXISTS = 6,
    PERMISSION_DENIED = 7,
    RESOURCE_EXHAUSTED = 8,
    FAILED_PRECONDITION = 9,
    ABORTED = 10,
    OUT_OF_RANGE = 11,
    UNIMPLEMENTED = 12,
    INTERNAL = 13,
    UNAVAILABLE = 14,
    DATA_LOSS = 15,
    UNAUTHENTICATED = 16,
};

inline constexpr std::uint16_t status_max = 16;

inline std::string_view name_of(Status status) {
    static constexpr std::string_view names[] = {
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED"};
    return names[static_cast<std::uint16_t>(status)];
}

// A status message on the wire: a sentence, never a dump.
inline constexpr std::size_t message_bytes_max = 1024;

// The base of all: a status, what happened, and where (an address, a method, an option).
class Error : public std::runtime_error {
  public:
    Error(Status status_, std::string what_, std::string where_ = "")
        : std::runtime_error(
              std::string(name_of(status_)) + ": " + what_ + (where_.empty() ? "" : ", " + where_)
          ),
          status(status_),
          message(std::move(what_)),
          where(std::move(where_)) {}

    Status status;
    std::string message;  // Python's `what`, a name that std::exception has taken
    std::string where;
};

// The local caller asked for what cannot be; nothing was sent, and the connection lives.
class UsageError : public Error {
  public:
    using Error::Error;
};

// The remote peer broke the rules of FRAME.md; the session is over.
class ProtocolError : public Error {
  public:
    explicit ProtocolError(const std::string& what_, std::string where_ = "")
        : Error(Status::INTERNAL, "protocol error: " + what_, std::move(where_)), broken(what_) {}

    std::string broken;  // the rule alone
};

// A call ended with a status that is not OK: the peer's answer, a deadline, a cancel, or the
// peer's death (UNAVAILABLE).
class CallError : public Error {
  public:
    using Error::Error;
};

// The status that says best what an errno means to a caller.
inline Status status_of_errno(int number) {
    switch (number) {
        case ENOENT:
        case ENOTDIR:
            return Status::NOT_FOUND;
        case EEXIST:
        case EADDRINUSE:
            return Status::ALREADY_EXISTS;
        case EACCES:
        case EPERM:
        case ELOOP:
            return Status::PERMISSION_DENIED;  // ELOOP: O_NOFOLLOW met a symbolic link
        case EMFILE:
        case ENFILE:
        case ENOMEM:
        case ENOBUFS:
        case ENOSPC:
        case EAGAIN:
            return Status::RESOURCE_EXHAUSTED;  // EAGAIN: no further thread or process
        case EINVAL:
        case ENAMETOOLONG:
        case EADDRNOTAVAIL:
        case EPROTOTYPE:  // another scheme's server is at this address
            return Status::INVALID_ARGUMENT;
        case ECONNREFUSED:
        case ECONNRESET:
        case EPIPE:
        case ENXIO:
        case EHOSTUNREACH:
        case ENETUNREACH:
        case ETIMEDOUT:
            return Status::UNAVAILABLE;
        default:
            return Status::INTERNAL;
    }
}

// A system call failed: which one, with which errno, on which object.
class SystemError : public Error {
  public:
    SystemError(std::string call_, int number, std::string where_ = "")
        : Error(status_of_errno(number), call_ + ": " + std::strerror(number), std::move(where_)),
          call(std::move(call_)),
          error_number(number) {}

    std::string call;
    int error_number;  // Python's `errno`, a macro here
};

}  // namespace ipc_bridge
