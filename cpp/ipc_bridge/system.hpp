// The Stream contract that every byte transport keeps, and the system calls under it.
//
// A transport makes Streams: `connect` on the client's side, a Listener's `accept` on the server's.
// All times are nanoseconds of the monotonic clock (clock_gettime(2), CLOCK_MONOTONIC): a deadline
// is such a time, `never` is none.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include <ipc_bridge/errors.hpp>

namespace ipc_bridge {

inline constexpr std::int64_t never = std::numeric_limits<std::int64_t>::max();
inline constexpr double timeout_s_max = 1e9;         // 31 years; longer is for ever
inline constexpr std::ptrdiff_t would_block = 0;     // of try_read and try_write: nothing now
inline constexpr std::ptrdiff_t end_of_stream = -1;  // the peer has gone (Python's END)

// About what a wake-up across cores costs, so a spin at most doubles it.
inline constexpr std::int64_t adaptive_spin_ns = 50'000;
inline constexpr int spins_fruitless_max = 8;  // then the peer is slow, and spinning only heats
inline constexpr unsigned spin_retry_waits =
    64;                                      // how often a peer may show that it is quick again
inline constexpr int spin_clock_reads = 16;  // reads of the wire for each read of the clock

// First and longest pause between attempts to reach a server.
inline constexpr std::int64_t connect_retry_ns[] = {1'000'000, 50'000'000};

inline std::int64_t now_ns() {
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return std::int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

// The deadline `timeout_s` seconds from now, which may be below 0; none: `never`.
//
// Throws UsageError: INVALID_ARGUMENT for what is not a number.
inline std::int64_t deadline_after(std::optional<double> timeout_s) {
    if (!timeout_s || *timeout_s > timeout_s_max) {
        return never;
    }
    if (std::isnan(*timeout_s)) {
        throw UsageError(Status::INVALID_ARGUMENT, "a timeout that is not a number");
    }
    return now_ns() + static_cast<std::int64_t>(std::max(0.0, *timeout_s) * 1e9);
}

// Milliseconds to a deadline, rounded up, at least 0; for poll(2) -1 stands for `never`.
inline std::int64_t remaining_ms(std::int64_t deadline_ns) {
    if (deadline_ns == never) {
        return -1;
    }
    return std::max<std::int64_t>(0, (deadline_ns - now_ns() + 999'999) / 1'000'000);
}

inline void sleep_ns(std::int64_t ns) {
    if (ns > 0) {
        const timespec time{ns / 1'000'000'000, ns % 1'000'000'000};
        nanosleep(&time, nullptr);  // a signal may cut it short: every caller looks again
    }
}

// How a reader waits.
enum class Wait {
    BLOCK,     // sleep in the kernel at once
    SPIN,      // poll until there is something: the fastest, for a core of its own
    ADAPTIVE,  // spin for adaptive_spin_ns, then block
};

// Decides how long a stream's next read may spin.
class Spinner {
  public:
    explicit Spinner(Wait wait) : wait_(wait) {}

    // Set from another thread: spinners share what there is too little of, so none spins.
    void crowd(bool crowded) { crowded_.store(crowded, std::memory_order_relaxed); }
    bool is_crowded() const { return crowded_.load(std::memory_order_relaxed); }

    // For how long to spin before blocking: 0, a while, or `never` (do not block).
    std::int64_t budget_ns() {
        if (wait_ == Wait::BLOCK || is_crowded()) {
            return 0;
        }
        if (wait_ == Wait::SPIN) {
            return never;
        }
        if (fruitless_ < spins_fruitless_max) {
            return adaptive_spin_ns;
        }
        return ++waits_ % spin_retry_waits == 0 ? adaptive_spin_ns : 0;
    }

    // Tell whether the last spin found something.
    void spun(bool fruitful) { fruitless_ = fruitful ? 0 : fruitless_ + 1; }

  private:
    Wait wait_;
    std::atomic<bool> crowded_ = false;
    int fruitless_ = 0;
    unsigned waits_ = 0;
};

// One connection: a full-duplex stream of bytes to one peer.
//
// One thread uses it at a time; only `interrupt` may be called from another, and not after its
// destruction.
class Stream {
  public:
    explicit Stream(Wait wait) : spinner(wait) {}
    virtual ~Stream() = default;
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    Spinner spinner;

    // Read what is there into `buffer`, without waiting: the count of bytes, would_block, or
    // end_of_stream once everything the peer sent has been read and it has closed or died.
    virtual std::ptrdiff_t try_read(std::span<std::byte> buffer) = 0;

    // Write the front of `buffers`, in order, as one piece where the mechanism allows, without
    // waiting: the count of bytes taken (which need not end at a buffer's end), would_block, or
    // end_of_stream if the peer has gone (what it sent before may still be read).
    virtual std::ptrdiff_t try_write(std::span<const std::span<const std::byte>> buffers) = 0;

    // Sleep until one of the wanted can be done, the peer goes or `interrupt` is called: true; or
    // false at the deadline. A true may be spurious.
    virtual bool wait(bool readable, bool writable, std::int64_t deadline_ns) = 0;

    // Wait by the stream's wait strategy until something can be read, and read it.
    //
    // The usual path of whoever has nothing to write. would_block is the deadline.
    std::ptrdiff_t read(std::span<std::byte> buffer, std::int64_t deadline_ns) {
        if (const std::int64_t budget_ns = spinner.budget_ns()) {
            const std::ptrdiff_t count = spin(buffer, budget_ns, deadline_ns);
            if (count != would_block || budget_ns == never) {
                return count;
            }
        }
        return sleep_and_read(buffer, deadline_ns);
    }

    // Prepare to sleep on `fileno` in a loop of one's own: true says "ready now, do not sleep".
    //
    // Mechanisms whose descriptor is always up to date have nothing to prepare.
    virtual bool arm() { return false; }

    // A descriptor that is readable when `try_read` has something (after `arm`), for select,
    // epoll and asyncio.
    virtual int fileno() const = 0;

    // From any thread: the wait or read under way, and any later one, ends as if the peer had
    // closed.
    virtual void interrupt() = 0;

    // Give everything back; idempotent.
    virtual void close() = 0;

  protected:
    // Two system calls; a mechanism that can do it in one overrides this.
    virtual std::ptrdiff_t sleep_and_read(std::span<std::byte> buffer, std::int64_t deadline_ns) {
        while (wait(true, false, deadline_ns)) {
            const std::ptrdiff_t count = try_read(buffer);
            if (count != would_block) {
                return count;
            }
        }
        return would_block;
    }

    // Poll for at most a while; would_block if nothing came. A mechanism that knows a cheaper look
    // than `try_read` overrides this.
    virtual std::ptrdiff_t spin(
        std::span<std::byte> buffer, std::int64_t budget_ns, std::int64_t deadline_ns
    ) {
        const std::int64_t until =
            budget_ns == never ? deadline_ns : std::min(deadline_ns, now_ns() + budget_ns);
        while (true) {
            for (int i = 0; i < spin_clock_reads; ++i) {
                const std::ptrdiff_t count = try_read(buffer);
                if (count != would_block) {
                    spinner.spun(true);
                    return count;
                }
            }
            if (now_ns() >= until) {
                spinner.spun(false);
                return would_block;
            }
        }
    }
};

// A server's end of a transport: where clients arrive.
class Listener {
  public:
    virtual ~Listener() = default;

    std::string url;  // what a client connects to, the port filled in

    // Wait for the next client; null once `interrupt` was called or no client can come.
    //
    // Never throws for what one client did.
    virtual std::unique_ptr<Stream> accept() = 0;

    // From any thread, also from a signal handler: `accept` returns null, now and later.
    virtual void interrupt() = 0;

    // Stop listening and remove what the listener made; idempotent.
    virtual void close() = 0;
};

// A listener whose streams all come through one socket, as a ROUTER's of ZeroMQ do.
//
// `accept` is for a thread for each stream. A server whose handlers do not block calls `next`
// instead, and one thread serves all streams. They take whatever is written, at once: bounds are
// for whoever writes.
class Hub : public Listener {
  public:
    // Python's collector needs no word on who owns a stream.
    struct Input {
        Stream* stream = nullptr;
        std::unique_ptr<Stream> owned;  // a new one is the caller's from now on
    };

    // Wait for input: the stream, maybe a new one, that has some or has come to its end.
    //
    // None at the deadline, or once `interrupt` was called; after `close`, only at the deadline:
    // nobody new comes, and the streams that are left live on.
    virtual Input next(std::int64_t deadline_ns) = 0;
};

// A way to move bytes between two processes, at one address.
class Transport {
  public:
    virtual ~Transport() = default;

    std::string url;
    // A hint: what the users of its streams take in one piece.
    std::uint32_t payload_bytes_max = 1U << 31;

    // Reach the server, waiting for it to start if need be.
    //
    // Throws Error: UNAVAILABLE at the deadline, PERMISSION_DENIED if what is there is not ours.
    virtual std::unique_ptr<Stream> connect(std::int64_t deadline_ns) = 0;

    // Become the server of this address.
    //
    // Throws Error: ALREADY_EXISTS if a live server has it, NOT_FOUND if its directory is missing,
    // PERMISSION_DENIED if something that is not ours is in the way.
    virtual std::unique_ptr<Listener> listen() = 0;
};

// Repeat a system call that a signal interrupted.
template <class Call>
auto retrying(Call call) {
    while (true) {
        const auto result = call();
        if (result >= 0 || errno != EINTR) {
            return result;
        }
    }
}

// Turn the failure of one system call into an Error that names the call and its object.
template <class Result>
Result checked(Result result, const char* call, const std::string& where) {
    if (result < 0) {
        throw SystemError(call, errno, where);
    }
    return result;
}

// A descriptor, owned.
class Fd {
  public:
    Fd() = default;
    explicit Fd(int fd) : fd_(fd) {}
    Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Fd& operator=(Fd&& other) noexcept {
        if (this != &other) {
            close();
            fd_ = std::exchange(other.fd_, -1);
        }
        return *this;
    }
    ~Fd() { close(); }

    int get() const { return fd_; }
    explicit operator bool() const { return fd_ >= 0; }

    // Give it to another owner.
    int release() { return std::exchange(fd_, -1); }

    void close() {
        if (fd_ >= 0) {
            ::close(std::exchange(fd_, -1));
        }
    }

  private:
    int fd_ = -1;
};

// An eventfd(2) that stays readable once `set`: ends every sleep that polls it.
class Wakeup {
  public:
    Wakeup() : fd_(checked(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd", "wake-up")) {}

    // From any thread or signal handler.
    void set() {
        const std::uint64_t one = 1;
        [[maybe_unused]] const auto written = ::write(fd_.get(), &one, sizeof(one));
    }

    // Take back what was `set`.
    void clear() {
        std::uint64_t count = 0;
        [[maybe_unused]] const auto taken = ::read(fd_.get(), &count, sizeof(count));
    }

    int fileno() const { return fd_.get(); }

    void close() { fd_.close(); }

  private:
    Fd fd_;
};

// poll(2) to a deadline: false at the deadline.
inline bool sleep_until_ready(std::span<pollfd> fds, std::int64_t deadline_ns) {
    while (true) {
        timespec left{};
        if (deadline_ns != never) {
            const std::int64_t left_ns = std::max<std::int64_t>(0, deadline_ns - now_ns());
            left = {left_ns / 1'000'000'000, left_ns % 1'000'000'000};
        }
        const int count =
            ppoll(fds.data(), fds.size(), deadline_ns == never ? nullptr : &left, nullptr);
        if (count >= 0) {
            return count > 0;
        }
        if (errno != EINTR) {
            throw SystemError("ppoll", errno);
        }
    }
}

// Attempt to reach a server until it works, or the deadline; `later` are the errors that its start
// may mend. (connect(2) has nothing to wait on for a server that is not there yet.) An attempt
// returns a descriptor, or none with errno.
inline Fd persist(
    const std::function<Fd()>& attempt,
    std::initializer_list<int> later,
    const std::string& url,
    std::int64_t deadline_ns
) {
    std::int64_t pause_ns = connect_retry_ns[0];
    while (true) {
        if (Fd fd = attempt()) {
            return fd;
        }
        if (std::find(later.begin(), later.end(), errno) == later.end()) {
            throw SystemError("connect", errno, url);
        }
        const std::int64_t left_ns = deadline_ns - now_ns();
        if (left_ns <= 0) {
            throw Error(Status::UNAVAILABLE, "no server", url);
        }
        sleep_ns(std::min(pause_ns, left_ns));
        pause_ns = std::min(2 * pause_ns, connect_retry_ns[1]);
    }
}

// flock(2) on `path`, held for a server's life: one server an address, stale things reclaimed.
//
// The kernel drops the lock with the process, however it ends. The file is removed at the end,
// under the lock; so whoever locks a file makes sure that it is still the one at the path.
class Lock {
  public:
    // Throws Error: ALREADY_EXISTS if it is held, PERMISSION_DENIED if it is not ours.
    explicit Lock(std::string path) : path_(std::move(path)) {
        constexpr int flags = O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK;
        while (!fd_) {
            take(Fd(
                checked(retrying([&] { return ::open(path_.c_str(), flags, 0600); }), "open", path_)
            ));
        }
    }
    Lock(Lock&&) = default;
    Lock& operator=(Lock&&) = delete;
    ~Lock() { close(); }

    // The file, for who has something to note in it that must outlive a crash.
    int fileno() const { return fd_.get(); }

    void close() {
        if (fd_) {
            ::unlink(path_.c_str());
            fd_.close();
        }
    }

  private:
    void take(Fd fd) {
        struct stat mine {};
        checked(::fstat(fd.get(), &mine), "fstat", path_);
        if (!S_ISREG(mine.st_mode) || mine.st_uid != ::geteuid()) {
            throw Error(Status::PERMISSION_DENIED, "the lock file is not ours", path_);
        }
        if (retrying([&] { return ::flock(fd.get(), LOCK_EX | LOCK_NB); }) < 0) {
            if (errno == EWOULDBLOCK) {
                throw Error(Status::ALREADY_EXISTS, "another server has this address", path_);
            }
            throw SystemError("flock", errno, path_);  // of a file system without locks
        }
        struct stat there {};
        if (::lstat(path_.c_str(), &there) == 0 && there.st_ino == mine.st_ino &&
            there.st_dev == mine.st_dev) {
            fd_ = std::move(fd);
        }  // else removed between our open and our lock: try again
    }

    std::string path_;
    Fd fd_;
};

// Throws Error: NOT_FOUND; PERMISSION_DENIED unless it is ours alone.
inline void check_private_directory(const std::string& path) {
    struct stat info {};
    checked(::lstat(path.c_str(), &info), "stat", path);
    if (!S_ISDIR(info.st_mode)) {
        throw Error(Status::PERMISSION_DENIED, "not a directory", path);
    }
    if (info.st_uid != ::geteuid() || (info.st_mode & 077) != 0) {
        throw Error(Status::PERMISSION_DENIED, "the directory is not ours alone (mode 0700)", path);
    }
}

// Make `path` with mode 0700 unless it is there; true if it was made.
//
// Throws Error: PERMISSION_DENIED if what is there is not a directory that only we can use.
inline bool make_private_directory(const std::string& path) {
    if (::mkdir(path.c_str(), 0700) == 0) {
        return true;
    }
    if (errno != EEXIST) {
        throw SystemError("mkdir", errno, path);
    }
    check_private_directory(path);
    return false;
}

// Throws Error: PERMISSION_DENIED unless the peer of a Unix socket runs as us (or is root).
inline void check_peer(int fd, const std::string& where) {
    ucred peer{};
    socklen_t size = sizeof(peer);
    checked(
        ::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size), "getsockopt SO_PEERCRED", where
    );
    if (peer.uid != ::geteuid() && peer.uid != 0) {
        throw Error(
            Status::PERMISSION_DENIED, "the peer runs as uid " + std::to_string(peer.uid), where
        );
    }
}

// accept(2) and open(2) out of resources: wait, try again.
inline bool is_exhausted(int number) {
    return number == EMFILE || number == ENFILE || number == ENOBUFS || number == ENOMEM;
}
inline constexpr std::int64_t retry_ns = 50'000'000;  // no spinning, yet quick to recover

}  // namespace ipc_bridge
