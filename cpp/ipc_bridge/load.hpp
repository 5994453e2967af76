// The load generator behind `bench`: calls that are timed, verified and counted, and their report.
//
// Each client is a connection with a thread of its own. All keep one schedule: a warm-up that is
// not counted, then the measured part; a call that is under way when that ends is still finished
// and counted, so that a stall at the end is not lost.
//
// Closed loop: a call follows the answer to the one before. Open loop (a rate): calls have a time
// at which they are due, and their clock starts then, so that a stall is charged to every call that
// it delays (no "coordinated omission"). The last moments before that time are spun, not slept: a
// sleeper wakes up late by about what a call takes, and that would be charged as well.
#pragma once

#include <dirent.h>
#include <sys/resource.h>
#include <time.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <ipc_bridge/endpoint.hpp>
#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/service.hpp>
#include <ipc_bridge/session.hpp>
#include <ipc_bridge/system.hpp>

namespace ipc_bridge::load {

using Json = nlohmann::ordered_json;

// Items of a stream that is left when the time is up.
inline constexpr std::uint64_t endless = std::uint64_t{1} << 63U;
// Before a call is due: longer than a wake-up takes, also on a virtual machine.
inline constexpr std::int64_t spin_ns = 200'000;
// For calls that were due in time but are late; then they are given up.
inline constexpr std::int64_t overrun_ns = 1'000'000'000;
// How far apart the looks at the clock shall be in a stream at full speed.
inline constexpr std::int64_t look_ns = 1'000'000;
// And how many items, at most.
inline constexpr int look_items_max = 1024;
// With fewer, it would be the maximum under another name.
inline constexpr std::size_t p99_samples_min = 100;
inline constexpr std::size_t p99_9_samples_min = 1000;
// As a server's process: the one that stdio started.
inline constexpr int child = -1;
// Room made beforehand: a vector that grows under way copies all it has.
inline constexpr std::size_t samples_reserved = 1U << 20U;

// What to call, how often, and for how long.
struct Plan {
    std::string url;
    std::string op;  // "echo", a unary call, or "stream"
    std::size_t size_bytes = 0;
    double duration_s = 0.0;
    double warmup_s = 0.0;
    double rate_hz = 0.0;  // of all clients together; 0: closed loop
    std::size_t clients = 1;
    // Of a service of one's own, whose answers are not verified; 0: the op's own.
    std::uint16_t method = 0;
    // Of the calls of `method`; none: `size_bytes` of the pattern.
    std::optional<std::string> payload;
    double work_s = 0.0;  // asleep after each item of a stream, as a consumer at work would be
    int server_pid = 0;   // whose use of the machine is reported as well; child, or 0: nobody's
    std::uint32_t window_bytes = window_bytes_default;
    std::uint32_t payload_bytes_max = frame::payload_bytes_max;
};

// When the warm-up and the measured part begin, and when that ends (monotonic ns).
struct Schedule {
    std::int64_t start_ns = 0;
    std::int64_t began_ns = 0;
    std::int64_t end_ns = 0;
};

// What this process has used.
struct Usage {
    double user_s;
    double system_s;
    std::int64_t voluntary;  // context switches
    std::int64_t involuntary;

    // What came on top of an earlier one.
    Usage since(const Usage& then) const {
        return {
            user_s - then.user_s,
            system_s - then.system_s,
            voluntary - then.voluntary,
            involuntary - then.involuntary};
    }
};

// A thread's context switches.
struct Switches {
    std::int64_t voluntary = 0;
    std::int64_t involuntary = 0;
};

// What another process has used, and its largest resident size.
struct ServerUsage {
    double cpu_s;
    std::map<std::string, Switches> switches;  // by thread: what one has done is gone when it ends
    std::int64_t memory_peak_bytes;

    // Context switches, of the threads that are still there.
    Switches all() const {
        Switches found;
        for (const auto& [thread, one] : switches) {
            found.voluntary += one.voluntary;
            found.involuntary += one.involuntary;
        }
        return found;
    }

