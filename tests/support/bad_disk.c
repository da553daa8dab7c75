/* Preloaded into a process, makes its disk fail as a file of orders says.
 *
 * BAD_DISK names the file. While it exists, its one line is "CALL ERRNO MS PATH [WHEN N]": each CALL
 * (write, read or sync) on a file whose path contains PATH takes MS ms longer, and fails with ERRNO
 * if that is not 0. PATH$ is for paths that end with PATH. With WHEN (before or after) the process is
 * killed at the Nth of these calls: before it is made, or once it has returned. "once 1" makes only
 * the first one fail. The calls are those SQLite makes; everything else goes its way.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static atomic_int calls;

static int is_at(const char *path, const char *part) {
    size_t length = strlen(path), wanted = strlen(part);
    if (!wanted || part[wanted - 1] != '$') return strstr(path, part) != NULL;
    return length >= --wanted && !strncmp(path + length - wanted, part, wanted);
}

/* The errno to fail with, 0 for "go on". dies: whether to be killed when the call has returned. */
static int order(const char *call, const char *path, int *dies) {
    char wanted[16], part[256], line[512], when[16] = "";
    int error = 0, ms = 0, nth = 0;
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
    if (sscanf(line, "%15s %d %d %255s %15s %d", wanted, &error, &ms, part, when, &nth) < 4) return 0;
    if (strcmp(wanted, call) || !is_at(path, part)) return 0;
    int is_nth = nth && ++calls == nth;
    if (is_nth && !strcmp(when, "before")) kill(getpid(), SIGKILL);
    *dies = is_nth && !strcmp(when, "after");
    if (!strcmp(when, "once") && !is_nth) return 0;
    struct timespec pause = {ms / 1000, (ms % 1000) * 1000000L};
    if (ms) nanosleep(&pause, NULL);
    return error;
}

static int order_fd(const char *call, int fd, int *dies) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t count = readlink(link, path, sizeof path - 1);
    if (count < 0) return 0;
    path[count] = 0;
    return order(call, path, dies);
}

/* Make the call as ordered: fail instead of it, or be killed after it. */
#define OBEY(type, call, fd, made) do { \
        int dies = 0, error = order_fd(call, fd, &dies); \
        if (error) { errno = error; return -1; } \
        type done = (made); \
        if (dies) kill(getpid(), SIGKILL); \
        return done; \
    } while (0)

ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at) {
    ssize_t (*real)(int, const void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pwrite64");
    OBEY(ssize_t, "write", fd, real(fd, data, count, at));
}

ssize_t pwrite(int fd, const void *data, size_t count, off_t at) {
    ssize_t (*real)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, "pwrite");
    OBEY(ssize_t, "write", fd, real(fd, data, count, at));
}

ssize_t write(int fd, const void *data, size_t count) {
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    OBEY(ssize_t, "write", fd, real(fd, data, count));
}

ssize_t pread64(int fd, void *data, size_t count, off64_t at) {
    ssize_t (*real)(int, void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pread64");
    OBEY(ssize_t, "read", fd, real(fd, data, count, at));
}

int fsync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    OBEY(int, "sync", fd, real(fd));
}

int fdatasync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fdatasync");
    OBEY(int, "sync", fd, real(fd));
}
