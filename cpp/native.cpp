// ipc_bridge._native: what Python cannot do by itself. The ring of `shm`, which needs atomics, is
// bound as a Stream whose methods are these functions, with nothing in between; and the walk over
// the headers of many small items.
//
// The GIL is given up while a thread waits, but not at once: to take it back costs more than many
// an answer does, so the first moment is spun with it.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <ipc_bridge/errors.hpp>
#include <ipc_bridge/frame.hpp>
#include <ipc_bridge/system.hpp>
#include <ipc_bridge/transports/ring.hpp>
#include <ipc_bridge/transports/shm_ring.hpp>

namespace nb = nanobind;

namespace {

using namespace ipc_bridge;

// Looks at the ring with the GIL held: about 2 us, a fraction of a turn of the GIL (5 ms).
constexpr int looks_with_gil = 100;

// What an object of the buffer protocol shows, for the time of a call.
class View {
  public:
    View(PyObject* object, int flags) {
        if (PyObject_GetBuffer(object, &view_, flags) != 0) {
            throw nb::python_error();
        }
    }
    View(View&& other) noexcept : view_(std::exchange(other.view_, {})) {}
    View& operator=(View&&) = delete;
    ~View() { PyBuffer_Release(&view_); }

    std::span<std::byte> bytes() const {
        return {static_cast<std::byte*>(view_.buf), static_cast<std::size_t>(view_.len)};
    }

  private:
    Py_buffer view_{};
};

// RingStream, waiting as a Python thread does: without the GIL, and open to signals.
class PyRingStream : public RingStream {
  public:
    PyRingStream(
        nb::object life_line,
        std::shared_ptr<const ring::Memory> memory,
        int side,
        Wait wait,
        const std::string& where
    )
        : PyRingStream(
              std::move(life_line),
              Fd(nb::cast<int>(life_line.attr("fileno")())),
              std::move(memory),
              side,
              wait,
              where
          ) {}

    std::ptrdiff_t py_read(nb::handle buffer, std::int64_t deadline_ns) {
        const View view(buffer.ptr(), PyBUF_WRITABLE);
        const std::int64_t budget_ns = spinner.budget_ns();
        for (int i = 0; i < (budget_ns != 0 ? looks_with_gil : 1); ++i) {
            if (const std::ptrdiff_t count = try_read(view.bytes())) {
                spinner.spun(true);
                return count;
            }
            shm_ring::pause();
        }
        const nb::gil_scoped_release released;
        if (budget_ns != 0) {
            const std::ptrdiff_t count = spin(view.bytes(), budget_ns, deadline_ns);
            if (count != would_block || (budget_ns == never && !spinner.is_crowded())) {
                return count;
            }
        }
        return sleep_and_read(view.bytes(), deadline_ns);
    }

    std::ptrdiff_t py_try_read(nb::handle buffer) {
        return try_read(View(buffer.ptr(), PyBUF_WRITABLE).bytes());
    }

    std::ptrdiff_t py_try_write(nb::handle buffers) {
        const auto sequence =
            nb::steal(PySequence_Fast(buffers.ptr(), "a sequence of buffers is needed"));
        if (!sequence.is_valid()) {
            throw nb::python_error();
        }
        PyObject** const items = PySequence_Fast_ITEMS(sequence.ptr());
        const auto count = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(sequence.ptr()));
        if (count == 1) {
            const View view(items[0], PyBUF_SIMPLE);
            const std::span<const std::byte> part = view.bytes();
            return try_write({&part, 1});
        }
        std::vector<View> views;
        std::vector<std::span<const std::byte>> parts;
        views.reserve(count);
        parts.reserve(count);
        for (std::size_t i = 0; i < count; ++i) {
            parts.push_back(views.emplace_back(items[i], PyBUF_SIMPLE).bytes());
        }
        return try_write(parts);
    }

    bool py_wait(bool readable, bool writable, std::int64_t deadline_ns) {
        const nb::gil_scoped_release released;
        return wait(readable, writable, deadline_ns);
    }

    void py_close() {
        const bool is_open = fileno() >= 0;
        close();
        if (is_open) {
            life_line_.attr("detach")();  // which closed it: it is one descriptor
        }
    }

  protected:
    void on_pause() override {
        const nb::gil_scoped_acquire held;
        if (PyErr_CheckSignals() != 0) {
            throw nb::python_error();
        }
    }

  private:
    PyRingStream(
        nb::object life_line,
        Fd fd,
        std::shared_ptr<const ring::Memory> memory,
        int side,
        Wait wait,
        const std::string& where
    ) try
        : RingStream(std::move(fd), std::move(memory), side, wait, where), life_line_(life_line) {
    } catch (...) {
        fd.release();  // still the socket's
        throw;
    }

    nb::object life_line_;  // Python's socket
};

// A URL, whose bytes need not be UTF-8: os.fsencode, and back.
std::string encoded(const nb::str& text) {
    const nb::object bytes = nb::steal(PyUnicode_EncodeFSDefault(text.ptr()));
    if (!bytes.is_valid()) {
        throw nb::python_error();
    }
    return {nb::borrow<nb::bytes>(bytes).c_str(), nb::borrow<nb::bytes>(bytes).size()};
}
nb::object decoded(const std::string& text) {
    return nb::steal(
        PyUnicode_DecodeFSDefaultAndSize(text.data(), static_cast<Py_ssize_t>(text.size()))
    );
}

