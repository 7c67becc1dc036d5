// LD_PRELOAD library: one call fails on paths that contain a text, while a file exists.
// FAILING=call:text:errno:file, with call one of open, write, fsync, rename. With call `clock`, CLOCK_REALTIME is `errno`
// seconds ahead.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static char call[16], text[128], file[512];
static int number;

__attribute__((constructor)) static void read_rule(void) {
    const char *rule = getenv("FAILING");
    if (rule) sscanf(rule, "%15[^:]:%127[^:]:%d:%511s", call, text, &number, file);
}

static int hits(const char *name, const char *path) {
    return !strcmp(name, call) && strstr(path, text) && access(file, F_OK) == 0;
}

static int hits_open(const char *name, int descriptor) {
    char link[64], path[1024];
    if (strcmp(name, call)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return hits(name, path);
}

#define FAIL_IF(condition) if (condition) { errno = number; return -1; }

ssize_t write(int descriptor, const void *from, size_t size) {
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    FAIL_IF(hits_open("write", descriptor));
    return real(descriptor, from, size);
}

int fsync(int descriptor) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    FAIL_IF(hits_open("fsync", descriptor));
    return real(descriptor);
}

int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    FAIL_IF(hits("rename", from) || hits("rename", to));
    return real(from, to);
}

#define OPEN(name)                                                       \
    int name(const char *path, int flags, ...) {                         \
        int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name);   \
        va_list rest;                                                    \
        va_start(rest, flags);                                           \
        int mode = va_arg(rest, int);                                    \
        va_end(rest);                                                    \
        FAIL_IF(hits("open", path));                                     \
        return real(path, flags, mode);                                  \
    }
OPEN(open)
OPEN(open64)

int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME && hits("clock", text)) now->tv_sec += number;
    return result;
}