    // What came on top of an earlier one.
    ServerUsage since(const ServerUsage& then) const {
        ServerUsage found{cpu_s - then.cpu_s, switches, memory_peak_bytes};
        for (auto& [thread, one] : found.switches) {
            if (const auto before = then.switches.find(thread); before != then.switches.end()) {
                one.voluntary -= before->second.voluntary;
                one.involuntary -= before->second.involuntary;
            }
        }
        return found;
    }
};

// Sleep until shortly before a time, and spin the rest.
inline void sleep_until(std::int64_t at_ns) {
    for (std::int64_t left_ns = 0; (left_ns = at_ns - now_ns()) > spin_ns;) {
        sleep_ns(left_ns - spin_ns);
    }
    while (now_ns() < at_ns) {
        std::this_thread::yield();  // another client's thread may be due
    }
}

// Nearest rank: each is a time that occurred. Null where there are too few samples; for the p99 of
// latencies any number will do, as they are there to look at, and ages are not.
inline Json percentiles(std::vector<std::uint64_t> ordered, std::size_t p99_min = 1) {
    std::sort(ordered.begin(), ordered.end());
    const std::size_t count = ordered.size();
    const auto at = [&](std::size_t per_mille, std::size_t count_min) {
        return count >= count_min ? Json(ordered[(count * per_mille + 999) / 1000 - 1]) : Json();
    };
    return {
        {"p50", at(500, 1)},
        {"p90", at(900, 1)},
        {"p99", at(990, p99_min)},
        {"p99_9", at(999, p99_9_samples_min)},
        {"max", at(1000, 1)},
    };
}

// All threads of this process, the children apart.
inline Usage usage_now() {
    rusage used{};
    checked(::getrusage(RUSAGE_SELF, &used), "getrusage", "self");
    const auto seconds = [](const timeval& time) {
        return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / 1e6;
    };
    return {seconds(used.ru_utime), seconds(used.ru_stime), used.ru_nvcsw, used.ru_nivcsw};
}

// A number of a status file of proc(5); 0 if it is not there.
inline std::int64_t status_field(const std::string& path, const std::string& name) {
    std::ifstream status(path);
    for (std::string word; status >> word;) {
        std::int64_t number = 0;
        if (word == name && status >> number) {
            return number;
        }
    }
    return 0;
}

// The largest resident size. (ru_maxrss of getrusage(2) would not do: a new program inherits that
// of the process that started it, and a harness is larger than what it starts.)
inline std::int64_t memory_peak_bytes() {
    return status_field("/proc/self/status", "VmHWM:") * 1024;
}

// Let the largest resident size of a process be that from here on: proc(5), clear_refs. Of one that
// is not ours, it stays that of its whole life.
inline void forget_memory_peak(int pid) {
    std::ofstream("/proc/" + std::to_string(pid) + "/clear_refs") << 5;
}

// All threads of another process. The time is that of its clock, clock_getcpuclockid(3), which
// counts nanoseconds, and the threads that have ended. Throws Error: NOT_FOUND.
inline ServerUsage server_usage_now(int pid) {
    const std::string path = "/proc/" + std::to_string(pid);
    const std::unique_ptr<DIR, int (*)(DIR*)> tasks(
        ::opendir((path + "/task").c_str()), ::closedir
    );
    checked(tasks ? 0 : -1, "open", path);
    timespec cpu{};
    checked(::clock_gettime((~pid << 3) | 2, &cpu), "clock_gettime", path);
    std::map<std::string, Switches> switches;
    while (const dirent* thread = ::readdir(tasks.get())) {
        if (thread->d_name[0] == '.') {
            continue;
        }
        const std::string status = path + "/task/" + thread->d_name + "/status";
        switches[thread->d_name] = {
            status_field(status, "voluntary_ctxt_switches:"),
            status_field(status, "nonvoluntary_ctxt_switches:")};
    }
    const double cpu_s = static_cast<double>(cpu.tv_sec) + static_cast<double>(cpu.tv_nsec) / 1e9;
    const std::int64_t memory_peak = status_field(path + "/status", "VmHWM:") * 1024;
    return {cpu_s, std::move(switches), memory_peak};
}

// The process that the main thread has started. Throws Error: NOT_FOUND.
inline int child_pid() {
    const std::string path = "/proc/self/task/" + std::to_string(::getpid()) + "/children";
    int pid = 0;
    if (!(std::ifstream(path) >> pid)) {
        throw Error(Status::NOT_FOUND, "no server was started by this client", path);
    }
    return pid;
}

// One client, and what it measured. (Aligned, so that no two write to one cache line.)
class alignas(128) Worker {
  public:
    Worker(const Plan& plan, Bridge bridge, std::size_t number)
        : plan_(plan), bridge_(std::move(bridge)), number_(number) {
        samples.reserve(samples_reserved);
    }

