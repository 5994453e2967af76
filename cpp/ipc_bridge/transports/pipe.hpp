// Pipes: `pipe` (named FIFOs, strangers meet in a directory) and `stdio` (a parent and its child).
//
// Pick `pipe` for the cheapest wake-up with nothing but the file system, `stdio` when one program
// starts the other anyway: nothing to name, nothing to clean up, and the end of one ends the other.
//
// Meeting: a client of `pipe` makes a FIFO for each direction and writes one line with their random
// name into the server's FIFO `listen`; the server opens the pair, and its first byte tells the
// client so. A line is found again after garbage, a record of fixed size never is.
//
// The trap: a pipe's end-of-file means "no writer now", not "the writer has finished"; whoever
// opens too early or too late reads a false one. See `Pipe::attempt` for the order that avoids it,
// and `Stdio::listen` for the other trap: on `stdio`, a stray print would land amid the frames.
//
// Copy with it: errors, system (and frame, session, client, server for the calls on top).
// Run: ipc-bridge-peer serve pipe:///tmp/demo.d
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>

namespace ipc_bridge {
namespace pipe_detail {

// Of each pipe; with 100 clients still below pipe-user-pages-soft, pipe(7).
inline constexpr int pipe_bytes = 256 << 10;
// 16 hex digits and a newline; below PIPE_BUF, so lines never mix.
inline constexpr std::size_t line_bytes_max = 17;
// In the lock file: the directory, by a server.
inline constexpr std::string_view made_mark = "made";
inline constexpr int open_flags = O_NONBLOCK | O_CLOEXEC | O_NOFOLLOW;
// For a child to leave by itself at its end-of-file, while whoever closes waits: most do.
inline constexpr std::int64_t close_waits_ns = 50'000'000;
// Then, before it gets SIGTERM.
inline constexpr std::int64_t child_leaves_ns = 100'000'000;
// Then, for its calls to end, before it gets SIGKILL.
inline constexpr std::int64_t child_ends_ns = 2'000'000'000;

inline bool is_name(std::string_view text) {
    return text.size() == 16 &&
           text.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

inline bool is_pair(std::string_view text) {
    return text.size() == 20 && is_name(text.substr(0, 16)) &&
           (text.substr(16) == ".c2s" || text.substr(16) == ".s2c");
}

// Python does this at its start. A write to a pipe without a reader would end the process; there
// is no flag for one write, as sockets have. A handler of the program's own stays.
inline void ignore_sigpipe() {
    struct sigaction action {};
    if (::sigaction(SIGPIPE, nullptr, &action) == 0 && action.sa_handler == SIG_DFL) {
        ::signal(SIGPIPE, SIG_IGN);
    }
}

inline void set_blocking(int fd, bool blocking) {
    const int flags = ::fcntl(fd, F_GETFL);
    ::fcntl(fd, F_SETFL, blocking ? flags & ~O_NONBLOCK : flags | O_NONBLOCK);
}

// Open a FIFO of ours. Throws Error: NOT_FOUND, UNAVAILABLE (no reader), PERMISSION_DENIED.
inline Fd open_fifo(const std::string& path, int flags) {
    Fd fd(checked(retrying([&] { return ::open(path.c_str(), flags | open_flags); }), "open", path)
    );
    struct stat info {};
    checked(::fstat(fd.get(), &info), "fstat", path);
    if (!S_ISFIFO(info.st_mode) || info.st_uid != ::geteuid()) {
        throw Error(Status::PERMISSION_DENIED, "not a FIFO of ours", path);
    }
    return fd;
}

// Has this server made the directory, or one that died in it? The lock file tells who comes after a
// crash, and removes it.
inline bool note_made(const Lock& lock, bool made) {
    if (made) {
        [[maybe_unused]] const auto written =
            ::pwrite(lock.fileno(), made_mark.data(), made_mark.size(), 0);
        return true;
    }
    char mark[made_mark.size()];
    return ::pread(lock.fileno(), mark, sizeof(mark), 0) == ssize_t{sizeof(mark)} &&
           std::string_view(mark, sizeof(mark)) == made_mark;
}

// Remove what a dead server and its clients left; only under the lock, and only ours.
inline void sweep(const std::string& path) {
    const std::unique_ptr<DIR, int (*)(DIR*)> directory(::opendir(path.c_str()), ::closedir);
    if (!directory) {
        throw SystemError("opendir", errno, path);
    }
    while (const dirent* entry = ::readdir(directory.get())) {
        const std::string name = entry->d_name;
        if (name != "listen" && !is_pair(name)) {
            continue;
        }
        const std::string there = path + "/" + name;
        struct stat info {};
        if (::lstat(there.c_str(), &info) < 0) {
            continue;
        }
        if (S_ISFIFO(info.st_mode) && info.st_uid == ::geteuid()) {
            ::unlink(there.c_str());
        } else if (name == "listen") {
            throw Error(
                Status::ALREADY_EXISTS, "something that is not our FIFO is in the way", there
            );
        }
    }
}

// Unlinks its path at the end.
class Unlinker {
  public:
    explicit Unlinker(std::string path) : path_(std::move(path)) {}
    Unlinker(const Unlinker&) = delete;
    Unlinker& operator=(const Unlinker&) = delete;
    ~Unlinker() { ::unlink(path_.c_str()); }

  private:
    std::string path_;
};

}  // namespace pipe_detail

// A pipe to read and a pipe to write, both in non-blocking mode.
//
// An endpoint that always blocks reads in blocking mode instead: then it sleeps and reads in one
// system call. No descriptor ends that sleep, so `interrupt` writes a byte into the pipe itself.
class PipeStream : public Stream {
  public:
    PipeStream(Fd read_fd, Fd write_fd, Wait wait, std::function<void()> on_close, bool server)
        : Stream(wait),
          read_fd_(std::move(read_fd)),
          write_fd_(std::move(write_fd)),
          on_close_(std::move(on_close)),
          blocking_(wait == Wait::BLOCK && (!server || nudge({}))) {
        pipe_detail::ignore_sigpipe();
        pipe_detail::set_blocking(read_fd_.get(), blocking_);
        pipe_detail::set_blocking(write_fd_.get(), false);
        if (server) {
            wakeup_.emplace();
        }
        for (const int fd : {read_fd_.get(), write_fd_.get()}) {
            // This may fail, beyond the user's share: smaller pipes work too.
            if (::fcntl(fd, F_GETPIPE_SZ) < pipe_detail::pipe_bytes) {
                ::fcntl(fd, F_SETPIPE_SZ, pipe_detail::pipe_bytes);
            }
        }
    }
    ~PipeStream() override { PipeStream::close(); }

