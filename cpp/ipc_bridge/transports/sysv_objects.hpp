// System V objects that outlive nobody: keys, the journal of them, the watch over a life-line, and
// what the transports over them share.
//
// Queues, semaphores and segments belong to no process: what is not removed stays until the machine
// restarts. So every key carries this project's mark (ipcs shows it, `ipc-bridge doctor` finds it),
// and a server notes each in a journal beside its address *before* it makes the objects. The
// journal is a file with a lock of its own: free, its server is dead, and the next one to start
// removes what it names. Two servers may thus overlap, as one drains.
//
// In life, objects go as soon as nobody can need them. Who closes first removes what it reads from;
// its peer, told by the life-line's end, takes what is left unread and removes everything.
//
// Copy with it: errors, system, meeting, unix_address. (Not ftok(3): its keys collide.)
#pragma once

#include <glob.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/random.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/meeting.hpp>

namespace ipc_bridge {
namespace sysv {

// The first 12 bits of every key of ours.
inline constexpr std::uint32_t key_mark = 0x1BC00000;
inline constexpr std::uint32_t key_mask = 0xFFF00000;
// A connection's keys follow each other; a queue, a semaphore and a segment may share one.
inline constexpr std::uint32_t keys_each = 4;
// Clients that have not left a closed connection; beyond, the oldest loses it.
inline constexpr std::size_t parted_max = 256;
// To a peer that is about to read; then there is no room for longer.
inline constexpr int yields_max = 64;
// First and longest pause then.
inline constexpr std::int64_t pause_ns[] = {20'000, 1'000'000};
// For clients to take what is unread before this process leaves.
inline constexpr std::int64_t linger_ns = 500'000'000;

// Does a key carry this project's mark?
inline bool is_ours(std::uint32_t key) {
    return (key & key_mask) == key_mark;
}

inline std::uint32_t random_bits() {
    std::uint32_t bits = 0;
    retrying([&] { return ::getrandom(&bits, sizeof(bits), 0); });
    return bits;
}

enum class Kind : std::uint8_t { QUEUE, SEMAPHORE, SEGMENT };

// A queue, a semaphore or a segment, by its id; below 0: there is none, and errno says why.
// (Python's sysv_ipc has a class for each.)
struct Object {
    Kind kind;
    int id;

    // The one that has this key.
    static Object find(Kind kind, std::uint32_t key) { return get(kind, key, 0, 0); }

    // A new one, 0600. `size`: the bytes of a segment, the first value of a semaphore.
    static Object make(Kind kind, std::uint32_t key, std::size_t size) {
        const Object made = get(kind, key, size, IPC_CREAT | IPC_EXCL | 0600);
        if (kind == Kind::SEMAPHORE && made.id >= 0) {
            ::semctl(made.id, 0, SETVAL, static_cast<int>(size));
        }
        return made;
    }

    // Whose it is. Throws SystemError.
    ipc_perm owner() const {
        msqid_ds queue{};
        semid_ds semaphore{};
        shmid_ds segment{};
        switch (kind) {
            case Kind::QUEUE:
                checked(::msgctl(id, IPC_STAT, &queue), "msgctl", "queue");
                return queue.msg_perm;
            case Kind::SEMAPHORE:
                checked(::semctl(id, 0, IPC_STAT, &semaphore), "semctl", "semaphore");
                return semaphore.sem_perm;
            default:
                checked(::shmctl(id, IPC_STAT, &segment), "shmctl", "segment");
                return segment.shm_perm;
        }
    }

    // Idempotent, whoever was first.
    void remove() const {
        switch (kind) {
            case Kind::QUEUE:
                ::msgctl(id, IPC_RMID, nullptr);
                break;
            case Kind::SEMAPHORE:
                ::semctl(id, 0, IPC_RMID);
                break;
            default:
                ::shmctl(id, IPC_RMID, nullptr);
        }
    }

  private:
    static Object get(Kind kind, std::uint32_t key, std::size_t size, int flags) {
        const auto name = static_cast<key_t>(key);
        switch (kind) {
            case Kind::QUEUE:
                return {kind, ::msgget(name, flags)};
            case Kind::SEMAPHORE:
                return {kind, ::semget(name, flags == 0 ? 0 : 1, flags)};
            default:
                return {kind, ::shmget(name, size, flags)};
        }
    }
};

// Remove whatever has this key, if it is ours by its owner too.
inline void remove_objects(std::uint32_t key) {
    for (const Kind kind : {Kind::QUEUE, Kind::SEMAPHORE, Kind::SEGMENT}) {
        const Object found = Object::find(kind, key);
        try {
            if (found.id < 0) {
                continue;
            }
            const ipc_perm owner = found.owner();
            if (owner.uid == ::geteuid() || owner.cuid == ::geteuid()) {
                found.remove();
            }
        } catch (const Error&) {  // gone, or another user's
        }
    }
}

// Has somebody removed the object? (Which of the two it is, is a matter of the moment.)
inline bool is_removed(int number) {
    return number == EIDRM || number == EINVAL;
}

// What a client is told when something cannot be made.
inline Error refusal(const std::string& call, int number) {
    const Status status = number == EACCES ? Status::PERMISSION_DENIED : Status::RESOURCE_EXHAUSTED;
    return {status, call + ": " + std::strerror(number)};
}

// A limit of this IPC namespace, proc(5).
inline std::size_t limit(const std::string& name) {
    const std::string path = "/proc/sys/kernel/" + name;
    unsigned long value = 0;
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(
        std::fopen(path.c_str(), "re"), std::fclose
    );
    if (!file || std::fscanf(file.get(), "%lu", &value) != 1) {
        throw SystemError("read", errno, path);
    }
    return value;
}

// Remove what dead servers of an address left: their journals name it, and nobody holds their
// locks. (A key noted but not made yet may have come to another server since; one chance in 262,144
// for each server killed in that instant.)
inline void reclaim(const std::string& path) {
    std::string pattern;
    for (const char c : path) {
        pattern += std::string("*?[\\").find(c) != std::string::npos ? "\\" : "";
        pattern += c;
    }
    pattern += ".keys-*";
    glob_t found{};
    if (::glob(pattern.c_str(), 0, nullptr, &found) == 0) {
        for (std::size_t i = 0; i < found.gl_pathc; ++i) {
            try {
                const Lock lock(found.gl_pathv[i]);
                std::uint32_t key = 0;
                for (off_t at = 0; ::pread(lock.fileno(), &key, sizeof(key), at) == sizeof(key);
                     at += sizeof(key)) {
                    for (std::uint32_t number = 0; is_ours(key) && number < keys_each; ++number) {
                        remove_objects(key + number);
                    }
                }
            } catch (const Error&) {  // alive, or not ours
            }
        }
    }
    ::globfree(&found);
}

// What the watcher looks after: a life-line, and a time to wake somebody.
class Watched {
  public:
    explicit Watched(Fd life_line) : life_line_(std::move(life_line)), fd(life_line_.get()) {}
    virtual ~Watched() = default;
    Watched(const Watched&) = delete;
    Watched& operator=(const Watched&) = delete;

    // The peer has gone. True: forget this. May neither watch nor unwatch.
    virtual bool on_gone() = 0;

    // `wake_ns` has come. The same holds.
    virtual void on_time() {}

  protected:
    Fd life_line_;

  public:
    const int fd;
    std::atomic<std::int64_t> wake_ns = never;
};

// One thread a process, while there is something to watch: asleep until a life-line ends or a time
// comes. msgrcv(2) can do neither: it waits for a message and nothing else.
//
// A time that is set while an earlier one is planned costs no system call: at that earlier one the
// thread looks again.
class Watcher {
  public:
    Watcher() : epoll_(checked(::epoll_create1(EPOLL_CLOEXEC), "epoll_create1", "watcher")) {
        control(EPOLL_CTL_ADD, poke_.fileno(), EPOLLIN | EPOLLET);
    }

    void add(Watched& one) {
        if (!thread_.joinable()) {
            thread_ = std::thread([this] { run(); });
        }
        control(EPOLL_CTL_ADD, one.fd, EPOLLRDHUP | EPOLLONESHOT);
        all_.insert(&one);
        by_fd_[one.fd] = &one;
    }

    void remove(Watched& one) {
        all_.erase(&one);
        if (const auto found = by_fd_.find(one.fd);
            found != by_fd_.end() && found->second == &one) {
            by_fd_.erase(found);
            ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, one.fd, nullptr);
        }
    }

    bool is_idle() const { return all_.empty(); }

    // Somebody has set its `wake_ns` to this.
    void plan(std::int64_t wake_ns) {
        if (wake_ns < planned_ns_) {
            poke_.set();
        }
    }

    // Nothing is left to watch: end the thread.
    void join() {
        poke_.set();
        thread_.join();
    }

    // Of what is watched; held while somebody is told.
    static std::mutex& changes() {
        static auto* mutex = new std::mutex;  // for ever: the thread may outlive static objects
        return *mutex;
    }
    static std::shared_ptr<Watcher>& current() {
        static auto* watcher = new std::shared_ptr<Watcher>;
        return *watcher;
    }

  private:
    void control(int operation, int fd, std::uint32_t events) {
        epoll_event event{};
        event.events = events;
        event.data.fd = fd;
        checked(::epoll_ctl(epoll_.get(), operation, fd, &event), "epoll_ctl", "watcher");
    }

    void run() {
        epoll_event ready[64];
        while (true) {
            // Who sets a time and then sees an old plan is seen by the second look.
            planned_ns_ = first_ns();
            planned_ns_ = std::min(planned_ns_.load(), first_ns());
            const auto timeout_ms = std::min<std::int64_t>(remaining_ms(planned_ns_), 1 << 30);
            const int count =
                ::epoll_wait(epoll_.get(), ready, std::size(ready), static_cast<int>(timeout_ms));
            const std::lock_guard lock(changes());
            for (int i = 0; i < count; ++i) {
                tell_gone(ready[i].data.fd);
            }
            const std::int64_t now = now_ns();
            for (Watched* one : all_) {
                if (one->wake_ns <= now) {
                    one->wake_ns = never;
                    one->on_time();
                }
            }
            if (all_.empty()) {
                if (current().get() == this) {  // nobody joins
                    thread_.detach();
                    epoll_.close();
                    current().reset();
                }
                return;
            }
        }
    }

    std::int64_t first_ns() const {
        const std::lock_guard lock(changes());
        std::int64_t first = never;
        for (const Watched* one : all_) {
            first = std::min(first, one->wake_ns.load());
        }
        return first;
    }

    void tell_gone(int fd) {
        // The event may be of a descriptor that was closed since, whose number a new one has now.
        if (const auto found = by_fd_.find(fd); found != by_fd_.end() && meeting::is_over(fd)) {
            Watched* one = found->second;
            by_fd_.erase(found);
            ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
            if (one->on_gone()) {
                all_.erase(one);
            }
        }
    }

    Fd epoll_;
    Wakeup poke_;
    std::set<Watched*> all_;
    std::map<int, Watched*> by_fd_;
    std::atomic<std::int64_t> planned_ns_ = never;
    std::thread thread_;
};

// Look after it, until `unwatch`; the watcher that does.
inline Watcher* watch(Watched& one) {
    const std::lock_guard lock(Watcher::changes());
    if (!Watcher::current()) {
        Watcher::current() = std::make_shared<Watcher>();
    }
    Watcher::current()->add(one);
    return Watcher::current().get();
}

// Once this returns, it is told nothing any more. Not for who is just being told.
inline void unwatch(Watched& one) {
    std::shared_ptr<Watcher> last;
    {
        const std::lock_guard lock(Watcher::changes());
        if (!Watcher::current()) {
            return;
        }
        Watcher::current()->remove(one);
        if (!Watcher::current()->is_idle()) {
            return;
        }
        last = std::move(Watcher::current());
        Watcher::current().reset();
    }
    last->join();
}

// The keys in use by one server, in a file that outlives it if need be.
//
// It ends, and its file with it, once it is closed and the last key is released.
class Journal {
  public:
    // Reclaim what dead servers of the address `path` left, and begin. Throws Error.
    explicit Journal(const std::string& path) : lock_((reclaim(path), name_of(path))) {}

