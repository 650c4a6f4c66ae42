#include "checkpoint/files.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "globe/factored.hpp"

namespace globe::detail {
namespace {

[[noreturn]] void fail(const std::string& path, const std::string& what) {
    throw CheckpointError(path + ": cannot be read (" + what + "); fetch the checkpoint's missing file");
}

class Descriptor {
  public:
    explicit Descriptor(const std::string& path) : number_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
        if (number_ < 0) fail(path, std::strerror(errno));
    }
    ~Descriptor() { close(number_); }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int number() const { return number_; }

  private:
    const int number_;
};

}  // namespace

Bytes map_file(const std::string& path) {
    const Descriptor file(path);
    struct stat status = {};
    if (fstat(file.number(), &status) != 0) fail(path, std::strerror(errno));
    if (!S_ISREG(status.st_mode)) fail(path, "it is not a file");
    const auto size = static_cast<std::size_t>(status.st_size);
    if (size == 0) return {nullptr, nullptr, 0};
    void* mapped = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.number(), 0);
    if (mapped == MAP_FAILED) fail(path, std::strerror(errno));
    const std::shared_ptr<const void> owner(mapped, [mapped, size](const void*) { munmap(mapped, size); });
    return {owner, static_cast<const unsigned char*>(mapped), size};
}

}  // namespace globe::detail