    std::uint64_t operations = 0;
    std::uint64_t operations_warmup = 0;
    std::uint64_t bytes = 0;             // of the answers
    std::vector<std::uint64_t> samples;  // ns
    std::vector<std::uint64_t> ages;     // ns
    std::uint64_t errors = 0;
    std::optional<Error> error;  // the first
    std::uint64_t failures = 0;  // answers that differ from the pattern
    std::int64_t began_ns = 0;   // of the measured part; 0: it was not reached
    std::int64_t ended_ns = 0;

    // Keep the schedule to its end, or until the connection is of no further use.
    void run(const Schedule& schedule) {
        schedule_ = schedule;
        turn_ns_ = schedule.began_ns;
        try {
            if (plan_.op == "echo") {
                call();
            } else if (plan_.method != 0) {
                read_streams();
            } else if (plan_.rate_hz > 0) {
                read_stamped_stream();
            } else {
                read_stream();
            }
        } catch (const Error& failure) {
            note(failure);
        }
        ended_ns = now_ns();
    }

  private:
    // Unary calls. Payloads are made before the timed span, answers compared after it.
    void call() {
        const Pattern pattern(plan_.size_bytes);
        const std::uint16_t method = plan_.method != 0 ? plan_.method : echo_method;
        const double interval_ns = plan_.rate_hz > 0 ? 1e9 / plan_.rate_hz : 0.0;
        for (std::uint64_t index = number_;; index += plan_.clients) {
            const Bytes payload = plan_.payload ? bytes_of(*plan_.payload) : pattern.item(index);
            const auto offset_ns =
                static_cast<std::int64_t>(static_cast<double>(index) * interval_ns);
            std::int64_t start_ns = interval_ns > 0 ? schedule_.start_ns + offset_ns : now_ns();
            if (start_ns >= turn_ns_ && !turn(start_ns)) {
                return;
            }
            if (interval_ns <= 0) {
                start_ns = now_ns();
            } else if (now_ns() < schedule_.end_ns + overrun_ns) {
                sleep_until(start_ns);
            } else {
                return;
            }
            try {
                const Bytes reply = bridge_.call(method, payload);
                samples.push_back(static_cast<std::uint64_t>(now_ns() - start_ns));
                count(1, reply.size());
                if (plan_.method == 0 && !pattern.verifies(index, reply)) {
                    ++failures;
                }
            } catch (const CallError& failure) {
                note(failure);
                if (failure.status == Status::UNAVAILABLE) {
                    return;
                }
            }
        }
    }

    // One endless stream. A look at the clock costs about what a small item does, so they are as
    // rare as look_ns allows; leaving the loop cancels the stream.
    void read_stream() {
        const std::size_t size_bytes = plan_.size_bytes;
        const Pattern pattern(size_bytes);
        int stride = 1;  // items until the next look
        int left = 1;
        std::int64_t looked_ns = now_ns();
        std::uint64_t index = 0;
        for (const Bytes item : bridge_.stream(endless, static_cast<std::uint32_t>(size_bytes))) {
            if (!pattern.verifies(index++, item)) {
                ++failures;
            }
            work();
            if (--left != 0) {
                continue;
            }
            count(static_cast<unsigned>(stride), static_cast<unsigned>(stride) * size_bytes);
            const std::int64_t at_ns = now_ns();
            if (at_ns >= turn_ns_ && !turn(at_ns)) {
                return;
            }
            const bool quick = at_ns - looked_ns < look_ns;
            stride = quick ? std::min(2 * stride, look_items_max) : std::max(1, stride / 2);
            left = stride;
            looked_ns = at_ns;
        }
    }

    // One endless, paced stream. The samples are latencies one way: from the time at which an item
    // was sent to its arrival. Its age runs from the time at which it was due, by the producer's
    // own pace, to the end of the work on it: it grows where a consumer is too slow, while the
    // producer waits for it and the latency cannot show it.
    void read_stamped_stream() {
        const auto size_bytes = static_cast<std::uint32_t>(plan_.size_bytes);
        const double rate_hz = plan_.rate_hz / static_cast<double>(plan_.clients);
        const auto offset_ns = [rate_hz](std::uint64_t index) {
            return static_cast<std::int64_t>(static_cast<double>(index) * 1e9 / rate_hz);
        };
        const auto not_negative = [](std::int64_t span_ns) {
            return static_cast<std::uint64_t>(std::max<std::int64_t>(0, span_ns));
        };
        std::optional<std::int64_t> first_due_ns;
        const Pattern pattern(size_bytes);
        std::uint64_t index = 0;
        for (const Bytes item : bridge_.stream(endless, size_bytes, rate_hz, true)) {
            const std::int64_t at_ns = now_ns();
            if (at_ns >= turn_ns_ && !turn(at_ns)) {
                return;
            }
            count(1, item.size());
            if (pattern.verifies(index, item, stamp_bytes)) {
                std::int64_t sent_ns = 0;
                std::memcpy(&sent_ns, item.data(), stamp_bytes);
                samples.push_back(not_negative(at_ns - sent_ns));
                first_due_ns = first_due_ns.value_or(sent_ns - offset_ns(index));
                work();
                ages.push_back(not_negative(now_ns() - *first_due_ns - offset_ns(index)));
            } else {
                ++failures;
            }
            ++index;
        }
    }