    // The first of keys_each keys, noted before anything is made with them.
    std::uint32_t reserve() {
        const std::lock_guard lock(changes_);
        std::uint32_t key = 0;
        do {  // not those of a connection that is about to go
            key = key_mark | (random_bits() & ~key_mask & ~(keys_each - 1));
        } while (std::find(slots_.begin(), slots_.end(), key) != slots_.end());
        const auto slot = std::find(slots_.begin(), slots_.end(), 0U);
        note(static_cast<std::size_t>(slot - slots_.begin()), key);
        return key;
    }

    // Nothing has these keys any more.
    void release(std::uint32_t key) {
        const std::lock_guard lock(changes_);
        const auto slot = std::find(slots_.begin(), slots_.end(), key);
        try {
            note(static_cast<std::size_t>(slot - slots_.begin()), 0);
        } catch (const Error&) {  // no harm: who reclaims this key finds nothing
        }
        end_if_over();
    }

    // No key will be reserved any more. Idempotent.
    void close() {
        const std::lock_guard lock(changes_);
        closed_ = true;
        end_if_over();
    }

  private:
    static std::string name_of(const std::string& path) {
        char token[9] = {};
        std::snprintf(token, sizeof(token), "%08x", random_bits());
        return path + ".keys-" + token;
    }

