/* Lets the n-th call that changes a file below a folder fail, as on a full or broken disk. Loaded by LD_PRELOAD.

   FAIL_BELOW  the folder (its real path)
   FAIL_AT     n, from 1; 0: none fails
   FAIL_COUNT  a file outside the folder, to which each process appends a byte a call: its size is the count of all

   A call fails as it would: write, pwrite, writev, ftruncate, fallocate, mkdir and open for writing with ENOSPC,
   fsync and fdatasync with EIO, rename and link with ENOSPC. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static int below(const char *path)
{
	const char *folder = getenv("FAIL_BELOW");
	size_t length = folder ? strlen(folder) : 0;
	return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int descriptor_below(int fd)
{
	char link[40], path[PATH_MAX];
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	ssize_t length = readlink(link, path, sizeof path - 1);
	if (length < 0)
		return 0;
	path[length] = 0;
	return below(path);
}

static int path_below(int folder, const char *path)
{
	if (path[0] == '/')
		return below(path);
	if (folder != AT_FDCWD)
		return descriptor_below(folder);
	char here[PATH_MAX];
	return getcwd(here, sizeof here) && below(here);
}

/* Whether this call is the n-th of all processes. */
static int fails(void)
{
	static int (*really_open)(const char *, int, ...);
	static ssize_t (*really_write)(int, const void *, size_t);
	const char *count = getenv("FAIL_COUNT"), *at = getenv("FAIL_AT");
	if (!count)
		return 0;
	if (!really_open) {
		really_open = dlsym(RTLD_NEXT, "open");
		really_write = dlsym(RTLD_NEXT, "write");
	}
	int saved = errno, fd = really_open(count, O_WRONLY | O_APPEND | O_CLOEXEC);
	if (fd < 0)
		return 0;
	really_write(fd, ".", 1);
	off_t number = lseek(fd, 0, SEEK_CUR);
	close(fd);
	errno = saved;
	return at && number == atol(at);
}

#define FAIL_IF(condition, code, value) \
	do { \
		if ((condition) && fails()) { \
			errno = code; \
			return value; \
		} \
	} while (0)

ssize_t write(int fd, const void *data, size_t size)
{
	REAL(write);
	FAIL_IF(descriptor_below(fd), ENOSPC, -1);
	return real(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at)
{
	REAL(pwrite);
	FAIL_IF(descriptor_below(fd), ENOSPC, -1);
	return real(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
	REAL(pwrite64);
	FAIL_IF(descriptor_below(fd), ENOSPC, -1);
	return real(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
	REAL(writev);
	FAIL_IF(descriptor_below(fd), ENOSPC, -1);
	return real(fd, parts, count);
}

int ftruncate64(int fd, off64_t size)
{
	REAL(ftruncate64);
	FAIL_IF(descriptor_below(fd), ENOSPC, -1);
	return real(fd, size);
}

int posix_fallocate64(int fd, off64_t at, off64_t size)
{
	REAL(posix_fallocate64);
	FAIL_IF(descriptor_below(fd), 0, ENOSPC);
	return real(fd, at, size);
}

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *to_at, size_t size, unsigned flags)
{
	REAL(copy_file_range);
	FAIL_IF(descriptor_below(to), ENOSPC, -1);
	return real(from, at, to, to_at, size, flags);
}

int fsync(int fd)
{
	REAL(fsync);
	FAIL_IF(descriptor_below(fd), EIO, -1);
	return real(fd);
}

int fdatasync(int fd)
{
	REAL(fdatasync);
	FAIL_IF(descriptor_below(fd), EIO, -1);
	return real(fd);
}

int rename(const char *from, const char *to)
{
	REAL(rename);
	FAIL_IF(path_below(AT_FDCWD, to), ENOSPC, -1);
	return real(from, to);
}

int renameat(int folder, const char *from, int other, const char *to)
{
	REAL(renameat);
	FAIL_IF(path_below(other, to), ENOSPC, -1);
	return real(folder, from, other, to);
}

int link(const char *from, const char *to)
{
	REAL(link);
	FAIL_IF(path_below(AT_FDCWD, to), ENOSPC, -1);
	return real(from, to);
}

int mkdir(const char *path, mode_t mode)
{
	REAL(mkdir);
	FAIL_IF(path_below(AT_FDCWD, path), ENOSPC, -1);
	return real(path, mode);
}

int open64(const char *path, int flags, ...)
{
	REAL(open64);
	va_list more;
	va_start(more, flags);
	mode_t mode = va_arg(more, mode_t);
	va_end(more);
	FAIL_IF((flags & O_CREAT) && path_below(AT_FDCWD, path), ENOSPC, -1);
	return real(path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...)
{
	REAL(openat64);
	va_list more;
	va_start(more, flags);
	mode_t mode = va_arg(more, mode_t);
	va_end(more);
	FAIL_IF((flags & O_CREAT) && path_below(folder, path), ENOSPC, -1);
	return real(folder, path, flags, mode);
}

int mkdirat(int folder, const char *path, mode_t mode)
{
	REAL(mkdirat);
	FAIL_IF(path_below(folder, path), ENOSPC, -1);
	return real(folder, path, mode);
}

int linkat(int folder, const char *from, int other, const char *to, int flags)
{
	REAL(linkat);
	FAIL_IF(path_below(other, to), ENOSPC, -1);
	return real(folder, from, other, to, flags);
}
