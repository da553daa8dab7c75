/* Preloaded into a process, makes its disk fail as a file of orders says.
 *
 * BAD_DISK names the file. While it exists, its one line is "CALL ERRNO MS PATH": each CALL (write,
 * read or sync) on a file whose path contains PATH takes MS ms longer, and fails with ERRNO if that
 * is not 0. The calls are those SQLite makes; everything else goes its way.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

/* The errno to fail with, 0 for "go on". */
static int order(const char *call, const char *path) {
    char wanted[16], part[256], line[512];
    int error = 0, ms = 0;
    const char *file = getenv("BAD_DISK");
    if (!file) return 0;
    int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    ssize_t (*real_read)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
    int fd = real_open(file, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t count = real_read(fd, line, sizeof line - 1);
    close(fd);
    if (count <= 0) return 0;
    line[count] = 0;
    if (sscanf(line, "%15s %d %d %255s", wanted, &error, &ms, part) != 4) return 0;
    if (strcmp(wanted, call) || !strstr(path, part)) return 0;
    struct timespec pause = {ms / 1000, (ms % 1000) * 1000000L};
    if (ms) nanosleep(&pause, NULL);
    return error;
}

static int order_fd(const char *call, int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t count = readlink(link, path, sizeof path - 1);
    if (count < 0) return 0;
    path[count] = 0;
    return order(call, path);
}

#define OR_FAIL(error) do { int _e = (error); if (_e) { errno = _e; return -1; } } while (0)

ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at) {
    ssize_t (*real)(int, const void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pwrite64");
    OR_FAIL(order_fd("write", fd));
    return real(fd, data, count, at);
}

ssize_t pwrite(int fd, const void *data, size_t count, off_t at) {
    ssize_t (*real)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, "pwrite");
    OR_FAIL(order_fd("write", fd));
    return real(fd, data, count, at);
}

ssize_t write(int fd, const void *data, size_t count) {
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    OR_FAIL(order_fd("write", fd));
    return real(fd, data, count);
}

ssize_t pread64(int fd, void *data, size_t count, off64_t at) {
    ssize_t (*real)(int, void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pread64");
    OR_FAIL(order_fd("read", fd));
    return real(fd, data, count, at);
}

int fsync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    OR_FAIL(order_fd("sync", fd));
    return real(fd);
}

int fdatasync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fdatasync");
    OR_FAIL(order_fd("sync", fd));
    return real(fd);
}
