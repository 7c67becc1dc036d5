/* LD_PRELOAD: makes calls on chosen paths fail, at a chosen moment, in every process of a run.
 *
 *   INJECT = RULE[;RULE ...]      RULE = call[@rank]:path:effect:trigger[:[skip+]count]
 *
 * call     a group of C functions:
 *          open (any), create (an open that may write), read, write, fsync, rename, link, unlink (rmdir too), mkdir,
 *          truncate, stat, list (opendir), mmap, free (statvfs), clock (clock_gettime of CLOCK_REALTIME)
 * @rank    only in the process with RANK=rank; "@agent": only where RANK is not set
 * path     part of the absolute path, or a pattern with * that matches all of it; of a rename or link: of either path
 * effect   NUMBER   the call fails with this errno; for free: so many bytes are free; for clock: so many seconds later
 *          KILL     the process gets SIGKILL before the call
 *          SHORT    a write writes half of its bytes
 *          SLOW=MS  the call takes so many milliseconds longer
 * trigger  the rule applies while this file exists; "-": always
 * count    of the matching calls, the first `skip` work, the next `count` are hit, and the others work
 *
 * INJECT_COUNTS names a file of 4 bytes per rule where all processes count the calls that matched.
 * Calls that glibc makes inside itself (stdio) cannot be caught, except that fopen counts as open.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { MOST_RULES = 32, PATH_BYTES = 4096 };
enum effect { FAIL, KILL, SHORT, SLOW };

struct rule {
    char call[16], rank[16], path[512], trigger[512];
    enum effect effect;
    long value; /* errno, bytes, seconds or milliseconds */
    unsigned skip, count;
};

static struct rule rules[MOST_RULES];
static int rule_count;
static _Atomic unsigned private_counts[MOST_RULES];
static _Atomic unsigned *counts = private_counts;

static const char *field(const char *text, char *into, size_t size) {
    size_t length = strcspn(text, ":;");
    size_t kept = length < size ? length : size - 1;
    memcpy(into, text, kept);
    into[kept] = 0;
    return text + length + (text[length] == ':');
}

static const char *parse_rule(const char *text, struct rule *rule) {
    char effect[32], times[32];
    text = field(text, rule->call, sizeof rule->call);
    text = field(text, rule->path, sizeof rule->path);
    text = field(text, effect, sizeof effect);
    text = field(text, rule->trigger, sizeof rule->trigger);
    text = field(text, times, sizeof times);
    char *rank = strchr(rule->call, '@');
    if (rank) {
        *rank = 0;
        snprintf(rule->rank, sizeof rule->rank, "%s", rank + 1);
    }
    rule->effect = !strcmp(effect, "KILL") ? KILL : !strcmp(effect, "SHORT") ? SHORT : !strncmp(effect, "SLOW=", 5) ? SLOW : FAIL;
    rule->value = atol(rule->effect == SLOW ? effect + 5 : effect);
    char *plus = strchr(times, '+');
    rule->skip = plus ? (unsigned)atoi(times) : 0;
    rule->count = *times ? (unsigned)atoi(plus ? plus + 1 : times) : 0xffffffffu;
    return text + (*text == ';');
}

