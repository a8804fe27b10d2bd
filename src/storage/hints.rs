//! What a file system can be told about a new file before anything is in it. These are hints: where a file system knows
//! nothing of them, nothing happens.

use std::os::fd::RawFd;

/// The kernel's `struct fsxattr` (`linux/fs.h`).
#[repr(C)]
#[derive(Default)]
struct FsXAttr {
    xflags: u32,
    extent_bytes: u32,
    extents: u32,
    project: u32,
    cow_extent_bytes: u32,
    unused: [u8; 8],
}

const GET_XATTR: libc::Ioctl = libc::_IOR::<FsXAttr>(b'X' as u32, 31);
const SET_XATTR: libc::Ioctl = libc::_IOW::<FsXAttr>(b'X' as u32, 32);
/// `FS_XFLAG_EXTSIZE`: the extent size is set.
const HAS_EXTENT_SIZE: u32 = 0x800;
/// `FS_NOCOW_FL`.
const NO_COW: libc::c_long = 0x0080_0000;

/// Asks for blocks that are overwritten in place (btrfs): an image's random writes fragment it badly otherwise. Returns
/// whether the file system has agreed.
pub fn no_copy_on_write(fd: RawFd) -> bool {
    let mut flags: libc::c_long = 0;
    // SAFETY: whatever the descriptor is, the kernel reads and writes at most a long there.
    unsafe {
        libc::ioctl(fd, libc::FS_IOC_GETFLAGS, &raw mut flags) == 0 && {
            flags |= NO_COW;
            libc::ioctl(fd, libc::FS_IOC_SETFLAGS, &raw const flags) == 0
        }
    }
}

/// Asks for extents of at least so many bytes (XFS). Returns whether the file system has agreed.
pub fn extent_size(fd: RawFd, bytes: u32) -> bool {
    let mut attributes = FsXAttr::default();
    // SAFETY: whatever the descriptor is, the structure is the one that these calls read and write.
    unsafe {
        libc::ioctl(fd, GET_XATTR, &raw mut attributes) == 0 && {
            attributes.xflags |= HAS_EXTENT_SIZE;
            attributes.extent_bytes = bytes;
            libc::ioctl(fd, SET_XATTR, &raw const attributes) == 0
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use super::*;

    /// Whatever the file system says to them, hints do no harm to the file.
    #[test]
    fn hints_leave_the_file_as_it_is() {
        assert_eq!(size_of::<FsXAttr>(), 28);
        let path = std::env::temp_dir().join(format!("libqcow2-hints-{}", std::process::id()));
        let file = File::create_new(&path).unwrap();
        for _ in 0..2 {
            let agreed = (no_copy_on_write(file.as_raw_fd()), extent_size(file.as_raw_fd(), 1 << 20));
            println!("the file system agrees: {agreed:?}");
        }
        std::fs::write(&path, b"content").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"content");
        assert!(!no_copy_on_write(-1) && !extent_size(-1, 1));
        std::fs::remove_file(&path).unwrap();
    }
}