    void note(std::size_t slot, std::uint32_t key) {
        slots_.resize(std::max(slots_.size(), slot + 1));
        slots_[slot] = key;
        const auto at = static_cast<off_t>(slot * sizeof(key));
        checked(::pwrite(lock_.fileno(), &key, sizeof(key), at), "pwrite", "journal");
    }

    void end_if_over() {
        if (closed_ &&
            std::all_of(slots_.begin(), slots_.end(), [](auto key) { return key == 0; })) {
            lock_.close();
        }
    }

    Lock lock_;
    std::mutex changes_;
    std::vector<std::uint32_t> slots_;  // as in the file
    bool closed_ = false;
};

// A connection that this side has closed, until its peer goes.
class Parted : public Watched {
  public:
    Parted(
        Fd life_line,
        std::uint32_t key,
        std::shared_ptr<Journal> journal,
        std::function<void()> finish
    )
        : Watched(std::move(life_line)),
          key_(key),
          journal_(std::move(journal)),
          finish_(std::move(finish)) {}

    bool on_gone() override {
        end();
        return true;
    }

    // Idempotent.
    void end() {
        {
            const std::lock_guard lock(parting());
            if (std::exchange(ended_, true)) {
                return;
            }
        }
        life_line_.close();
        finish_();
        journal_->release(key_);
        std::shared_ptr<Parted> self;           // until after the lock
        const std::lock_guard lock(parting());  // not before: this process may leave then
        const auto found = std::find_if(all().begin(), all().end(), [&](const auto& one) {
            return one.get() == this;
        });
        self = std::move(*found);
        all().erase(found);
    }