__attribute__((constructor)) static void parse(void) {
    const char *text = getenv("INJECT"), *counting = getenv("INJECT_COUNTS");
    if (counting) {
        int fd = (int)syscall(SYS_openat, AT_FDCWD, counting, O_RDWR | O_CLOEXEC);
        if (fd >= 0) {
            void *shared = mmap(NULL, sizeof private_counts, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
            if (shared != MAP_FAILED) counts = shared;
            syscall(SYS_close, fd);
        }
    }
    int found = 0;
    while (text && *text && found < MOST_RULES) text = parse_rule(text, &rules[found++]);
    rule_count = found;
}

static int of_this_process(const struct rule *rule) {
    if (!*rule->rank) return 1;
    const char *rank = getenv("RANK");
    return strcmp(rule->rank, rank ? rank : "agent") == 0;
}

static int matches(const struct rule *rule, const char *path) {
    return path && (strchr(rule->path, '*') ? !fnmatch(rule->path, path, 0) : strstr(path, rule->path) != NULL);
}

static int about(const char *call) {
    for (int i = 0; i < rule_count; i++)
        if (!strcmp(rules[i].call, call)) return 1;
    return 0;
}

/* The rule that hits this call, or NULL. Sleeps or kills if the rule says so. */
static const struct rule *hit(const char *call, const char *path, const char *other) {
    for (int i = 0; i < rule_count; i++) {
        const struct rule *rule = &rules[i];
        if (strcmp(rule->call, call) || !of_this_process(rule)) continue;
        if (!matches(rule, path) && !matches(rule, other)) continue;
        if (strcmp(rule->trigger, "-") && syscall(SYS_access, rule->trigger, F_OK)) continue;
        unsigned number = atomic_fetch_add(&counts[i], 1);
        if (number < rule->skip || number - rule->skip >= rule->count) continue;
        if (rule->effect == KILL) kill(getpid(), SIGKILL);
        if (rule->effect == SLOW) {
            struct timespec pause = {rule->value / 1000, rule->value % 1000 * 1000000};
            nanosleep(&pause, NULL);
            continue;
        }
        return rule;
    }
    return NULL;
}

static const char *target_of(const char *link, char *buffer) {
    long length = syscall(SYS_readlink, link, buffer, PATH_BYTES - 1);
    if (length < 0) return NULL;
    buffer[length] = 0;
    return buffer;
}

static const char *path_of(int fd, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return target_of(link, buffer);
}

/* The whole path, in `buffer` if it was relative. */
static const char *path_at(int folder, const char *path, char *buffer) {
    if (!path || *path == '/') return path;
    if (folder == AT_FDCWD ? !target_of("/proc/self/cwd", buffer) : !path_of(folder, buffer)) return path;
    if (!*path) return buffer;
    size_t length = strlen(buffer);
    snprintf(buffer + length, PATH_BYTES - length, "/%s", path);
    return buffer;
}

static const struct rule *hit_fd(const char *call, int fd) {
    char buffer[PATH_BYTES];
    return about(call) ? hit(call, path_of(fd, buffer), NULL) : NULL;
}

static const struct rule *hit_at(const char *call, int folder, const char *path) {
    char buffer[PATH_BYTES];
    return about(call) ? hit(call, path_at(folder, path, buffer), NULL) : NULL;
}

static int opening_fails(int folder, const char *path, int writes) {
    const struct rule *rule = hit_at("open", folder, path);
    if (!rule && writes) rule = hit_at("create", folder, path);
    if (rule) errno = (int)rule->value;
    return rule != NULL;
}

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)
#define FAIL_IF(hit_, value_) \
    do { \
        const struct rule *found_ = (hit_); \
        if (found_) return errno = (int)found_->value, value_; \
    } while (0)
#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list more; \
        va_start(more, flags); \
        mode = va_arg(more, mode_t); \
        va_end(more); \
    }
#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & O_CREAT))

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...); \
        MODE(flags) \
        return opening_fails(AT_FDCWD, path, WRITES(flags)) ? -1 : real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(int, name, int, const char *, int, ...); \
        MODE(flags) \
        return opening_fails(folder, path, WRITES(flags)) ? -1 : real(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)
#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(FILE *, name, const char *, const char *); \
        return opening_fails(AT_FDCWD, path, strpbrk(mode, "wa+") != NULL) ? NULL : real(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

#define WRITE(name, type, arguments, ...) \
    ssize_t name type { \
        REAL(ssize_t, name, __VA_ARGS__); \
        const struct rule *rule = hit_fd("write", fd); \
        if (rule && rule->effect == SHORT) size = size > 1 ? size / 2 : size; \
        else FAIL_IF(rule, -1); \
        return real arguments; \
    }
WRITE(write, (int fd, const void *from, size_t size), (fd, from, size), int, const void *, size_t)
WRITE(pwrite, (int fd, const void *from, size_t size, off_t at), (fd, from, size, at), int, const void *, size_t, off_t)
WRITE(pwrite64, (int fd, const void *from, size_t size, off64_t at), (fd, from, size, at), int, const void *, size_t, off64_t)
WRITE(sendfile, (int fd, int from, off_t *at, size_t size), (fd, from, at, size), int, int, off_t *, size_t)
WRITE(sendfile64, (int fd, int from, off64_t *at, size_t size), (fd, from, at, size), int, int, off64_t *, size_t)
WRITE(writev, (int fd, const struct iovec *from, int size), (fd, from, size), int, const struct iovec *, int)
ssize_t copy_file_range(int from, off64_t *at, int fd, off64_t *to, size_t size, unsigned flags) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
    FAIL_IF(hit_fd("write", fd), -1);
    return real(from, at, fd, to, size, flags);
}

#define ON_FD(name, result, call, failed, type, arguments, ...) \
    result name type { \
        REAL(result, name, __VA_ARGS__); \
        FAIL_IF(hit_fd(call, fd), failed); \
        return real arguments; \
    }
ON_FD(read, ssize_t, "read", -1, (int fd, void *to, size_t size), (fd, to, size), int, void *, size_t)
ON_FD(pread, ssize_t, "read", -1, (int fd, void *to, size_t size, off_t at), (fd, to, size, at), int, void *, size_t, off_t)
ON_FD(pread64, ssize_t, "read", -1, (int fd, void *to, size_t size, off64_t at), (fd, to, size, at), int, void *, size_t, off64_t)
ON_FD(readv, ssize_t, "read", -1, (int fd, const struct iovec *to, int size), (fd, to, size), int, const struct iovec *, int)
ON_FD(fsync, int, "fsync", -1, (int fd), (fd), int)
ON_FD(fdatasync, int, "fsync", -1, (int fd), (fd), int)
ON_FD(ftruncate, int, "truncate", -1, (int fd, off_t size), (fd, size), int, off_t)
ON_FD(ftruncate64, int, "truncate", -1, (int fd, off64_t size), (fd, size), int, off64_t)
ON_FD(mmap, void *, "mmap", MAP_FAILED, (void *at, size_t size, int rights, int flags, int fd, off_t from),
      (at, size, rights, flags, fd, from), void *, size_t, int, int, int, off_t)
