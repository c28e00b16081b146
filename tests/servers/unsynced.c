/* What would be left after a power cut? A library for LD_PRELOAD that keeps, of one folder, what was synced.
 *
 * `kill -9` loses nothing that was written: the kernel has it. A power cut loses what nobody synced. This library follows
 * fsync and fdatasync of everything in the folder UNSYNCED_FOLDER. Below UNSYNCED_IMAGES
 *
 *   content/ID   is what a file held when it was last synced; ID is its inode and the time of its birth
 *   tree/PATH    is a hard link to the content of the file that was durably called so
 *
 * so that `tree` is the folder as a power cut would leave it. A file that is synced is durable under its name, as ext4,
 * XFS and btrfs have it; any other change of names (renamed, removed, made and never synced) is durable when its folder is
 * synced. Nothing else makes durable: not sync, syncfs, msync or sync_file_range, nor files opened with O_SYNC.
 *
 * An image is changed in place, page by page, before the real call: what is cut short in it, is cut short as on a disk.
 * A file is read by the descriptor that it is synced by: closing another one would give up the locks that the process has
 * on it. Only one that cannot be read is opened once more.
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 64 };

static void fail(const char *what, const char *path)
{
    /* An image that is not true proves nothing. */
    dprintf(2, "unsynced: %s %s: %s\n", what, path, strerror(errno));
    abort();
}

static void join(char *buffer, const char *folder, const char *name)
{
    if (snprintf(buffer, PATH_MAX, "%s/%s", folder, name) >= PATH_MAX)
        fail("too long", name);
}

static void name_of(char *buffer, const char *images, const char *part, const char *rest)
{
    if (snprintf(buffer, PATH_MAX, "%s/%s/%s", images, part, rest) >= PATH_MAX)
        fail("too long", rest);
}

/* Write the ID of a file. False where there is none of that name. */
static int identify(int folder, const char *name, int flags, char *id, struct statx *found)
{
    if (statx(folder, name, flags | AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS | STATX_BTIME, found) != 0)
        return 0;
    snprintf(id, 64, "%llx-%llx-%x", (unsigned long long)found->stx_ino, (unsigned long long)found->stx_btime.tv_sec,
             found->stx_btime.tv_nsec);
    return 1;
}

/* Make `to` the same as `from`, page by page, where they differ. */
static void copy(int from, int to, const char *path)
{
    static __thread char new[PAGES * PAGE], old[PAGES * PAGE];
    struct stat before;
    off_t at = 0;
    if (fstat(to, &before) != 0)
        fail("cannot look at", path);
    for (ssize_t got; (got = pread(from, new, sizeof new, at)) != 0; at += got) {
        if (got < 0)
            fail("cannot read", path);
        ssize_t had = at < before.st_size ? pread(to, old, got, at) : 0, first = 0, page = 0;
        for (; first < got; first = page) {
            /* From one page that is the same to the next one. */
            for (; page < got; page += PAGE) {
                ssize_t size = got - page < PAGE ? got - page : PAGE;
                if (had >= page + size && memcmp(new + page, old + page, size) == 0)
                    break;
            }
            ssize_t last = page < got ? page : got;
            if (last > first && pwrite(to, new + first, last - first, at + first) != last - first)
                fail("cannot write", path);
            page += PAGE;
        }
    }
    if (before.st_size > at && ftruncate(to, at) != 0)
        fail("cannot cut", path);
}

/* Make `tree/rest` a name of `content/id`, which must be there. */
static void link_image(const char *images, const char *rest, const char *id)
{
    char tree[PATH_MAX], content[PATH_MAX], beside[PATH_MAX];
    struct stat at_tree, at_content;
    name_of(tree, images, "tree", rest);
    name_of(content, images, "content", id);
    if (stat(content, &at_content) != 0)
        fail("no content of", rest);
    if (stat(tree, &at_tree) == 0) {
        if (at_tree.st_ino == at_content.st_ino)
            return;
        name_of(beside, images, "", "beside");
        unlink(beside);
        if (link(content, beside) != 0 || rename(beside, tree) != 0)
            fail("cannot rename", tree);
    } else if (link(content, tree) != 0) {
        fail("cannot link", tree);
    }
}

static void make_parents(const char *images, const char *rest)
{
    char path[PATH_MAX];
    name_of(path, images, "tree", rest);
    for (char *at = path + strlen(images) + sizeof "/tree"; (at = strchr(at, '/')) != NULL; at++) {
        *at = 0;
        if (mkdir(path, 0777) != 0 && errno != EEXIST)
            fail("cannot make", path);
        *at = '/';
    }
}

