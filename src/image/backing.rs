//! Opening files by name: the image itself, and backing and external data files as far as the caller's policy allows.
//! Names in images are hostile until proven otherwise.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::options::BackingPolicy;
use crate::error::{Error, IoOp, Result};
use crate::storage::Storage;
use crate::storage::file::FileStorage;

const DENIED: &str = "set option 'backing' to 'relative' or 'any', give a resolver, or pass the storage yourself";
const DATA_FILE_DENIED: &str = "set option 'backing', which covers external data files too, to 'relative' or 'any', or \
     option 'data_file' to a path of your own, give a resolver, or pass the storage yourself";
const NO_FOLDER: &str =
    "the image was not opened by path, so relative names lead nowhere; give a resolver or the storage";
const NOT_BELOW: &str = "it leads out of the image's folder; set option 'backing' to 'any' if it is to be trusted";
const NO_OPENAT2: &str = "this system (a kernel before Linux 5.6, or a seccomp filter) refuses openat2, without which \
     names cannot be held below the image's folder; give a resolver or the storage";
const NOT_A_PATH: &str = "names with a protocol or 'json:' are not followed; give a resolver or the storage";

/// Opens a regular file or block device. A FIFO or device of another kind neither hangs nor passes.
pub fn open_file(path: &Path, writable: bool) -> Result<FileStorage> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(writable).custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK);
    let file = options.open(path).map_err(|e| Error::open(path, &e))?;
    accept_kind(file, path)
}

fn accept_kind(file: File, path: &Path) -> Result<FileStorage> {
    let kind = file.metadata().map_err(|e| Error::open(path, &e))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let path = path.display().to_string();
        return Err(Error::Path { path, why: "is neither a regular file nor a block device" });
    }
    Ok(FileStorage::cached(file))
}

/// Where the names in an image start from, as the chain is walked down.
pub struct Folder {
    root: Option<PathBuf>, // folder of the image that was opened
    below: PathBuf,        // from there to the folder of the file whose references are being followed
}

impl Folder {
    /// Folder of a path.
    pub fn of(path: &Path) -> Self {
        let root = match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
            Some(parent) => parent.to_path_buf(),
            None => PathBuf::from("/"),
        };
        Self { root: Some(root), below: PathBuf::new() }
    }

    /// An image that was not opened by path.
    pub fn nowhere() -> Self {
        Self { root: None, below: PathBuf::new() }
    }

    /// Opens a backing file for reading, and moves on to its folder.
    pub fn open_backing(&mut self, name: &str, policy: BackingPolicy) -> Result<Arc<dyn Storage>> {
        let denied = |hint| Error::BackingDenied { name: name.to_owned(), hint };
        if policy == BackingPolicy::Deny {
            return Err(denied(DENIED));
        }
        let (storage, path) = self.open(name, policy, false, denied)?;
        self.below = path.parent().map(Path::to_path_buf).unwrap_or_default();
        Ok(Arc::new(storage))
    }

    /// Opens the external data file of the image in this folder.
    pub fn open_data_file(&self, name: &str, policy: BackingPolicy, writable: bool) -> Result<Arc<dyn Storage>> {
        let denied = |hint| Error::DataFileDenied { name: name.to_owned(), hint };
        if policy == BackingPolicy::Deny {
            return Err(denied(DATA_FILE_DENIED));
        }
        Ok(Arc::new(self.open(name, policy, writable, denied)?.0))
    }

    fn open(
        &self,
        name: &str,
        policy: BackingPolicy,
        writable: bool,
        denied: impl Fn(&'static str) -> Error,
    ) -> Result<(FileStorage, PathBuf)> {
        if has_protocol(name) {
            return Err(denied(NOT_A_PATH));
        }
        let path = self.below.join(name);
        let storage = match (policy, &self.root) {
            (BackingPolicy::Relative, None) => return Err(denied(NO_FOLDER)),
            (BackingPolicy::Relative, Some(root)) => {
                if path.components().any(|c| matches!(c, Component::RootDir)) {
                    return Err(denied(NOT_BELOW));
                }
                open_beneath(root, &path, writable).map_err(|e| hint_for(&e).map_or(e, denied))?
            }
            (_, None) if path.is_relative() => return Err(denied(NO_FOLDER)),
            (_, None) => open_file(&path, writable)?,
            (_, Some(root)) => open_file(&root.join(&path), writable)?,
        };
        Ok((storage, path))
    }
}

/// What to say of a refusal by the kernel, beyond its error number.
fn hint_for(error: &Error) -> Option<&'static str> {
    match error {
        Error::Io { op: IoOp::Open, errno: libc::EXDEV | libc::ELOOP, .. } => Some(NOT_BELOW),
        // Opening for reading gives neither of itself; seccomp filters give one or the other.
        Error::Io { op: IoOp::Open, errno: libc::ENOSYS | libc::EPERM, .. } => Some(NO_OPENAT2),
        _ => None,
    }
}

/// `json:` and `nbd:` are such names, `./a:b` is not: a colon before the first slash.
fn has_protocol(name: &str) -> bool {
    name.find([':', '/']).is_some_and(|at| name.as_bytes()[at] == b':')
}

/// Opens a file below a folder; the kernel refuses every way out of it, links included.
fn open_beneath(root: &Path, path: &Path, writable: bool) -> Result<FileStorage> {
    let failed = |e: &io::Error| Error::io(IoOp::Open, 0, e);
    let mut options = std::fs::OpenOptions::new();
    options.read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC);
    let folder = options.open(root).map_err(|e| failed(&e))?;
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::Path { path: path.display().to_string(), why: "contains a zero byte" })?;
    // SAFETY: all-zero is a valid open_how.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    let access = if writable { libc::O_RDWR } else { libc::O_RDONLY };
    how.flags = (access | libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: valid descriptor, NUL-terminated name, and a struct of the size that is passed.
    let fd = unsafe {
        libc::syscall(libc::SYS_openat2, folder.as_raw_fd(), name.as_ptr(), &raw const how, size_of_val(&how))
    };
    if fd < 0 {
        return Err(failed(&io::Error::last_os_error()));
    }
    // SAFETY: the call above returned a descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    accept_kind(File::from(fd), path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_by_the_kernel_is_explained() {
        let hint = |errno| hint_for(&Error::Io { op: IoOp::Open, offset: 0, errno });
        for (errno, part) in [
            (libc::EXDEV, "leads out of"),
            (libc::ELOOP, "leads out of"),
            (libc::ENOSYS, "openat2"),
            (libc::EPERM, "openat2"),
        ] {
            let hint = hint(errno).unwrap();
            let text = Error::BackingDenied { name: "base.raw".to_owned(), hint }.to_string();
            assert!(text.contains("base.raw") && text.contains(part), "{text}");
        }
        assert_eq!((hint(libc::ENOENT), hint(libc::EACCES)), (None, None), "the number says it all");
        assert_eq!(hint_for(&Error::ReadOnly), None);
    }

    #[test]
    fn protocols_are_told_from_paths() {
        for name in ["json:{}", "nbd://host/x", "fat:rw:/tmp", "file:a", ":x"] {
            assert!(has_protocol(name), "{name}");
        }
        for name in ["a", "./a:b", "/a:b", "dir/nbd:x", ""] {
            assert!(!has_protocol(name), "{name}");
        }
    }
}
