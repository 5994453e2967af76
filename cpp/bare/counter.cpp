// A lesson: two processes count up one number in shared memory. That is three steps, read, add and
// write, and what the other one wrote in between is lost, in any language: no lock within one
// process helps, nor does Python's GIL. Under a semaphore that both take nothing is lost.
//     g++ -std=c++20 -O2 counter.cpp -o counter
//     ./counter first 7000 1000000 bare & sleep 1; python counter.py second 7000 1000000 bare
//     ./counter first 7000 100000 locked & sleep 1; python counter.py second 7000 100000 locked
#include <sys/sem.h>
#include <sys/shm.h>

#include "rounds.hpp"

using rounds::checked;

int open_semaphore(int key, int flags, int value) {
    const int semaphore = checked(semget(key, 1, flags), "semget");
    if (flags != 0)
        checked(semctl(semaphore, 0, SETVAL, value), "semctl");
    return semaphore;
}

void step(int semaphore, short by) {
    sembuf change{0, by, 0};
    checked(semop(semaphore, &change, 1), "semop");
}

int main(int argc, char** argv) {
    const std::vector<std::string> words(argv + 1, argv + argc);
    rounds::usage = "usage: counter first|second KEY COUNT bare|locked";
    if (words.size() != 4 || (words[0] != "first" && words[0] != "second") ||
        (words[3] != "bare" && words[3] != "locked"))
        rounds::leave(2, rounds::usage);
    const bool is_first = words[0] == "first", is_locked = words[3] == "locked";
    const int key = rounds::number<int>(words[1], 1, 1 << 30);
    const auto count = rounds::number<std::int64_t>(words[2], 1, 1 << 30);

    const int flags = is_first ? IPC_CREAT | IPC_EXCL | 0600 : 0;
    const int segment = checked(shmget(key, sizeof(std::int64_t), flags), "shmget");
    auto* const counter = static_cast<volatile std::int64_t*>(shmat(segment, nullptr, 0));
    const int lock = open_semaphore(key, flags, 1);
    const int mine = open_semaphore(key + (is_first ? 1 : 2), flags, 0);
    const int others = open_semaphore(key + (is_first ? 2 : 1), flags, 0);
    if (is_first)
        rounds::say("ready " + words[1]);

    step(others, 1);  // both are here
    step(mine, -1);
    for (std::int64_t i = 0; i < count; ++i) {
        if (is_locked)
            step(lock, -1);
        *counter = *counter + 1;
        if (is_locked)
            step(lock, 1);
    }
    if (!is_first) {
        step(others, 1);
        return 0;
    }
    step(mine, -1);  // both have counted
    const std::int64_t all = *counter;
    checked(shmctl(segment, IPC_RMID, nullptr), "shmctl");
    for (const int semaphore : {lock, mine, others})
        checked(semctl(semaphore, 0, IPC_RMID), "semctl");
    rounds::say("counted=" + std::to_string(all) + " lost=" + std::to_string(2 * count - all));
}