static int open_image(const char *images, const char *id)
{
    char content[PATH_MAX];
    name_of(content, images, "content", id);
    int image = open(content, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (image < 0)
        fail("cannot open", content);
    return image;
}

static void save_file(int file, const char *images, const char *rest, const char *id)
{
    int from = file, image = open_image(images, id);
    if ((fcntl(file, F_GETFL) & O_ACCMODE) == O_WRONLY) {
        char path[64];
        snprintf(path, sizeof path, "/proc/self/fd/%d", file);
        from = open(path, O_RDONLY | O_CLOEXEC);
    }
    copy(from, image, rest);
    if (from != file)
        close(from);
    close(image);
    make_parents(images, rest);
    link_image(images, rest, id);
}

static void remove_image(const char *path)
{
    if (unlink(path) == 0 || errno == ENOENT)
        return;
    DIR *folder = opendir(path);
    if (folder == NULL)
        fail("cannot remove", path);
    for (struct dirent *one; (one = readdir(folder)) != NULL;) {
        char below[PATH_MAX];
        if (strcmp(one->d_name, ".") == 0 || strcmp(one->d_name, "..") == 0)
            continue;
        join(below, path, one->d_name);
        remove_image(below);
    }
    closedir(folder);
    rmdir(path);
}

/* Make the names in a folder durable; `contents` too, of all that is in it. */
static void save_folder(const char *path, const char *images, const char *rest, int contents)
{
    char tree[PATH_MAX], below[PATH_MAX], id[64];
    struct statx found;
    name_of(tree, images, "tree", rest);
    make_parents(images, rest);
    if (mkdir(tree, 0777) != 0 && errno != EEXIST)
        fail("cannot make", tree);
    DIR *folder = opendir(tree);
    if (folder == NULL)
        fail("cannot list", tree);
    for (struct dirent *one; (one = readdir(folder)) != NULL;) {
        join(below, path, one->d_name);
        if (faccessat(AT_FDCWD, below, F_OK, AT_SYMLINK_NOFOLLOW) != 0) {
            join(below, tree, one->d_name);
            remove_image(below);
        }
    }
    closedir(folder);
    folder = opendir(path);
    if (folder == NULL)
        fail("cannot list", path);
    for (struct dirent *one; (one = readdir(folder)) != NULL;) {
        if (strcmp(one->d_name, ".") == 0 || strcmp(one->d_name, "..") == 0)
            continue;
        if (*rest)
            join(below, rest, one->d_name);
        else
            strcpy(below, one->d_name);
        if (!identify(dirfd(folder), one->d_name, 0, id, &found))
            continue; /* it went meanwhile */
        if (S_ISDIR(found.stx_mode)) {
            char inner[PATH_MAX];
            join(inner, path, one->d_name);
            if (contents) {
                save_folder(inner, images, below, contents);
            } else {
                name_of(inner, images, "tree", below);
                if (mkdir(inner, 0777) != 0 && errno != EEXIST)
                    fail("cannot make", inner);
            }
        } else if (S_ISREG(found.stx_mode)) {
            if (contents) {
                int file = openat(dirfd(folder), one->d_name, O_RDONLY | O_CLOEXEC);
                if (file < 0)
                    fail("cannot open", below);
                save_file(file, images, below, id);
                close(file);
            } else {
                /* Of what was never synced there is a name and no content. */
                close(open_image(images, id));
                link_image(images, below, id);
            }
        }
    }
    closedir(folder);
}

static int take_turn(const char *images)
{
    char path[PATH_MAX];
    name_of(path, images, "", "turn");
    int turn = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (turn < 0 || flock(turn, LOCK_EX) != 0)
        fail("cannot lock", path);
    return turn;
}

static void save(int file)
{
    const char *root = getenv("UNSYNCED_FOLDER"), *images = getenv("UNSYNCED_IMAGES");
    char link[64], path[PATH_MAX], id[64];
    struct statx found;
    if (root == NULL || images == NULL)
        return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return;
    path[length] = 0;
    size_t above = strlen(root);
    if (strncmp(path, root, above) != 0 || (path[above] != '/' && path[above] != 0))
        return;
    if (!identify(file, "", AT_EMPTY_PATH, id, &found) || found.stx_nlink == 0)
        return;
    const char *rest = path[above] ? path + above + 1 : "";
    int before = umask(0), turn = take_turn(images);
    if (S_ISDIR(found.stx_mode))
        save_folder(path, images, rest, 0);
    else if (S_ISREG(found.stx_mode))
        save_file(file, images, rest, id);
    close(turn);
    umask(before);
}

int fsync(int file)
{
    static int (*real)(int);
    int error = errno;
    if (real == NULL)
        real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    save(file);
    errno = error;
    return real(file);
}

int fdatasync(int file)
{
    static int (*real)(int);
    int error = errno;
    if (real == NULL)
        real = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    save(file);
    errno = error;
    return real(file);
}

/* For who prepares: all of the folder is durable as it is. */
void unsynced_settle(const char *root, const char *images)
{
    int before = umask(0);
    save_folder(root, images, "", 1);
    umask(before);
}

/* For who compares: the ID of a file, into 64 bytes; empty where there is none. */
void unsynced_identify(const char *path, char *id)
{
    struct statx found;
    *id = 0;
    identify(AT_FDCWD, path, 0, id, &found);
}