    static std::mutex& parting() {
        static auto* mutex = new std::mutex;  // for ever, as the watcher's
        return *mutex;
    }
    static std::list<std::shared_ptr<Parted>>& all() {
        static auto* list = new std::list<std::shared_ptr<Parted>>;  // the oldest first
        return *list;
    }

  private:
    std::uint32_t key_;
    std::shared_ptr<Journal> journal_;
    std::function<void()> finish_;
    bool ended_ = false;
};

// Before this process leaves. The journals of those that do not go in time stay, for the next
// server.
struct Lingerer {
    ~Lingerer() {
        const std::int64_t deadline_ns = now_ns() + linger_ns;
        const auto is_over = [] {
            const std::lock_guard lock(Parted::parting());
            return Parted::all().empty();
        };
        while (!is_over() && now_ns() < deadline_ns) {
            sleep_ns(1'000'000);
        }
    }
};

// This side has closed, and the peer may still read: `finish` once it has gone.
inline void part(
    Fd life_line, std::uint32_t key, std::shared_ptr<Journal> journal, std::function<void()> finish
) {
    static const Lingerer at_exit;
    ::shutdown(life_line.get(), SHUT_WR);  // the peer's end-of-file
    const auto parted =
        std::make_shared<Parted>(std::move(life_line), key, std::move(journal), std::move(finish));
    std::shared_ptr<Parted> oldest;
    {
        const std::lock_guard lock(Parted::parting());
        if (Parted::all().size() >= parted_max) {
            oldest = Parted::all().front();
        }
        Parted::all().push_back(parted);
    }
    try {
        watch(*parted);
    } catch (const Error&) {  // no descriptor for a watcher: what the peer has not read is lost
        parted->end();
    }
    if (oldest) {
        unwatch(*oldest);
        oldest->end();
    }
}

// What the streams over System V objects share: how they end.
//
// `lock_` guards what is read, for once the peer has gone the watcher takes in what is unread,
// unless the reader is asleep, who is woken to do it. So the objects go at once, also when nobody
// reads for an hour.
class SysvStream : public Stream, public Watched {
  public:
    // `journal` is the server's, which has reserved `key`; a client has none.
    SysvStream(Fd life_line, Wait wait, std::uint32_t key, std::shared_ptr<Journal> journal)
        : Stream(wait), Watched(std::move(life_line)), key_(key), journal_(std::move(journal)) {}

    bool on_gone() override {
        const std::lock_guard lock(lock_);
        over_ = true;
        if (sleeping_) {
            wake();
        } else {
            settle();
        }
        return false;
    }

    void on_time() override {
        if (sleeping_) {
            wake();
        }
    }