    // The streams of a method of one's own, one after the other.
    void read_streams() {
        const Pattern pattern(plan_.size_bytes);
        const Bytes payload = plan_.payload ? bytes_of(*plan_.payload) : pattern.item(0);
        while (now_ns() < turn_ns_ || turn(now_ns())) {
            for (const Bytes item : bridge_.call_stream(plan_.method, payload)) {
                count(1, item.size());
                const std::int64_t at_ns = now_ns();
                if (at_ns >= turn_ns_ && !turn(at_ns)) {
                    return;
                }
            }
        }
    }

    void work() const {
        if (plan_.work_s > 0) {
            sleep_ns(static_cast<std::int64_t>(plan_.work_s * 1e9));
        }
    }

    void count(std::uint64_t more_operations, std::uint64_t more_bytes) {
        operations += more_operations;
        bytes += more_bytes;
    }

    // A part of the schedule is over: begin the next one; false if that was the last.
    bool turn(std::int64_t at_ns) {
        const bool open_loop = plan_.op == "echo" && plan_.rate_hz > 0;
        if (began_ns == 0) {
            operations_warmup = operations;
            operations = bytes = 0;
            samples.clear();
            ages.clear();
            // Where no call is due at a given time, the part has its full length, however late.
            began_ns = open_loop ? schedule_.began_ns : at_ns;
            turn_ns_ = began_ns + schedule_.end_ns - schedule_.began_ns;
            if (at_ns < turn_ns_) {
                return true;
            }
        }
        if (open_loop) {
            sleep_until(schedule_.end_ns);  // no further call is due, but the part has its length
        }
        return false;
    }

    void note(const Error& failure) {
        ++errors;
        if (!error) {
            error = failure;
        }
    }

    const Plan& plan_;
    Bridge bridge_;
    std::size_t number_;
    Schedule schedule_;
    std::int64_t turn_ns_ = 0;  // when the next part of the schedule begins
};

// What all clients measured together.
struct Result {
    Plan plan;
    std::deque<Worker> workers;
    Usage usage{};  // of all calls, the warm-up's too: a look in between would disturb them
    std::optional<ServerUsage> server;  // of the same
    std::int64_t memory_peak_bytes = 0;

    // All latencies, in nanoseconds.
    std::vector<std::uint64_t> samples() const {
        std::vector<std::uint64_t> all;
        each_measured([&](const Worker& worker) {
            all.insert(all.end(), worker.samples.begin(), worker.samples.end());
        });
        return all;
    }

    // Of the items of paced streams, in nanoseconds.
    std::vector<std::uint64_t> ages() const {
        std::vector<std::uint64_t> all;
        each_measured([&](const Worker& worker) {
            all.insert(all.end(), worker.ages.begin(), worker.ages.end());
        });
        return all;
    }

    // The first error, or what stands for it: wrong answers.
    std::optional<Error> error() const {
        if (const auto first = first_error()) {
            return first;
        }
        const std::uint64_t failures = sum(&Worker::failures);
        if (failures != 0) {
            return Error(
                Status::DATA_LOSS,
                std::to_string(failures) + " answers differ from the pattern",
                plan.url
            );
        }
        return std::nullopt;
    }

