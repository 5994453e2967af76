// What a program reads, prints and leaves with: files and streams whole, JSON, errors in one line.
// Its Python twin is python/ipc_bridge/console.py.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include <nlohmann/json.hpp>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/load.hpp>
#include <ipc_bridge/system.hpp>

namespace ipc_bridge::peer {

using load::Json;
using std::to_string;

inline constexpr int exit_usage = 2;
inline constexpr int exit_status = 10;        // plus the status
inline constexpr int exit_interrupted = 130;  // as a shell reports SIGINT

// The command line is at fault, and not what it asked for: another exit code.
class CommandLineError : public Error {
  public:
    explicit CommandLineError(std::string what, std::string at = "")
        : Error(Status::INVALID_ARGUMENT, std::move(what), std::move(at)) {}
};

// All that can be read, up to the largest payload that there can be.
inline std::string read_all(int fd, const std::string& where) {
    std::string data;
    while (true) {
        const std::size_t had = data.size();
        data.resize(had + (1U << 20U));
        const ssize_t count =
            checked(retrying([&] { return ::read(fd, &data[had], 1U << 20U); }), "read", where);
        data.resize(had + static_cast<std::size_t>(count));
        if (count == 0) {
            return data;
        }
        if (data.size() > frame::payload_bytes_limit) {
            const std::string what = "above " + to_string(frame::payload_bytes_limit) + " bytes";
            throw Error(Status::RESOURCE_EXHAUSTED, what, where);
        }
    }
}

// Write it whole.
inline void write_all(int fd, Bytes data, const std::string& where) {
    while (!data.empty()) {
        const ssize_t count = checked(
            retrying([&] { return ::write(fd, data.data(), data.size()); }), "write", where
        );
        data = data.subspan(static_cast<std::size_t>(count));
    }
}

// A descriptor of a new, empty file.
inline Fd create(const std::string& path, const std::string& where) {
    constexpr int flags = O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC;
    return Fd(checked(retrying([&] { return ::open(path.c_str(), flags, 0666); }), "open", where));
}

// Print. A reader who has left (| head) has what he wanted.
inline void write_out(std::string_view text) {
    try {
        write_all(1, bytes_of(text), "stdout");
    } catch (const Error& error) {
        if (error.status != Status::UNAVAILABLE) {
            throw;
        }
    }
}

// As JSON, always UTF-8; on one line unless indented.
inline std::string json_of(const Json& figures, int indent = -1) {
    return figures.dump(indent, ' ', false, Json::error_handler_t::replace) + "\n";
}

// Say in one line what is wrong; the exit code for it.
inline int report_error(const Error& error) {
    std::string line = std::string("error: ") + error.what();
    std::replace(line.begin(), line.end(), '\n', ' ');
    line += '\n';
    try {
        write_all(2, bytes_of(line), "stderr");
    } catch (const Error&) {  // there is nobody to tell
    }
    const bool usage = dynamic_cast<const CommandLineError*>(&error) != nullptr;
    return usage ? exit_usage : exit_status + static_cast<int>(error.status);
}

}  // namespace ipc_bridge::peer