    // Throws Error: UNIMPLEMENTED. The kernel has no descriptor for a System V object, so none can
    // be given to select or epoll: wait in a thread, or take another transport.
    int fileno() const override {
        throw Error(Status::UNIMPLEMENTED, "System V objects have no descriptor to wait on");
    }

    bool wait(bool /*readable*/, bool writable, std::int64_t deadline_ns) override {
        if (!writable) {
            return sleep(deadline_ns);
        }
        // Nothing tells that there is room: pause, and let the caller look.
        if (fulls_ <= yields_max) {
            ::sched_yield();
        } else {
            const std::int64_t pause =
                std::min(pause_ns[0] << std::min(fulls_ - yields_max, 10), pause_ns[1]);
            sleep_ns(std::min(pause, deadline_ns - now_ns()));
        }
        return now_ns() < deadline_ns;
    }

    void interrupt() override {
        interrupted_ = true;
        wake();
    }

    void close() override {
        if (std::exchange(closed_, true)) {
            return;
        }
        unwatch(*this);  // from here on this thread is alone
        if (settled_) {
            return;
        }
        if (over_ || meeting::is_over(life_line_.get())) {
            settle();
        } else if (!journal_) {  // the server takes what is unread, and removes the rest
            remove_in();
            life_line_.close();
        } else {
            remove_in();
            part(std::move(life_line_), key_, journal_, remover_of_out());
        }
    }

  protected:
    // Once all is there for the watcher: the last of what a constructor does.
    void begin() { watcher_ = watch(*this); }

    // Is something taken out of the object, and not given yet?
    virtual bool has_some() const = 0;

    // Wait in the kernel for the next of what the peer sends, or for `wake`: 0, or an errno.
    virtual int take_one() = 0;

    // Make the sleeping reader look again. From any thread.
    virtual void wake() = 0;

    // Take in what is unread: the objects go now.
    virtual void take_rest() = 0;

    // Remove what this side reads from. Idempotent, whoever was first.
    virtual void remove_in() = 0;

    // What removes what this side writes to, also when the stream is no more. Idempotent, whoever
    // was first.
    virtual std::function<void()> remover_of_out() const = 0;

    // Somebody else has removed an object of ours, so no more will come: end_of_stream, also for
    // what is read from now on, once what is there is read.
    std::ptrdiff_t removed() {
        interrupted_ = true;
        return end_of_stream;
    }

    std::uint32_t key_;
    std::mutex lock_;
    std::atomic<bool> over_ = false;  // the peer has gone
    std::atomic<bool> interrupted_ = false;
    std::atomic<bool> sleeping_ = false;  // the reader is, or is about to be
    int fulls_ = 0;                       // how often in a row there was no room to write

  private:
    // Sleep until there is something to read, or nothing more will come: true.
    bool sleep(std::int64_t deadline_ns) {
        while (!has_some() && may_sleep()) {
            const Awake awake{*this};
            if (deadline_ns != never) {
                wake_ns = deadline_ns;
                watcher_->plan(deadline_ns);
                if (now_ns() >= deadline_ns) {
                    return false;
                }
            }
            const int number = take_one();
            if (is_removed(number)) {
                return true;
            }
            if (number != 0 && number != EINTR) {  // msgrcv(2), semop(2): never restarted
                throw SystemError("msgrcv or semop", number);
            }
        }
        return true;
    }

    struct Awake {
        SysvStream& stream;
        ~Awake() { stream.woken(); }
    };

    // Before the reader sleeps: may it? Then `woken` must follow.
    bool may_sleep() {
        const std::lock_guard lock(lock_);
        sleeping_ = !over_ && !interrupted_;
        return sleeping_;
    }

    void woken() {
        wake_ns = never;
        const std::lock_guard lock(lock_);
        sleeping_ = false;
        if (over_) {
            settle();
        }
    }

    // The peer has gone: take what is unread, and remove everything.
    void settle() {
        if (!std::exchange(settled_, true)) {
            if (!closed_) {
                take_rest();
            }
            remove_in();
            remover_of_out()();
            life_line_.close();
            if (journal_) {
                journal_->release(key_);
            }
        }
    }