    std::ptrdiff_t try_read(std::span<std::byte> buffer) override {
        if (blocking_) {
            pollfd ready{read_fd_.get(), POLLIN, 0};
            const bool is_ready = interrupted_ || ::poll(&ready, 1, 0) > 0;
            return is_ready ? PipeStream::sleep_and_read(buffer, never) : would_block;
        }
        return read_some(buffer);
    }

    std::ptrdiff_t try_write(std::span<const std::span<const std::byte>> buffers) override {
        ssize_t count = 0;
        if (buffers.size() == 1) {
            count = retrying([&] {
                return ::write(write_fd_.get(), buffers[0].data(), buffers[0].size());
            });
        } else {
            // An iovec is a pointer and a size, as a span is, but for the const.
            static_assert(sizeof(std::span<const std::byte>) == sizeof(iovec));
            count = retrying([&] {
                return ::writev(
                    write_fd_.get(),
                    reinterpret_cast<const iovec*>(buffers.data()),
                    static_cast<int>(buffers.size())
                );
            });
        }
        if (count >= 0) {
            return count;
        }
        if (errno == EAGAIN) {
            return would_block;
        }
        if (errno == EPIPE) {
            return end_of_stream;
        }
        throw SystemError("write", errno, "pipe");
    }

    bool wait(bool readable, bool writable, std::int64_t deadline_ns) override {
        pollfd fds[3];
        std::size_t count = 0;
        if (wakeup_) {
            fds[count++] = {wakeup_->fileno(), POLLIN, 0};
        }
        if (readable) {  // else its end-of-file, which no mask hides, would keep poll(2) busy
            fds[count++] = {read_fd_.get(), POLLIN, 0};
        }
        if (writable) {
            fds[count++] = {write_fd_.get(), POLLOUT, 0};
        }
        return interrupted_ || sleep_until_ready({fds, count}, deadline_ns);
    }