Wait wait_of(const std::string& name) {
    return name == "block" ? Wait::BLOCK : name == "spin" ? Wait::SPIN : Wait::ADAPTIVE;
}

// The stream of who makes the memory, and the memory's descriptor, which is the caller's. Tests let
// the indices start elsewhere.
nb::tuple make(
    nb::object life_line,
    std::size_t capacity,
    const std::string& wait,
    const nb::str& where,
    std::uint64_t start
) {
    auto [memory, fd] = ring::Memory::make(capacity, start);
    auto stream = std::make_unique<PyRingStream>(
        std::move(life_line), std::move(memory), 0, wait_of(wait), encoded(where)
    );
    auto result = nb::make_tuple(nb::cast(std::move(stream)), fd.get());
    fd.release();
    return result;
}

// The stream of who was given the memory's descriptor, which stays the caller's.
std::unique_ptr<PyRingStream> attach(
    nb::object life_line,
    int memory_fd,
    std::size_t capacity,
    const std::string& wait,
    const nb::str& where
) {
    const std::string place = encoded(where);
    return std::make_unique<PyRingStream>(
        std::move(life_line),
        ring::Memory::attach(memory_fd, capacity, place),
        1,
        wait_of(wait),
        place
    );
}

// frame.py's `_walk`, which says what it does.
nb::tuple walk(
    nb::handle buffer,
    std::size_t start,
    std::size_t end,
    std::uint32_t call_id,
    std::uint32_t index,
    std::int64_t bytes_max,
    std::uint32_t size_max
) {
    const View view(buffer.ptr(), PyBUF_SIMPLE);
    const std::span<const std::byte> all = view.bytes();
    end = std::min(end, all.size());
    const std::size_t limit =
        start + static_cast<std::size_t>(std::max<std::int64_t>(0, bytes_max));
    std::vector<std::uint32_t> offsets;
    std::vector<std::uint32_t> sizes;
    const std::size_t most = end > start ? (end - start) / frame::header_bytes : 0;
    offsets.reserve(std::min<std::size_t>(most, 1024));
    sizes.reserve(std::min<std::size_t>(most, 1024));
    bool is_uniform = true;
    std::size_t at = start;
    while (at + frame::header_bytes <= end && at < limit) {
        frame::Header header;
        std::memcpy(&header, all.data() + at, sizeof(header));
        const std::size_t stop = at + frame::header_bytes + header.payload_size;
        if (stop > end || header.payload_size > size_max || header.kind != Kind::ITEM ||
            header.flags != 0 || header.code != 0 || header.call_id != call_id ||
            header.value != index) {
            break;
        }
        is_uniform = is_uniform && (sizes.empty() || sizes.front() == header.payload_size);
        offsets.push_back(static_cast<std::uint32_t>(at + frame::header_bytes - start));
        sizes.push_back(header.payload_size);
        at = stop;
        ++index;
    }
    const auto bytes = [](const std::vector<std::uint32_t>& numbers) {
        return nb::bytes(numbers.data(), numbers.size() * sizeof(std::uint32_t));
    };
    return nb::make_tuple(at, bytes(offsets), bytes(sizes), is_uniform);
}

// Raise what Python's half of the library raises.
void raise(const std::exception_ptr& error, void*) {
    const auto set = [](const char* name, auto... words) {
        const nb::object type = nb::module_::import_("ipc_bridge.errors").attr(name);
        PyErr_SetObject(type.ptr(), type(words...).ptr());
    };
    try {
        std::rethrow_exception(error);
    } catch (const ProtocolError& broken) {
        set("ProtocolError", broken.broken, decoded(broken.where));
    } catch (const SystemError& failed) {
        set("SystemError", failed.call, failed.error_number, decoded(failed.where));
    } catch (const Error& other) {
        const auto status = static_cast<int>(other.status);
        set("Error",
            nb::module_::import_("ipc_bridge.errors").attr("Status")(status),
            other.message,
            decoded(other.where));
    }
}

}  // namespace

NB_MODULE(_native, m) {
    // A daemon thread may still hold a stream as the interpreter ends: nothing that users could
    // mend.
    nb::set_leak_warnings(false);
    nb::register_exception_translator(raise);
    nb::class_<Spinner>(m, "Spinner").def_prop_rw("crowded", &Spinner::is_crowded, &Spinner::crowd);
    nb::class_<PyRingStream>(m, "RingStream")
        .def_prop_ro(
            "spinner",
            [](PyRingStream& self) -> Spinner& { return self.spinner; },
            nb::rv_policy::reference_internal
        )
        .def("try_read", &PyRingStream::py_try_read)
        .def("try_write", &PyRingStream::py_try_write)
        .def("wait", &PyRingStream::py_wait)
        .def("read", &PyRingStream::py_read)
        .def("arm", &PyRingStream::arm)
        .def("fileno", &PyRingStream::fileno)
        .def("interrupt", &PyRingStream::interrupt)
        .def("close", &PyRingStream::py_close);
    m.def(
        "make",
        make,
        nb::arg("life_line"),
        nb::arg("capacity_bytes"),
        nb::arg("wait"),
        nb::arg("where"),
        nb::arg("start") = 0
    );
    m.def("attach", attach);
    m.attr("CAPACITY_BYTES") = ring::capacity_bytes;
    m.def("is_capacity", ring::is_capacity);
    m.def("walk", walk);
}
