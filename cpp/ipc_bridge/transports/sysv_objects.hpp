// System V objects that outlive nobody: their keys, and the journal of them.
//
// Queues, semaphores and segments belong to no process: what is not removed stays until the machine
// restarts. So every key carries this project's mark (ipcs shows it, `ipc-bridge doctor` finds it),
// and a server notes each in a journal beside its address *before* it makes the objects. The
// journal is a file with a lock of its own: free, its server is dead, and the next one to start
// removes what it names. Two servers may thus overlap, as one drains.
//
// Copy with it: errors, system. (Not ftok(3): its keys collide.)
#pragma once

#include <glob.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/random.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/system.hpp>

namespace ipc_bridge {
namespace sysv {

// The first 12 bits of every key of ours.
inline constexpr std::uint32_t key_mark = 0x1BC00000;
inline constexpr std::uint32_t key_mask = 0xFFF00000;
// A connection's keys follow each other; a queue, a semaphore and a segment may share one.
inline constexpr std::uint32_t keys_each = 4;

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

// Has somebody removed the object? (Which of the first two it is, is a matter of the moment.) Or
// closed it to us, by its mode? Nothing more will come then.
inline bool is_removed(int number) {
    return number == EIDRM || number == EINVAL || number == EACCES;
}

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

    // Has somebody removed it, or closed it to us?
    bool is_gone() const {
        try {
            owner();
            return false;
        } catch (const SystemError& error) {
            return is_removed(error.error_number);
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
}  // namespace sysv
}  // namespace ipc_bridge