    int fileno() const override { return read_fd_.get(); }

    void interrupt() override {
        if (wakeup_) {
            interrupted_ = true;
            if (blocking_) {
                nudge({"", 1});
            }
            wakeup_->set();
        }
    }

    void close() override {
        if (read_fd_) {
            read_fd_.close();
            write_fd_.close();
            on_close_();
        }
    }

  protected:
    std::ptrdiff_t sleep_and_read(std::span<std::byte> buffer, std::int64_t deadline_ns) override {
        if (!blocking_) {
            return Stream::sleep_and_read(buffer, deadline_ns);
        }
        if (deadline_ns != never && !wait(true, false, deadline_ns)) {
            return would_block;
        }
        const std::ptrdiff_t count = interrupted_ ? end_of_stream : read_some(buffer);
        return interrupted_ ? end_of_stream : count;
    }

  private:
    // Write into the pipe that is read, through an end of our own; false if there is no such end
    // (proc(5) is not mounted). It is not kept: with it, the peer's end would not show.
    bool nudge(std::string_view data) const {
        const std::string path = "/proc/self/fd/" + std::to_string(read_fd_.get());
        const Fd fd(retrying([&] { return ::open(path.c_str(), O_WRONLY | O_NONBLOCK | O_CLOEXEC); }
        ));
        if (!fd) {
            return false;
        }
        // It may be full: then nobody sleeps.
        [[maybe_unused]] const auto written = ::write(fd.get(), data.data(), data.size());
        return true;
    }

    std::ptrdiff_t read_some(std::span<std::byte> buffer) {
        const ssize_t count =
            retrying([&] { return ::read(read_fd_.get(), buffer.data(), buffer.size()); });
        if (count > 0) {
            return count;
        }
        if (count == 0) {
            return end_of_stream;
        }
        if (errno == EAGAIN) {
            return interrupted_ ? end_of_stream : would_block;
        }
        throw SystemError("read", errno, "pipe");
    }

    Fd read_fd_;
    Fd write_fd_;
    std::function<void()> on_close_;
    bool blocking_;
    std::optional<Wakeup> wakeup_;
    std::atomic<bool> interrupted_ = false;
};

// The FIFO `listen`, under the lock.
class PipeListener : public Listener {
  public:
    PipeListener(std::string path, std::string url_, Wait wait, Lock lock, bool made)
        : path_(std::move(path)), wait_(wait), lock_(std::move(lock)), made_(made) {
        url = std::move(url_);
        const std::string listen = path_ + "/listen";
        checked(::mkfifo(listen.c_str(), 0600), "mkfifo", listen);
        try {
            fd_ = pipe_detail::open_fifo(listen, O_RDONLY);
            // A writer of our own: without one, the end-of-file between two clients keeps poll(2)
            // busy.
            writer_fd_ = pipe_detail::open_fifo(listen, O_WRONLY);
        } catch (...) {
            ::unlink(listen.c_str());
            throw;
        }
    }
    ~PipeListener() override { PipeListener::close(); }

    std::unique_ptr<Stream> accept() override {
        while (true) {
            while (!names_.empty() && !stopped_) {
                const std::string name = names_.front();
                names_.pop_front();
                if (auto stream = open_pair(name)) {
                    return stream;
                }
            }
            pollfd fds[] = {{fd_.get(), POLLIN, 0}, {wakeup_.fileno(), POLLIN, 0}};
            if (!stopped_) {
                sleep_until_ready(fds, never);
            }
            if (stopped_) {
                return nullptr;
            }
            read_names();
        }
    }

    void interrupt() override {
        stopped_ = true;
        wakeup_.set();
    }

    void close() override {
        if (!fd_) {
            return;
        }
        ::unlink((path_ + "/listen").c_str());
        fd_.close();
        writer_fd_.close();
        lock_.close();
        if (made_) {
            ::rmdir(path_.c_str());  // a client's pair may be in it: then it stays
        }
    }