    // The figures, by name.
    Json report(const std::string& language, const std::string& version) const {
        const auto [seconds, operations, operations_warmup, bytes] = totals();
        const auto first = first_error();
        const std::vector<std::uint64_t> latencies = samples();
        const auto per_second = [span = seconds](std::uint64_t amount) {
            return span > 0 ? static_cast<double>(amount) / span : 0.0;
        };
        Json json;
        json["language"] = language;
        json["version"] = version;
        json["url"] = plan.url;
        json["op"] = plan.op;
        json["size_bytes"] = plan.payload ? plan.payload->size() : plan.size_bytes;
        json["clients"] = plan.clients;
        json["rate_hz"] = plan.rate_hz;
        json["warmup_s"] = plan.warmup_s;
        json["seconds"] = seconds;
        json["operations"] = operations;
        json["operations_warmup"] = operations_warmup;
        json["bytes"] = bytes;
        json["operations_per_second"] = per_second(operations);
        json["bytes_per_second"] = per_second(bytes);
        json["errors"] = sum(&Worker::errors);
        json["error"] = first ? Json(first->what()) : Json();
        json["verification_failures"] = sum(&Worker::failures);
        json["samples"] = latencies.size();
        json["latency_ns"] = percentiles(latencies);
        json["age_ns"] = percentiles(ages(), p99_samples_min);
        json["cpu_s"] = {{"user", usage.user_s}, {"system", usage.system_s}};
        json["context_switches"] = {
            {"voluntary", usage.voluntary}, {"involuntary", usage.involuntary}};
        json["memory_peak_bytes"] = memory_peak_bytes;
        json["server"] = report_server();
        return json;
    }

  private:
    struct Totals {
        double seconds;
        std::uint64_t operations;
        std::uint64_t operations_warmup;
        std::uint64_t bytes;
    };

    Json report_server() const {
        if (!server) {
            return nullptr;
        }
        const Switches switches = server->all();
        return {
            {"cpu_s", server->cpu_s},
            {"context_switches",
             {{"voluntary", switches.voluntary}, {"involuntary", switches.involuntary}}},
            {"memory_peak_bytes", server->memory_peak_bytes},
        };
    }

    Totals totals() const {
        std::int64_t began_ns = never;
        std::int64_t ended_ns = 0;
        std::uint64_t operations = 0;
        std::uint64_t operations_warmup = 0;
        std::uint64_t bytes = 0;
        each_measured([&](const Worker& worker) {
            began_ns = std::min(began_ns, worker.began_ns);
            ended_ns = std::max(ended_ns, worker.ended_ns);
            operations += worker.operations;
            operations_warmup += worker.operations_warmup;
            bytes += worker.bytes;
        });
        const double seconds = ended_ns != 0 ? static_cast<double>(ended_ns - began_ns) / 1e9 : 0.0;
        return {seconds, operations, operations_warmup, bytes};
    }

    std::optional<Error> first_error() const {
        for (const Worker& worker : workers) {
            if (worker.error) {
                return worker.error;
            }
        }
        return std::nullopt;
    }

    std::uint64_t sum(std::uint64_t Worker::*member) const {
        std::uint64_t total = 0;
        for (const Worker& worker : workers) {
            total += worker.*member;
        }
        return total;
    }

    template <class Body>
    void each_measured(Body body) const {
        for (const Worker& worker : workers) {
            if (worker.began_ns != 0) {
                body(worker);
            }
        }
    }
};

// Do what the plan says. Throws Error if a client cannot connect, or there is no such server
// process.
inline std::unique_ptr<Result> run(Plan plan) {
    auto result = std::make_unique<Result>();
    result->plan = std::move(plan);
    const Plan& asked = result->plan;
    const ConnectOptions options{
        .window_bytes = asked.window_bytes, .payload_bytes_max = asked.payload_bytes_max};
    for (std::size_t number = 0; number < asked.clients; ++number) {
        result->workers.emplace_back(asked, connect(asked.url, options), number);
    }
    const int server_pid = asked.server_pid == child ? child_pid() : asked.server_pid;
    std::optional<ServerUsage> server_before;
    if (server_pid != 0) {
        forget_memory_peak(server_pid);  // of what it did for others before
        server_before = server_usage_now(server_pid);
    }
    const Usage before = usage_now();
    Schedule schedule;
    schedule.start_ns = now_ns();
    schedule.began_ns = schedule.start_ns + static_cast<std::int64_t>(asked.warmup_s * 1e9);
    schedule.end_ns = schedule.began_ns + static_cast<std::int64_t>(asked.duration_s * 1e9);
    std::vector<std::jthread> threads;
    for (Worker& worker : result->workers) {
        threads.emplace_back([&worker, schedule] { worker.run(schedule); });
    }
    for (std::jthread& thread : threads) {
        thread.join();
    }
    result->usage = usage_now().since(before);
    if (server_before) {
        try {
            result->server = server_usage_now(server_pid).since(*server_before);
        } catch (const Error&) {  // it has gone: the calls have noticed, and say so
        }
    }
    result->memory_peak_bytes = memory_peak_bytes();
    return result;
}

}  // namespace ipc_bridge::load
