// What the transports over System V objects share: how their connections begin, and how they end.
//
// In life, objects go as soon as nobody can need them. Who closes first removes what it reads from;
// its peer, told by the life-line's end, takes what is left unread and removes everything. If
// somebody else removes one (ipcrm), the client sees it within a quarter of a second, whatever
// either peer does, and goes; so a server with idle clients sleeps on.
//
// Copy with it: errors, system, meeting, unix_address, sysv_objects, sysv_watcher.
#pragma once

#include <sched.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/meeting.hpp>
#include <ipc_bridge/transports/sysv_objects.hpp>
#include <ipc_bridge/transports/sysv_watcher.hpp>

namespace ipc_bridge {
namespace sysv {

// Clients that have not left a closed connection; beyond, the oldest loses it.
inline constexpr std::size_t parted_max = 256;
// To a peer that is about to read; then there is no room for longer.
inline constexpr int yields_max = 64;
// First and longest pause then.
inline constexpr std::int64_t pause_ns[] = {20'000, 1'000'000};
// For clients to take what is unread before this process leaves.
inline constexpr std::int64_t linger_ns = 500'000'000;

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
    // `journal` is the server's, which has reserved `key`; a client has none. (`begin` follows, and
    // takes the life-line.)
    SysvStream(
        const Fd& life_line,
        const std::vector<Object>& objects,
        Wait wait,
        std::uint32_t key,
        std::shared_ptr<Journal> journal
    )
        : Stream(wait),
          Watched(life_line.get()),
          key_(key),
          objects_(objects),
          journal_(std::move(journal)) {}

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

    bool is_broken() override {
        return std::any_of(objects_.begin(), objects_.end(), [](const Object& one) {
            return one.is_gone();
        });
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
        {
            // The watcher may look at it in this moment. (Python's GIL orders the two.)
            const std::lock_guard lock(lock_);
            if (std::exchange(closed_, true)) {
                return;
            }
        }
        unwatch(*this);  // from here on this thread is alone
        if (!settled_ && (over_ || meeting::is_over(life_line_.get()))) {
            settle();
        }
        if (!settled_) {  // of a client's, the server takes what is unread, and removes the rest
            remove_in();
            if (journal_) {
                part(std::move(life_line_), key_, journal_, remover_of_out());
            }
        }
        life_line_.close();
    }

  protected:
    // Once all is there for the watcher: the last of what a constructor does. What it throws, and
    // what is thrown before, leaves the life-line with the caller, whose peer is to be told.
    void begin(Fd& life_line) {
        life_line_ = std::move(life_line);
        look_ns = journal_ ? never : now_ns() + look_every_ns;
        try {
            watcher_ = watch(*this);
        } catch (...) {
            life_line = std::move(life_line_);
            throw;
        }
    }

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
        while (may_sleep()) {
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

    // Before the reader sleeps: may it? Then `woken` must follow. (What it has, the watcher may
    // just add to.)
    bool may_sleep() {
        const std::lock_guard lock(lock_);
        sleeping_ = !has_some() && !over_ && !interrupted_;
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
            // For the peer. To close it is this side's, who may be sending the answer through it.
            ::shutdown(life_line_.get(), SHUT_RDWR);
            if (journal_) {
                journal_->release(key_);
            }
        }
    }

    std::vector<Object> objects_;
    std::shared_ptr<Journal> journal_;
    Watcher* watcher_ = nullptr;
    bool settled_ = false;  // the objects are gone, and the life-line is at its end
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
        try {
            std::vector<Object> objects;
            for (const Part& part : parts) {
                objects.push_back(find(part, answer.key));
            }
            return std::make_unique<Way>(
                std::move(life_line), objects, answer.shape, wait_, answer.key, nullptr
            );
        } catch (const ProtocolError& error) {
            throw ProtocolError(error.broken, url);
        } catch (const SystemError& error) {
            throw meaning_of(error, url);
        }
    }

    std::unique_ptr<Listener> listen() override {
        auto door = std::make_shared<UnixDoor>(meeting_.open());
        auto journal = std::make_shared<Journal>(path_);
        const auto welcome = [journal, wait = wait_, url = url](
                                 Fd& life_line, meeting::Record& /*hello*/
                             ) {
            const auto [answer, objects] = make(*journal);
            std::unique_ptr<Stream> stream;
            try {
                stream = std::make_unique<Way>(
                    std::move(life_line), objects, answer.shape, wait, answer.key, journal
                );
            } catch (const SystemError& error) {
                unmake(*journal, answer.key, objects);
                throw meaning_of(error, url);
            } catch (...) {  // no thread for a watcher, perhaps
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
        if (found.id < 0) {
            throw meaning_of(SystemError("open", errno), url);
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

    // What it means that an object cannot be opened. Somebody may remove it at any moment.
    static Error meaning_of(const SystemError& error, const std::string& url) {
        const int number = error.error_number;
        if (number == ENOENT || (is_removed(number) && number != EACCES)) {
            return {
                Status::UNAVAILABLE,
                "the server's objects are not here: they have gone, or are in another IPC "
                "namespace",
                url};
        }
        return refusal(error.call, number);
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