  private:
    void read_names() {
        char buffer[4096];
        const ssize_t count = retrying([&] { return ::read(fd_.get(), buffer, sizeof(buffer)); });
        for (ssize_t i = 0; i < count; ++i) {
            if (buffer[i] == '\n') {
                if (pipe_detail::is_name(line_)) {
                    names_.push_back(line_);
                }
                line_.clear();
            } else if (line_.size() < pipe_detail::line_bytes_max) {
                line_ += buffer[i];  // longer is garbage, and stays so when cut
            }
        }
    }

    // Open a client's pair and take it off the disk; null if the client has gone.
    std::unique_ptr<Stream> open_pair(const std::string& name) {
        const std::string c2s = path_ + "/" + name + ".c2s";
        const std::string s2c = path_ + "/" + name + ".s2c";
        try {
            Fd read_fd = pipe_detail::open_fifo(c2s, O_RDONLY);
            Fd write_fd = pipe_detail::open_fifo(s2c, O_WRONLY);
            auto stream = std::make_unique<PipeStream>(
                std::move(read_fd), std::move(write_fd), wait_, [] {}, true
            );
            ::unlink(c2s.c_str());
            ::unlink(s2c.c_str());
            return stream;
        } catch (const Error& error) {
            if (error.status == Status::RESOURCE_EXHAUSTED) {  // the client waits; do not spin
                names_.push_front(name);
                pollfd stop{wakeup_.fileno(), POLLIN, 0};
                sleep_until_ready({&stop, 1}, now_ns() + retry_ns);
            } else if (error.status == Status::UNAVAILABLE) {  // ENXIO: nobody reads
                ::unlink(c2s.c_str());
                ::unlink(s2c.c_str());
            }
        }
        return nullptr;
    }

    std::string path_;
    Wait wait_;
    Lock lock_;
    bool made_;
    Fd fd_;
    Fd writer_fd_;
    Wakeup wakeup_;
    std::deque<std::string> names_;
    std::string line_;  // the start of a line
    std::atomic<bool> stopped_ = false;
};

// `pipe:///dir`: a directory of the server's own, mode 0700; in it `lock`, `listen`, and for a
// moment the pair of a client that is arriving.
class Pipe : public Transport {
  public:
    explicit Pipe(std::string path, Wait wait = Wait::ADAPTIVE)
        : path_(std::move(path)), wait_(wait) {
        url = "pipe://" + path_;
    }

    std::unique_ptr<Stream> connect(std::int64_t deadline_ns) override {
        std::int64_t pause_ns = connect_retry_ns[0];
        while (true) {
            if (auto stream = attempt(deadline_ns)) {
                return stream;
            }
            const std::int64_t left_ns = deadline_ns - now_ns();
            if (left_ns <= 0) {
                throw Error(Status::UNAVAILABLE, "no server", url);
            }
            sleep_ns(std::min(pause_ns, left_ns));
            pause_ns = std::min(2 * pause_ns, connect_retry_ns[1]);
        }
    }

    std::unique_ptr<Listener> listen() override {
        bool made = make_private_directory(path_);
        try {
            Lock lock(path_ + "/lock");
            made = pipe_detail::note_made(lock, made);
            pipe_detail::sweep(path_);
            return std::make_unique<PipeListener>(path_, url, wait_, std::move(lock), made);
        } catch (...) {
            if (made) {
                ::rmdir(path_.c_str());
            }
            throw;
        }
    }