    std::shared_ptr<Journal> journal_;
    Watcher* watcher_ = nullptr;
    bool settled_ = false;  // the objects are gone, and the life-line with them
    bool closed_ = false;
};

// One of a connection's objects: its key is the connection's and `number`; `size` as of
// Object::make.
struct Part {
    Kind kind;
    std::uint32_t number;
    std::size_t size;
};

// What the transports over System V objects share: how two peers come to have the same ones.
//
// The server makes them for each client, and its answer is their first key and their shape. `Way`
// is the stream, which says what it takes:
//
//     scheme, Shape         a name; what an answer says beside the key
//     Shape offer()         a server's
//     parts(Shape)          what is made and found, in this order; none: no shape of ours
//     Way(life_line, objects, shape, wait, key, journal)    as SysvStream
template <class Way>
class SysvTransport : public Transport {
  public:
    // Throws Error: INVALID_ARGUMENT for a path that is empty or too long.
    explicit SysvTransport(std::string path, Wait wait = Wait::ADAPTIVE)
        : meeting_(Way::scheme, path), path_(std::move(path)), wait_(wait) {
        url = meeting_.url;
    }

    std::unique_ptr<Stream> connect(std::int64_t deadline_ns) override {
        auto [life_line, record] = meeting_.connect(deadline_ns);
        Answer answer{};
        if (record.body.size() == sizeof(answer)) {
            std::memcpy(&answer, record.body.data(), sizeof(answer));
        }
        const std::vector<Part> parts = Way::parts(answer.shape);
        if (!is_ours(answer.key) || parts.empty()) {
            throw ProtocolError(std::string("not an answer of ") + Way::scheme, url);
        }
        std::vector<Object> objects;
        for (const Part& part : parts) {
            objects.push_back(find(part, answer.key));
        }
        try {
            return std::make_unique<Way>(
                std::move(life_line), objects, answer.shape, wait_, answer.key, nullptr
            );
        } catch (const ProtocolError& error) {
            throw ProtocolError(error.broken, url);
        }
    }

    std::unique_ptr<Listener> listen() override {
        auto door = std::make_shared<UnixDoor>(meeting_.open());
        auto journal = std::make_shared<Journal>(path_);
        const auto welcome = [journal, wait = wait_](Fd& life_line, meeting::Record& /*hello*/) {
            const auto [answer, objects] = make(*journal);
            std::unique_ptr<Stream> stream;
            try {
                stream = std::make_unique<Way>(
                    std::move(life_line), objects, answer.shape, wait, answer.key, journal
                );
            } catch (...) {  // no descriptor for a watcher, perhaps
                unmake(*journal, answer.key, objects);
                throw;
            }
            meeting::Record record;
            record.body.assign(reinterpret_cast<const char*>(&answer), sizeof(answer));
            return std::pair(std::move(stream), std::move(record));
        };
        return std::make_unique<MeetingListener>(meeting_, door, welcome, [journal, door] {
            journal->close();
            door->close();
        });
    }

  private:
    struct Answer {
        std::uint32_t key;
        typename Way::Shape shape;
    };

    // What the server has made.
    Object find(const Part& part, std::uint32_t key) const {
        const Object found = Object::find(part.kind, key + part.number);
        if (found.id < 0 && errno == ENOENT) {
            throw Error(
                Status::UNAVAILABLE,
                "the server's objects are not here: they have gone, or are in another IPC "
                "namespace",
                url
            );
        }
        if (found.id < 0) {
            throw refusal("open", errno);
        }
        if (const uid_t uid = found.owner().cuid; uid != ::geteuid() && uid != 0) {
            throw Error(
                Status::PERMISSION_DENIED,
                "the server's objects are of uid " + std::to_string(uid),
                url
            );
        }
        return found;
    }

    // New ones, and their answer. Throws Error: RESOURCE_EXHAUSTED.
    static std::pair<Answer, std::vector<Object>> make(Journal& journal) {
        const typename Way::Shape shape = Way::offer();
        while (true) {
            const std::uint32_t key = journal.reserve();
            std::vector<Object> made;
            int number = 0;
            for (const Part& part : Way::parts(shape)) {
                made.push_back(Object::make(part.kind, key + part.number, part.size));
                if (made.back().id < 0) {
                    number = errno;
                    break;
                }
            }
            if (number == 0) {
                return {{key, shape}, std::move(made)};
            }
            unmake(journal, key, made);
            if (number != EEXIST) {  // else somebody has one of these keys: take others
                throw refusal("make", number);
            }
        }
    }

    // Removing what was not made fails, and no more.
    static void unmake(Journal& journal, std::uint32_t key, const std::vector<Object>& made) {
        for (const Object& one : made) {
            one.remove();
        }
        journal.release(key);
    }

    Meeting meeting_;
    std::string path_;
    Wait wait_;
};

}  // namespace sysv
}  // namespace ipc_bridge