ON_FD(mmap64, void *, "mmap", MAP_FAILED, (void *at, size_t size, int rights, int flags, int fd, off64_t from),
      (at, size, rights, flags, fd, from), void *, size_t, int, int, int, off64_t)

#define ON_PATH(name, result, call, failed, folder, type, arguments, ...) \
    result name type { \
        REAL(result, name, __VA_ARGS__); \
        FAIL_IF(hit_at(call, folder, path), failed); \
        return real arguments; \
    }
ON_PATH(unlink, int, "unlink", -1, AT_FDCWD, (const char *path), (path), const char *)
ON_PATH(unlinkat, int, "unlink", -1, at, (int at, const char *path, int flags), (at, path, flags), int, const char *, int)
ON_PATH(rmdir, int, "unlink", -1, AT_FDCWD, (const char *path), (path), const char *)
ON_PATH(mkdir, int, "mkdir", -1, AT_FDCWD, (const char *path, mode_t mode), (path, mode), const char *, mode_t)
ON_PATH(mkdirat, int, "mkdir", -1, at, (int at, const char *path, mode_t mode), (at, path, mode), int, const char *, mode_t)
ON_PATH(opendir, DIR *, "list", NULL, AT_FDCWD, (const char *path), (path), const char *)
ON_PATH(stat, int, "stat", -1, AT_FDCWD, (const char *path, struct stat *to), (path, to), const char *, struct stat *)
ON_PATH(stat64, int, "stat", -1, AT_FDCWD, (const char *path, struct stat64 *to), (path, to), const char *, struct stat64 *)
ON_PATH(fstatat, int, "stat", -1, at, (int at, const char *path, struct stat *to, int flags), (at, path, to, flags), int,
        const char *, struct stat *, int)
ON_PATH(fstatat64, int, "stat", -1, at, (int at, const char *path, struct stat64 *to, int flags), (at, path, to, flags), int,
        const char *, struct stat64 *, int)
ON_PATH(statx, int, "stat", -1, at, (int at, const char *path, int flags, unsigned mask, struct statx *to),
        (at, path, flags, mask, to), int, const char *, int, unsigned, struct statx *)

static const struct rule *hit_two(const char *call, int at, const char *from, int other, const char *to) {
    char one[PATH_BYTES], two[PATH_BYTES];
    return about(call) ? hit(call, path_at(at, from, one), path_at(other, to, two)) : NULL;
}
#define ON_TWO(name, call) \
    int name(const char *from, const char *to) { \
        REAL(int, name, const char *, const char *); \
        FAIL_IF(hit_two(call, AT_FDCWD, from, AT_FDCWD, to), -1); \
        return real(from, to); \
    }
ON_TWO(rename, "rename")
ON_TWO(link, "link")
#define ON_TWO_AT(name, call, more_type, more_name) \
    int name(int at, const char *from, int other, const char *to more_type) { \
        REAL(int, name, int, const char *, int, const char *, unsigned); \
        FAIL_IF(hit_two(call, at, from, other, to), -1); \
        return real(at, from, other, to, more_name); \
    }
#define COMMA ,
ON_TWO_AT(renameat, "rename", , 0)
ON_TWO_AT(renameat2, "rename", COMMA unsigned flags, flags)
ON_TWO_AT(linkat, "link", COMMA int flags, (unsigned)flags)

#define STATVFS(name, type) \
    static void none_free_##name(const struct rule *rule, struct type *found) { \
        found->f_bavail = found->f_bfree = (fsblkcnt_t)rule->value / (found->f_frsize ? found->f_frsize : 1); \
    } \
    int name(const char *path, struct type *found) { \
        REAL(int, name, const char *, struct type *); \
        int result = real(path, found); \
        const struct rule *rule = hit_at("free", AT_FDCWD, path); \
        if (!result && rule) none_free_##name(rule, found); \
        return result; \
    } \
    int f##name(int fd, struct type *found) { \
        REAL(int, f##name, int, struct type *); \
        int result = real(fd, found); \
        const struct rule *rule = hit_fd("free", fd); \
        if (!result && rule) none_free_##name(rule, found); \
        return result; \
    }
STATVFS(statvfs, statvfs)
STATVFS(statvfs64, statvfs64)

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, clock_gettime, clockid_t, struct timespec *);
    int result = real(clock, now);
    if (!result && clock == CLOCK_REALTIME && about("clock")) {
        const struct rule *rule = hit("clock", "", NULL);
        if (rule) now->tv_sec += rule->value;
    }
    return result;
}