  private:
    // Knock once; null if no server answers (yet).
    std::unique_ptr<Stream> attempt(std::int64_t deadline_ns) const {
        Fd listen_fd;
        try {
            check_private_directory(path_);
            listen_fd = pipe_detail::open_fifo(path_ + "/listen", O_WRONLY);
        } catch (const Error& error) {
            if (error.status == Status::NOT_FOUND || error.status == Status::UNAVAILABLE) {
                return nullptr;
            }
            throw;
        }
        const std::string name = make_name();
        const std::string s2c = path_ + "/" + name + ".s2c";
        const std::string c2s = path_ + "/" + name + ".c2s";
        checked(::mkfifo(s2c.c_str(), 0600), "mkfifo", s2c);
        const pipe_detail::Unlinker undo_s2c(s2c);
        checked(::mkfifo(c2s.c_str(), 0600), "mkfifo", c2s);
        const pipe_detail::Unlinker undo_c2s(c2s);
        // Our end for reading first, so that the server can open its own for writing. Then a reader
        // that stands in for the server, without which ours for writing would not open; it leaves
        // when the server has come, else the server would read a false end-of-file.
        Fd read_fd = pipe_detail::open_fifo(s2c, O_RDONLY);
        const Fd stand_in_fd = pipe_detail::open_fifo(c2s, O_RDONLY);
        Fd write_fd = pipe_detail::open_fifo(c2s, O_WRONLY);
        if (knock(listen_fd.get(), name) &&
            await_answer(read_fd.get(), listen_fd.get(), deadline_ns)) {
            return std::make_unique<PipeStream>(
                std::move(read_fd), std::move(write_fd), wait_, [] {}, false
            );
        }
        return nullptr;
    }

    static std::string make_name() {
        std::uint64_t random = 0;
        checked(::getrandom(&random, sizeof(random), 0), "getrandom", "");
        char name[17];
        std::snprintf(name, sizeof(name), "%016llx", static_cast<unsigned long long>(random));
        return name;
    }

    // False if it is full of others, or if the server has just gone.
    static bool knock(int listen_fd, const std::string& name) {
        pipe_detail::ignore_sigpipe();
        const std::string line = name + "\n";
        return retrying([&] { return ::write(listen_fd, line.data(), line.size()); }) > 0;
    }

    // Wait for the server's first byte; its listening end tells if it goes instead (POLLERR).
    static bool await_answer(int read_fd, int listen_fd, std::int64_t deadline_ns) {
        pollfd fds[] = {{read_fd, POLLIN, 0}, {listen_fd, 0, 0}};
        return sleep_until_ready(fds, deadline_ns) && (fds[0].revents & POLLIN) != 0;
    }

    std::string path_;
    Wait wait_;
};

// The parent is the only client; when it has gone, no other can come.
class StdioListener : public Listener {
  public:
    StdioListener(std::string url_, Fd read_fd, Fd write_fd, Wait wait)
        : gone_(std::make_shared<Wakeup>()),
          stream_(std::make_unique<PipeStream>(
              std::move(read_fd), std::move(write_fd), wait, [gone = gone_] { gone->set(); }, true
          )) {
        url = std::move(url_);
    }

    std::unique_ptr<Stream> accept() override {
        if (!stream_ && !stopped_) {
            pollfd fds[] = {{gone_->fileno(), POLLIN, 0}, {wakeup_.fileno(), POLLIN, 0}};
            sleep_until_ready(fds, never);
        }
        return std::move(stream_);
    }

    void interrupt() override {
        stopped_ = true;
        wakeup_.set();
    }

    void close() override { stopped_ = true; }

  private:
    std::shared_ptr<Wakeup> gone_;
    Wakeup wakeup_;
    std::atomic<bool> stopped_ = false;
    std::unique_ptr<Stream> stream_;
};

// `stdio:COMMAND WORDS`: the client starts the server as its child; the child serves `stdio:`.
//
// There is one client, and it is there from the start; the child's HELLO says that it is ready.
class Stdio : public Transport {
  public:
    explicit Stdio(std::vector<std::string> words, Wait wait = Wait::ADAPTIVE)
        : words_(std::move(words)), wait_(wait) {
        url = "stdio:";
        for (std::size_t i = 0; i < words_.size(); ++i) {
            url += (i == 0 ? "" : " ") + words_[i];
        }
    }

    std::unique_ptr<Stream> connect(std::int64_t /*deadline_ns*/) override {
        if (words_.empty()) {
            throw Error(Status::INVALID_ARGUMENT, "stdio takes a command to start", url);
        }
        Fd to_child[2];
        Fd from_child[2];
        make_pipe(to_child);
        make_pipe(from_child);
        const pid_t child = spawn(to_child[0].get(), from_child[1].get());
        return std::make_unique<PipeStream>(
            std::move(from_child[0]), std::move(to_child[1]), wait_, [child] { reap(child); }, false
        );
    }

    // Take fds 0 and 1 for the wire, and put /dev/null and stderr in their places: whatever prints
    // from now on prints there.
    std::unique_ptr<Listener> listen() override {
        for (const int fd : {0, 1}) {
            struct stat info {};
            checked(::fstat(fd, &info), "fstat", url);
            if (!S_ISFIFO(info.st_mode)) {
                throw Error(
                    Status::FAILED_PRECONDITION,
                    "fd " + std::to_string(fd) +
                        " is not a pipe; a client starts this program: stdio:COMMAND",
                    url
                );
            }
        }
        std::fflush(stdout);
        Fd read_fd(checked(::fcntl(0, F_DUPFD_CLOEXEC, 3), "fcntl", url));
        Fd write_fd(checked(::fcntl(1, F_DUPFD_CLOEXEC, 3), "fcntl", url));
        const Fd null_fd(checked(::open("/dev/null", O_RDONLY | O_CLOEXEC), "open", "/dev/null"));
        checked(::dup2(null_fd.get(), 0), "dup2", url);
        checked(::dup2(2, 1), "dup2", url);
        return std::make_unique<StdioListener>(url, std::move(read_fd), std::move(write_fd), wait_);
    }

  private:
    static void make_pipe(Fd (&ends)[2]) {
        int fds[2];
        checked(::pipe2(fds, O_CLOEXEC), "pipe2", "stdio");
        ends[0] = Fd(fds[0]);
        ends[1] = Fd(fds[1]);
    }

    pid_t spawn(int stdin_fd, int stdout_fd) const {
        std::vector<char*> arguments;
        for (const std::string& word : words_) {
            arguments.push_back(const_cast<char*>(word.c_str()));
        }
        arguments.push_back(nullptr);
        posix_spawn_file_actions_t files;
        ::posix_spawn_file_actions_init(&files);
        ::posix_spawn_file_actions_adddup2(&files, stdin_fd, 0);
        ::posix_spawn_file_actions_adddup2(&files, stdout_fd, 1);
        posix_spawnattr_t attributes;  // a child starts with the default SIGPIPE
        ::posix_spawnattr_init(&attributes);
        sigset_t signals;
        ::sigemptyset(&signals);
        ::posix_spawnattr_setsigmask(&attributes, &signals);
        ::sigaddset(&signals, SIGPIPE);
        ::posix_spawnattr_setsigdefault(&attributes, &signals);
        ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK);
        pid_t child = 0;
        const int number =
            ::posix_spawnp(&child, arguments[0], &files, &attributes, arguments.data(), environ);
        ::posix_spawnattr_destroy(&attributes);
        ::posix_spawn_file_actions_destroy(&files);
        if (number != 0) {
            throw SystemError("spawn", number, words_[0]);
        }
        return child;
    }

    // Let the child leave at its end-of-file; else see to its end from a thread, which this process
    // waits for when it leaves: whoever closes has a deadline, and the child may be stopped.
    static void reap(pid_t child) {
        if (!has_left(child, pipe_detail::close_waits_ns)) {
            const std::lock_guard lock(enders().mutex);
            enders().threads.emplace_back(end, child);
        }
    }

    static void end(pid_t child) {
        if (has_left(child, pipe_detail::child_leaves_ns)) {
            return;
        }
        ::kill(child, SIGTERM);
        if (!has_left(child, pipe_detail::child_ends_ns)) {
            ::kill(child, SIGKILL);
            retrying([&] { return ::waitpid(child, nullptr, 0); });
        }
    }

    // Wait for the child's end, at most `patience_ns`, and take its status.
    static bool has_left(pid_t child, std::int64_t patience_ns) {
        const std::int64_t deadline_ns = now_ns() + patience_ns;
        for (std::int64_t pause_ns = 500'000; now_ns() < deadline_ns;
             pause_ns = std::min<std::int64_t>(2 * pause_ns, 50'000'000)) {
            if (::waitpid(child, nullptr, WNOHANG) != 0) {
                return true;
            }
            sleep_ns(pause_ns);
        }
        return false;
    }

    struct Enders {
        std::mutex mutex;
        std::vector<std::jthread> threads;  // joined when the process leaves
    };
    static Enders& enders() {
        static Enders all;
        return all;
    }

    std::vector<std::string> words_;
    Wait wait_;
};

}  // namespace ipc_bridge
